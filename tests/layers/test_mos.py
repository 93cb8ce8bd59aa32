"""MoS against its dense form, its reductions to the plain block, gradients, state."""

import copy

import pytest
import torch
from mos_cases import DIM, EXACT, LENGTHS, assert_equals_dense_form, attention_block, build, case, twin_block
from oracles import (
    gate_row,
    gradients,
    masked_attention,
    members,
    ragged,
    rows_of,
)
from torch import nn

from model_zoo.layers.mos import MoS
from model_zoo.layers.sequence import Sequence

# ---- lazy = dense


@pytest.mark.parametrize("topk", [1, 2, 3])
@pytest.mark.parametrize("block", [twin_block, attention_block])
@pytest.mark.parametrize("seed", range(3))
def test_lazy_experts_equal_all_experts(block, topk, seed):
    layer = build(block, seed, topk_item=topk, topk_window=topk)
    assert_equals_dense_form(layer, *case(seed=seed, padding=seed))


@pytest.mark.parametrize(
    "options",
    [
        {"gate_norm": "softmax_then_mask", "topk_item": 1, "topk_window": 2},
        {"router_temperature": 0.2, "topk_item": 2, "topk_window": 2},
        {"codebook": "learned", "topk_item": 2, "topk_window": 2},
        {"shared_router": True, "topk_item": 2, "topk_window": 2},
        {"router_linear": True, "topk_item": 2},
        {"router_hidden": 7, "topk_item": 2},
        {"router_bias": False, "router_hidden": 32, "topk_item": 2, "topk_window": 2},
        {"router_input": "item_target", "topk_item": 2, "topk_window": 2},
        {"gate_source": "target", "topk_item": 2, "topk_window": 1},
        {"gate_source": "target", "router_input": "item_target", "topk_item": 2},
        {"window_align": "left", "topk_window": 2},
        {"window_divide_by": "size", "topk_window": 2},
        {"short_history": "skip", "topk_window": 2},
        {"empty_history": "zeros"},
        {"n_item_experts": 0},
        {"n_window_experts": 0, "topk_item": 2},
        {"alpha_item": 0.0},
        {"alpha_window": 0.0, "topk_item": 2},
        {"alpha_item": 0.5, "alpha_window": 0.5, "topk_item": 2},
        {"alpha_item": 1.0, "alpha_window": 0.0},
        {"alpha_item": 0.1, "alpha_window": 0.6},
        {"window_size": 30},
        {"window_size": 2, "window_stride": 3, "topk_window": 2},
    ],
    ids=lambda options: ",".join(f"{key}={value}" for key, value in options.items()),
)
def test_every_option_equals_the_dense_form(options):
    assert_equals_dense_form(build(**options), *case())


@pytest.mark.parametrize("topk", [1, 2])
def test_experts_on_subsequences_equal_experts_masked_in_place(topk):
    """For a block without positions, masking the tokens of other themes is the same as taking them out."""
    layer = build(attention_block, topk_item=topk, alpha_item=1.0, alpha_window=0.0)
    query, sequence = case([6, 2, 5], padding=3)
    vectors = sequence.vectors
    reads = torch.zeros(*sequence.mask.shape, 3, dtype=torch.bool)
    reads[sequence.mask] = members(layer.item_router, vectors[sequence.mask])
    gates = torch.stack([gate_row(layer.item_router, row[-1]) for row in vectors])
    expected = sum(
        gates[:, [n]] * masked_attention(expert, query, vectors, reads[:, :, n])
        for n, expert in enumerate(layer.item_experts.experts)
    )
    torch.testing.assert_close(layer(query, sequence), expected, **EXACT)


def test_blocks_without_a_plan_are_dispatched_one_by_one():
    """A block that is not attention over items (here: a sum) is called as a plain module."""

    class Sum(nn.Module):
        out_dim = DIM

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(DIM))

        def forward(self, query: torch.Tensor, sequence: Sequence) -> torch.Tensor:
            return query + self.scale * (sequence.vectors * sequence.mask.unsqueeze(2)).sum(1)

    layer = build(Sum, alpha_item=1.0, alpha_window=0.0, topk_item=2)
    query, sequence = case([6, 2, 5], padding=1)
    expected = []
    for target, tokens in zip(query, rows_of(sequence.vectors, sequence.mask), strict=True):
        reads, gates = members(layer.item_router, tokens), gate_row(layer.item_router, tokens[-1])
        expected.append(sum(
            gates[n] * (target + expert.scale * tokens[reads[:, n]].sum(0))
            for n, expert in enumerate(layer.item_experts.experts)
        ))  # fmt: skip
    torch.testing.assert_close(layer(query, sequence), torch.stack(expected), **EXACT)


# ---- reductions to the plain block


def test_zero_weights_are_the_plain_block_bit_for_bit_and_hold_nothing_else():
    torch.manual_seed(5)
    plain = twin_block()
    torch.manual_seed(5)
    layer = MoS(twin_block, DIM, alpha_item=0.0, alpha_window=0.0)
    names = [f"global_expert.{name}" for name in plain.state_dict()]
    assert [name for name in layer.state_dict() if name != "_extra_state"] == names
    assert layer.expert_modules() == []
    query, sequence = torch.randn(6, DIM, requires_grad=True), ragged(LENGTHS, DIM, dtype=torch.float)
    output, expected = layer(query, sequence), plain(query, sequence)
    assert torch.equal(output, expected)
    leaves = [query, sequence.items]
    found = gradients(output, [*leaves, *layer.parameters()])
    for got, want in zip(found, gradients(expected, [*leaves, *plain.parameters()]), strict=True):
        assert torch.equal(got, want)


def test_zero_fusion_of_a_full_layer_is_its_global_expert_bit_for_bit():
    layer = build()
    layer.set_fusion(0.0, 0.0)
    query, sequence = case()
    output = layer(query, sequence)
    assert torch.equal(output, layer.global_expert(query, sequence))
    beside = [p for module in layer.expert_modules() for p in module.parameters()]
    assert all(g is None for g in torch.autograd.grad(output.sum(), beside, allow_unused=True))


def test_the_global_expert_starts_as_the_plain_block_of_the_same_seed_and_leaves_the_same_stream():
    torch.manual_seed(5)
    plain = twin_block()
    after = torch.rand(3)
    torch.manual_seed(5)
    layer = MoS(twin_block, DIM)
    assert torch.equal(torch.rand(3), after)
    for name, value in plain.state_dict().items():
        assert torch.equal(layer.global_expert.state_dict()[name], value)
    first, second = layer.item_experts.experts[:2]
    assert not torch.equal(first.short_attention.W_q.weight, second.short_attention.W_q.weight)


@pytest.mark.parametrize("branch", ["item", "window"])
def test_one_expert_that_copies_the_global_one_is_the_plain_block(branch):
    size = {"window_size": 1, "window_stride": 1}  # windows of one item are the items
    alphas = {"alpha_item": 0.0, "alpha_window": 0.0, f"alpha_{branch}": 1.0}
    layer = build(n_item_experts=1, n_window_experts=1, **alphas, **size)
    experts = getattr(layer, f"{branch}_experts").experts
    experts[0] = copy.deepcopy(layer.global_expert)
    query, sequence = case()
    output, expected = layer(query, sequence), layer.global_expert(query, sequence)
    torch.testing.assert_close(output, expected, **EXACT)
    leaves = [query, sequence.items]
    for got, want in zip(gradients(output, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(got, want, **EXACT)


# ---- gradients


@pytest.mark.parametrize("topk, trained", [(1, False), (2, True)])
def test_h_is_trained_only_with_more_than_one_theme(topk, trained):
    layer = build(topk_item=topk, topk_window=topk)
    query, sequence = case()
    layer(query, sequence).square().sum().backward()
    for router in (layer.item_router, layer.window_router):
        grads = [p.grad for p in router.h.parameters()]
        assert all((g is not None and float(g.abs().sum()) > 0) == trained for g in grads)


def test_softmax_then_mask_trains_h_with_one_theme():
    layer = build(gate_norm="softmax_then_mask")
    query, sequence = case()
    layer(query, sequence).square().sum().backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in layer.item_router.h.parameters())


def test_with_all_weight_on_the_experts_the_global_expert_serves_only_rows_that_have_none():
    layer = build(alpha_item=0.5, alpha_window=0.5)
    calls = []
    layer.global_expert.register_forward_hook(lambda module, args, output: calls.append(args[0].shape[0]))
    query, sequence = case()
    output = layer(query, sequence)
    assert calls == [1]
    (grad,) = gradients(output[[0, 1, 3, 4, 5]], [layer.global_expert.short_attention.W_v.weight])
    assert float(grad.abs().sum()) == 0.0


# ---- state and bad input


def test_a_checkpoint_carries_the_weights_in_force():
    layer = build()
    layer.set_fusion(0.5, 0.5)
    other = build(seed=9)
    other.load_state_dict(layer.state_dict())
    assert (other.alpha_item, other.alpha_window) == (0.5, 0.5)
    query, sequence = case()
    assert torch.equal(other(query, sequence), layer(query, sequence))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"alpha_item": 0.7, "alpha_window": 0.5}, r"alpha_item \(0.7\) and alpha_window \(0.5\)"),
        ({"alpha_item": -0.1}, "must be >= 0"),
        ({"topk_item": 4}, r"topk_item \(4\) must lie in 1..n_item_experts \(3\)"),
        ({"topk_window": 0}, r"topk_window \(0\)"),
        ({"ema_decay": 1.5}, r"ema_decay \(1.5\)"),
        ({"window_size": 0}, r"window_size \(0\)"),
        ({"window_stride": 0}, r"window_stride \(0\)"),
        ({"router_temperature": 0.0}, r"router_temperature \(0.0\)"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)
