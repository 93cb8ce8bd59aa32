"""Histories read by row groups, kept in memory or mapped from a file that is written once and whole."""

import os
import pickle
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from conftest import in_groups

from model_zoo.errors import DataError
from model_zoo.pipeline.histories import Histories, read_bounded_histories, read_histories


def users(path: Path, rows: list[list[int]], order: list[int] | None = None, row_group_size: int = 2) -> str:
    order = list(range(len(rows))) if order is None else order
    table = {"user_index": order, "full_item_seq": [rows[user] for user in order]}
    in_groups(pl.DataFrame(table, schema_overrides={"full_item_seq": pl.List(pl.Int64)}), path, row_group_size)
    return str(path)


ROWS = [[1, 2, 3], [], [4], [5, 6], [], [7, 8, 9, 1]]


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 3, 1, 0, 2, 4], [2, 3, 0, 1, 4, 5]])
@pytest.mark.parametrize("limit", [0, 10**6])
def test_histories_in_parts_in_memory_or_mapped(tmp_path: Path, order: list[int], limit: int) -> None:
    path = users(tmp_path / "user_info.parquet", ROWS, order)
    whole = read_histories(path, 10)
    found = read_bounded_histories(path, 10, limit, str(tmp_path / "cache"))
    assert whole.items.tolist() == [item for row in ROWS for item in row]
    assert whole.offsets.tolist() == [0, 3, 3, 4, 6, 6, 10]
    np.testing.assert_array_equal(found.items, whole.items, strict=True)
    np.testing.assert_array_equal(found.offsets, whole.offsets, strict=True)
    assert (found.folder is not None) == (limit == 0)


def test_users_without_an_index_are_numbered_across_row_groups(tmp_path: Path) -> None:
    path = users(tmp_path / "user_info.parquet", ROWS)
    in_groups(pl.read_parquet(path).drop("user_index"), path, 2)
    found = read_bounded_histories(path, 10, 10**6, str(tmp_path / "cache"))
    assert found.items.tolist() == [item for row in ROWS for item in row] and found.offsets.tolist()[-1] == 10


def test_mapped_histories_are_written_once_and_named_by_their_content(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    path = users(tmp_path / "user_info.parquet", ROWS)
    first = read_bounded_histories(path, 10, 0, str(cache))
    assert first.folder is not None
    written = os.stat(os.path.join(first.folder, "items.npy")).st_mtime_ns
    again = read_bounded_histories(path, 10, 0, str(cache))
    assert again.folder == first.folder
    assert os.stat(os.path.join(first.folder, "items.npy")).st_mtime_ns == written
    other = read_bounded_histories(users(tmp_path / "user_info.parquet", ROWS[:3]), 10, 0, str(cache))
    assert other.folder != first.folder and other.offsets.tolist() == [0, 3, 3, 4]
    assert sorted(os.listdir(cache)) == sorted(os.path.basename(str(one.folder)) for one in (first, other))


def test_histories_with_a_fault_leave_nothing_behind(tmp_path: Path) -> None:
    path = users(tmp_path / "user_info.parquet", [*ROWS, [3, 99]], [0, 1, 6, 2, 3, 4, 5])
    with pytest.raises(DataError, match="user_index 6, position 1: item 99 is not in item_info"):
        read_bounded_histories(path, 10, 0, str(tmp_path / "cache"))
    assert os.listdir(tmp_path / "cache") == []
    users(tmp_path / "user_info.parquet", ROWS)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="histories that exceed memory_limit_mib go there: set data_root"):
        read_bounded_histories(path, 10, 0, str(tmp_path / "file"))


def test_mapped_histories_go_to_other_processes_as_a_name(tmp_path: Path) -> None:
    path = users(tmp_path / "user_info.parquet", [[1] * 50_000, [2, 3]])
    found = read_bounded_histories(path, 10, 0, str(tmp_path / "cache"))
    sent = pickle.dumps(found)
    assert len(sent) < 1000
    copy: Histories = pickle.loads(sent)
    np.testing.assert_array_equal(copy.items, found.items, strict=True)
    np.testing.assert_array_equal(copy.offsets, found.offsets, strict=True)
