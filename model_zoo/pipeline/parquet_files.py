"""Parquet files: opened, checked against their own footer, and read by row groups; a damaged one gets one sentence."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from typing import cast

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from model_zoo.errors import DataError, UserError

#: raised by the Rust code of polars where data surprise it; no Exception
PanicException = pl.exceptions.PanicException


def column_names(path: str) -> list[str]:
    """The columns of a parquet file.

    Raises:
        DataError: missing or unreadable file.
    """
    with readable(path), pq.ParquetFile(path) as file:  # pyarrow before 25 leaves read_schema's footers to the collector
        return file.schema_arrow.names


def read_table(path: str, columns: Sequence[str], rows: tuple[int, int] | None = None) -> pl.DataFrame:
    """The named columns of a parquet file.

    pyarrow decodes them, as polars prints the stack of its Rust code where it panics at a damaged page.

    Args:
        rows: first row and the row behind the last; default: all. Only row groups that hold some of them are decoded.

    Raises:
        DataError: missing file, unreadable file, a page that its own checksum disowns, missing column.
    """
    present = column_names(path)
    missing = [name for name in columns if name not in present]
    if missing:
        near = difflib.get_close_matches(missing[0], present, n=1)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        raise DataError(f"{path}: no column '{missing[0]}'{hint}; it has {', '.join(present)}")
    sizes = _group_sizes(path)
    first, last = rows or (0, sum(sizes))
    ends = np.cumsum(sizes, dtype=np.int64)
    starts = ends - sizes
    groups = np.flatnonzero((starts < last) & (ends > first))
    expected = int(sum(sizes[group] for group in groups))
    with readable(path), pq.ParquetFile(path, page_checksum_verification=True) as file:
        found = file.read_row_groups(groups.tolist(), columns=list(columns))
        plain = {name: found[name] for name in columns}  # without metadata: polars panics where they are no UTF-8
        for column in plain.values():
            if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
                column.validate(full=True)
        table = cast(pl.DataFrame, pl.from_arrow(pa.table(plain)))
    if table.height != expected:
        raise _unreadable(path, f"it holds {table.height} rows where its footer says {expected}")
    return table.slice(first - int(starts[groups[0]]), last - first) if len(groups) else table


def row_count(path: str) -> int:
    """Rows of a parquet file, from its footer.

    Raises:
        DataError: missing or unreadable file.
    """
    return sum(_group_sizes(path))


def row_groups(path: str) -> list[int]:
    """Where the row groups of a parquet file begin, and the number of its rows, from its footer.

    Raises:
        DataError: missing or unreadable file, or a footer that does not fit the file.
    """
    return [0, *np.cumsum([size for size in _group_sizes(path) if size]).tolist()]


def _group_sizes(path: str) -> tuple[int, ...]:
    """Rows of each row group."""
    with readable(path):
        found = os.stat(path)
        return _checked_sizes(path, found.st_mtime_ns, found.st_size)


@contextmanager
def readable(path: str) -> Iterator[None]:
    """A file that cannot be read is the user's error."""
    if not os.path.exists(path):
        raise DataError(f"{path}: no such file; see data/README.md for how to get or build the data set")
    try:
        yield
    except UserError:
        raise
    except (Exception, PanicException) as error:  # damage makes polars and pyarrow raise errors of any type
        raise _unreadable(path, reason_of(error)) from None


def reason_of(error: BaseException) -> str:
    """The first line of an error's message, fit for a sentence: a damaged file's own bytes may stand in it."""
    line = (str(error).splitlines() or [""])[0][:200].rstrip(" .:")
    return "".join(letter if letter.isprintable() else "?" for letter in line) or type(error).__name__


def _unreadable(path: str, reason: str) -> DataError:
    return DataError(f"{path}: not a readable parquet file ({reason}); copy or build it again")


@lru_cache(maxsize=32)
def _checked_sizes(path: str, changed: int, size: int) -> tuple[int, ...]:
    """`_group_sizes` of a file as it was at a time, kept, as a file of many row groups is asked for each of them."""
    footer = pq.read_metadata(path)
    groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    for fault in _misfits(footer, groups, size):
        raise _unreadable(path, fault)
    return tuple(group.num_rows for group in groups)


def _misfits(footer: pq.FileMetaData, groups: Sequence[pq.RowGroupMetaData], size: int) -> Iterator[str]:
    """What a sound footer cannot say; a reader that believed it would ask for absurd memory, or read another column."""
    if footer.num_rows != sum(group.num_rows for group in groups) or any(group.num_rows < 0 for group in groups):
        yield f"its row groups do not add up to {footer.num_rows} rows"
    taken: list[tuple[int, int]] = []
    for group in groups:
        if not group.num_rows:  # pyarrow writes one for a table of no rows, its columns at no place
            continue
        for number in range(group.num_columns):
            chunk = group.column(number)
            starts = [chunk.data_page_offset]
            if chunk.has_dictionary_page and chunk.dictionary_page_offset:
                starts.append(chunk.dictionary_page_offset)
            start, length = min(starts), chunk.total_compressed_size
            name = chunk.path_in_schema
            if start < 4 or length < 0 or start + length > size:
                yield f"column '{name}' lies outside the file"
            flat = footer.schema.column(number).max_repetition_level == 0
            if flat and chunk.num_values != group.num_rows:
                yield f"column '{name}' has {chunk.num_values} values in {group.num_rows} rows"
            taken.append((start, start + length))
    taken.sort()
    if any(before[1] > after[0] for before, after in pairwise(taken)):
        yield "two of its columns overlap"
