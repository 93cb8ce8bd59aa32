"""Which tokens a search keeps: order, ties, padding, and LongCTR's choices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_zoo.layers.retrieval import best_columns, keep_columns, nearest_columns
from model_zoo.layers.sequence import Sequence


def tied(lengths, columns, seed=0):
    """Distances of few values, and the mask."""
    mask = torch.arange(columns) >= columns - torch.tensor(lengths).unsqueeze(1)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, mask.shape, generator=generator), mask


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(0, 4), st.integers(1, 12), st.integers(0, 99))
def test_the_nearest_real_tokens_are_kept_in_time_order_the_newest_of_equally_near_ones(lengths, padding, topk, seed):
    columns = max(lengths) + padding
    distance, mask = tied(lengths, columns, seed)
    kept = nearest_columns(distance, mask, topk)
    assert kept.shape == (len(lengths), min(topk, columns)) and kept.dtype == torch.int64
    for row, length in enumerate(lengths):
        real = range(columns - length, columns)
        best = sorted(real, key=lambda t: (int(distance[row, t]), -t))[:topk]
        chosen = kept[row].tolist()
        assert [t for t in chosen if t in real] == sorted(best) and chosen == sorted(set(chosen))


def test_more_padding_changes_which_tied_columns_longctr_keeps_and_not_which_the_default_keeps():
    distance, mask = tied([40] * 8, 40)
    far = torch.cat([torch.zeros(8, 60, dtype=torch.long), distance], 1)
    padded = torch.cat([torch.zeros(8, 60, dtype=torch.bool), mask], 1)
    for compat in (False, True):
        alone, beside = (nearest_columns(d, m, 5, compat) for d, m in ((distance, mask), (far, padded)))
        assert torch.equal(alone, beside - 60) != compat


def test_longctr_keeps_what_torch_keeps():
    distance, mask = tied([20, 3, 11], 20)
    order = distance.float().masked_fill(~mask, 9.0)
    expected = order.topk(6, dim=1, largest=False, sorted=True).indices.sort(1).values
    assert torch.equal(nearest_columns(distance, mask, 6, longctr_compat=True), expected)


@pytest.mark.parametrize("topk", [1, 3, 5, 8])
def test_the_best_scored_real_tokens_are_kept_in_time_order(topk):
    scores = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(7) >= 7 - torch.tensor([7, 4, 1, 0]).unsqueeze(1)
    kept = best_columns(scores, mask, topk)
    for row, length in enumerate([7, 4, 1, 0]):
        best = sorted(range(7 - length, 7), key=lambda t: -float(scores[row, t]))[:topk]
        assert [t for t in kept[row].tolist() if t >= 7 - length] == sorted(best)


def test_padding_outranks_real_tokens_of_negative_score_in_longctr_alone():
    """Three real items, all scored below zero, behind three columns of padding; topk 3 (quirk 4)."""
    scores = torch.tensor([[0.0, 0.0, 0.0, -1.0, -3.0, -2.0]])
    mask = torch.arange(6).unsqueeze(0) >= 3
    assert best_columns(scores, mask, 3).tolist() == [[3, 4, 5]]
    assert best_columns(scores, mask, 3, longctr_compat=True).tolist() == [[0, 1, 2]]
    scores[0, 5] = 2.0  # one of three is kept
    assert mask.gather(1, best_columns(scores, mask, 3, longctr_compat=True)).sum() == 1


@pytest.mark.parametrize("columns", [0, 2, 5])
def test_all_columns_are_kept_if_there_are_no_more_than_topk(columns):
    mask = torch.ones(2, columns, dtype=torch.bool)
    everything = [list(range(columns))] * 2
    assert nearest_columns(torch.zeros(2, columns, dtype=torch.long), mask, 5).tolist() == everything
    assert best_columns(torch.zeros(2, columns), mask, 5).tolist() == everything


def test_distances_beyond_what_single_precision_holds_are_told_apart():
    """Order keys of long histories: 2,000 columns and distances up to 10^5, beyond 2^24."""
    distance = torch.full((1, 2_000), 100_001)
    distance[0, 7] = 100_000
    kept = nearest_columns(distance, torch.ones(1, 2_000, dtype=torch.bool), 3)
    assert kept.tolist() == [[7, 1_998, 1_999]]


def test_the_kept_tokens_are_a_sequence_over_the_same_items():
    sequence = Sequence.from_vectors(torch.randn(2, 4, 3), torch.tensor([[0, 1, 1, 1], [0, 0, 0, 1]]))
    kept = keep_columns(sequence, torch.tensor([[1, 3], [2, 3]]))
    assert kept.items is sequence.items
    assert torch.equal(kept.vectors, torch.stack([sequence.vectors[0, [1, 3]], sequence.vectors[1, [2, 3]]]))
    assert kept.mask.tolist() == [[True, True], [False, True]]
