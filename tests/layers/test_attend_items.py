"""The attention over gathered item rows: its value and its hand-written gradient."""

import pytest
import torch
from oracles import gradients, ragged

from model_zoo.layers import attend_items as module
from model_zoo.layers.attend_items import attend_items

# float64 sums of at most a few dozen terms of order one, taken in another order
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def dropout_factors(*shape: int, seed: int = 0):
    return torch.randint(2, shape, generator=torch.Generator().manual_seed(seed)).double() / 0.5


def plain(query, items, index, mask, keep, attend_padding):
    vectors = items[index]
    scores = (query.unsqueeze(2) * vectors.unsqueeze(1)).sum(-1).masked_fill(~mask.unsqueeze(1), -1e9)
    weight = scores.softmax(-1)
    if keep is not None:
        weight = weight * keep
    if not attend_padding:
        weight = weight * mask.unsqueeze(1)
    return (weight.unsqueeze(-1) * vectors.unsqueeze(1)).sum(2)


@pytest.mark.parametrize("attend_padding", [False, True])
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("rows_at_a_time", [1, 2, 3])
def test_output_and_gradients_equal_the_plain_formula(rows_at_a_time, dropout, heads, attend_padding, monkeypatch):
    monkeypatch.setattr(module, "GATHERED_FLOATS", rows_at_a_time * 5 * 5)
    sequence = ragged([4, 0, 2], 5, padding=1)
    query = torch.randn(3, heads, 5, dtype=torch.double, requires_grad=True)
    keep = dropout_factors(3, heads, 5) if dropout else None
    arguments = (query, sequence.items, sequence.index, sequence.mask, keep, attend_padding)
    output, expected = attend_items(*arguments), plain(*arguments)
    torch.testing.assert_close(output, expected, **EXACT)
    leaves = [query, sequence.items]
    for got, want in zip(gradients(output, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("attend_padding", [False, True])
@pytest.mark.parametrize("dropout", [False, True])
def test_the_gradient_is_the_derivative(dropout, attend_padding):
    sequence = ragged([3, 1, 0], 4, num_items=5)
    query = torch.randn(3, 2, 4, dtype=torch.double, requires_grad=True)
    keep = dropout_factors(3, 2, 3) if dropout else None

    def apply(q, items):
        return attend_items(q, items, sequence.index, sequence.mask, keep, attend_padding)

    assert torch.autograd.gradcheck(apply, (query, sequence.items))


def test_constant_items_leave_the_query_gradient_as_it_is():
    sequence = ragged([3, 1], 4)
    query = torch.randn(2, 1, 4, dtype=torch.double, requires_grad=True)
    (expected,) = gradients(attend_items(query, sequence.items, sequence.index, sequence.mask), [query])
    (got,) = gradients(attend_items(query, sequence.items.detach(), sequence.index, sequence.mask), [query])
    assert torch.equal(got, expected)
