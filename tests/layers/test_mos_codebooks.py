"""When and by what the codebooks of MoS move."""

from typing import Any

import pytest
import torch
from mos_cases import EXACT, build, case
from oracles import (
    ema_batch_mean,
    occurrences_by_row,
)

from model_zoo.layers.mos import MoS


@pytest.mark.parametrize("update, training", [(True, True), (True, False), (False, True), (False, False)])
def test_codes_move_only_when_updates_are_on_and_the_layer_trains(update, training):
    layer = build()
    layer.set_fusion(0.5, 0.5, update_codebooks=update)
    layer.train(training)
    before = [router.codebook.codes.clone() for router in (layer.item_router, layer.window_router)]
    query, sequence = case()
    layer(query, sequence).sum().backward()
    for router, codes in zip((layer.item_router, layer.window_router), before, strict=True):
        assert router.codebook.codes.grad is None and not router.codebook.codes.requires_grad
        assert torch.equal(router.codebook.codes, codes) == (not (update and training))


def test_codes_do_not_move_in_an_optimizer_step():
    layer = build()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    before = layer.item_router.codebook.codes.clone()
    query, sequence = case()
    layer(query, sequence).sum().backward()
    optimizer.step()
    assert torch.equal(layer.item_router.codebook.codes, before)


@pytest.mark.parametrize("branch", ["item", "window"])
@pytest.mark.parametrize("options", [{}, {"router_input": "item_target"}, {"short_history": "skip"}])
def test_the_ema_averages_every_occurrence_of_every_row(branch, options):
    """Repeated items count each time, padding and the targets not at all, the window router sees windows."""
    layer = build(topk_item=2, topk_window=2, ema_decay=0.9, **options)
    layer.set_fusion(0.25, 0.25, update_codebooks=True)
    query, sequence = case(padding=3)
    codebook = getattr(layer, f"{branch}_router").codebook
    expected = ema_batch_mean(codebook.codes, 0.9, *occurrences_by_row(layer, query, sequence, branch))
    assert not torch.equal(expected, codebook.codes)
    layer(query, sequence)
    torch.testing.assert_close(codebook.codes, expected, **EXACT)


def run_updates(steps: int = 1, **options: Any) -> MoS:
    layer = build(**{"topk_item": 2, "topk_window": 2, "ema_decay": 0.9, **options})
    layer.set_fusion(0.25, 0.25, update_codebooks=True)
    for step in range(steps):
        layer(*case(seed=step))
    return layer


@pytest.mark.parametrize("option", [{"ema_assign": "top1"}, {"ema_normalize": True}, {"ema_mode": "count"},
                                    {"ema_decay": 0.5}])  # fmt: skip
def test_ema_options_reach_both_codebooks(option):
    plain, other = run_updates(), run_updates(**option)
    for name in ("item_router", "window_router"):
        assert not torch.allclose(getattr(plain, name).codebook.codes, getattr(other, name).codebook.codes)


def test_revive_dead_moves_a_code_that_no_token_chooses():
    for revive in (0, 2):
        layer = build(n_item_experts=9, revive_dead=revive)
        layer.set_fusion(0.25, 0.25, update_codebooks=True)
        before = layer.item_router.codebook.codes.clone()
        for step in range(2):
            layer(*case([3, 2], seed=0))
            if step == 0:
                idle = layer.item_router.codebook.idle_updates == 1
                assert bool(idle.any())
        moved = (layer.item_router.codebook.codes != before).any(1)
        assert bool(moved[idle].all()) == bool(revive)
        assert bool(moved[idle].any()) == bool(revive)


def test_a_learned_codebook_is_trained_by_gradient_and_not_by_ema():
    layer = build(codebook="learned", topk_item=2, topk_window=2)
    layer.set_fusion(0.25, 0.25, update_codebooks=True)
    before = layer.item_router.codebook.codes.detach().clone()
    query, sequence = case()
    layer(query, sequence).square().sum().backward()
    assert torch.equal(layer.item_router.codebook.codes, before)
    for router in (layer.item_router, layer.window_router):
        assert float(router.codebook.codes.grad.abs().sum()) > 0
