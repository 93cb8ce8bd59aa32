"""Reading parquet columns: what is a value, what is refused, and that a refusal says where."""

from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_zoo.errors import DataError
from model_zoo.pipeline import columns, parquet_files

FILE = "train.parquet"
lists_of_ids = st.lists(st.lists(st.integers(0, 9), max_size=6), max_size=12)


def series(values: Any, dtype: Any = None) -> pl.Series:
    return pl.Series("tags", values, dtype=dtype, strict=False)


def lists(*rows: Any, inner: Any = pl.Int64) -> pl.Series:
    return series(list(rows), pl.List(inner))


INTEGER_TYPES = [pl.Int8, pl.Int16, pl.Int32, pl.Int64, pl.UInt8, pl.UInt16, pl.UInt32, pl.UInt64]


@pytest.mark.parametrize("dtype", [*INTEGER_TYPES, pl.Float32, pl.Float64, pl.Decimal(10, 2)])
def test_whole_numbers_of_any_type_are_ids(dtype: Any) -> None:
    found = columns.ids(series([0, 1, 5], dtype), FILE, vocab_size=6)
    assert found.dtype == np.int32 and found.tolist() == [0, 1, 5]


def test_booleans_are_zero_and_one() -> None:
    assert columns.integers(series([True, False]), FILE).tolist() == [1, 0]
    assert columns.floats(series([True, False]), FILE).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("dtype", [pl.Int8, pl.UInt64, pl.Float32, pl.Float64, pl.Decimal(10, 2)])
def test_numbers_of_any_type_become_float32(dtype: Any) -> None:
    found = columns.floats(series([1, 2], dtype), FILE)
    assert found.dtype == np.float32 and found.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, 2.5], "column 'tags', row 1: 2.5 is not a whole number (1 such rows)"),
        ([1.0, float("nan"), float("nan")], "column 'tags', row 1: nan is not a whole number (2 such rows)"),
        ([float("inf")], "column 'tags', row 0: inf is not a whole number"),
        ([1, 2, None], "column 'tags', row 2: None is null; fill it or drop the row"),
        ([1, 2**63 + 5], "column 'tags', row 1: 9223372036854775813 is beyond 64-bit integers"),
        ([1e30], "column 'tags', row 0: 1e+30 is beyond 64-bit integers"),
        (["a"], "column 'tags' holds String, not numbers; encode it as numbers"),
        ([[1]], "column 'tags' holds List(Int64), not numbers"),
    ],
)
def test_what_is_no_integer_is_refused_with_file_column_and_row(values: list[Any], message: str) -> None:
    dtype = pl.UInt64 if values[-1] == 2**63 + 5 else None
    with pytest.raises(DataError) as refusal:
        columns.integers(series(values, dtype), FILE)
    assert f"{FILE}: {message}" in str(refusal.value) and "\n" not in str(refusal.value)


def test_dates_are_no_numbers() -> None:
    with pytest.raises(DataError, match=r"column 'tags' holds Datetime.*, not numbers"):
        columns.integers(series([1, 2]).cast(pl.Datetime), FILE)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_numbers_that_float32_cannot_hold_are_refused(value: float) -> None:
    with pytest.raises(DataError, match=r"column 'tags', row 1: \S+ is NaN, infinite or beyond float32"):
        columns.floats(series([1.0, value]), FILE)


def test_ids_outside_the_vocabulary_are_refused_at_both_ends() -> None:
    assert columns.ids(series([0, 4]), FILE, 5).tolist() == [0, 4]
    with pytest.raises(DataError, match=r"row 1: 5 is outside 0\.\.4; raise the column's vocab_size"):
        columns.ids(series([4, 5]), FILE, 5)
    with pytest.raises(DataError, match=r"row 0: -1 is negative; number the ids from 1, with 0 for padding"):
        columns.ids(series([-1, 4]), FILE, 5)


@given(lists_of_ids, st.integers(1, 7))
@settings(derandomize=True, deadline=None, max_examples=40)
def test_id_lists_keep_the_first_ids_and_end_in_zeros(rows: list[list[int]], max_len: int) -> None:
    table = columns.id_lists(lists(*rows), FILE, 10, max_len)
    expected = [(row + [0] * max_len)[:max_len] for row in rows]
    assert table.dtype == np.int32 and table.shape == (len(rows), max_len) and table.tolist() == expected


@given(lists_of_ids)
@settings(derandomize=True, deadline=None, max_examples=40)
def test_ragged_lists_come_apart_and_together_again(rows: list[list[int]]) -> None:
    values, offsets = columns.ragged(lists(*rows), FILE)
    flat = values.to_list()
    assert [flat[a:b] for a, b in pairwise(offsets)] == rows


def test_lists_that_are_all_empty_need_no_type() -> None:
    assert columns.id_lists(series([[], []]), FILE, 5, 2).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1], None], "row 1: None is null (write an empty list)"),
        ([[1], [], [2, None]], "row 2, position 1: None is null; fill it or drop the row (1 such values)"),
        ([[1], [], [2, 9]], "row 2, position 1: 9 is outside 0..4; raise the column's vocab_size (1 such values)"),
        ([[1], [-2]], "row 1, position 0: -2 is negative"),
        ([[1.0], [], [1.0, 2.5]], "row 2, position 1: 2.5 is not a whole number (1 such values)"),
        ([["a"]], "holds String, not numbers"),
        ([[[1]]], "holds List(Int64), not numbers"),
        ([1], "must hold lists, not Int64"),
    ],
)
def test_a_bad_id_inside_a_list_is_named_by_row_and_position(rows: list[Any], message: str) -> None:
    with pytest.raises(DataError) as refusal:
        columns.id_lists(series(rows), FILE, 5, 3)
    assert f"{FILE}: column 'tags'" in str(refusal.value) and message in str(refusal.value)


@pytest.mark.parametrize("dtype", [pl.List(pl.Float64), pl.Array(pl.Float32, 2), pl.List(pl.Int16)])
def test_vectors_are_float32_whatever_the_list_type(dtype: Any) -> None:
    found = columns.vectors(series([[1, 2], [3, 4]], dtype), FILE, 2)
    assert found.dtype == np.float32 and found.tolist() == [[1.0, 2.0], [3.0, 4.0]]


@pytest.mark.parametrize(
    ("rows", "width", "message"),
    [
        ([[1.0, 2.0], [3.0, 4.0], [1.0]], 2, "row 2: [1.0] is not a vector of 2 numbers; build the column again"),
        ([[1.0, 2.0], [1.0, 2.0]], 3, "row 0: [1.0, 2.0] is not a vector of 3 numbers; most rows hold 2: set"),
        ([[1.0], [2.0, 2.0], [3.0, 3.0]], None, "row 0: [1.0] is not a vector of 2 numbers"),
        ([[], []], None, "row 0: [] is not a vector of 1 numbers"),
        ([[1.0, 2.0], [3.0, float("nan")]], 2, "row 1: [3.0, nan] holds a value that is NaN, infinite"),
        ([[1.0, 2.0], [3.0, 1e300]], 2, "row 1: [3.0, 1e+300] holds a value that is NaN, infinite or beyond float32"),
        ([[1.0, 2.0], [None, 4.0]], 2, "row 1, position 0: None is null"),
    ],
)
def test_a_bad_vector_is_named_by_its_row(rows: list[Any], width: int | None, message: str) -> None:
    with pytest.raises(DataError) as refusal:
        columns.vectors(lists(*rows, inner=pl.Float64), FILE, width)
    assert f"{FILE}: column 'tags', {message}" in str(refusal.value)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([5, 3, 5], pl.Int64), ([5, 3, 5], pl.UInt8), ([2.5, 0.5, 2.5], pl.Float64), (["b", "a", "b"], pl.String),
        (["b", "a", "b"], pl.Categorical), ([2**63 + 9, 3, 2**63 + 9], pl.UInt64), ([True, False, True], pl.Boolean),
        ([Decimal("2.5"), Decimal("0.5"), Decimal("2.5")], pl.Decimal(5, 2)),
    ],
)  # fmt: skip
def test_groups_are_equal_where_the_ids_are(values: list[Any], dtype: Any) -> None:
    found = columns.groups(series(values, dtype), FILE)
    assert found.dtype == np.int64 and found[0] == found[2] != found[1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["a", None], "row 1: None is null; give"),
        ([1.0, float("nan")], "row 1: nan is NaN; give"),
        ([[1]], "one id per"),
    ],
)
def test_rows_without_a_group_are_refused(values: list[Any], message: str) -> None:
    with pytest.raises(DataError) as refusal:
        columns.groups(series(values), FILE)
    assert message in str(refusal.value)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.parquet"
    pq.write_table(pa.table({"user_index": [0, 1], "seq_len": [3, 4], "name": ["a", "b"]}), path)
    return path


def test_only_the_named_columns_are_read(good: Path) -> None:
    assert parquet_files.read_table(str(good), ["seq_len"]).columns == ["seq_len"]
    assert parquet_files.column_names(str(good)) == ["user_index", "seq_len", "name"]
    assert parquet_files.row_count(str(good)) == 2


def test_a_path_is_taken_literally(good: Path, tmp_path: Path) -> None:
    odd = tmp_path / "a[1]*?" / "day=3"
    odd.mkdir(parents=True)
    path = good.rename(odd / "good.parquet")
    assert parquet_files.read_table(str(path), ["seq_len"]).shape == (2, 1)


def test_a_missing_column_is_refused_with_the_nearest_name(good: Path) -> None:
    with pytest.raises(DataError) as refusal:
        parquet_files.read_table(str(good), ["user_index", "user_indx"])
    expected = "no column 'user_indx' (did you mean 'user_index'?); it has user_index, seq_len, name"
    assert str(refusal.value) == f"{good}: {expected}"
    with pytest.raises(DataError, match="no column 'zzz'; it has"):
        parquet_files.read_table(str(good), ["zzz"])


@pytest.mark.parametrize(
    "read", [parquet_files.column_names, parquet_files.row_count, lambda path: parquet_files.read_table(path, ["a"])]
)
def test_a_missing_file_is_refused_with_the_way_to_get_it(read: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.parquet: no such file; see data/README\.md"):
        read(str(tmp_path / "absent.parquet"))


@pytest.mark.parametrize("content", ["empty", "text", "half", "tail cut", "folder"])
def test_a_file_that_is_no_parquet_file_is_refused_in_one_sentence(content: str, good: Path) -> None:
    whole = good.read_bytes()
    good.unlink()
    contents = {
        "empty": b"",
        "text": b"user_index,label\n0,1\n",
        "half": whole[: len(whole) // 2],
        "tail cut": whole[:-9],
    }
    good.mkdir() if content == "folder" else good.write_bytes(contents[content])
    reads = (parquet_files.column_names, parquet_files.row_count, lambda path: parquet_files.read_table(path, ["a"]))
    for read in reads:
        with pytest.raises(DataError, match=r"good\.parquet: not a readable parquet file \(.*\); copy") as refusal:
            read(str(good))
        assert "\n" not in str(refusal.value)


def test_damage_inside_a_file_gives_a_refusal_or_a_table_never_a_crash(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "damaged.parquet"
    rows = [rng.integers(1, 99, 5).tolist() for _ in range(500)]
    pq.write_table(pa.table({"user_index": list(range(500)), "full_item_seq": rows}), path)
    whole = path.read_bytes()
    outcomes = set()
    for _ in range(40):
        damaged = bytearray(whole)
        start = int(rng.integers(4, len(whole) - 60))
        damaged[start : start + 50] = rng.integers(0, 256, 50, dtype=np.uint8).tobytes()
        path.write_bytes(damaged)
        try:
            parquet_files.read_table(str(path), ["user_index", "full_item_seq"])
            outcomes.add("table")
        except DataError:
            outcomes.add("refusal")
    assert "refusal" in outcomes
