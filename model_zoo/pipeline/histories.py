"""Every user's history as one flat array, in memory or, where a bound says so, mapped from a file written once."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from model_zoo.errors import DataError
from model_zoo.files import write_whole_with
from model_zoo.pipeline import columns, parquet_files

logger = logging.getLogger("model_zoo")

Integers = npt.NDArray[np.int64]

SEQUENCE = "full_item_seq"
#: seconds; no time in seconds since 1970 comes near it, and every one of this century in milliseconds is beyond it
LATEST = 10**11


@dataclass(frozen=True)
class Histories:
    """Every user's full item sequence, oldest first, as one flat array.

    Attributes:
        items: int32, all sequences one after the other.
        offsets: int64 ``[users + 1]``; user u's sequence is ``items[offsets[u]:offsets[u + 1]]``.
        folder: where they are mapped from, which is all that another process gets of them; None if they are in memory.
        times: int64 seconds, when each event was; None if the data do not say.
    """

    items: npt.NDArray[np.int32]
    offsets: Integers
    folder: str | None = None
    times: Integers | None = None

    @property
    def lengths(self) -> Integers:
        """Length of each user's sequence."""
        return np.diff(self.offsets)

    @classmethod
    def mapped(cls, folder: str) -> Histories:
        """Histories whose items stay in a file of that folder; the operating system keeps in memory what it can."""
        files = [os.path.join(folder, name) for name in ("items.npy", "times.npy")]
        items, times = (np.asarray(np.load(file, mmap_mode="r")) if os.path.exists(file) else None for file in files)
        assert items is not None
        return cls(items, np.load(os.path.join(folder, "offsets.npy")), folder, times)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.folder is not None:
            return Histories.mapped, (self.folder,)
        return Histories, (self.items, self.offsets, None, self.times)


def read_histories(
    path: str,
    num_items: int,
    bounds: list[int] | None = None,
    allocate: Callable[..., Any] = np.empty,
    time_col: str | None = None,
) -> Histories:
    """Ragged histories with row = user_index, whatever the order of the file's rows.

    Args:
        bounds: where the parts begin in which to read the file, and its number of rows; default: all at once.
        allocate: makes the array of all items, from its shape and dtype, and that of all times.
        time_col: the list column of the events' times; None = leave times out.

    Raises:
        DataError: a missing or twofold user, a history with something that is no item, or times that do not fit it.
    """
    def parts() -> Iterator[tuple[str, Integers, pl.Series, Integers, pl.Series | None]]:
        """Of each part: its name, its users, its items and their offsets, its lists of times."""
        for rows in [None] if bounds is None else pairwise(bounds):
            table, part = user_table(path, rows, time_col)
            series, offsets = columns.ragged(table[SEQUENCE], part)
            yield part, read_users(table, part), series, offsets, table[time_col] if time_col else None

    known = list(parts()) if bounds is None else None  # read once; parts are read again, as they may not fit together
    sizes = [(users, np.diff(offsets)) for _, users, _, offsets, _ in known or parts()]
    index, lengths = (np.concatenate([part[side] for part in sizes] or [np.zeros(0, np.int64)]) for side in (0, 1))
    order = order_of_users(index, path)
    offsets = np.concatenate([[0], np.cumsum(lengths[order])])
    items = allocate((int(offsets[-1]),), np.int32)
    times = allocate(items.shape, np.int64) if time_col else None
    for part, users, series, starts, lists in known or parts():
        values = read_events(series, users, starts, part, num_items)
        if len(users) and (np.diff(users) == 1).all():
            place: slice | Integers = slice(offsets[users[0]], offsets[users[-1] + 1])
        else:
            place = np.arange(len(values)) + np.repeat(offsets[users] - starts[:-1], np.diff(starts))
        items[place] = values
        if times is not None and lists is not None:
            times[place] = read_times(lists, users, starts, part)
    return Histories(items, offsets, None, times)


def user_table(
    path: str, rows: tuple[int, int] | None = None, time_col: str | None = None
) -> tuple[pl.DataFrame, str]:
    """The columns of ``user_info`` that histories need, of all rows or some, and what messages call that part."""
    names = ["user_index"] if "user_index" in parquet_files.column_names(path) else []
    names += [SEQUENCE, *([time_col] if time_col else [])]
    table = parquet_files.read_table(path, names, rows)
    return table, path if rows is None else columns.FilePart(path, rows[0])


def read_users(table: pl.DataFrame, path: str) -> Integers:
    """``user_index`` of each row: the row's number if there is no such column."""
    if "user_index" in table.columns:
        return columns.integers(table["user_index"], path)
    return columns.row_numbers(path, table.height)


def read_events(series: pl.Series, users: Integers, offsets: Integers, path: str, num_items: int) -> Integers:
    """The events of some users, flat.

    Args:
        series, offsets: from `columns.ragged`.

    Raises:
        DataError: an event that is no item, padding included.
    """
    items = columns.integers(series, path, offsets)
    for bad, reason in (
        (items >= num_items, f"is not in item_info, whose last item_index is {num_items - 1}"),
        (items < 0, "is negative"),
        (items == 0, "is the padding item; take it out of the history"),
    ):
        columns.refuse_in_lists(
            bad, items, offsets, path, SEQUENCE, reason, "item {}", lambda row: f"user_index {users[row]}", "events"
        )
    return items


def read_times(lists: pl.Series, users: Integers, offsets: Integers, path: str) -> Integers:
    """The times of some users' events, flat.

    Args:
        lists: a list of times for each user.
        offsets: of the users' events.

    Raises:
        DataError: not one whole number of seconds for each event, or times that fall.
    """
    column, (series, starts) = str(lists.name), columns.ragged(lists, path)
    events, found = np.diff(offsets), np.diff(starts)
    if (events != found).any():
        row = int(np.argmax(events != found))
        raise DataError(
            f"{path}: column '{column}', user_index {users[row]}: {found[row]} times for {events[row]} events of "
            f"{SEQUENCE}; write one for each"
        )
    times = columns.integers(series, path, offsets)
    falls = np.zeros(len(times), bool)
    falls[1:] = times[1:] < times[:-1]
    falls[offsets[:-1][events > 0]] = False  # a user's first event
    for bad, reason in (
        (np.abs(times) > LATEST, "is no time in seconds; divide milliseconds by 1,000"),
        (falls, "is before the event in front of it; sort each history by time, items and times alike"),
    ):
        columns.refuse_in_lists(
            bad, times, offsets, path, column, reason, "time {}", lambda row: f"user_index {users[row]}", "times"
        )
    return times


def read_bounded_histories(
    path: str, num_items: int, limit: int, cache: str, time_col: str | None = None
) -> Histories:
    """Histories read by row groups: kept in memory if they take at most ``limit`` bytes, else mapped.

    The mapped file is made once, in a folder of ``cache`` named by the content of ``path``.

    Raises:
        DataError: as `read_histories`, or the folder cannot be written.
    """
    folder = os.path.join(cache, f"{digest(path)}-{num_items}")
    if time_col:
        folder += f"-{hashlib.blake2b(time_col.encode(), digest_size=4).hexdigest()}"
    if os.path.isdir(folder):
        return Histories.mapped(folder)
    bounds = parquet_files.row_groups(path)
    unfinished = f"{folder}.{os.getpid()}.partial"
    event_bytes = 12 if time_col else 4

    def allocate(shape: tuple[int], dtype: Any) -> Any:
        if shape[0] * event_bytes <= limit:
            return np.empty(shape, dtype)
        os.makedirs(unfinished, exist_ok=True)
        target = os.path.join(unfinished, "items.npy" if dtype is np.int32 else "times.npy")
        return np.lib.format.open_memmap(target, mode="w+", dtype=dtype, shape=shape)

    try:
        found = read_histories(path, num_items, bounds, allocate, time_col)
        if not isinstance(found.items, np.memmap):
            return found
        for values in (found.items, found.times):
            if isinstance(values, np.memmap):
                values.flush()
        write_whole_with(os.path.join(unfinished, "offsets.npy"), lambda file: np.save(file, found.offsets))
        if not os.path.isdir(folder):  # another run may have made it meanwhile
            os.replace(unfinished, folder)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise DataError(f"{cache}: {reason}; histories that exceed memory_limit_mib go there: set data_root") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    logger.info("histories are mapped from %s", folder)
    return Histories.mapped(folder)


def rows_in_order(index: Integers, path: str, column: str) -> Integers:
    """The permutation that puts rows in order of ``index``, which must be a run of whole numbers.

    Raises:
        DataError: a number is missing or stands there twice.
    """
    order = np.argsort(index, kind="stable")
    steps = np.diff(index[order])
    if (steps != 1).any():
        place = int(np.argmax(steps != 1))
        found = index[order[place]]
        fault = "twice" if steps[place] == 0 else f"but no {found + 1}"
        raise DataError(f"{path}: column '{column}' has {found} {fault}; every index must stand there once")
    return order


def order_of_users(index: Integers, path: str) -> Integers:
    """`rows_in_order` of ``user_index``, which begins at 0.

    Raises:
        DataError: a user is missing or stands there twice.
    """
    order = rows_in_order(index, path, "user_index")
    if len(index) and index[order[0]] != 0:
        raise DataError(f"{path}: column 'user_index' starts at {index[order[0]]}; number the users from 0")
    return order


def digest(path: str) -> str:
    """BLAKE2 of a file's bytes, 32 hex digits."""
    found = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            found.update(chunk)
    return found.hexdigest()
