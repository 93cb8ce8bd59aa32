"""The TWIN block: both branches against their per-position forms, LongCTR's window, short and empty histories."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import attention, gradients, longctr_twin, masked_attention, mos, ragged, rows_of, twin
from torch import nn

from model_zoo.backbones.twin import TwinBlock
from model_zoo.errors import ConfigError
from model_zoo.layers.mos import MoS
from model_zoo.layers.sequence import Sequence
from model_zoo.layers.target_attention import TargetAttention

# float64 sums of at most a few dozen terms of order one, taken in another order
EXACT = {"rtol": 1e-10, "atol": 1e-10}
DIM = 6
LENGTHS = [12, 1, 0, 4, 7, 3]


def build(**options: Any) -> TwinBlock:
    torch.manual_seed(2)
    block = TwinBlock(DIM, **{"attention_dim": 8, "num_heads": 2, "short_seq_len": 5, "topk": 3, **options}).double()
    for weight in block.parameters():
        nn.init.normal_(weight)
    return block


def case(lengths=LENGTHS, seed: int = 0, padding: int = 0) -> tuple[torch.Tensor, Sequence]:
    generator = torch.Generator().manual_seed(seed + 1)
    query = torch.randn(len(lengths), DIM, generator=generator, dtype=torch.double).requires_grad_()
    return query, ragged(lengths, DIM, seed, padding=padding)


def assert_same(block: nn.Module, query, sequence, expected) -> None:
    """Output and the gradients of every parameter, of the items and of the targets."""
    output = block(query, sequence)
    torch.testing.assert_close(output, expected, **EXACT)
    leaves = [query, sequence.items, *block.parameters()]
    for got, want in zip(gradients(output, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(got, want, **EXACT)


def by_row(block: TwinBlock, query, sequence) -> torch.Tensor:
    rows = rows_of(sequence.vectors, sequence.mask)
    return torch.stack([twin(block, target, tokens) for target, tokens in zip(query, rows, strict=True)])


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("short_seq_len, topk", [(2, 1), (5, 3), (5, 12), (50, 50)])
def test_the_block_equals_a_loop_over_rows(heads, short_seq_len, topk):
    block = build(num_heads=heads, short_seq_len=short_seq_len, topk=topk)
    query, sequence = case(padding=2)
    assert_same(block, query, sequence, by_row(block, query, sequence))


def test_the_answer_is_short_then_long_of_twice_the_item_width():
    block = build()
    query, sequence = case()
    output = block(query, sequence)
    assert block.out_dim == 2 * DIM and output.shape == (6, 2 * DIM)
    vectors, mask = sequence.vectors, sequence.mask
    short = masked_attention(block.short_attention, query, vectors[:, -4:], mask[:, -4:])
    torch.testing.assert_close(output[:, :DIM], short, **EXACT)
    torch.testing.assert_close(output[:, DIM:], masked_attention(block.long_attention, query, vectors, mask), **EXACT)


def test_the_short_branch_reads_one_item_fewer_than_its_name_says():
    block = build(topk=1)
    vectors = torch.randn(1, 9, DIM, dtype=torch.double, requires_grad=True)
    output = block(torch.randn(1, DIM, dtype=torch.double), Sequence.from_vectors(vectors, torch.ones(1, 9)))
    (grad,) = gradients(output[:, :DIM], [vectors])
    assert grad[0].abs().sum(1).nonzero().flatten().tolist() == [5, 6, 7, 8]


def test_topk_of_the_history_or_more_equals_full_softmax_attention():
    query, sequence = case()
    full = TargetAttention(DIM, 8, 2).double()
    for topk in (12, 13, 1000):
        block = build(topk=topk)
        full.load_state_dict(block.long_attention.state_dict())
        torch.testing.assert_close(block(query, sequence)[:, DIM:], full(query, sequence), **EXACT)


@pytest.mark.parametrize("columns", [1, 3, 5])
def test_batches_shorter_than_both_branches_work(columns):
    block = build(short_seq_len=50, topk=50)
    query, sequence = case([columns, min(columns, 1)])
    assert_same(block, query, sequence, by_row(block, query, sequence))


def test_a_history_of_one_item_attends_to_that_item_in_both_branches():
    block = build()
    query, sequence = case([1, 9], padding=3)
    item = sequence.vectors[0, -1]
    want = torch.cat([branch.W_o(branch.W_v(item)) for branch in (block.short_attention, block.long_attention)])
    torch.testing.assert_close(block(query, sequence)[0], want, **EXACT)


def test_empty_histories_give_exact_zeros():
    block = build()
    query, sequence = case()
    empty = LENGTHS.index(0)
    assert torch.equal(block(query, sequence)[empty], torch.zeros(2 * DIM, dtype=torch.double))
    none = Sequence.from_vectors(torch.zeros(6, 0, DIM, dtype=torch.double), torch.zeros(6, 0))
    assert torch.equal(block(query, none), torch.zeros(6, 2 * DIM, dtype=torch.double))


# ---- LongCTR's window


def test_longctr_compat_equals_longctrs_slices():
    """Rows: full, full by one column less, padding inside the window, one item, no item; top-k keeps all columns."""
    block = build(longctr_compat=True, topk=8)
    query, sequence = case([8, 7, 3, 1, 0])
    assert_same(block, query, sequence, longctr_twin(block, query, sequence.vectors, sequence.mask))


def test_longctr_compat_truncates_to_topk_as_longctr_does():
    block = build(longctr_compat=True, topk=2)
    query, sequence = case([8, 7, 3, 2])
    assert_same(block, query, sequence, longctr_twin(block, query, sequence.vectors, sequence.mask))


def test_longctr_compat_masks_each_item_by_its_left_neighbour():
    """With L = 120 and S = 50: items 71..119 under the mask columns 70..118, so the oldest real item is dropped."""
    block = build(longctr_compat=True, short_seq_len=50, topk=120)
    vectors = torch.randn(2, 120, DIM, dtype=torch.double, requires_grad=True)
    mask = torch.arange(120) >= torch.tensor([[0], [100]])
    output = block(torch.randn(2, DIM, dtype=torch.double), Sequence.from_vectors(vectors, mask))
    (grad,) = gradients(output[:, :DIM], [vectors])
    read = [row.abs().sum(1).nonzero().flatten().tolist() for row in grad]
    assert read == [list(range(71, 120)), list(range(101, 120))]


def test_by_default_the_oldest_real_item_is_read():
    block = build(short_seq_len=50, topk=120)
    vectors = torch.randn(1, 120, DIM, dtype=torch.double, requires_grad=True)
    mask = torch.arange(120) >= torch.tensor([[100]])
    output = block(torch.randn(1, DIM, dtype=torch.double), Sequence.from_vectors(vectors, mask))
    (grad,) = gradients(output[:, :DIM], [vectors])
    assert grad[0].abs().sum(1).nonzero().flatten().tolist() == list(range(100, 120))


def test_longctr_compat_refuses_batches_that_longctr_cannot_run():
    block = build(longctr_compat=True, short_seq_len=5)
    query, sequence = case([4, 2])
    with pytest.raises(ConfigError, match="padded to 4 items when short_seq_len is 5; set longctr_compat: False"):
        block(query, sequence)
    assert block(*case([5, 2])).shape == (2, 2 * DIM)


# ---- in a mixture, and its settings


@pytest.mark.parametrize("topk", [1, 2])
def test_a_mixture_over_the_long_branch_alone_leaves_the_short_branch_as_it_is(topk):
    def wrap(make):
        return MoS(make, DIM, n_item_experts=3, n_window_experts=2, topk_item=topk, codebook_dim=4,
                   window_size=4, window_stride=2)  # fmt: skip

    torch.manual_seed(4)
    block = TwinBlock(DIM, wrap, attention_dim=8, short_seq_len=5, topk=3).double()
    assert isinstance(block.long_attention, MoS) and block.out_dim == 2 * DIM
    query, sequence = case(padding=1)
    rows = rows_of(sequence.vectors, sequence.mask)
    short = [attention(block.short_attention, q, tokens[-4:]) for q, tokens in zip(query, rows, strict=True)]
    expected = torch.cat([torch.stack(short), mos(block.long_attention, query, sequence.vectors, sequence.mask)], 1)
    assert_same(block, query, sequence, expected)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"short_seq_len": 1}, "short_seq_len must be at least 2, not 1"),
        ({"topk": 0}, "topk must be at least 1, not 0"),
        ({"Kc_cross_features": 2}, "Kc_cross_features must be 0"),
        ({"num_heads": 3}, "must be a multiple of num_heads"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    padding=st.integers(1, 6),
    topk=st.sampled_from([1, 3, 50]),
    seed=st.integers(0, 100),
)
def test_padding_row_order_and_batch_mates_do_not_matter(lengths, padding, topk, seed):
    block = build(topk=topk)
    query, plain = case(lengths, seed)
    columns = torch.zeros(len(lengths), padding, dtype=torch.long)
    padded = Sequence(plain.items, torch.cat([columns, plain.index], 1), torch.cat([columns.bool(), plain.mask], 1))
    output = block(query, plain)
    torch.testing.assert_close(block(query, padded), output, **EXACT)
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(block(query[order], plain.select(order)), output[order], **EXACT)
    alone = torch.cat([block(query[[b]], plain.select(torch.tensor([b]))) for b in range(len(lengths))])
    torch.testing.assert_close(alone, output, **EXACT)
