"""FuXi-alpha and FuXi-MME against weights written out pair by pair: outputs, gradients, reductions, causality, counts."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_files import small_model, tiny_loader
from oracles import gradients, ragged
from torch import Tensor, nn

from model_zoo.backbones.fuxi import FuXiBlock, FuXiMMEBlock
from model_zoo.errors import ConfigError
from model_zoo.layers.fuxi_layer import FuXiLayer, gap_buckets
from model_zoo.layers.sequence import Sequence
from model_zoo.layers.timed_sequence import timed
from model_zoo.layers.token_experts import TokenExperts

# float64 sums of a few dozen terms of order one, taken in another order, below norms
EXACT = {"rtol": 1e-8, "atol": 1e-10}
LENGTHS = [7, 3, 0, 1, 5]


def block_and_query(kind=FuXiMMEBlock, dim: int = 12, **options) -> tuple[FuXiMMEBlock, Tensor]:
    torch.manual_seed(3)
    block = kind(dim, **{"hidden_dropout": 0.0, "max_positions": 6, "num_heads": 1, **options}).double()
    for weight in block.parameters():
        nn.init.normal_(weight, std=0.5)
    return block, torch.randn(len(LENGTHS), dim, dtype=torch.double, requires_grad=True)


def with_times(sequence: Sequence) -> Sequence:
    """Gaps from a second to some years."""
    gaps = 3 ** (torch.arange(sequence.mask.numel()).view_as(sequence.mask) % 17)
    return timed(sequence, gaps.cumsum(1))


def norm(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def mixed(experts: TokenExperts, x: Tensor, read: Tensor) -> Tensor:
    """One token's answer, all experts computed."""
    if experts.gate is None:
        return experts.experts[0](x)
    logits = experts.gate.weight @ read
    kept = logits.topk(experts.topk)
    gates = kept.values.softmax(0) if experts.topk > 1 else logits.softmax(0)[kept.indices]
    return sum(g * experts.experts[int(e)](x) for g, e in zip(gates, kept.indices, strict=True))


def layer_row(layer: FuXiLayer, x: list[Tensor], times: list[int]) -> list[Tensor]:
    """One row's real tokens through a layer, pair by pair."""
    read = [norm(t) for t in x]
    projected = [F.silu(mixed(layer.uvqk, r, r)).split(layer.query_sizes + layer.key_sizes) for r in read]
    heads, limit = layer.heads, layer.max_positions
    out = []
    for i, (u, q, _, _) in enumerate(projected):
        channels = []
        for head in range(heads):
            wq, wv = len(q) // heads, layer.key_sizes[0] // heads
            parts = [[], [], []]
            for j in range(i + 1):
                value = projected[j][2][head * wv : (head + 1) * wv]
                parts[0].append(layer.positions[min(i - j, limit - 1)] * value)
                if layer.gaps is not None:
                    gap = times[min(i + 1, len(x) - 1)] - times[j]
                    bucket = min(int(math.log(max(abs(gap), 1)) / 0.301), 128)
                    parts[1].append(layer.gaps[bucket] * value)
                score = q[head * wq : (head + 1) * wq] @ projected[j][3][head * wq : (head + 1) * wq]
                parts[2].append(F.silu(score) / limit * value)
            channels += [sum(part) for part in parts if part]
        o = mixed(layer.output, norm(torch.cat(channels)) * u, read[i]) + x[i]
        out.append(o if layer.ffn is None else mixed(layer.ffn, norm(o), norm(o)) + o)
    return out


def fuxi(block: FuXiMMEBlock, query: Tensor, sequence: Sequence) -> Tensor:
    """The whole block, row by row and table by table."""
    tables, answers = block.num_tables, []
    times = getattr(sequence, "times", torch.zeros_like(sequence.index))
    for target, vectors, when, real in zip(query, sequence.vectors, times, sequence.mask, strict=True):
        tokens, when = vectors[real], when[real].tolist()
        if not len(tokens):
            answers.append(query.new_zeros(block.out_dim))
            continue
        joined, cosines = torch.zeros_like(target), []
        for m in range(tables):
            scale = math.sqrt(tokens.shape[1] / tables)
            ages = [min(len(tokens) - 1 - p, len(block.positions) - 1) for p in range(len(tokens))]
            x = [t[m::tables] * scale + block.positions[age][m::tables] for t, age in zip(tokens, ages, strict=True)]
            for layer in block.layers:
                x = layer_row(layer, x, when)
            cosines.append(F.cosine_similarity(x[-1], target[m::tables], dim=0))
            joined = joined.index_add(0, torch.arange(m, len(target), tables), x[-1])
        if block.head == "dnn":
            answers.append(joined / joined.norm())
        elif block.merge == "mean_cosine":
            answers.append(sum(cosines).view(1) / tables / block.temperature)
        else:
            answers.append(F.cosine_similarity(joined, target, dim=0).view(1) / block.temperature)
    return torch.stack(answers)


CASES = [
    (FuXiBlock, {}),
    (FuXiBlock, {"num_heads": 3, "num_layers": 1, "ffn_ratio": 2}),
    (FuXiBlock, {"ffn_single_stage": True, "temporal_channel": True}),
    (FuXiBlock, {"qk_dim": 2, "value_dim": 5, "max_positions": 4, "head": "dot"}),
    (FuXiMMEBlock, {}),
    (FuXiMMEBlock, {"num_tables": 2, "num_heads": 2, "layer_experts": 3, "layer_topk": 1, "head": "dot"}),
    (FuXiMMEBlock, {"num_tables": 3, "moe_targets": "uvqk", "head": "dot", "merge": "mean_cosine"}),
    (FuXiMMEBlock, {"num_tables": 2, "moe_targets": "output", "temporal_channel": True, "num_layers": 3}),
    (FuXiMMEBlock, {"num_tables": 6, "moe_targets": "ffn", "num_layers": 1}),
]


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_output_and_every_gradient_equal_weights_pair_by_pair(kind, options):
    block, query = block_and_query(kind, **options)
    sequence = ragged(LENGTHS, 12, padding=2)
    if block.temporal_channel:
        sequence = with_times(sequence)
    output, expected = block(query, sequence), fuxi(block, query, sequence)
    assert output.shape == (5, block.out_dim) == (5, 1 if block.head == "dot" else 12)
    torch.testing.assert_close(output, expected, **EXACT)
    leaves = [query, sequence.items, *block.parameters()]
    for got, want in zip(gradients(output, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(got, want, **EXACT)


def test_one_table_and_one_expert_are_fuxi_alpha():
    plain, query = block_and_query(FuXiBlock)
    block, _ = block_and_query(num_tables=1, layer_experts=1, layer_topk=1)
    block.load_state_dict(plain.state_dict())
    sequence = ragged(LENGTHS, 12)
    assert torch.equal(block(query, sequence), plain(query, sequence))


def test_identical_experts_are_a_dense_layer():
    block, query = block_and_query(num_tables=2, layer_experts=3, layer_topk=2)
    dense, _ = block_and_query(num_tables=2, layer_experts=1, layer_topk=1)
    for layer, one in zip(block.layers, dense.layers, strict=True):
        for target in ("uvqk", "output", "ffn"):
            for expert in getattr(layer, target).experts:
                expert.load_state_dict(getattr(one, target).experts[0].state_dict())
        with torch.no_grad():
            layer.positions.copy_(one.positions)
    with torch.no_grad():
        block.positions.copy_(dense.positions)
    sequence = ragged(LENGTHS, 12)
    torch.testing.assert_close(block(query, sequence), dense(query, sequence), **EXACT)


def test_dropout_is_on_the_input_and_in_both_halves_of_a_layer():
    """With all of it dropped a layer passes its input on, and without the input's there is nothing to pass."""
    block, query = block_and_query(FuXiBlock, hidden_dropout=1.0, num_layers=1)
    layer = block.layers[0].train()
    with torch.no_grad():
        layer.output.experts[0].bias.zero_()
    tokens, mask = torch.randn(2, 4, 12, dtype=torch.double), torch.ones(2, 4, dtype=torch.bool)
    assert torch.equal(layer(tokens, mask), tokens)
    assert not block.train()(query, ragged(LENGTHS, 12)).any()


@pytest.mark.parametrize("temporal", [False, True])
def test_no_position_reads_a_later_one_and_the_newest_is_the_last_column(temporal):
    block, _ = block_and_query(FuXiBlock, temporal_channel=temporal)
    layer = block.layers[0]
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(2, 6, 12, generator=generator, dtype=torch.double)
    mask, times = torch.ones(2, 6, dtype=torch.bool), torch.arange(6).expand(2, 6) * 100
    before = layer(tokens, mask, times)
    changed = tokens.clone()
    changed[:, 4] += 1.0
    after = layer(changed, mask, times)
    torch.testing.assert_close(after[:, :4], before[:, :4], **EXACT)
    assert float((after[:, 4:] - before[:, 4:]).detach().abs().amin(-1).max()) > 1e-6
    torch.testing.assert_close(layer(tokens, mask, times, newest=True), before[:, -1:], **EXACT)


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("temporal", [False, True])
def test_parameters_of_a_layer(single, temporal):
    d, h, dqk, dv, m, n = 10, 2, 3, 4, 2, 50
    layer = FuXiLayer(
        d, num_heads=h, qk_dim=dqk, value_dim=dv, max_positions=n, ffn_ratio=m, ffn_single_stage=single,
        temporal_channel=temporal, dropout=0.0,
    )  # fmt: skip
    channels = 3 if temporal else 2
    maps = d * ((channels + 1) * h * dv + 2 * h * dqk) + (channels * h * dv + 1) * d
    wanted = maps + (0 if single else 3 * m * d**2) + (129 if temporal else 0) + n
    assert sum(p.numel() for p in layer.parameters()) == wanted


def test_more_tables_have_no_more_embedding_parameters_and_narrower_layers():
    one, four = (small_model("FuXiMME", num_tables=m, num_heads=1).parameter_counts() for m in (1, 4))
    assert one["embedding"] == four["embedding"] and four["block"] < one["block"] / 3


def test_initial_values_after_the_models_reset():
    """Input maps, gates and tables N(0, 0.02^2), the other maps xavier-uniform, positions as item vectors."""
    block = small_model("FuXiMME", num_tables=1, num_heads=1, max_positions=2000, temporal_channel=True).block
    width = block.positions.shape[1]
    layer = block.layers[0]
    drawn = {0.02: [layer.uvqk.experts[0].weight, layer.positions, layer.gaps], 1e-4 * math.sqrt(width): [block.positions]}
    for std, weights in drawn.items():
        for weight in weights:  # 129 numbers at least: their standard deviation is within a quarter
            assert 0.75 * std < float(weight.detach().std()) < 1.25 * std
    assert float(torch.cat([e.gate.weight.flatten() for e in (layer.uvqk, layer.output, layer.ffn)]).detach().std()) < 0.03
    for linear in (layer.output.experts[0], layer.ffn.experts[0].gate, layer.ffn.experts[1].outer):
        bound = math.sqrt(6 / sum(linear.weight.shape))
        assert 0.9 * bound < float(linear.weight.detach().abs().max()) <= bound
    assert not layer.output.experts[0].bias.detach().any()


@pytest.mark.parametrize("name", ["FuXi", "MoS_FuXi", "GShard_FuXi", "ExpertChoice_FuXiMME"])
def test_the_time_channel_works_under_every_method_and_reads_the_times(name):
    model = small_model(name, temporal_channel=True).eval()
    batch = tiny_loader().batch(np.arange(30))
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, FuXiLayer):
                nn.init.normal_(layer.gaps)
        spans = [model(replace(batch, history_time=batch.history.long().cumsum(1) * gap))["y_pred"] for gap in (1, 1000)]
    assert all(bool(span.isfinite().all()) for span in spans) and not torch.equal(*spans)


def test_buckets_of_time_gaps():
    """Second, two, ten, a minute, an hour, a day, thirty days; either sign; nothing beyond the table."""
    gaps = torch.tensor([0, 1, 2, 10, 60, 3600, -86400, 2_592_000])
    assert gap_buckets(gaps).tolist() == [0, 0, 2, 7, 13, 27, 37, 49]
    assert int(gap_buckets(torch.tensor([2**62]))) == 128


def test_balance_losses_are_given_in_training_alone():
    block, query = block_and_query(num_layers=2, num_tables=2)
    sequence = ragged(LENGTHS, 12)
    losses: list[Tensor] = []
    block.eval()(query, sequence, losses)
    assert not losses
    block.train()(query, sequence, losses)
    assert len(losses) == 6
    weighed, _ = block_and_query(num_layers=2, num_tables=2, balance_weight=0.5)
    more: list[Tensor] = []
    weighed.train()(query, sequence, more)
    for loss, larger in zip(losses, more, strict=True):
        torch.testing.assert_close(larger, 50 * loss, **EXACT)
    plain, _ = block_and_query(FuXiBlock)
    plain.train()(query, sequence, losses)
    assert len(losses) == 6


@pytest.mark.parametrize(("options", "message"), [
    ({"num_tables": 5}, r"num_tables \(5\) must divide the width of an item vector \(12\)"),
    ({"num_tables": 4, "num_heads": 2}, r"num_heads \(2\) must divide .* 4 tables \(3\); or set qk_dim and value_dim"),
    ({"moe_targets": "x"}, "moe_targets must be one of all, uvqk, output, ffn, not 'x'"),
    ({"moe_targets": "ffn", "ffn_single_stage": True}, "moe_targets: ffn needs a feed-forward net"),
    ({"merge": "x"}, "merge must be concat or mean_cosine, not 'x'"),
    ({"layer_topk": 5}, r"layer_topk \(5\) must lie in 1..layer_experts \(4\)"),
    ({"num_layers": 0}, "num_layers must be at least 1, not 0"),
    ({"qk_dim": 0}, "qk_dim must be at least 1, not 0"),
    ({"hidden_dropout": 1.5}, "hidden_dropout must lie in 0..1, not 1.5"),
    ({"temperature": 0.0}, "temperature must be above 0, not 0.0"),
    ({"balance_weight": -1.0}, "balance_weight must be >= 0, not -1.0"),
])  # fmt: skip
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FuXiMMEBlock(12, **{"num_heads": 1, **options})


def test_the_time_channel_without_times_is_refused():
    block, query = block_and_query(FuXiBlock, temporal_channel=True)
    with pytest.raises(ConfigError, match=r"temporal_channel: True needs the time of every event .* time_col"):
        block(query, ragged(LENGTHS, 12))
