"""Parquet columns to checked numpy arrays: ids, labels, numbers, lists; every refusal names file, column and row."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from model_zoo.errors import DataError

Array = npt.NDArray[np.generic]
Offsets = npt.NDArray[np.int64]

#: one more than the largest int64, exact as a float
TOO_LARGE = 2.0**63
#: integer types whose values may not fit into int64
BEYOND_INT64 = tuple(getattr(pl, name) for name in ("UInt64", "Int128", "UInt128") if hasattr(pl, name))


class FilePart(str):
    """A file's path together with the number of the first row that was read, which messages about rows count from."""

    first_row: int

    def __new__(cls, path: str, first_row: int) -> FilePart:
        part = super().__new__(cls, path)
        part.first_row = first_row
        return part


def row_name(path: str, row: int) -> str:
    """``row N``, N being the number in the whole file."""
    return f"row {getattr(path, 'first_row', 0) + row}"


def such(path: str, bad: Array, what: str) -> str:
    """How many, and where they were counted."""
    within = " in its row group" if isinstance(path, FilePart) else ""
    return f"{int(bad.sum())} such {what}{within}"


def column_names(path: str) -> list[str]:
    """The columns of a parquet file.

    Raises:
        DataError: missing or unreadable file.
    """
    with _readable(path):
        return _scan(path).collect_schema().names()


def read_table(path: str, columns: Sequence[str], rows: tuple[int, int] | None = None) -> pl.DataFrame:
    """The named columns of a parquet file.

    Args:
        rows: first row and the row behind the last; default: all. Only row groups that hold some of them are decoded.

    Raises:
        DataError: missing file, unreadable file, missing column.
    """
    present = column_names(path)
    missing = [name for name in columns if name not in present]
    if missing:
        near = difflib.get_close_matches(missing[0], present, n=1)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        raise DataError(f"{path}: no column '{missing[0]}'{hint}; it has {', '.join(present)}")
    with _readable(path):
        scan = _scan(path) if rows is None else _scan(path).slice(rows[0], rows[1] - rows[0])
        return scan.select(columns).collect()


def row_count(path: str) -> int:
    """Rows of a parquet file, from its footer.

    Raises:
        DataError: missing or unreadable file.
    """
    with _readable(path):
        return int(_scan(path).select(pl.len()).collect().item())


def row_groups(path: str) -> list[int]:
    """Where the row groups of a parquet file begin, and the number of its rows, from its footer.

    Raises:
        DataError: missing or unreadable file.
    """
    with _readable(path):
        footer = pq.read_metadata(path)
        sizes = [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]
    return [0, *np.cumsum([size for size in sizes if size]).tolist()]


def _scan(path: str) -> pl.LazyFrame:
    """The file of this very name, whatever ``*``, ``[`` or ``=`` its path holds."""
    return pl.scan_parquet(path, glob=False, hive_partitioning=False)


@contextmanager
def _readable(path: str) -> Iterator[None]:
    """A file that cannot be read is the user's error."""
    if not os.path.exists(path):
        raise DataError(f"{path}: no such file; see data/README.md for how to get or build the data set")
    try:
        yield
    except (pl.exceptions.PolarsError, pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: not a readable parquet file ({reason}); copy or build it again") from None


def integers(series: pl.Series, path: str, offsets: Offsets | None = None) -> npt.NDArray[np.int64]:
    """A column of whole numbers, stored as integer, float or bool, as int64 ``[N]``.

    Args:
        offsets: of the rows, if the column holds the flat values of `ragged`; for the error message.

    Raises:
        DataError: null, NaN, fraction, beyond int64, or another type.
    """
    values = _numbers(series, path, offsets)
    if values.dtype.kind == "f":
        whole = np.rint(values)
        _refuse(~(np.isfinite(values) & (values == whole)), series, path, "is not a whole number", offsets)
        values = whole
    if values.dtype.kind == "f" or values.dtype == np.uint64:
        size = values.astype(np.float64)
        _refuse((size < -TOO_LARGE) | (size >= TOO_LARGE), series, path, "is beyond 64-bit integers", offsets)
    return values.astype(np.int64)


def floats(series: pl.Series, path: str) -> npt.NDArray[np.float32]:
    """A numeric column as finite float32 ``[N]``.

    Raises:
        DataError: null, NaN or infinite value, one beyond float32, or another type.
    """
    values = _float32(series, path)
    _refuse(~np.isfinite(values), series, path, "is NaN, infinite or beyond float32")
    return values


def ids(series: pl.Series, path: str, vocab_size: int, offsets: Offsets | None = None) -> npt.NDArray[np.int32]:
    """An id column as int32 ``[N]`` within ``[0, vocab_size)``.

    Args:
        offsets: as in `integers`.

    Raises:
        DataError: as `integers`, or an id out of range.
    """
    values = integers(series, path, offsets)
    _refuse(values < 0, series, path, "is negative; number the ids from 1, with 0 for padding", offsets)
    beyond = f"is outside 0..{vocab_size - 1}; raise the column's vocab_size"
    _refuse(values >= vocab_size, series, path, beyond, offsets)
    return values.astype(np.int32)


def groups(series: pl.Series, path: str, distinct: pl.Series | None = None) -> npt.NDArray[np.int64]:
    """A column of group ids of any scalar type as int64 ``[N]``, equal where the ids are.

    Args:
        distinct: every id of the file, once, if ``series`` is a part of the file whose ids may need numbering.

    Raises:
        DataError: null, NaN, or a list.
    """
    if series.dtype.is_nested():
        raise DataError(f"{path}: column '{series.name}' holds {series.dtype}; a group_id column holds one id per row")
    _refuse(series.is_null().to_numpy(), series, path, "is null; give every row a group")
    if series.dtype.is_float():
        _refuse(series.is_nan().to_numpy(), series, path, "is NaN; give every row a group")
    if distinct is not None:
        return series.replace_strict(distinct, groups(distinct, path), return_dtype=pl.Int64).to_numpy()
    if series.dtype.is_numeric():
        with suppress(DataError):  # fractions, and hashes beyond int64, are numbered below
            return integers(series, path)
    return series.rank("dense").cast(pl.Int64).to_numpy()


def distinct_groups(path: str, column: str, bounds: Sequence[int]) -> pl.Series | None:
    """Every group id of a file once, read by row groups; None if they are whole numbers, which need no numbering.

    Args:
        bounds: from `row_groups`.
    """
    found: pl.Series | None = None
    for start, end in pairwise(bounds):
        series = read_table(path, [column], (start, end))[column]
        if series.dtype.is_nested() or (series.dtype.is_integer() and series.dtype not in BEYOND_INT64):
            return None
        known = series.drop_nulls().drop_nans().unique() if series.dtype.is_float() else series.drop_nulls().unique()
        found = known if found is None else pl.concat([found, known]).unique()
    return None if found is None else found.sort()


def id_lists(series: pl.Series, path: str, vocab_size: int, max_len: int) -> npt.NDArray[np.int32]:
    """A column of id lists as int32 ``[N, max_len]``: the first ``max_len`` ids, zeros behind shorter lists.

    Raises:
        DataError: not a list column, a null list, or an id that `ids` would refuse.
    """
    values, offsets = ragged(series, path)
    flat = ids(values, path, vocab_size, offsets)
    lengths = np.minimum(np.diff(offsets), max_len)
    table = np.zeros((len(series), max_len), dtype=np.int32)
    column = np.arange(max_len)
    inside = column < lengths[:, None]
    source = offsets[:-1, None] + column
    table[inside] = flat[source[inside]]
    return table


def vectors(series: pl.Series, path: str, width: int | None = None) -> npt.NDArray[np.float32]:
    """A column of equally long float lists as float32 ``[N, m]``.

    Raises:
        DataError: lists of different lengths, of another width than asked for, or a NaN or infinite value.
    """
    values, offsets = ragged(series, path)
    lengths = np.diff(offsets)
    usual = int(np.bincount(lengths, minlength=2)[1:].argmax()) + 1
    wanted = width or usual
    fix = "build the column again" if wanted == usual else f"most rows hold {usual}: set embedding_dim or pretrain_dim"
    _refuse(lengths != wanted, series, path, f"is not a vector of {wanted} numbers; {fix}")
    numbers = _float32(values, path, offsets).reshape(len(series), wanted)
    bad = ~np.isfinite(numbers).all(axis=1).reshape(-1)
    _refuse(bad, series, path, "holds a value that is NaN, infinite or beyond float32")
    return numbers


def ragged(series: pl.Series, path: str) -> tuple[pl.Series, npt.NDArray[np.int64]]:
    """A list column as its values, flat, and int64 offsets ``[N + 1]``.

    Raises:
        DataError: not a list column, or a null list.
    """
    if isinstance(series.dtype, pl.Array):
        series = series.arr.to_list()
    if not isinstance(series.dtype, pl.List):
        raise DataError(f"{path}: column '{series.name}' must hold lists, not {series.dtype}")
    _refuse(series.is_null().to_numpy(), series, path, "is null (write an empty list)")
    lengths = series.list.len().to_numpy().astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    nonempty = series.filter(pl.Series(lengths > 0))
    if not len(nonempty):
        inner = series.dtype.inner
        return pl.Series(series.name, [], dtype=pl.Int64 if inner == pl.Null else inner), offsets
    return nonempty.explode().alias(series.name), offsets


def _numbers(series: pl.Series, path: str, offsets: Offsets | None = None) -> Array:
    """The values of a numeric or boolean column without nulls."""
    if not (series.dtype.is_numeric() or series.dtype == pl.Boolean):
        raise DataError(f"{path}: column '{series.name}' holds {series.dtype}, not numbers; encode it as numbers")
    _refuse(series.is_null().to_numpy(), series, path, "is null; fill it or drop the row", offsets)
    if series.dtype.is_decimal() or str(series.dtype) in ("Int128", "UInt128"):  # numpy has neither
        series = series.cast(pl.Float64)
    return series.to_numpy()


def _float32(series: pl.Series, path: str, offsets: Offsets | None = None) -> npt.NDArray[np.float32]:
    """The values of a numeric column; infinite where float32 does not reach."""
    with np.errstate(over="ignore"):
        return _numbers(series, path, offsets).astype(np.float32)


def _refuse(bad: Array, series: pl.Series, path: str, reason: str, offsets: Offsets | None = None) -> None:
    """Raise for the first value where ``bad``; with ``offsets`` the values are the flat ones of a list column."""
    if not bad.any():
        return
    place = int(np.argmax(bad))
    value = series[place]
    shown = str(value.to_list()[:8] if isinstance(value, pl.Series) else value)
    row, what = row_name(path, place), "rows"
    if offsets is not None:
        number = int(np.searchsorted(offsets, place, side="right")) - 1
        row, what = f"{row_name(path, number)}, position {place - offsets[number]}", "values"
    raise DataError(f"{path}: column '{series.name}', {row}: {shown} {reason} ({such(path, bad, what)})")
