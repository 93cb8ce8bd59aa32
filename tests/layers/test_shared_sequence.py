"""Blocks that read a history once for all of its rows, against the same blocks on one history per row."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mos_cases import spread
from oracles import ragged
from torch import Tensor, nn

from model_zoo.backbones.gru4rec import GRU4RecBlock
from model_zoo.backbones.sdim import SDIMBlock
from model_zoo.backbones.transact import TransActBlock
from model_zoo.backbones.twin import TwinBlock
from model_zoo.layers import attend_items
from model_zoo.layers.attend_items import best_scored, grouped_histories
from model_zoo.layers.blocks import call_block
from model_zoo.layers.mos import MoS
from model_zoo.layers.sequence import Sequence, SharedSequence
from model_zoo.layers.target_attention import TargetAttention

DIM = 6
# float64: sums of at most some hundred terms of order one in another order
EXACT = {"rtol": 1e-9, "atol": 1e-9}
SETTINGS = settings(derandomize=True, deadline=None, max_examples=20)


def twin(wrap: Any = None, **options: Any) -> nn.Module:
    return TwinBlock(DIM, wrap, **{"attention_dim": 4, "num_heads": 2, "short_seq_len": 4, "topk": 3, **options})


def sdim(wrap: Any = None, **options: Any) -> nn.Module:
    return SDIMBlock(DIM, wrap, **{"attention_dim": 4, "short_seq_len": 4, "num_hashes": 3, "hash_bits": 2, **options})


def transact(**options: Any) -> nn.Module:
    return TransActBlock(DIM, **{"concat_max_pool": False, "dim_feedforward": 5, "num_heads": 2, **options})


def mos(block: Any = twin, **options: Any) -> MoS:
    defaults = {"n_item_experts": 3, "n_window_experts": 2, "codebook_dim": 4, "window_size": 4, "window_stride": 2}
    return MoS(block, DIM, **{**defaults, "router_bias": True, **options})


def inside(block: Any) -> nn.Module:
    """A block whose long branch alone is a mixture."""
    return block(lambda long_branch: mos(long_branch))


BLOCKS: dict[str, Any] = {
    "attention": lambda: TargetAttention(DIM, 4, 2),
    "attention without projections": lambda: TargetAttention(DIM, DIM, 2, topk=2, use_qkvo=False),
    "TWIN": twin,
    "TWIN, one head": lambda: twin(num_heads=1, topk=1),
    "SDIM": sdim,
    "SDIM of directions": lambda: sdim(l2_norm=True),
    "SDIM, many buckets": lambda: sdim(num_hashes=40, hash_bits=5),
    "TransAct": transact,
    "TransAct, two columns": lambda: transact(first_k_cols=2, num_heads=1),
    "TransAct, max-pool": lambda: transact(concat_max_pool=True),
    "GRU4Rec": lambda: GRU4RecBlock(DIM, hidden_dim=4),
    "MoS": mos,
    "MoS, several themes": lambda: mos(topk_item=2, topk_window=2, gate_norm="softmax_then_mask", shared_router=True),
    "MoS, target gates": lambda: mos(gate_source="target", topk_item=2, window_align="left"),
    "MoS, target in the router": lambda: mos(router_input="item_target"),
    "MoS without global expert": lambda: mos(alpha_item=0.5, alpha_window=0.5, short_history="skip"),
    "MoS, zeros for empty": lambda: mos(empty_history="zeros", n_window_experts=0, window_divide_by="size"),
    "MoS of SDIM": lambda: mos(sdim),
    "MoS of TransAct": lambda: mos(transact),
    "MoS of GRU4Rec": lambda: mos(lambda: GRU4RecBlock(DIM, hidden_dim=4)),
    "MoS inside TWIN": lambda: inside(twin),
    "MoS inside SDIM": lambda: inside(sdim),
}


def made(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(0)
    return spread(BLOCKS[name](), seed).double().eval()


@st.composite
def batches(draw: Any) -> tuple[Tensor, SharedSequence]:
    """Histories of 0 to 11 items, some of no row, and rows that read them in any order."""
    lengths = draw(st.lists(st.integers(0, 11), min_size=1, max_size=5))
    owner = draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=12))
    seed = draw(st.integers(0, 999))
    histories = ragged(lengths, DIM, seed, padding=draw(st.integers(0, 2)))
    query = torch.randn(len(owner), DIM, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.double)
    return query, SharedSequence(histories, torch.tensor(owner))


@pytest.mark.parametrize("name", BLOCKS)
@settings(SETTINGS, max_examples=8)
@given(batch=batches(), floats=st.sampled_from([1, 150, 10**6]))
def test_equals_one_history_per_row(name: str, batch: tuple[Tensor, SharedSequence], floats: int) -> None:
    query, shared = batch
    block = made(name)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(attend_items, "GATHERED_FLOATS", floats)
        torch.testing.assert_close(call_block(block, query, shared), block(query, shared.expanded()), **EXACT)


@pytest.mark.parametrize("name", ["attention", "TWIN", "SDIM", "SDIM of directions", "MoS of SDIM", "MoS inside TWIN"])
@pytest.mark.parametrize("rows", [2, 80])
def test_long_histories_of_many_rows_are_never_expanded(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    histories = ragged([90, 61], DIM, 3, num_items=70)
    owner = torch.arange(rows) % 2
    query = torch.randn(rows, DIM, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    shared = SharedSequence(histories, owner)
    block = made(name)
    with torch.no_grad():
        wanted = block(query, shared.expanded())
        monkeypatch.setattr(SharedSequence, "expanded", lambda self: pytest.fail("expanded"))
        torch.testing.assert_close(call_block(block, query, shared), wanted, **EXACT)


def test_training_and_gradients_get_one_history_per_row() -> None:
    class Seen(nn.Module):
        shares = True

        def forward(self, query: Tensor, sequence: Any) -> Any:
            return type(sequence)

    shared, block = SharedSequence(ragged([3], DIM), torch.zeros(2, dtype=torch.long)), Seen()
    assert call_block(block.eval(), torch.zeros(2, DIM), shared) is Sequence  # gradients are on
    with torch.no_grad():
        assert call_block(block, torch.zeros(2, DIM), shared) is SharedSequence
        assert call_block(block.train(), torch.zeros(2, DIM), shared) is Sequence
        block.shares = False
        assert call_block(block.eval(), torch.zeros(2, DIM), shared) is Sequence


@SETTINGS
@given(batch=batches(), data=st.data())
def test_parts_are_the_parts_of_the_expanded_batch(batch: tuple[Tensor, SharedSequence], data: Any) -> None:
    _, shared = batch
    plain = shared.expanded()
    rows = torch.tensor(data.draw(st.lists(st.integers(0, len(shared.owner) - 1), max_size=6)), dtype=torch.long)
    keep = torch.rand(shared.histories.mask.shape, generator=torch.Generator().manual_seed(len(rows))) < 0.5
    pairs = [
        (shared.last(2).expanded(), plain.last(2)),
        (shared.select(rows).expanded(), plain.select(rows)),
        (shared.select_kept(rows, keep).expanded(), plain.select_kept(rows, keep[shared.owner])),
    ]
    for found, wanted in pairs:
        assert torch.equal(found.mask, wanted.mask) and torch.equal(found.index[found.mask], wanted.index[wanted.mask])
    assert torch.equal(shared.lengths, plain.lengths)
    assert len(shared.select(rows).histories.index) == len(set(shared.owner[rows].tolist()))


@SETTINGS
@given(batch=batches(), floats=st.sampled_from([1, 200, 10**6]))
def test_groups_hold_each_row_once_beside_its_history(batch: tuple[Tensor, SharedSequence], floats: int) -> None:
    _, shared = batch
    if shared.histories.index.shape[1] == 0:
        return
    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attend_items, "GATHERED_FLOATS", floats)
        for group in grouped_histories(shared):
            filled = torch.ones_like(group.slots, dtype=torch.bool) if group.filled is None else group.filled
            assert torch.equal(group.unpad(group.history.unsqueeze(1).expand_as(group.slots)), shared.owner[group.rows])
            assert torch.equal(group.vectors, shared.histories.vectors[group.history])
            assert 2 * filled.sum() >= filled.numel()
            seen += group.rows.tolist()
    assert sorted(seen) == list(range(len(shared.owner)))


@SETTINGS
@given(length=st.integers(1, 400), topk=st.integers(1, 30), levels=st.sampled_from([3, 10**6]), seed=st.integers(0, 99))
def test_best_scored_are_the_top_k(length: int, topk: int, levels: int, seed: int) -> None:
    topk = min(topk, length)
    scores = torch.randint(levels, (2, 3, length), generator=torch.Generator().manual_seed(seed)).double()
    best, column = best_scored(scores, topk)
    assert torch.equal(best.sort(-1).values, scores.topk(topk, sorted=True).values.flip(-1))
    assert torch.equal(scores.gather(-1, column), best)
    assert all(len(set(row)) == topk for row in column.view(-1, topk).tolist())
