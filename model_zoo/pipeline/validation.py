"""Every check of a data set, all findings at once; files are read by row groups, so that they may exceed the memory."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from model_zoo.compat import FeatureMap
from model_zoo.errors import DataError
from model_zoo.pipeline import columns
from model_zoo.pipeline.dataset import SPLITS, dataset_files, item_specs, order_of_items
from model_zoo.pipeline.download import SUMS, check_sums
from model_zoo.pipeline.histories import SEQUENCE, order_of_users, read_events, read_users
from model_zoo.pipeline.parquet_files import column_names, read_table, row_groups
from model_zoo.pipeline.pretrained_vectors import read_vectors, vector_path
from model_zoo.pipeline.splits import SplitReader, feature_column
from model_zoo.pipeline.validation_report import Faults, Report
from model_zoo.pipeline.validation_rows import Rows, cross_check
from model_zoo.pipeline.validation_splits import SplitCheck, SplitFigures

#: shares from which a figure is a warning
MANY_EMPTY, MANY_COLD = 0.5, 0.2
#: names of a column that holds the time of an impression
TIME_NAMES = ("timestamp", "time", "ts", "time_ms", "unix_time", "event_time", "datetime", "impression_time")


def validate_dataset(
    feature_map: FeatureMap,
    params: dict[str, Any],
    metrics: list[str] | None = None,
    time_column: str | None = None,
    limit: int = 2**30,
) -> Report:
    """Check a data set.

    Args:
        feature_map: from `build_feature_map`.
        params: the paths, as for `load_dataset`.
        metrics: of the experiment; gAUC needs groups of both labels.
        time_column: when an impression was; default: one of `TIME_NAMES` that all splits have.
        limit: bytes of rows and events held at a time, about; histories beyond it are put into a temporary file.

    Raises:
        ConfigError: a path is not configured.
    """
    found = Validator(feature_map, dataset_files(params), metrics or [], time_column)
    found.read()
    report, time = found.report, found.time_column
    if time is None:
        known = ", ".join(TIME_NAMES)
        report.add("time order", "not checked", f"no column of times; name it with --time if it is none of {known}")
    lacking = None
    if found.lengths is None or found.num_items is None or not report.sound("histories"):
        lacking = "user_info and item_info"
    elif not all(figures.sound for figures in found.figures.values()) or "train" not in found.figures:
        lacking = "the splits' row columns"
    if lacking is None:
        splits = {name: found.files[f"{name}_data"] for name in found.figures}
        counts = np.sum([figures.users for figures in found.figures.values()], axis=0)
        rows = Rows(splits, counts, feature_map.labels[0], time)
        assert found.num_items is not None
        with tempfile.TemporaryDirectory() as folder:
            cross_check(rows, found.files["user_info"], found.num_items, limit, folder, report)
        if time and not report.findings["time order"]:
            report.add("time order", "ok", f"by '{time}'")
    for check in ("duplicates", "split overlap", "own events", *(["time order"] if time else [])) if lacking else ():
        report.add(check, "not checked", f"mend {lacking} first")
    return report


@dataclass
class Validator:
    """Reads a data set once and checks each column by itself; `report` has the findings.

    Attributes:
        num_items, lengths: items, and length of each user's history; None where their file does not say.
        figures: by split.
    """

    feature_map: FeatureMap
    files: dict[str, str]
    metrics: list[str]
    time_column: str | None
    report: Report = field(default_factory=Report)
    num_items: int | None = None
    lengths: columns.Integers | None = None
    figures: dict[str, SplitFigures] = field(default_factory=dict)

    def read(self) -> None:
        """All files, in the order in which they build on each other."""
        self.faults = Faults(self.report)
        self.present: dict[str, list[str]] = {}
        self._open()
        if "item_info" in self.present:
            self._items(self.files["item_info"])
        if "user_info" in self.present:
            self._users(self.files["user_info"])
        for name in SPLITS:
            if f"{name}_data" in self.present:
                self._split(name, self.files[f"{name}_data"])
        self._vectors()
        self.faults.close()
        if self.report.sound("files"):  # a damaged page is found where it is read
            rows = sum(row_groups(path)[-1] for path in self.files.values())
            size = sum(os.path.getsize(path) for path in self.files.values())
            self.report.add("files", "ok", f"{len(self.files)} files, {rows:,} rows, {size:,} bytes")

    def _vectors(self) -> None:
        for name, spec in self.feature_map.features.items():
            width = spec.get("pretrain_dim", spec.get("embedding_dim", self.feature_map.default_emb_dim))
            if "pretrained_emb" in spec and width is None:
                self.report.add("pretrained", "not checked", f"{name}: give --expid, whose embedding_dim they must have")
            elif "pretrained_emb" in spec:
                try:
                    read_vectors(vector_path(self.feature_map, name), name, spec["vocab_size"], width)
                except DataError as error:
                    self.report.add("pretrained", "error", str(error))

    def _open(self) -> None:
        for key, path in self.files.items():
            try:
                row_groups(path)
                self.present[key] = column_names(path)
            except DataError as error:
                self.report.add("files", "error", str(error))
        folders = sorted({Path(path).parent for path in self.files.values()})
        for fault in (fault for folder in folders for fault in check_sums(folder)):
            self.report.add("checksums", "error", fault)
        if not any((folder / SUMS).exists() for folder in folders):
            self.report.add("checksums", "not checked", f"no {SUMS} beside the files")
        if self.time_column is None:
            known = [names for key, names in self.present.items() if key.endswith("_data")]
            self.time_column = next((name for name in TIME_NAMES if known and all(name in names for names in known)), None)

    def _has(self, key: str, wanted: list[str]) -> list[str]:
        """Those of the columns that a file has; the others are errors."""
        for name in wanted:
            if name not in self.present[key]:
                try:
                    read_table(self.files[key], [name])
                except DataError as error:
                    self.report.add("columns", "error", str(error))
        return [name for name in dict.fromkeys(wanted) if name in self.present[key]]

    def _items(self, path: str) -> None:
        specs = item_specs(self.feature_map)
        names = self._has("item_info", ["item_index", *specs])
        width, index = self.feature_map.default_emb_dim, []
        for table, numbers in self.faults.parts(path, names):
            for name in names:
                if name != "item_index":
                    read = partial(_feature, name, specs[name], width)
                    self.faults.clean("item features", path, table, numbers, read)
            if "item_index" in names and self.faults.clean("item_index", path, table, numbers, _item_index).all():
                index.append(_item_index(table, path))
                self._padding(table[np.flatnonzero(index[-1] == 0)], path)
        if "item_index" in names and sum(map(len, index)) == row_groups(path)[-1]:
            order = self._order("item_index", index, path)
            self.num_items = None if order is None else len(order)

    def _padding(self, rows: pl.DataFrame, path: str) -> None:
        """LongCTR's models read the padding row's features."""
        for name in rows.columns:
            values = rows[name].explode() if rows[name].dtype.is_nested() else rows[name]
            if values.dtype.is_numeric() and (values.fill_null(0) != 0).any():
                text = f"{path}: column '{name}' of the padding row, item_index 0, is not 0; write 0"
                self.report.add("item features", "warning", text)

    def _order(self, check: str, index: list[columns.Integers], path: str) -> columns.Integers | None:
        """The permutation that puts a file in order of its index; None if the index has a fault."""
        known = np.concatenate([np.zeros(0, np.int64), *index])
        try:
            order = (order_of_items if check == "item_index" else order_of_users)(known, path)
        except DataError as error:
            self.report.add(check, "error", str(error))
            return None
        if (np.diff(order) == 1).all():
            self.report.add(check, "ok", f"{len(order):,}, in order")
        else:
            text = f"{path}: rows are not in order of '{check}': read rightly here, but LongCTR goes by position; sort them"
            self.report.add(check, "warning", text)
        return order

    def _users(self, path: str) -> None:
        if not self._has("user_info", [SEQUENCE]):
            return
        names = [name for name in ("user_index", SEQUENCE) if name in self.present["user_info"]]
        users, lengths = [], []
        for table, numbers in self.faults.parts(path, names):
            named = self.faults.clean("user_index", path, table, numbers, read_users)
            events = partial(_events, num_items=self.num_items or 2**62)
            if not named.all():
                self.faults.clean("histories", path, table.filter(named), numbers[named], events)
                continue
            self.faults.clean("histories", path, table, numbers, events)
            if isinstance(table.schema[SEQUENCE], pl.List | pl.Array):
                users.append(read_users(table, columns.FilePart(path, int(numbers[0]))))
                series = table[SEQUENCE]
                series = series.arr.to_list() if isinstance(series.dtype, pl.Array) else series
                lengths.append(series.list.len().fill_null(0).to_numpy().astype(np.int64))
        if sum(map(len, users)) == row_groups(path)[-1]:
            order = self._order("user_index", users, path)
            self.lengths = None if order is None else np.concatenate([np.zeros(0, np.int64), *lengths])[order]

    def _split(self, name: str, path: str) -> None:
        lengths = self.lengths if self.lengths is not None else np.zeros(0, np.int64)
        reader = SplitReader(path, name, self.feature_map, lengths, self.num_items or 2**31)
        check = SplitCheck(
            reader, self.faults, [], self.time_column, self.lengths is not None, self.num_items is not None
        )
        group_id = self.feature_map.group_id
        check.present = self._has(f"{name}_data", [*check.wanted().values(), *([group_id] if group_id else [])])
        found = check.figures()
        if found.rows:
            self.figures[name] = found
            self._report_split(name, path, found)
        else:
            self.report.add("rows", "error", f"{path}: no rows; the {name} split needs at least one impression")

    def _report_split(self, name: str, path: str, found: SplitFigures) -> None:
        tally, add = found.tally, self.report.add
        if tally.rows:
            grouped = name != "train" and any(metric in ("gAUC", "avgAUC") for metric in self.metrics)
            for check, fault in tally.faults(path, self.feature_map.group_id, grouped):
                add(check, "error", fault)
            add("labels", "ok", f"{name}: {tally.clicks / tally.rows:.2%} of {tally.rows:,} rows are clicks")
            share = found.empty / tally.rows
            add("empty histories", "warning" if share > MANY_EMPTY else "ok", f"{name}: {share:.1%} of the rows")
        train = self.figures.get("train", found)
        if train is found:
            return
        if found.shown.any():
            cold = found.shown[train.shown == 0].sum() / found.shown.sum()
            text = f"{name}: the item of {cold:.1%} of the rows is never a target in train"
            add("cold items", "warning" if cold > MANY_COLD else "ok", text)
        if found.times and train.times and found.times[0] < train.times[1]:
            text = f"{path}: begins at '{self.time_column}' {found.times[0]:.0f}, before train ends at {train.times[1]:.0f}"
            add("time order", "warning", text)


def _feature(name: str, spec: dict[str, Any], width: int | None, table: pl.DataFrame, path: str) -> columns.Array:
    return feature_column(table[name], path, spec, width)


def _item_index(table: pl.DataFrame, path: str) -> columns.Integers:
    return columns.integers(table["item_index"], path)


def _events(table: pl.DataFrame, path: str, num_items: int) -> columns.Integers:
    series, offsets = columns.ragged(table[SEQUENCE], path)
    return read_events(series, read_users(table, path), offsets, path, num_items)
