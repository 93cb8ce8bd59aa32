"""A split that is read by row groups, so that its memory has a bound."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from model_zoo.errors import ConfigError
from model_zoo.pipeline import columns, parquet_files
from model_zoo.pipeline.splits import Split, SplitReader, joined

#: bytes of a table's temporaries while it is checked, per byte of the table: int64 copies, masks
READING = 3

#: rows that lie in memory together, and an order of them
Block = tuple[Split, npt.NDArray[np.int64]]


@dataclass(frozen=True)
class StreamedSplit:
    """A split of which a few row groups at a time are in memory.

    Attributes:
        reader: reads and checks a range of rows.
        bounds: where the row groups begin, and the number of rows.
        block_rows: rows that are shuffled together, at most (a block holds at least one row group).
    """

    reader: SplitReader
    bounds: tuple[int, ...]
    block_rows: int

    @classmethod
    def open(cls, reader: SplitReader, limit: int) -> StreamedSplit:
        """Check the whole file once, row group by row group.

        Args:
            limit: bytes; a half for the row group that is read, a half for a block of rows that is iterated over.

        Raises:
            ConfigError: a row group takes more than its half.
            DataError: as `SplitReader.read`.
        """
        parquet_files.column_names(reader.path)  # refuses what is no parquet file
        bounds = parquet_files.row_groups(reader.path)
        largest = int(np.argmax(np.diff(bounds))) if len(bounds) > 1 else 0
        table = reader.table((bounds[largest], bounds[largest + 1]) if len(bounds) > 1 else None)
        rows = table.height
        needed = READING * int(table.estimated_size())
        if 2 * needed > limit:
            mib = math.ceil(4 * needed / 2**20)
            raise ConfigError(
                f"memory_limit_mib: {2 * limit // 2**20}: the largest row group of {os.path.basename(reader.path)} "
                f"({rows:,} rows) needs {mib}; raise it, or write the file with smaller row groups"
            )
        del table
        group_id = reader.feature_map.group_id
        if group_id:
            reader = replace(reader, distinct=columns.distinct_groups(reader.path, group_id, bounds))
        width = 0
        split = cls(reader, tuple(bounds), 1)
        for part in split.parts():
            width = max(width, math.ceil(part.nbytes / len(part)))
        return replace(split, block_rows=max(1, limit // 2 // (width + 8)))

    def __len__(self) -> int:
        return self.bounds[-1]

    @property
    def name(self) -> str:
        """``train``, ``valid`` or ``test``."""
        return self.reader.name

    @property
    def path(self) -> str:
        """The file."""
        return self.reader.path

    def parts(self) -> Iterator[Split]:
        """The row groups in the file's order."""
        for rows in pairwise(self.bounds):
            yield self.reader.read(rows)

    def blocks(self, order: np.random.Generator | None) -> Iterator[Block]:
        """All rows, in blocks: row groups in the file's order, or in a random order, several shuffled together."""
        if order is None:
            for part in self.parts():
                yield part, np.arange(len(part))
            return
        starts = order.permutation(len(self.bounds) - 1)
        sizes = np.diff(self.bounds)
        waiting: list[Split] = []
        for place, number in enumerate(starts):
            waiting.append(self.reader.read((self.bounds[number], self.bounds[number + 1])))
            following = sizes[starts[place + 1]] if place + 1 < len(starts) else self.block_rows
            if sum(map(len, waiting)) + following > self.block_rows:
                block = joined(waiting)
                waiting.clear()
                yield block, order.permutation(len(block))
                del block  # before the next row group is read


def in_memory(split: Split | StreamedSplit) -> Split:
    """The split, if rows of it can be picked out.

    Raises:
        ConfigError: it is streamed.
    """
    if isinstance(split, StreamedSplit):
        raise ConfigError(f"{split.path}: streamed rows come in an epoch's order only; leave memory_limit_mib out")
    return split


def without(blocks: Iterable[Block], rows: int) -> Iterator[Block]:
    """The blocks less the first ``rows`` rows of their orders."""
    for block, order in blocks:
        kept = order[rows:]
        rows -= len(order) - len(kept)
        if len(kept):
            yield block, kept


def batches_of(blocks: Iterable[Block], sizes: Iterable[int]) -> Iterator[Split]:
    """Batches of the given sizes; what a block leaves over begins the batch that the next one completes.

    Args:
        sizes: as many rows together as the blocks have.
    """
    remaining = iter(sizes)
    missing, held = next(remaining, 0), list[Split]()
    for block, order in blocks:
        place = 0
        while place < len(order):
            rows = order[place : place + missing]
            held.append(block.take(rows))
            place, missing = place + len(rows), missing - len(rows)
            if not missing:
                batch, held, missing = joined(held), [], next(remaining, 0)
                yield batch
        del block  # before the next one is made
