"""Parquet columns to checked numpy arrays: ids, labels, numbers, lists; every refusal names file, column and row."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import polars as pl

from model_zoo.errors import DataError

Array = npt.NDArray[np.generic]


def read_table(path: str, columns: Sequence[str]) -> pl.DataFrame:
    """The named columns of a parquet file.

    Raises:
        DataError: missing file, unreadable file, missing column.
    """
    if not os.path.exists(path):
        raise DataError(f"{path}: no such file; see data/README.md for how to get or build the data set")
    try:
        present = pl.read_parquet_schema(path)
        missing = [name for name in columns if name not in present]
        if missing:
            near = difflib.get_close_matches(missing[0], list(present), n=1)
            hint = f" (did you mean '{near[0]}'?)" if near else ""
            raise DataError(f"{path}: no column '{missing[0]}'{hint}; it has {', '.join(present)}")
        return pl.read_parquet(path, columns=list(columns))
    except (pl.exceptions.PolarsError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: not a readable parquet file ({reason}); copy or build it again") from None


def integers(series: pl.Series, path: str) -> npt.NDArray[np.int64]:
    """A column of whole numbers, stored as integer, float or bool, as int64 ``[N]``.

    Raises:
        DataError: null, NaN, fraction, or another type.
    """
    values = _numbers(series, path)
    if values.dtype.kind == "f":
        whole = np.rint(values)
        _refuse(~(np.isfinite(values) & (values == whole)), series, path, "is not a whole number")
        values = whole
    return values.astype(np.int64)


def floats(series: pl.Series, path: str) -> npt.NDArray[np.float32]:
    """A numeric column as finite float32 ``[N]``.

    Raises:
        DataError: null, NaN or infinite value, or another type.
    """
    values = _numbers(series, path)
    _refuse(~np.isfinite(values), series, path, "is NaN or infinite")
    return values.astype(np.float32)


def ids(series: pl.Series, path: str, vocab_size: int, what: str = "vocab_size") -> npt.NDArray[np.int32]:
    """An id column as int32 ``[N]`` within ``[0, vocab_size)``.

    Raises:
        DataError: as `integers`, or an id out of range.
    """
    values = integers(series, path)
    _refuse((values < 0) | (values >= vocab_size), series, path, f"is outside 0..{vocab_size - 1}; {what} is too small")
    return values.astype(np.int32)


def id_lists(series: pl.Series, path: str, vocab_size: int, max_len: int) -> npt.NDArray[np.int32]:
    """A column of id lists as int32 ``[N, max_len]``: the first ``max_len`` ids, zeros behind shorter lists.

    Raises:
        DataError: not a list column, a null list, or an id that `ids` would refuse.
    """
    values, offsets = ragged(series, path)
    flat = ids(pl.Series(series.name, values), path, vocab_size)
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
    wanted = width or (int(lengths[0]) if len(lengths) else 0)
    _refuse(lengths != wanted, series, path, f"is not a vector of {wanted} numbers (set embedding_dim or pretrain_dim)")
    numbers = _numbers(values, path).astype(np.float32).reshape(len(series), wanted)
    _refuse(~np.isfinite(numbers).all(1), series, path, "holds a NaN or infinite value")
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
    inner = series.dtype.inner
    values = nonempty.explode() if len(nonempty) else pl.Series(series.name, [], dtype=inner)
    return values.alias(series.name), offsets


def _numbers(series: pl.Series, path: str) -> Array:
    """The values of a numeric or boolean column without nulls."""
    if not (series.dtype.is_numeric() or series.dtype == pl.Boolean):
        raise DataError(f"{path}: column '{series.name}' holds {series.dtype}, not numbers; encode it as integers")
    _refuse(series.is_null().to_numpy(), series, path, "is null")
    return series.to_numpy()


def _refuse(bad: Array, series: pl.Series, path: str, reason: str) -> None:
    """Raise for the first row where ``bad``."""
    if bad.any():
        row = int(np.argmax(bad))
        value = series[row] if row < len(series) else None
        shown = str(value.to_list()[:8] if isinstance(value, pl.Series) else value)
        raise DataError(f"{path}: column '{series.name}', row {row}: {shown} {reason} ({int(bad.sum())} such rows)")
