"""What single options of MoS change."""

from typing import Any

import pytest
import torch
from mos_cases import DIM, EXACT, attention_block, build, case
from oracles import branch_tokens, router_inputs
from torch import nn

from model_zoo.layers.mos import MoS


def output_of(**options: Any) -> torch.Tensor:
    return build(**{"topk_item": 2, "topk_window": 2, **options})(*case())


@pytest.mark.parametrize(
    "option",
    [
        {"router_temperature": 0.1},
        {"gate_norm": "softmax_then_mask"},
        {"gate_source": "target"},
        {"window_align": "left"},
        {"window_divide_by": "size"},
        {"short_history": "skip"},
        {"topk_item": 1},
        {"window_size": 3},
        {"window_stride": 3},
        {"alpha_item": 0.5},
    ],
    ids=lambda option: ",".join(f"{key}={value}" for key, value in option.items()),
)
def test_the_option_changes_the_answer(option):
    """With `test_every_option_equals_the_dense_form`: it has an effect, and the right one."""
    assert not torch.allclose(output_of(**option), output_of())


def test_a_low_temperature_leaves_the_weight_to_the_best_theme():
    best, cold = build(topk_item=1), build(topk_item=3, router_temperature=1e-3)
    _, sequence = case([6, 4, 5])
    routing = cold.item_router(sequence)
    torch.testing.assert_close(routing.gates, best.item_router(sequence).gates, rtol=0, atol=1e-6)


def test_a_shared_router_is_one_h_with_two_codebooks():
    shared, separate = build(shared_router=True), build()
    assert shared.item_router.h is shared.window_router.h
    assert shared.item_router.codebook is not shared.window_router.codebook
    assert separate.item_router.h is not separate.window_router.h
    h = sum(p.numel() for p in separate.window_router.h.parameters())
    counts = [sum(p.numel() for p in layer.parameters()) for layer in (separate, shared)]
    assert counts[0] - counts[1] == h
    alone = build(shared_router=True, n_item_experts=0)
    assert alone.window_router.h is not None


def test_the_router_sees_the_target_when_asked_to():
    query, sequence = case([9, 9])
    item, both = build(), build(router_input="item_target")
    assert both.item_router.h[0].in_features == 2 * DIM and item.item_router.h[0].in_features == DIM

    def route(layer: MoS, targets: torch.Tensor) -> torch.Tensor:
        return layer.item_router(layer.router_inputs(targets, sequence)).members

    torch.manual_seed(0)
    others = [torch.randn(2, DIM, dtype=torch.double) * 3 for _ in range(5)]
    assert all(torch.equal(route(item, q), route(item, query)) for q in others)
    assert any(not torch.equal(route(both, q), route(both, query)) for q in others)
    inputs = both.router_inputs(query, sequence)
    want = router_inputs(both, query[0], branch_tokens(both, sequence.vectors[0], "item"))
    assert torch.equal(inputs.vectors[0], want)


def test_the_shape_of_h():
    assert isinstance(build(router_linear=True).item_router.h, nn.Linear)
    assert build(router_hidden=7).window_router.h[0].out_features == 7
    assert MoS(attention_block, DIM).item_router.h[0].bias is None
    assert MoS(attention_block, DIM, router_bias=True).window_router.h[2].bias is not None


@pytest.mark.parametrize("branch", ["item", "window"])
def test_a_branch_without_experts_is_absent_and_leaves_its_weight_to_the_other(branch):
    other = "window" if branch == "item" else "item"
    layer = build(**{f"n_{branch}_experts": 0, f"topk_{branch}": 1})
    assert getattr(layer, f"{branch}_experts") is None and getattr(layer, f"{branch}_router") is None
    assert not any(name.startswith(branch) for name in layer.state_dict())
    assert (getattr(layer, f"alpha_{branch}"), getattr(layer, f"alpha_{other}")) == (0.0, 0.25)
    layer.set_fusion(0.5, 0.5)
    assert (getattr(layer, f"alpha_{branch}"), getattr(layer, f"alpha_{other}")) == (0.0, 1.0)


def test_commitment_and_alignment_add_their_weighted_losses_in_training_only():
    query, sequence = case()
    for option, count in (({}, 0), ({"commitment_weight": 0.5}, 2), ({"align_weight": 0.5}, 2)):
        layer = build(topk_item=2, **option)
        losses: list[torch.Tensor] = []
        output = layer(query, sequence, losses)
        assert len(losses) == count
        assert torch.equal(output, layer(query, sequence))  # the list does not change the answer
        layer.eval()(query, sequence, losses)
        assert len(losses) == count


def test_the_commitment_loss_trains_h_alone_with_one_theme():
    layer = build(commitment_weight=0.5)
    query, sequence = case()
    losses: list[torch.Tensor] = []
    layer(query, sequence, losses)
    torch.testing.assert_close(losses[0], 0.5 * layer.item_router.commitment(sequence), **EXACT)
    torch.testing.assert_close(losses[1], 0.5 * layer.window_router.commitment(layer.window_tokens(sequence)), **EXACT)
    sum(losses).backward()
    trained = {name.split(".")[0] for name, p in layer.named_parameters() if p.grad is not None}
    assert trained == {"item_router", "window_router"}


def test_the_alignment_loss_pulls_experts_towards_the_fixed_global_answer():
    layer = build(align_weight=0.5)
    query, sequence = case([6, 4])
    losses: list[torch.Tensor] = []
    layer(query, sequence, losses)
    layer.set_fusion(1.0, 0.0)
    item = layer(query, sequence)
    layer.set_fusion(0.0, 0.0)
    goal = layer(query, sequence).detach()
    torch.testing.assert_close(losses[0], 0.5 * (item - goal).square().mean(), **EXACT)
    sum(losses).backward()
    assert all(p.grad is None or not p.grad.any() for p in layer.global_expert.parameters())
    assert any(p.grad is not None for p in layer.item_experts.parameters())
