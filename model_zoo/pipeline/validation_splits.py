"""One reading of a split's file: each column checked by itself, and the figures that other checks start from."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import numpy as np
import polars as pl

from model_zoo.errors import DataError
from model_zoo.pipeline import columns
from model_zoo.pipeline.columns import Integers
from model_zoo.pipeline.dataset import LabelTally
from model_zoo.pipeline.parquet_files import row_groups
from model_zoo.pipeline.splits import LABEL, ColumnReader, SplitReader
from model_zoo.pipeline.validation_report import Faults

#: which check a column belongs to; that of context features is another
CHECK_OF = {"user_index": "rows", "item_index": "rows", "seq_len": "seq_len", LABEL: "labels", "time": "time order"}
CONTEXT = "context features"


@dataclass
class SplitFigures:
    """What a split's rows come to.

    Attributes:
        users: sound rows by user.
        shown: sound rows by target item.
        tally: of their labels.
        rows: of the file.
        empty: sound rows without history.
        sound: every row column of every row is.
        times: of the first and the last impression.
    """

    users: Integers
    shown: Integers
    tally: LabelTally = field(default_factory=LabelTally)
    rows: int = 0
    empty: int = 0
    sound: bool = True
    times: tuple[float, float] | None = None


@dataclass
class SplitCheck:
    """Checks one split.

    Attributes:
        reader: of the split; its ``lengths`` and ``num_items`` count only if they are known.
        faults: takes what is wrong.
        present: columns of the file, of those that are wanted.
        time: the column of times.
        users_known, items_known: whether user_info and item_info could be read.
    """

    reader: SplitReader
    faults: Faults
    present: list[str]
    time: str | None
    users_known: bool
    items_known: bool

    def wanted(self) -> dict[str, str]:
        """Columns of the file by what they are to the split."""
        names = {key: self.reader.feature_map.labels[0] if key == LABEL else key for key in self.reader.readers()}
        return names | ({"time": self.time} if self.time else {})

    def figures(self) -> SplitFigures:
        """Read the file."""
        reader, group_id = self.reader, self.reader.feature_map.group_id
        items = reader.num_items if self.items_known else 0
        found = SplitFigures(np.zeros(len(reader.lengths), np.int64), np.zeros(items, np.int64))
        readers = reader.readers()
        if not self.users_known:
            readers["user_index"] = partial(_whole, "user_index")
        if time := self.time:
            readers["time"] = lambda table, path: columns.times(table[time], path)
        names = self.wanted()
        readers = {key: read for key, read in readers.items() if names[key] in self.present}
        found.sound = set(CHECK_OF) & names.keys() <= readers.keys()
        group = None
        if group_id and group_id in self.present:
            try:
                distinct = columns.distinct_groups(reader.path, group_id, row_groups(reader.path))
                group = partial(self._group, group_id, distinct)
            except DataError as error:  # a damaged page
                self.faults.report.add("files", "error", str(error))
        for table, numbers in self.faults.parts(reader.path, self.present):
            found.rows += table.height
            self._add(found, table, numbers, readers, group)
        found.sound &= found.tally.rows == row_groups(reader.path)[-1]
        return found

    def _add(
        self, found: SplitFigures, table: pl.DataFrame, numbers: Integers,
        readers: dict[str, ColumnReader], group: ColumnReader | None,
    ) -> None:  # fmt: skip
        """Check a part of the file and count its sound rows."""
        path, clean = self.reader.path, self.faults.clean
        good = np.ones(table.height, dtype=bool)
        for key, read in readers.items():
            sound = clean(CHECK_OF.get(key, CONTEXT), path, table, numbers, read)
            if key in CHECK_OF:
                good &= sound
        if group:
            good &= clean("groups", path, table, numbers, group)
        table, numbers = table.filter(good), numbers[good]
        if not found.sound:
            return
        if self.users_known:
            good = clean("seq_len", path, table, numbers, self._reach)
            table, numbers = table.filter(good), numbers[good]
        if not table.height:
            return
        where = columns.FilePart(path, 0, numbers)
        user, item, seq_len, label = (readers[key](table, where) for key in CHECK_OF if key != "time")
        found.tally.add(label, group(table, where) if group else None)
        found.empty += int((seq_len == 0).sum())
        if self.items_known:
            found.shown += np.bincount(item, minlength=len(found.shown))
        if self.users_known:
            found.users += np.bincount(user, minlength=len(found.users))
        if "time" in readers:
            times = readers["time"](table, where).to_numpy()
            first, last = found.times or (np.inf, -np.inf)
            found.times = min(first, times.min()), max(last, times.max())

    def _reach(self, table: pl.DataFrame, path: str) -> None:
        self.reader.check_history(_whole("user_index", table, path), _whole("seq_len", table, path), path)

    @staticmethod
    def _group(name: str, distinct: pl.Series | None, table: pl.DataFrame, path: str) -> Integers:
        return columns.groups(table[name], path, distinct)


def _whole(name: str, table: pl.DataFrame, path: str) -> Integers:
    return columns.integers(table[name], path)
