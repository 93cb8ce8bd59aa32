"""Times of events beside the items of histories: read, checked, cut and carried in the same way."""

import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_zoo.batch import Batch, neighbours_histories
from model_zoo.errors import DataError
from model_zoo.pipeline.dataset import CTRDataset
from model_zoo.pipeline.histories import Histories, read_bounded_histories, read_histories
from model_zoo.pipeline.loader import SequenceLoader, gather_histories
from model_zoo.pipeline.resident import ResidentLoader

ITEMS = [[1, 2, 3], [], [4], [5, 6], [], [7, 8, 9, 1]]
TIMES = [[5, 5, 90], [], [7], [100, 2000], [], [-3, 0, 1, 10**10]]
FLAT = [time for row in TIMES for time in row]


def users(path: Path, times: Any = TIMES, order: Any = range(6)) -> str:
    table = {"user_index": list(order), "full_item_seq": [ITEMS[u] for u in order], "seen": [times[u] for u in order]}
    pl.DataFrame(table, schema_overrides={"full_item_seq": pl.List(pl.Int64)}).write_parquet(path, row_group_size=2)
    return str(path)


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 3, 1, 0, 2, 4]])
@pytest.mark.parametrize("limit", [0, 10**6])
def test_times_lie_as_their_items_do_in_memory_or_mapped(tmp_path: Path, order: list[int], limit: int) -> None:
    path = users(tmp_path / "user_info.parquet", order=order)
    whole = read_histories(path, 10, time_col="seen")
    assert whole.times is not None and whole.times.tolist() == FLAT and whole.times.dtype == np.int64
    assert whole.items.tolist() == [item for row in ITEMS for item in row]
    cache = tmp_path / "cache"
    found = read_bounded_histories(path, 10, limit, str(cache), "seen")
    assert (found.folder is not None) == (limit == 0)
    np.testing.assert_array_equal(found.times, whole.times, strict=True)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(found)).times, whole.times, strict=True)
    without = read_bounded_histories(path, 10, limit, str(cache))
    assert without.times is None and read_histories(path, 10).times is None
    if limit == 0:  # each its own folder, found again
        assert without.folder != found.folder
        again = read_bounded_histories(path, 10, limit, str(cache), "seen")
        assert again.folder == found.folder and again.times is not None and again.times.tolist() == FLAT
        assert sorted(os.listdir(str(found.folder))) == ["items.npy", "offsets.npy", "times.npy"]


def test_a_bound_that_holds_the_items_alone_does_not_hold_their_times(tmp_path: Path) -> None:
    path = users(tmp_path / "user_info.parquet")
    assert read_bounded_histories(path, 10, 40, str(tmp_path / "cache")).folder is None
    assert read_bounded_histories(path, 10, 40, str(tmp_path / "cache"), "seen").folder is not None


@pytest.mark.parametrize(
    "user, times, message",
    [
        (5, [1, 2, 3], "'seen', user_index 5: 3 times for 4 events of full_item_seq; write one for each"),
        (0, [5, 4, 90], "user_index 0, position 1: time 4 is before the event in front of it; sort each history"),
        (3, [1.7e12, 1.8e12], r"user_index 3, position 0: time 1700000000000 is no time in seconds; divide milliseconds"),
        (3, [1.5, 2], "is not a whole number"),
        (2, [None], "is null"),
        (2, None, r"is null \(write an empty list\)"),
    ],
)
def test_times_that_do_not_fit_are_refused_by_user(tmp_path: Path, user: int, times: Any, message: str) -> None:
    wrong = [times if number == user else row for number, row in enumerate(TIMES)]
    path = tmp_path / "user_info.parquet"
    floats = times is not None and any(isinstance(time, float) for time in times)
    users(path, [None if row is None else [*map(float, row)] for row in wrong] if floats else wrong)
    with pytest.raises(DataError, match=message):
        read_histories(str(path), 10, time_col="seen")
    with pytest.raises(DataError, match="no column 'sen' \\(did you mean 'seen'"):
        read_histories(str(path), 10, time_col="sen")


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 12), st.data())
@settings(derandomize=True, deadline=None, max_examples=60)
def test_times_are_cut_as_items_are(lengths: list[int], max_len: int, data: st.DataObject) -> None:
    total = sum(lengths)
    items, offsets = np.arange(1, total + 1, dtype=np.int32), np.concatenate([[0], np.cumsum(lengths)])
    histories = Histories(items, offsets, None, items.astype(np.int64) * 10**9)
    chosen = np.array(data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=6)), np.int32)
    seq_len = np.array([data.draw(st.integers(0, lengths[user])) for user in chosen], np.int32)
    wanted = (histories, chosen, seq_len, max_len)
    times = gather_histories(*wanted, times=True)
    np.testing.assert_array_equal(times, gather_histories(*wanted).astype(np.int64) * 10**9, strict=True)


@pytest.fixture(scope="module")
def timed_dataset(tiny_dataset: CTRDataset) -> CTRDataset:
    """The tiny data set, an event's time being its item times 10**9."""
    times = tiny_dataset.histories.items.astype(np.int64) * 10**9
    return replace(tiny_dataset, histories=replace(tiny_dataset.histories, times=times))


@pytest.mark.parametrize("loader", [SequenceLoader, ResidentLoader])
def test_loaders_carry_times(timed_dataset: CTRDataset, tiny_dataset: CTRDataset, loader: type) -> None:
    options: Any = {"shuffle": True, "seed": 1, "device": "cpu"}
    batch = next(iter(loader(timed_dataset, "train", 64, 20, **options)))
    plain = next(iter(loader(tiny_dataset, "train", 64, 20, **options)))
    assert torch.equal(batch.history, plain.history) and plain.history_time is None
    assert torch.equal(batch.history_time, batch.history.long() * 10**9)
    rows = torch.tensor([3, 0])
    assert torch.equal(batch.select(rows).history_time, batch.history_time[rows])
    meta = batch.to(torch.device("meta"))
    assert meta.history_time.device.type == "meta" and plain.to(torch.device("meta")).history_time is None


def batch_of(history: list[list[int]], times: list[list[int]] | None) -> Batch:
    rows = len(history)
    given = None if times is None else torch.tensor(times)
    target, label = torch.ones(rows, dtype=torch.int32), torch.ones(rows)
    return Batch(torch.tensor(history, dtype=torch.int32), target, {}, label, None, torch.arange(rows), history_time=given)


def test_neighbours_share_a_history_only_if_its_times_are_the_same() -> None:
    history = [[0, 3, 3]] * 4 + [[1, 2, 3]] * 4
    times = [[0, 1, 2]] * 4 + [[1, 2, 3]] * 2 + [[1, 2, 9]] * 2
    shared = batch_of(history, times).sharing_neighbours()
    assert shared.owner is not None and shared.owner.tolist() == [0, 0, 0, 0, 1, 1, 2, 2]
    assert shared.history.tolist() == [[0, 3, 3], [1, 2, 3], [1, 2, 3]]
    assert shared.history_time is not None and shared.history_time.tolist() == [[0, 1, 2], [1, 2, 3], [1, 2, 9]]
    kept = shared.select(torch.tensor([7, 0]))
    assert torch.equal(kept.history_time, shared.history_time) and kept.owner.tolist() == [2, 0]
    plain = batch_of(history, None).sharing_neighbours()
    assert plain.owner is not None and plain.owner.tolist() == [0] * 4 + [1] * 4 and plain.history_time is None
    assert shared.sharing_neighbours() is shared
    different = batch_of(history, [[n, n, n] for n in range(8)])
    assert different.sharing_neighbours() is different
    assert neighbours_histories(different.history, different.history_time) is None
