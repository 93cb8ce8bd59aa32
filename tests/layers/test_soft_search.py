"""Soft search against its formula: values, hand-written gradient, groups of rows."""

import pytest
import torch
from oracles import gradients, ragged

from model_zoo.layers import attend_items
from model_zoo.layers.soft_search import soft_search

# float64 sums of at most a few dozen terms of order one, taken in another order
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def case():
    sequence = ragged([6, 0, 3, 1], 5, padding=1)
    query = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.double).requires_grad_()
    return query, sequence


@pytest.mark.parametrize("rows_at_a_time", [1, 3, 100])
def test_sum_and_gradients_equal_the_formula(rows_at_a_time, monkeypatch):
    monkeypatch.setattr(attend_items, "GATHERED_FLOATS", rows_at_a_time * 7 * 5)
    query, sequence = case()
    pooled, scores = soft_search(query, sequence.items, sequence.index, sequence.mask)
    plain = (query.unsqueeze(1) * sequence.vectors).sum(2) * sequence.mask
    torch.testing.assert_close(scores, plain.detach(), **EXACT)
    expected = (plain.unsqueeze(2) * sequence.vectors).sum(1)
    torch.testing.assert_close(pooled, expected, **EXACT)
    for got, want in zip(gradients(pooled, [query, sequence.items]), gradients(expected, [query, sequence.items])):
        torch.testing.assert_close(got, want, **EXACT)


def test_the_gradient_is_the_derivative():
    query, sequence = case()
    assert torch.autograd.gradcheck(
        lambda q, items: soft_search(q, items, sequence.index, sequence.mask)[0], (query, sequence.items)
    )


def test_scores_carry_no_gradient_and_frozen_items_cost_none():
    query, sequence = case()
    pooled, scores = soft_search(query, sequence.items.detach(), sequence.index, sequence.mask)
    assert not scores.requires_grad
    (got,) = gradients(pooled, [query])
    (want,) = gradients(soft_search(query, sequence.items, sequence.index, sequence.mask)[0], [query])
    assert torch.equal(got, want)


def test_under_autocast_the_search_keeps_the_items_precision():
    query, sequence = case()
    items = sequence.items.detach().float().requires_grad_()
    plain, _ = soft_search(query.detach().float(), items, sequence.index, sequence.mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled, scores = soft_search(query.detach().float(), items, sequence.index, sequence.mask)
    assert torch.equal(pooled, plain) and scores.dtype == torch.float32
