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
from model_zoo.pipeline import columns

logger = logging.getLogger("model_zoo")

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Histories:
    """Every user's full item sequence, oldest first, as one flat array.

    Attributes:
        items: int32, all sequences one after the other.
        offsets: int64 ``[users + 1]``; user u's sequence is ``items[offsets[u]:offsets[u + 1]]``.
        folder: where they are mapped from, which is all that another process gets of them; None if they are in memory.
    """

    items: npt.NDArray[np.int32]
    offsets: Integers
    folder: str | None = None

    @property
    def lengths(self) -> Integers:
        """Length of each user's sequence."""
        return np.diff(self.offsets)

    @classmethod
    def mapped(cls, folder: str) -> Histories:
        """Histories whose items stay in a file of that folder; the operating system keeps in memory what it can."""
        items = np.asarray(np.load(os.path.join(folder, "items.npy"), mmap_mode="r"))
        return cls(items, np.load(os.path.join(folder, "offsets.npy")), folder)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.folder is not None:
            return Histories.mapped, (self.folder,)
        return Histories, (self.items, self.offsets)


def read_histories(
    path: str, num_items: int, bounds: list[int] | None = None, allocate: Callable[..., Any] = np.empty
) -> Histories:
    """Ragged histories with row = user_index, whatever the order of the file's rows.

    Args:
        bounds: where the parts begin in which to read the file, and its number of rows; default: all at once.
        allocate: makes the array of all items, from its shape and dtype.

    Raises:
        DataError: a missing or twofold user, or a history with something that is no item.
    """
    named = "user_index" in columns.column_names(path)

    def parts() -> Iterator[tuple[str, Integers, pl.Series, Integers]]:
        """Of each part: its name, its users, its items and their offsets."""
        for rows in [None] if bounds is None else pairwise(bounds):
            table = columns.read_table(path, ["user_index", "full_item_seq"] if named else ["full_item_seq"], rows)
            first = 0 if rows is None else rows[0]
            part: str = path if rows is None else columns.FilePart(path, first)
            users = columns.integers(table["user_index"], part) if named else np.arange(first, first + table.height)
            yield part, users, *columns.ragged(table["full_item_seq"], part)

    known = list(parts()) if bounds is None else None  # read once; parts are read again, as they may not fit together
    sizes = [(users, np.diff(offsets)) for _, users, _, offsets in known or parts()]
    index, lengths = (np.concatenate([part[side] for part in sizes] or [np.zeros(0, np.int64)]) for side in (0, 1))
    order = rows_in_order(index, path, "user_index")
    if len(index) and index[order[0]] != 0:
        raise DataError(f"{path}: column 'user_index' starts at {index[order[0]]}; number the users from 0")
    offsets = np.concatenate([[0], np.cumsum(lengths[order])])
    items = allocate((int(offsets[-1]),), np.int32)
    for part, users, series, starts in known or parts():
        values = columns.integers(series, part, starts)
        _check_events(values, users, starts, part, num_items)
        if len(users) and (np.diff(users) == 1).all():
            items[offsets[users[0]] : offsets[users[-1] + 1]] = values
        else:
            items[np.arange(len(values)) + np.repeat(offsets[users] - starts[:-1], np.diff(starts))] = values
    return Histories(items, offsets)


def read_bounded_histories(path: str, num_items: int, limit: int, cache: str) -> Histories:
    """Histories read by row groups: kept in memory if they take at most ``limit`` bytes, else mapped.

    The mapped file is made once, in a folder of ``cache`` named by the content of ``path``.

    Raises:
        DataError: as `read_histories`, or the folder cannot be written.
    """
    folder = os.path.join(cache, f"{digest(path)}-{num_items}")
    if os.path.isdir(folder):
        return Histories.mapped(folder)
    bounds = columns.row_groups(path)
    unfinished = f"{folder}.{os.getpid()}.partial"
    target = os.path.join(unfinished, "items.npy")

    def allocate(shape: tuple[int], dtype: Any) -> Any:
        if shape[0] * 4 <= limit:
            return np.empty(shape, dtype)
        os.makedirs(unfinished)
        return np.lib.format.open_memmap(target, mode="w+", dtype=dtype, shape=shape)

    try:
        found = read_histories(path, num_items, bounds, allocate)
        if not isinstance(found.items, np.memmap):
            return found
        found.items.flush()
        np.save(os.path.join(unfinished, "offsets.npy"), found.offsets)
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


def digest(path: str) -> str:
    """BLAKE2 of a file's bytes, 32 hex digits."""
    found = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            found.update(chunk)
    return found.hexdigest()


def _check_events(items: Integers, users: Integers, offsets: Integers, path: str, num_items: int) -> None:
    """Refuse events that are no item, padding included."""
    for bad, reason in (
        (items >= num_items, f"is not in item_info, whose last item_index is {num_items - 1}"),
        (items < 0, "is negative"),
        (items == 0, "is the padding item; take it out of the history"),
    ):
        if bad.any():
            place = int(np.argmax(bad))
            row = int(np.searchsorted(offsets, place, side="right")) - 1
            where = f"{path}: column 'full_item_seq', user_index {users[row]}, position {place - offsets[row]}"
            raise DataError(f"{where}: item {items[place]} {reason} ({columns.such(path, bad, 'events')})")
