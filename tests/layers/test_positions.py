"""Positions without padding, sums over them, and the recurrence's order of them."""

import pytest
import torch
import torch.nn.functional as F
from oracles import gradients, ragged, rows_of
from torch.utils.flop_counter import FlopCounterMode

from model_zoo.layers.attentional_gru import Steps
from model_zoo.layers.positions import Positions, projected
from model_zoo.layers.sequence import Sequence

# float64 sums of a dozen terms, taken in another order
EXACT = {"rtol": 1e-12, "atol": 1e-12}
LENGTHS = [3, 0, 5, 1, 5]


def test_positions_are_the_real_ones_row_by_row_oldest_first():
    sequence = ragged(LENGTHS, 2, padding=2)
    places = Positions.of(sequence)
    assert places.row.tolist() == [0] * 3 + [2] * 5 + [3] + [4] * 5 and places.counts.tolist() == LENGTHS
    assert torch.equal(places.item, torch.cat(rows_of(sequence.index, sequence.mask)))
    everything = Positions.of(sequence, torch.ones_like(sequence.mask))
    assert torch.equal(everything.item, sequence.index.flatten()) and everything.counts.tolist() == [7] * 5


@pytest.mark.parametrize("weighted", [False, True])
def test_pooling_is_a_weighted_sum_of_each_row(weighted):
    sequence = ragged(LENGTHS, 3, padding=1)
    places = Positions.of(sequence)
    weight = torch.randn(14, dtype=torch.double, generator=torch.Generator().manual_seed(0)).requires_grad_()
    rows = rows_of(sequence.vectors, sequence.mask)
    by_row = zip(weight.split(LENGTHS), rows, strict=True)
    expected = torch.stack([w @ x if weighted else x.sum(0) for w, x in by_row])
    found = places.pool(sequence.items, weight if weighted else None)
    torch.testing.assert_close(found, expected, **EXACT)
    leaves = [sequence.items, *([weight] if weighted else [])]
    for got, want in zip(gradients(found, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("num_items", [3, 50])
@pytest.mark.parametrize("bias", [False, True])
def test_projections_are_those_of_each_position_however_they_are_computed(num_items, bias):
    sequence = ragged(LENGTHS, 3, num_items=num_items)
    weight = torch.randn(4, 3, dtype=torch.double).requires_grad_()
    offset = torch.randn(4, dtype=torch.double).requires_grad_() if bias else None
    expected = F.linear(sequence.items[sequence.index], weight, offset)
    with FlopCounterMode(display=False) as counter:
        found = projected(sequence.index, sequence.items, weight, offset)
    assert counter.get_total_flops() == 2 * 3 * 4 * min(num_items, sequence.index.numel())
    torch.testing.assert_close(found, expected, **EXACT)
    leaves = [sequence.items, weight, *([offset] if bias else [])]
    for got, want in zip(gradients(found, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("padding", [0, 2])
def test_steps_go_column_by_column_through_the_rows_that_have_begun(padding):
    sequence = ragged(LENGTHS, 2, padding=padding)
    steps = Steps.of(sequence)
    assert steps.order.tolist() == [2, 4, 0, 3, 1] and steps.counts == [2, 2, 3, 3, 4]
    assert steps.row.tolist() == [2, 4, 2, 4, 2, 4, 0, 2, 4, 0, 2, 4, 0, 3]
    for row, column_items in enumerate(rows_of(sequence.index, sequence.mask)):
        assert torch.equal(steps.item[steps.row == row], column_items)
    answers = torch.arange(1.0, 5.0).unsqueeze(1)  # of the sorted rows that are not empty
    assert steps.by_row(answers).flatten().tolist() == [3.0, 0.0, 1.0, 4.0, 2.0]


def test_batches_without_rows_or_items():
    for sequence in (ragged([], 2), Sequence.from_vectors(torch.zeros(3, 0, 2), torch.zeros(3, 0)), ragged([0, 0], 2)):
        rows = len(sequence.index)
        places = Positions.of(sequence)
        assert places.item.numel() == 0 and places.pool(sequence.items).shape == (rows, 2)
        assert not places.pool(sequence.items).any()
