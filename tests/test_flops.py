"""Counted operations against products written out by hand, and the paper's accounting against routers' own reports."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import masked_attention
from torch import nn

from model_zoo.backbones.mamba4rec import Mamba4RecBlock
from model_zoo.backbones.sdim import SDIMBlock
from model_zoo.backbones.sim import SIMBlock
from model_zoo.backbones.transact import TransActBlock
from model_zoo.backbones.twin import TwinBlock
from model_zoo.batch import Batch
from model_zoo.experiment.flops import RoutedBatch, RoutedBranch, block_flops, route
from model_zoo.experiment.flops_counter import FlopCounter, Flops
from model_zoo.experiment.flops_formula import analytic_flops, block_cost
from model_zoo.experiment.run import build_model, make_loaders
from model_zoo.layers.attend_items import attend_items
from model_zoo.layers.attend_rows import RowReads, attend_rows
from model_zoo.layers.selective_scan import selective_scan_last
from model_zoo.layers.sequence import Sequence
from model_zoo.layers.target_attention import TargetAttention
from model_zoo.pipeline.dataset import load_dataset
from model_zoo.pipeline.feature_map import build_feature_map
from model_zoo.sequential_ctr import SequentialCTR
from model_zoo.three_phase import ThreePhaseCTR

R, H, K, D = 3, 2, 7, 5
RIVALS = ("GShard", "DSelectK", "ExpertChoice")


def count(run: Callable[[], Any]) -> Flops:
    with FlopCounter() as counter:
        run()
    return counter.flops


def test_matrix_products_and_other_arithmetic_are_told_apart() -> None:
    layer, x = nn.Linear(4, 3), torch.randn(6, 4)
    assert count(lambda: layer(x)) == Flops(products=2 * 6 * 4 * 3)
    assert count(lambda: torch.einsum("bd,ed->be", x, layer.weight)) == Flops(products=2 * 6 * 4 * 3)
    assert count(lambda: x @ torch.ones(4)) == Flops(products=2 * 24)
    assert count(lambda: (x * x + 1).sigmoid()) == Flops(other=3 * 24)
    assert count(lambda: torch.addcmul(x, x, x)) == Flops(other=2 * 24)
    assert count(lambda: x.softmax(-1)) == Flops(other=4 * 24)
    assert count(lambda: x.sum(1)) == Flops(other=24)
    assert count(lambda: torch.zeros(2, 4).index_add_(0, torch.zeros(6, dtype=torch.long), x)) == Flops(other=24)
    assert count(lambda: (x.T.contiguous(), x.long() * 2 + 1, x > 0, x[:2], torch.cat([x, x]))) == Flops()


def test_backward_passes_are_counted() -> None:
    layer, x = nn.Linear(4, 3), torch.randn(6, 4, requires_grad=True)
    both = count(lambda: layer(x).sum().backward())
    assert both.products == 3 * 2 * 6 * 4 * 3


@pytest.mark.parametrize("weighted", [False, True])
def test_embedding_bags(weighted: bool) -> None:
    table, index = torch.randn(9, D, requires_grad=True), torch.randint(9, (R, K))
    weight = torch.rand(R, K, requires_grad=True) if weighted else None
    run = lambda: F.embedding_bag(index, table, mode="sum", per_sample_weights=weight)  # noqa: E731
    assert count(run) == Flops(other=(2 if weighted else 1) * R * K * D)
    out = run()
    backward = count(lambda: out.backward(torch.ones_like(out)))
    assert backward.other == (4 if weighted else 1) * R * K * D


def test_item_attention_counts_scores_and_pooling() -> None:
    query, items = torch.randn(R, H, D, requires_grad=True), torch.randn(9, D, requires_grad=True)
    index, mask = torch.randint(9, (R, K)), torch.ones(R, K, dtype=torch.bool)
    with FlopCounter() as forward:
        pooled = attend_items(query, items, index, mask)
    assert forward.flops.products == 4 * R * H * K * D
    # scores of the gradient, the queries' gradient, and both terms of the items'
    assert count(lambda: pooled.sum().backward()).products == 8 * R * H * K * D


@pytest.mark.parametrize("real", [R * K, R])
def test_row_attention_counts_the_rows_read(real: int) -> None:
    """Scores are products; pooling is a weighted bag, the gradient of items two."""
    query, items = torch.randn(R, D, requires_grad=True), torch.randn(9, D, requires_grad=True)
    index, mask = torch.randint(9, (R, K)), torch.zeros(R, K, dtype=torch.bool)
    mask[:, : real // R] = True
    with FlopCounter() as forward:
        (pooled,) = attend_rows([query], [RowReads(index, mask)], items)
    softmax = (4 + 1) * R * K  # and the product with the mask
    assert forward.flops == Flops(products=2 * real * D, other=softmax + 2 * real * D)
    backward = count(lambda: pooled.backward(torch.ones_like(pooled)))
    d_scores = (2 + 1 + 1) * R * K  # its two products, sum, difference
    assert backward == Flops(products=2 * real * D, other=d_scores + (2 + 4) * real * D)


def test_scan_of_the_newest_position() -> None:
    states, channels = 6, D
    u, delta, z = torch.randn(R, K, channels), torch.randn(R, K, channels), torch.randn(R, channels)
    A, B, C = -torch.rand(channels, states), torch.randn(R, K, states), torch.randn(R, states)
    vector = torch.ones(channels)
    run = count(lambda: selective_scan_last(u, delta, A, B, C, vector, z, vector, kernel="torch"))
    # a step: Delta A, exp, decay of the state, multiply-add; before it bias, softplus, Delta u
    steps = 5 * R * K * channels * states + 3 * R * K * channels
    read = 2 * R * channels * states + 4 * R * channels  # C h and its sum; D u, sum, SiLU, gate
    assert run == Flops(other=steps + read)


# ---- models --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def build(tiny_params: Callable[..., dict[str, Any]]) -> Callable[..., tuple[SequentialCTR, Batch]]:
    """``build(model, **changes)``: a model on the tiny data set and a training batch."""
    found: dict[str, Any] = {}

    def make(name: str, **changes: Any) -> tuple[SequentialCTR, Batch]:
        params = tiny_params("MoS_TWIN_tiny" if name.startswith("MoS") else "TWIN_tiny", model=name, **changes)
        if not found:
            found["map"] = build_feature_map(params)
            found["data"] = load_dataset(found["map"], params)
        model = build_model(params, found["map"], found["data"])
        batch = next(iter(make_loaders(found["data"], {**params, "batch_size": 64})["train"]))
        return model, batch

    return make


def in_phase(model: SequentialCTR, name: str) -> ThreePhaseCTR:
    assert isinstance(model, ThreePhaseCTR)
    model.enter(next(phase for phase in model.phases(1) if phase.name == name))
    return model


@pytest.mark.parametrize("name", ["TWIN", "MoS_TWIN", "GShard_TWIN"])
def test_parts_add_up_to_the_model(name: str, build: Callable[..., Any]) -> None:
    model, batch = build(name)
    report = block_flops(model, batch)
    model.eval()
    with torch.no_grad():
        whole = count(lambda: model(batch))
    parts = report.embedding.prediction + report.block.prediction + report.head.prediction
    assert report.rows == len(batch)
    assert whole == parts + Flops(other=len(batch))  # the sigmoid


@pytest.mark.parametrize("name", ["TWIN", "GShard_TWIN"])
def test_training_counts_forward_and_backward(name: str, build: Callable[..., Any]) -> None:
    own = {"second_expert_threshold": 0.0} if "GShard" in name else {}  # 0: nothing random in the routing
    model, batch = build(name, batch_norm=False, attention_dropout=0.0, **own)
    report = block_flops(model, batch)
    assert report.head.training.products == 3 * report.head.prediction.products
    model.train()
    with FlopCounter() as whole:
        output = model(batch)
        terms = [output["y_pred"], *output["losses"]]
        torch.autograd.backward(terms, [torch.ones_like(term) for term in terms])
    parts = report.embedding.training + report.block.training + report.head.training
    assert parts.products == whole.flops.products
    # sigmoid and its gradient, and the target's gradient met by both block and head, which is added outside of the parts
    assert abs(parts.other - whole.flops.other) <= 3 * len(batch) * (1 + model.item_dim)


def test_counting_leaves_no_trace(build: Callable[..., Any]) -> None:
    model, batch = build("MoS_TWIN", attention_dropout=0.5)
    in_phase(model, "phase3").eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    block_flops(model, batch)
    assert not model.training
    route(model.train(), batch)
    assert model.training
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(random, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_phases_cost_what_they_train(build: Callable[..., Any]) -> None:
    plain, batch = build("TWIN")
    model, _ = build("MoS_TWIN")
    phases = {name: block_flops(in_phase(model, name), batch) for name in ("phase1", "phase2", "phase3")}
    assert phases["phase1"].block == block_flops(plain, batch).block  # alphas are 0: the plain backbone
    assert phases["phase2"].embedding.training.total == phases["phase2"].embedding.prediction.total  # frozen
    assert phases["phase3"].embedding.training.total > phases["phase3"].embedding.prediction.total
    assert phases["phase3"].block.prediction.products > phases["phase2"].block.prediction.products  # the global expert
    assert phases["phase3"].block.training.products > phases["phase2"].block.training.products


@pytest.mark.parametrize("method", RIVALS)
def test_routed_lengths_of_rivals(method: str, build: Callable[..., Any]) -> None:
    model, batch = build(f"{method}_TWIN", n_experts=4, topk_experts=2)
    found = route(model, batch)
    assert [branch.name for branch in found.branches] == ["router"]
    branch, = found.branches
    layer, sequence = model.method_layers()[0], model._read(batch)[2]
    assert torch.equal(found.histories, sequence.lengths)
    model.eval()
    stats = layer.routing_stats(sequence)
    torch.testing.assert_close(branch.lengths.sum(0) / stats["rows"], torch.tensor(stats["routed_length"]))
    assert branch.serves.sum() / stats["rows"] == pytest.approx(stats["experts_per_row"])
    if method == "ExpertChoice":
        share = (2 * sequence.lengths / 4).ceil().clamp(min=1) * (sequence.lengths > 0)
        assert torch.equal(branch.lengths, share.long().unsqueeze(1).expand(-1, 4))


def test_routed_lengths_of_mos(build: Callable[..., Any]) -> None:
    model, batch = build("MoS_TWIN")
    items, windows = route(in_phase(model, "phase3"), batch).branches
    sequence = model._read(batch)[2]
    assert (items.name, windows.name) == ("item_router", "window_router")
    assert torch.equal(items.lengths.sum(1), 2 * sequence.lengths)  # every token is read by k = 2 experts
    assert torch.equal(windows.lengths.sum(1), 2 * model.mos.window_tokens(sequence).lengths)
    assert bool((items.lengths[items.serves] > 0).all())  # who serves has the newest token at least
    assert route(in_phase(model, "phase1"), batch).branches == []


def test_nobody_serves_an_empty_history(build: Callable[..., Any]) -> None:
    model, batch = build("MoS_TWIN")
    batch.history[3] = 0
    found = route(in_phase(model, "phase3"), batch)
    assert found.histories[3] == 0
    for branch in found.branches:
        assert not branch.serves[3].any() and not branch.lengths[3].any()
        assert bool(branch.serves.any(1)[found.histories > 0].all())


def test_the_papers_ratio() -> None:
    """Evenly routed, k and n the same for all, stride 4: 17/32 of a rival with twice k and n for quadratic blocks."""
    length, n, k, batch = 240, 5, 2, 3

    def branch(name: str, tokens: int, kept: int, experts: int) -> RoutedBranch:
        lengths = torch.full((batch, experts), kept * tokens // experts)
        serves = torch.arange(experts).expand(batch, -1) < kept
        return RoutedBranch(name, [nn.Identity()] * experts, lengths, serves)

    histories = torch.full((batch,), length)
    mos = RoutedBatch(nn.Identity(), histories, [branch("item", length, k, n), branch("window", length // 4, k, n)])
    rival = RoutedBatch(nn.Identity(), histories, [branch("rival", length, 2 * k, 2 * n)])
    squared = [analytic_flops(one, lambda block, t: t**2) for one in (mos, rival)]
    linear = [analytic_flops(one, lambda block, t: t) for one in (mos, rival)]
    assert squared[0].every_expert / squared[1].every_expert == pytest.approx(17 / 32)
    assert linear[0].every_expert / linear[1].every_expert == pytest.approx(5 / 8)
    assert squared[0].shared == squared[1].shared == batch * length**2
    assert squared[0].serving_experts / squared[0].every_expert == pytest.approx(k / n)


# ---- formulas of blocks --------------------------------------------------------------------------------------------------


def cost(block: nn.Module, length: int) -> int:
    return int(block_cost(block, torch.tensor([float(length)]))[0])


@pytest.mark.parametrize("topk", [None, 4])
def test_cost_of_target_attention(topk: int | None) -> None:
    layer = TargetAttention(D, 6, 2, topk=topk).double()
    projections = count(
        lambda: masked_attention(layer, torch.randn(1, D).double(), torch.randn(1, K, D).double(), torch.ones(1, K) > 0)
    ).products
    assert cost(layer, K) == projections + 2 * K * 6 + 2 * min(K, topk or K) * 6


def test_cost_of_twin_and_sdim() -> None:
    short, long = TargetAttention(D, 6), TargetAttention(D, 6, topk=4)
    assert cost(TwinBlock(D, attention_dim=6, short_seq_len=4, topk=4), K) == cost(short, 3) + cost(long, K)
    sdim = SDIMBlock(D, attention_dim=6, short_seq_len=4, num_hashes=3, hash_bits=2)
    hashing, pooling = 2 * (K + 1) * D * 6, 2 * K * D
    assert cost(sdim, K) == cost(short, 3) + hashing + pooling


@pytest.mark.parametrize(("layers", "pool"), [(1, False), (2, True)])
def test_cost_of_transact(layers: int, pool: bool) -> None:
    block = TransActBlock(D, transformer_layers=layers, dim_feedforward=12, concat_max_pool=pool)
    reference = nn.TransformerEncoderLayer(2 * D, 1, 12, 0.1, batch_first=True)
    with torch.no_grad():
        one = count(lambda: reference.train()(torch.randn(1, K, 2 * D))).products
    assert cost(block, K) == layers * one + pool * 2 * (2 * D) ** 2


def test_cost_of_mamba4rec() -> None:
    block = Mamba4RecBlock(8, num_layers=2, d_state=6).eval()
    tokens = Sequence.from_vectors(torch.randn(1, K, 8), torch.ones(1, K, dtype=torch.bool))
    layer = block.layers[0]
    products = count(lambda: layer(tokens)).products  # of the scan the read-out C h alone is a product
    channels, states = layer.mamba.A_log.shape
    assert cost(block, K) == 2 * (products + K * (2 * channels * 4 + 5 * channels * states))


def test_cost_of_empty_histories_and_unknown_blocks() -> None:
    for block in (TwinBlock(D), SDIMBlock(D), TransActBlock(D), Mamba4RecBlock(8)):
        spent = block_cost(block, torch.tensor([0.0, 1.0, 2.0]))
        assert spent[0] == 0 and spent[2] > spent[1] > 0
    with pytest.raises(ValueError, match="SIMBlock"):
        block_cost(SIMBlock(D), torch.ones(1))
