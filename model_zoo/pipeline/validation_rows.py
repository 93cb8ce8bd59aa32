"""Checks that relate a data set's rows to each other and to their histories: a range of users at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import polars as pl

from model_zoo.pipeline import columns
from model_zoo.pipeline.columns import Integers
from model_zoo.pipeline.histories import read_bounded_histories
from model_zoo.pipeline.leakage import OwnEvents
from model_zoo.pipeline.parquet_files import read_table, row_groups
from model_zoo.pipeline.validation_report import Report

#: what makes two rows the same
KEYS = ["user", "item", "seq_len", "time"]
#: bytes that a row, and an event, take while they are compared
ROW_BYTES, EVENT_BYTES = 200, 80


@dataclass(frozen=True)
class Rows:
    """Where to find the rows of all splits.

    Attributes:
        splits: path by split, train first.
        users: how many rows each user has in all of them.
        label, time: columns; without ``time`` None.
    """

    splits: dict[str, str]
    users: Integers
    label: str
    time: str | None

    def frames(self, users: tuple[int, int]) -> dict[str, pl.DataFrame]:
        """The rows of a range of users by split: ``user``, ``item``, ``seq_len``, ``label``, ``row`` and ``time``."""
        return {name: self._frame(path, users) for name, path in self.splits.items()}

    def _frame(self, path: str, users: tuple[int, int]) -> pl.DataFrame:
        names = {"user": "user_index", "item": "item_index", "seq_len": "seq_len", "label": self.label}
        found = []
        for rows in pairwise(row_groups(path)):
            wanted = dict.fromkeys([*names.values(), *([self.time] if self.time else [])])
            table = read_table(path, list(wanted), rows)
            frame = pl.DataFrame({key: columns.integers(table[name], path) for key, name in names.items()})
            frame = frame.with_columns(row=pl.Series(np.arange(*rows)))
            if self.time:
                frame = frame.with_columns(columns.times(table[self.time], path).alias("time"))
            found.append(frame.filter(pl.col("user").is_between(*users, closed="left")))
        return pl.concat(found)


def cross_check(rows: Rows, user_info: str, num_items: int, limit: int, folder: str, report: Report) -> None:
    """Rows that stand there twice, histories that shrink with time, histories that hold the click itself.

    Args:
        limit: bytes held at a time, about.
        folder: where histories go that exceed half of it.
    """
    histories = read_bounded_histories(user_info, num_items, limit // 2, folder)
    repeats, own = Repeats(), {name: OwnEvents() for name in rows.splits}
    for users in _ranges(rows.users * ROW_BYTES + histories.lengths * EVENT_BYTES, limit // 2):
        frames = rows.frames(users)
        repeats.add(frames)
        for name, frame in frames.items():
            clicks = frame.filter(pl.col("label") == 1)
            own[name].add(histories, *(clicks[key].to_numpy() for key in ("user", "item", "seq_len")))
            own[name].add_places(histories, users, clicks)
    for name, counts in own.items():
        level, text = counts.finding()
        report.add("own events", level, f"{name}: {text}")
    repeats.report(rows, report)


def _ranges(cost: Integers, limit: int) -> Iterator[tuple[int, int]]:
    """Ranges of users, first and behind the last, whose costs add up to ``limit`` at most, or that hold one user."""
    total = np.concatenate([[0], np.cumsum(cost)])
    start = 0
    while start < len(cost):
        end = max(start + 1, int(np.searchsorted(total, total[start] + limit, side="right")) - 1)
        yield start, end
        start = end


@dataclass
class Repeats:
    """Rows that stand in the splits twice, and rows with a shorter history than an earlier row of their user.

    Attributes:
        found: how many, and the first one's split and row: by split (twice in it), by pair of splits (in both; the row is
            the second's), and by ``"time"``.
    """

    found: dict[str | tuple[str, str], tuple[int, str, int]] = field(default_factory=dict)

    def add(self, frames: Mapping[str, pl.DataFrame]) -> None:
        """Count those of a range of users: a frame a split, train first, from `Rows.frames`."""
        parts = [frame.with_columns(split=pl.lit(number, pl.Int8)) for number, frame in enumerate(frames.values())]
        rows, names = pl.concat(parts, how="vertical_relaxed"), list(frames)
        if not rows.height:
            return
        keys = [name for name in KEYS if name in rows.columns]
        table = rows.sort([*keys, "split", "row"])
        leads = np.ones(table.height, dtype=bool)  # the first of its equals
        leads[1:] = False
        for name in keys:
            column = table[name].to_numpy()
            leads[1:] |= column[1:] != column[:-1]
        split, row = table["split"].to_numpy(), table["row"].to_numpy()
        leader = split[np.maximum.accumulate(np.where(leads, np.arange(len(leads)), 0))]
        again = ~leads
        again[1:] &= split[1:] == split[:-1]
        for number, name in enumerate(names):
            self._count(name, name, row[again & (split == number)])
            for earlier in range(number):
                self._count((names[earlier], name), name, row[(split == number) & (leader == earlier)])
        if "time" in keys:
            table = rows.sort(["user", "time", "seq_len"])
            user, length = table["user"].to_numpy(), table["seq_len"].to_numpy()
            shorter = table[np.flatnonzero((user[1:] == user[:-1]) & (length[1:] < length[:-1])) + 1]
            if shorter.height:
                self._count("time", names[shorter["split"][0]], shorter["row"].to_numpy()[:1], shorter.height)

    def _count(self, key: str | tuple[str, str], split: str, row: Integers, count: int | None = None) -> None:
        count = len(row) if count is None else count
        if count:
            before, split, first = self.found.get(key, (0, split, int(row.min())))
            self.found[key] = before + count, split, first

    def report(self, rows: Rows, report: Report) -> None:
        """Tell what was found."""
        same = "user, item, seq_len" + (f" and {rows.time}" if rows.time else "")
        for key, (count, split, row) in self.found.items():
            where = f"{rows.splits[split]}: row {row}"
            if key == "time":
                text = f"{where}: seq_len is smaller than in a row of the user that is earlier by '{rows.time}'"
                text = f"{text} ({count:,} such rows)"
                report.add("time order", "error", text)
            elif isinstance(key, str):
                text = f"{where}: another row of {split} has its {same} ({count:,} such rows)"
                report.add("duplicates", "warning", text)
            else:
                text = f"{where}: stands in {key[0]} too, with its {same} ({count:,} such rows)"
                report.add("split overlap", "error" if rows.time else "warning", text)
