"""Parquet columns to checked numpy arrays: ids, labels, numbers, lists; every refusal names file, column and row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import polars as pl

from model_zoo.errors import DataError
from model_zoo.pipeline.parquet_files import read_table

Array = npt.NDArray[np.generic]
Integers = npt.NDArray[np.int64]

#: one more than the largest int64, exact as a float
TOO_LARGE = 2.0**63
#: integer types whose values may not fit into int64
BEYOND_INT64 = tuple(getattr(pl, name) for name in ("UInt64", "Int128", "UInt128") if hasattr(pl, name))


class FilePart(str):
    """A file's path together with which of its rows were read, which messages about rows count from."""

    first_row: int
    kept: Integers | None

    def __new__(cls, path: str, first_row: int, kept: Integers | None = None) -> FilePart:
        """``kept``: int64 ``[N]``, the rows counted from ``first_row``, if they are not all that follow it."""
        part = super().__new__(cls, path)
        part.first_row, part.kept = first_row, kept
        return part


class ValueFault(DataError):
    """Values of a column that cannot be.

    Attributes:
        column: the column.
        place: where the first of them stands.
        value: the first of them.
        reason: what is wrong, and the fix.
        count: how many there are in what was read.
        rows: bool ``[N]``, the rows that hold one.
    """

    def __init__(self, path: str, column: str, place: str, value: str, reason: str, bad: Array, rows: Array, what: str):
        self.column, self.place, self.value, self.reason, self.rows = column, place, value, reason, rows
        self.count = int(bad.sum())
        within = " in its row group" if isinstance(path, FilePart) else ""
        super().__init__(f"{path}: column '{column}', {place}: {value} {reason} ({self.count} such {what}{within})")


def row_numbers(path: str, rows: int) -> Integers:
    """Numbers in the whole file of the rows that were read."""
    kept = getattr(path, "kept", None)
    return getattr(path, "first_row", 0) + (np.arange(rows) if kept is None else kept)


def row_name(path: str, row: int) -> str:
    """``row N``, N being the number in the whole file."""
    return f"row {row_numbers(path, row + 1)[row]}"


def refuse(
    bad: Array, values: Array | pl.Series, path: str, column: str, reason: str, shown: str = "{}"
) -> None:
    """Refuse the values of a column, one a row, where ``bad``.

    Args:
        shown: how the first of them is put before the reason.

    Raises:
        ValueFault: there are some.
    """
    if bad.any():
        row = int(np.argmax(bad))
        said = shown.format(_text(values[row]))
        raise ValueFault(path, column, row_name(path, row), said, reason, bad, bad, "rows")


def refuse_in_lists(
    bad: Array, values: Array | pl.Series, offsets: Integers, path: str, column: str, reason: str,
    shown: str = "{}", name: Callable[[int], str] | None = None, what: str = "values",
) -> None:
    """Refuse the flat values of a list column where ``bad``.

    Args:
        offsets: of the rows, from `ragged`.
        shown: as for `refuse`.
        name: calls a row, by its number in what was read, what the user knows it as.

    Raises:
        ValueFault: there are some.
    """  # fmt: skip
    if bad.any():
        place = int(np.argmax(bad))
        owners = np.searchsorted(offsets, np.flatnonzero(bad), side="right") - 1
        rows = np.zeros(len(offsets) - 1, dtype=bool)
        rows[owners] = True
        row = int(owners[0])
        where = f"{name(row) if name else row_name(path, row)}, position {place - offsets[row]}"
        raise ValueFault(path, column, where, shown.format(_text(values[place])), reason, bad, rows, what)


def _text(value: object) -> str:
    return str(value.to_list()[:8] if isinstance(value, pl.Series) else value)


def integers(series: pl.Series, path: str, offsets: Integers | None = None) -> npt.NDArray[np.int64]:
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


def ids(series: pl.Series, path: str, vocab_size: int, offsets: Integers | None = None) -> npt.NDArray[np.int32]:
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


def times(series: pl.Series, path: str) -> pl.Series:
    """A column of times, stored as dates or as numbers, as int64 or float64 ``[N]``.

    Raises:
        DataError: null, NaN or infinite value, or another type.
    """
    _refuse(series.is_null().to_numpy(), series, path, "is null; fill it or drop the row")
    if series.dtype.is_temporal():
        return series.to_physical().cast(pl.Int64)
    if not series.dtype.is_numeric():
        raise DataError(f"{path}: column '{series.name}' holds {series.dtype}, not times; write numbers or dates")
    if series.dtype.is_integer() and series.dtype not in BEYOND_INT64:
        return series.cast(pl.Int64)
    found = series.cast(pl.Float64)
    _refuse(~np.isfinite(found.to_numpy()), series, path, "is no time; fill it or drop the row")
    return found


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


def _numbers(series: pl.Series, path: str, offsets: Integers | None = None) -> Array:
    """The values of a numeric or boolean column without nulls."""
    if not (series.dtype.is_numeric() or series.dtype == pl.Boolean):
        raise DataError(f"{path}: column '{series.name}' holds {series.dtype}, not numbers; encode it as numbers")
    _refuse(series.is_null().to_numpy(), series, path, "is null; fill it or drop the row", offsets)
    if series.dtype.is_decimal() or str(series.dtype) in ("Int128", "UInt128"):  # numpy has neither
        series = series.cast(pl.Float64)
    return series.to_numpy()


def _float32(series: pl.Series, path: str, offsets: Integers | None = None) -> npt.NDArray[np.float32]:
    """The values of a numeric column; infinite where float32 does not reach."""
    with np.errstate(over="ignore"):
        return _numbers(series, path, offsets).astype(np.float32)


def _refuse(bad: Array, series: pl.Series, path: str, reason: str, offsets: Integers | None = None) -> None:
    """Refuse values of a series where ``bad``; with ``offsets`` they are the flat ones of a list column."""
    if offsets is None:
        refuse(bad, series, path, str(series.name), reason)
    else:
        refuse_in_lists(bad, series, offsets, path, str(series.name), reason)
