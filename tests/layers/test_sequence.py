"""Operations on batches of histories against loops over rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import gradients, ragged, rows_of, windows
from torch import nn

from model_zoo.layers.sequence import Sequence, distinct_items
from model_zoo.layers.windows import Windows

EXAMPLES = settings(derandomize=True, deadline=None, max_examples=40)
# float64 means of at most nine terms of order one
EXACT = {"rtol": 1e-12, "atol": 1e-12}

lengths_of = st.lists(st.integers(0, 12), min_size=1, max_size=5)
seeds = st.integers(0, 1000)


def assert_rows(sequence: Sequence, expected: list[torch.Tensor]) -> None:
    """Each row's real vectors are the expected ones, at the right end of the row."""
    for row, (got, want) in enumerate(zip(rows_of(sequence.vectors, sequence.mask), expected, strict=True)):
        assert got.shape == want.shape, f"row {row}"
        torch.testing.assert_close(got, want, **EXACT)
    assert_right_aligned(sequence)


def windows_of(sequence: Sequence, *arguments, **options) -> Sequence:
    return Windows(sequence, *arguments, **options).sequence()


def assert_right_aligned(sequence: Sequence) -> None:
    assert not bool((sequence.mask[:, :-1] & ~sequence.mask[:, 1:]).any())


def scalars(*lengths: int, padding: int = 0) -> Sequence:
    """Histories 1, 2, ..., t of scalar items, left-padded with -1000."""
    width = max(lengths) + padding
    mask = torch.arange(width) >= width - torch.tensor(lengths).unsqueeze(1)
    vectors = (torch.arange(width) - width + torch.tensor(lengths).unsqueeze(1) + 1.0).masked_fill(~mask, -1000.0)
    return Sequence.from_vectors(vectors.double().unsqueeze(2), mask)


# ---- windows


@pytest.mark.parametrize("padding", [0, 1, 2, 3, 4, 9])
@pytest.mark.parametrize(
    "length, means",
    [
        (1, [1.0]),
        (5, [3.0]),
        (8, [4.5]),
        (9, [3.0, 5.5]),
        (11, [4.0, 7.5]),
        (12, [4.5, 8.5]),
        (13, [3.0, 5.5, 9.5]),
        (16, [4.5, 8.5, 12.5]),
    ],
)
def test_right_anchored_window_means_of_1_to_t(length, means, padding):
    got = windows_of(scalars(length, padding=padding), 8, 4)
    assert got.vectors[got.mask].flatten().tolist() == pytest.approx(means, abs=1e-12)


def test_left_windows_are_the_literal_definition_and_lose_the_newest_items():
    got = windows_of(scalars(11, padding=3), 8, 4, align="left")
    assert got.vectors[got.mask].flatten().tolist() == pytest.approx([4.5], abs=1e-12)
    assert int(windows_of(scalars(7), 8, 4, align="left").mask.sum()) == 0


@pytest.mark.parametrize("align", ["right", "left"])
@pytest.mark.parametrize("length, count", [(100, 24), (200, 49)])
def test_the_number_of_windows_of_long_histories(length, count, align):
    assert windows_of(scalars(length), 8, 4, align=align).lengths.tolist() == [count]


def test_a_short_history_divides_by_its_items_or_by_the_window_size():
    assert windows_of(scalars(5), 8, 4, divide_by="count").vectors.item() == pytest.approx(3.0)
    assert windows_of(scalars(5), 8, 4, divide_by="size").vectors.item() == pytest.approx(15 / 8)


@EXAMPLES
@given(
    lengths=lengths_of,
    size=st.integers(1, 9),
    stride=st.integers(1, 9),
    padding=st.integers(0, 5),
    align=st.sampled_from(["right", "left"]),
    divide_by=st.sampled_from(["count", "size"]),
    seed=seeds,
)
def test_windows_equal_a_loop_over_rows(lengths, size, stride, padding, align, divide_by, seed):
    sequence = ragged(lengths, 3, seed, padding=padding)
    got = windows_of(sequence, size, stride, align, divide_by)
    expected = [windows(tokens, size, stride, align, divide_by) for tokens in rows_of(sequence.vectors, sequence.mask)]
    assert_rows(got, expected)
    if any(len(row) for row in expected):
        output, reference = got.vectors[got.mask], torch.cat(expected)
        (grad,), (want,) = (gradients(value, [sequence.items]) for value in (output, reference))
        torch.testing.assert_close(grad, want, **EXACT)


@EXAMPLES
@given(length=st.integers(1, 60), size=st.integers(1, 12), stride=st.integers(1, 12))
def test_every_item_is_in_a_right_window_unless_the_stride_skips_it(length, size, stride):
    """The last window ends at the newest item, and with stride <= size no item is lost."""
    one_hot = torch.eye(length, dtype=torch.double).unsqueeze(0)
    got = windows_of(Sequence.from_vectors(one_hot, torch.ones(1, length, dtype=torch.bool)), size, stride)
    covered = (got.vectors[got.mask] > 0).any(0)
    assert got.vectors[0, -1, -1] > 0
    if stride <= size:
        assert bool(covered.all())
        expected = max(1, -((size - length) // stride) + 1)
        assert int(got.lengths) == expected


# ---- compact, right_aligned


@EXAMPLES
@given(lengths=lengths_of, padding=st.integers(0, 3), seed=seeds)
def test_compact_keeps_the_chosen_real_tokens_in_order(lengths, padding, seed):
    sequence = ragged(lengths, 3, seed, padding=padding)
    keep = torch.rand(sequence.mask.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    got = sequence.compact(keep)
    expected = rows_of(sequence.vectors, sequence.mask & keep)
    assert_rows(got, expected)
    assert got.index.shape[1] == max(len(row) for row in expected)


def test_compact_of_nothing_has_no_columns():
    sequence = ragged([3, 0], 3)
    assert sequence.compact(torch.zeros_like(sequence.mask)).index.shape == (2, 0)
    assert sequence.select(torch.tensor([], dtype=torch.long)).compact(sequence.mask[:0]).index.shape == (0, 0)


@EXAMPLES
@given(columns=st.integers(0, 8), rows=st.integers(1, 4), seed=seeds)
def test_right_aligned_removes_padding_from_the_inside_and_the_end(columns, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=generator) < 0.6
    sequence = Sequence.from_vectors(torch.randn(rows, columns, 2, generator=generator, dtype=torch.double), mask)
    assert_rows(sequence.right_aligned(), rows_of(sequence.vectors, mask))


def test_right_aligned_leaves_an_aligned_sequence_alone():
    sequence = ragged([3, 0, 5], 3, padding=2)
    assert sequence.right_aligned() is sequence


# ---- last, select, project, distinct items


@EXAMPLES
@given(lengths=lengths_of, padding=st.integers(0, 3), count=st.integers(0, 15), seed=seeds)
def test_last_keeps_the_newest_tokens(lengths, padding, count, seed):
    sequence = ragged(lengths, 3, seed, padding=padding)
    got = sequence.last(count)
    assert_rows(got, [row[max(len(row) - count, 0) :] for row in rows_of(sequence.vectors, sequence.mask)])
    assert got.lengths.tolist() == [min(length, count) for length in lengths]


def test_last_vectors_are_those_of_the_newest_items():
    sequence = ragged([3, 1, 5], 3, padding=2)
    newest = torch.stack([row[-1] for row in rows_of(sequence.vectors, sequence.mask)])
    assert torch.equal(sequence.last_vectors, newest)


@EXAMPLES
@given(lengths=lengths_of, seed=seeds, data=st.data())
def test_select_takes_the_given_rows_in_the_given_order(lengths, seed, data):
    rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=6))
    sequence = ragged(lengths, 3, seed)
    every = rows_of(sequence.vectors, sequence.mask)
    assert_rows(sequence.select(torch.tensor(rows, dtype=torch.long)), [every[row] for row in rows])


def test_project_equals_the_map_of_every_position_with_its_gradients():
    sequence = ragged([4, 0, 2], 3, padding=1)
    linear = nn.Linear(3, 5).double()
    got, want = sequence.project(linear), linear(sequence.vectors)
    torch.testing.assert_close(got, want, **EXACT)
    leaves = [sequence.items, *linear.parameters()]
    for grad, expected in zip(gradients(got, leaves), gradients(want, leaves), strict=True):
        torch.testing.assert_close(grad, expected, **EXACT)


@EXAMPLES
@given(values=st.lists(st.lists(st.integers(0, 20), min_size=3, max_size=3), min_size=1, max_size=6),
       dtype=st.sampled_from([torch.int32, torch.int64]))  # fmt: skip
def test_distinct_items_are_the_sorted_set_and_the_place_of_each_value(values, dtype):
    index = torch.tensor(values, dtype=dtype)
    rows, place = distinct_items(index, 21)
    assert rows.tolist() == sorted({value for row in values for value in row})
    assert place.dtype == torch.int64
    assert rows[place].tolist() == values


def test_a_sequence_of_given_vectors_returns_them():
    vectors = torch.randn(2, 4, 3)
    mask = torch.tensor([[False, True, True, True], [False, False, False, True]])
    sequence = Sequence.from_vectors(vectors, mask.float())
    assert torch.equal(sequence.vectors, vectors)
    assert sequence.mask.dtype == torch.bool
    assert sequence.lengths.tolist() == [3, 1]


def test_batches_of_no_rows_keep_their_columns():
    none = ragged([5], 3).select(torch.tensor([], dtype=torch.long))
    for align in ("right", "left"):
        assert windows_of(none, 4, 2, align=align).index.shape[0] == 0
    assert none.last(2).index.shape == (0, 2)


def test_batches_of_no_columns_have_no_windows_and_no_tokens():
    empty = Sequence.from_vectors(torch.zeros(3, 0, 2), torch.zeros(3, 0, dtype=torch.bool))
    assert empty.lengths.tolist() == [0, 0, 0]
    for align in ("right", "left"):
        assert not bool(windows_of(empty, 8, 4, align=align).mask.any())
    assert empty.right_aligned().index.shape == (3, 0)
    assert empty.last(5).index.shape == (3, 0)
