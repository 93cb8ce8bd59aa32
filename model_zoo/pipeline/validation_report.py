"""Findings about a data set, by check, and how faulty values are gathered instead of ending at the first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl

from model_zoo.errors import DataError
from model_zoo.pipeline import columns
from model_zoo.pipeline.parquet_files import read_table, row_groups
from model_zoo.pipeline.splits import ColumnReader

Level = Literal["ok", "warning", "error", "not checked"]

#: what is checked, in the report's order
CHECKS = {
    "files": "every file is there and opens; its footer fits it",
    "checksums": "the files are those whose sums were recorded",
    "columns": "every column that the config names is there, of a type that can be read",
    "item_index": "every item once, from the padding row 0 on",
    "user_index": "every user once, from 0 on",
    "item features": "no null, NaN or infinite value; ids within vocab_size; lists of one length",
    "pretrained": "pretrained vectors: one for each id, all numbers, as wide as the feature",
    "histories": "every event is an item of item_info",
    "rows": "users and items of the splits are those of user_info and item_info",
    "seq_len": "not negative, and within the user's history",
    "labels": "0 or 1, and both of them in every split",
    "groups": "every row has a group, and groups have both labels (gAUC)",
    "context features": "as for item features",
    "empty histories": "share of rows without any history",
    "cold items": "share of valid's and test's rows whose item is never a target in train",
    "duplicates": "no row stands in a split twice",
    "split overlap": "no row stands in two splits",
    "time order": "a user's history grows with time; valid and test do not begin before train ends",
    "own events": "histories end before the event that is to be predicted",
}


@dataclass
class Report:
    """Findings by check.

    Attributes:
        findings: check to its findings, each a level and a sentence.
    """

    findings: dict[str, list[tuple[Level, str]]] = field(default_factory=lambda: {check: [] for check in CHECKS})

    def add(self, check: str, level: Level, text: str) -> None:
        """Note one finding."""
        if (level, text) not in self.findings[check]:
            self.findings[check].append((level, text))

    def count(self, level: Level) -> int:
        """Findings of a level."""
        return sum(found == level for entries in self.findings.values() for found, _ in entries)

    def sound(self, *checks: str) -> bool:
        """Whether none of these checks found an error."""
        return not any(level == "error" for check in checks for level, _ in self.findings[check])

    @property
    def exit_code(self) -> int:
        """2 if there are errors, 1 if there are warnings, else 0."""
        return 2 if self.count("error") else 1 if self.count("warning") else 0

    def lines(self) -> list[str]:
        """The report: each check with its result, each finding on its own line."""
        lines = []
        for check, meaning in CHECKS.items():
            entries = self.findings[check] or [("ok", meaning)]
            lines += [f"{level:<12} {check:<16} {text}" for level, text in entries]
        errors, warnings = self.count("error"), self.count("warning")
        return [*lines, f"{errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}"]


class Faults:
    """Faulty values over the parts of a file: each kind once, with its count and the first example."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.found: dict[tuple[str, str, str, str], list[Any]] = {}

    def clean(
        self, check: str, path: str, table: pl.DataFrame, numbers: columns.Integers, read: ColumnReader
    ) -> npt.NDArray[np.bool_]:
        """Read a column again and again, each time without the rows that are faulty so far.

        So every kind of fault is found; of a row that has two kinds in one column, the first.

        Args:
            numbers: int64 ``[N]``, of the table's rows in the file.

        Returns:
            bool ``[N]``: the rows that are sound. None is if the column cannot be read at all.
        """
        sound = np.ones(table.height, dtype=bool)
        while True:
            kept = np.flatnonzero(sound)
            part = table if sound.all() else table[kept]
            try:
                read(part, columns.FilePart(path, 0, numbers[kept]))
            except columns.ValueFault as fault:
                key = (check, path, fault.column, fault.reason)
                entry = self.found.setdefault(key, [f"{fault.place}: {fault.value} {fault.reason}", 0])
                entry[1] += fault.count
                sound[kept[fault.rows]] = False
            except DataError as error:
                self.report.add("columns", "error", str(error))
                return np.zeros(table.height, dtype=bool)
            else:
                return sound

    def parts(self, path: str, names: list[str]) -> Iterator[tuple[pl.DataFrame, columns.Integers]]:
        """Some columns of a file by row groups, with the numbers of their rows; unreadable parts are errors."""
        for rows in pairwise(row_groups(path)):
            try:
                yield read_table(path, names, rows), np.arange(*rows)
            except DataError as error:  # a damaged page is found where it is decoded
                self.report.add("files", "error", str(error))

    def close(self) -> None:
        """Put what was found into the report."""
        for (check, path, column, _), (example, count) in sorted(self.found.items()):
            self.report.add(check, "error", f"{path}: column '{column}', {example} ({count:,} such)")
