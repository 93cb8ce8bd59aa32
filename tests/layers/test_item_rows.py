"""Sums over rows of an item table, and their transposes, against gathers of a vector per position."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import gradients

from model_zoo.layers import item_rows
from model_zoo.layers.item_rows import Entries, pool_rows, sparse_rows, spread

# float64 sums of at most a few dozen terms of order one, taken in another order
EXACT = {"rtol": 1e-11, "atol": 1e-11}

SHAPES = {
    "rows": st.integers(0, 5),
    "columns": st.integers(0, 7),
    "num_items": st.integers(1, 9),
    "share": st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    "seed": st.integers(0, 99),
}


def case(rows: int, columns: int, num_items: int, share: float, seed: int):
    generator = torch.Generator().manual_seed(seed)
    items = torch.randn(num_items, 3, generator=generator, dtype=torch.double)
    index = torch.randint(num_items, (rows, columns), generator=generator)
    mask = torch.rand(rows, columns, generator=generator) < share
    left = torch.randn(rows, 3, generator=generator, dtype=torch.double)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.double) * mask
    return items, index, mask, left, weight


@settings(derandomize=True, deadline=None, max_examples=80)
@given(**SHAPES)
def test_dots_pool_and_spread_are_the_dense_products(rows, columns, num_items, share, seed):
    items, index, mask, left, weight = case(rows, columns, num_items, share, seed)
    entries = Entries(index, mask)
    dots = entries.dense(entries.dots(left, items), 0.0)
    assert dots.shape == mask.shape
    torch.testing.assert_close(dots * mask, torch.einsum("nd,nkd->nk", left, items[index]) * mask, **EXACT)
    flat = entries.flat(weight)
    torch.testing.assert_close(entries.pool(items, flat), torch.einsum("nk,nkd->nd", weight, items[index]), **EXACT)
    goal = torch.zeros(num_items, 3, dtype=torch.double)
    for n in range(rows):
        for k in range(columns):
            goal[index[n, k]] += weight[n, k] * (left[n] + left[n].flip(0))
    pairs = [(left, flat), (left.flip(1), flat)]
    for parts in ([(entries, pairs)], [(entries, [pair]) for pair in pairs]):
        torch.testing.assert_close(spread(parts, num_items), goal, **EXACT)
    mixed = spread([(entries, pairs), (entries, pairs[:1]), (entries, pairs[1:])], num_items)
    torch.testing.assert_close(mixed, 2 * goal, **EXACT)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(**SHAPES)
def test_pool_rows_and_its_gradient(rows, columns, num_items, share, seed):
    items, index, _, _, weight = case(rows, columns, num_items, share, seed)
    items.requires_grad_()
    got, want = pool_rows(items, index, weight), torch.einsum("nk,nkd->nd", weight, items[index])
    torch.testing.assert_close(got, want, **EXACT)
    for a, b in zip(gradients(got, [items]), gradients(want, [items]), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_what_masked_entries_cost_is_a_choice_without_effect(share, monkeypatch):
    monkeypatch.setattr(item_rows, "DENSE_SHARE", share)
    items, index, mask, _, weight = case(5, 7, 9, 0.5, 1)
    entries = Entries(index, mask)
    assert (entries.place is None) == (share < 1.0 and int(mask.sum()) >= share * mask.numel())
    pooled = entries.pool(items, entries.flat(weight))
    torch.testing.assert_close(pooled, torch.einsum("nk,nkd->nd", weight, items[index]), **EXACT)


def test_sums_repeat_whatever_the_number_of_threads():
    _, index, mask, left, weight = case(400, 50, 300, 0.8, 2)
    entries = Entries(index, mask)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            found.append(spread([(entries, [(left.float(), entries.flat(weight.float()))])], 300))
        finally:
            torch.set_num_threads(1)
    assert torch.equal(found[0], found[1])


def test_half_precision_takes_the_plain_way():
    items = torch.randn(4, 3).bfloat16().requires_grad_()
    assert not sparse_rows(items)
    answer = pool_rows(items, torch.tensor([[0, 3], [2, 2]]), torch.tensor([[1.0, 2.0], [0.5, 0.5]]))
    want = torch.stack([items[0] + 2 * items[3], items[2]])
    torch.testing.assert_close(answer, want, rtol=2e-2, atol=2e-2)  # eight bits of mantissa
    answer.float().sum().backward()
    assert items.grad is not None
