"""A LongCTR data set: item table, ragged histories, splits; checked once, before any training."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from model_zoo.batch import ItemFeatures
from model_zoo.compat import FeatureMap
from model_zoo.errors import ConfigError, DataError
from model_zoo.pipeline import columns, parquet_files
from model_zoo.pipeline.download import check_sums
from model_zoo.pipeline.histories import (
    Histories,
    digest,
    read_bounded_histories,
    read_histories,
    rows_in_order,
)
from model_zoo.pipeline.leakage import first_clicks
from model_zoo.pipeline.pretrained_vectors import vector_path
from model_zoo.pipeline.splits import Split, SplitReader, feature_column
from model_zoo.pipeline.streaming import StreamedSplit

logger = logging.getLogger("model_zoo")

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class CTRDataset:
    """Item table, histories and splits of one data set."""

    feature_map: FeatureMap
    item_columns: dict[str, columns.Array]
    histories: Histories
    splits: dict[str, Split | StreamedSplit]
    files: dict[str, str]

    @property
    def num_items(self) -> int:
        """Items, the padding row included."""
        return len(next(iter(self.item_columns.values())))

    def item_features(self) -> ItemFeatures:
        """The item table as a module to put beside a model."""
        return ItemFeatures({name: torch.from_numpy(column) for name, column in self.item_columns.items()})

    def fingerprint(self) -> dict[str, str]:
        """BLAKE2 digest of each file's bytes (32 hex digits), pretrained vectors included."""
        return {name: digest(path) for name, path in self.files.items()}


def load_dataset(feature_map: FeatureMap, params: dict[str, Any]) -> CTRDataset:
    """Read and check a data set.

    Args:
        feature_map: from `build_feature_map`.
        params: paths ``item_info``, ``user_info``, ``train_data``, ``valid_data``, ``test_data`` (the last may be
            absent); ``time_col``, the list column of ``user_info`` with the events' times, or None;
            ``memory_limit_mib``, the bound on rows and histories in memory, and then ``data_root``.

    Raises:
        ConfigError: a path is not configured, or the bound is below what one row group takes.
        DataError: a file is missing, holds something wrong (names file, column and row), or is not the one downloaded.
    """
    files = dataset_files(params)
    folders = sorted({Path(path).parent for path in files.values()})
    if changed := [fault for folder in folders for fault in check_sums(folder)]:
        raise DataError(f"{'; '.join(changed)}; download the data set again")
    item_columns = read_items(files["item_info"], feature_map)
    num_items = len(next(iter(item_columns.values())))
    limit = (params.get("memory_limit_mib") or 0) * 2**20
    if limit:
        cache = os.path.join(params.get("data_root") or "data", "history_cache")
        histories = read_bounded_histories(files["user_info"], num_items, limit // 2, cache, params.get("time_col"))
    else:
        histories = read_histories(files["user_info"], num_items, time_col=params.get("time_col"))
    splits: dict[str, Split | StreamedSplit] = {}
    for name in SPLITS:
        if f"{name}_data" in files:
            reader = SplitReader(files[f"{name}_data"], name, feature_map, histories.lengths, num_items)
            splits[name] = StreamedSplit.open(reader, limit // 2) if limit else reader.read()
    train = next(splits["train"].parts())
    if (leak := first_clicks(histories, train).fault()) is not None:
        logger.warning("%s: %s; data/validate.py tells more", train.path, leak)
    for name, spec in feature_map.features.items():
        if "pretrained_emb" in spec and os.path.exists(path := vector_path(feature_map, name)):
            files[f"pretrained_emb of {name}"] = path
    return CTRDataset(feature_map, item_columns, histories, splits, files)


def dataset_files(params: dict[str, Any]) -> dict[str, str]:
    """The path of each file, by its key in the config.

    Raises:
        ConfigError: a path is not configured.
    """
    files = {}
    for key in ("item_info", "user_info", "train_data", "valid_data", "test_data"):
        path = params.get(key)
        if not path and key != "test_data":
            raise ConfigError(f"dataset {params['dataset_id']}: no path under '{key}'")
        if path:
            files[key] = with_extension(path)
    return files


def with_extension(path: str) -> str:
    """The path of a parquet file whose extension a config may leave out."""
    return path if path.endswith(".parquet") or os.path.exists(path) else f"{path}.parquet"


def read_items(path: str, feature_map: FeatureMap) -> dict[str, columns.Array]:
    """Item feature columns with row = item_index, whatever the order of the file's rows."""
    specs = item_specs(feature_map)
    table = parquet_files.read_table(path, ["item_index", *specs])
    order = order_of_items(columns.integers(table["item_index"], path), path)
    width = feature_map.default_emb_dim
    return {name: feature_column(table[name], path, spec, width)[order] for name, spec in specs.items()}


def item_specs(feature_map: FeatureMap) -> dict[str, dict[str, Any]]:
    """Specifications of the item features.

    Raises:
        ConfigError: there is none.
    """
    specs = {name: spec for name, spec in feature_map.features.items() if spec.get("source") == "item"}
    if not specs:
        raise ConfigError(f"dataset {feature_map.dataset_id}: no feature has `source: item`")
    return specs


def order_of_items(index: columns.Integers, path: str) -> columns.Integers:
    """The permutation that puts rows in order of ``item_index``, the padding row first.

    Raises:
        DataError: an item, or the padding row, is missing, or stands there twice.
    """
    order = rows_in_order(index, path, "item_index")
    if len(index) == 0 or index[order[0]] != 0:
        raise DataError(f"{path}: column 'item_index' has no 0; add the padding row, item_index 0, all features 0")
    return order


class LabelTally:
    """Clicks and rows of a split and of its groups, over any parts of it.

    Attributes:
        clicks, rows: of all parts.
        groups: float64 ``[groups, 2]``, clicks and rows of each group.
    """

    def __init__(self) -> None:
        self.clicks, self.rows = 0.0, 0
        self.groups = np.zeros((0, 2))
        self._ids = np.zeros(0, np.int64)

    def add(self, label: npt.NDArray[np.float32], group: npt.NDArray[np.int64] | None) -> None:
        """Count a part: labels and, if they matter, group ids ``[N]``."""
        self.clicks += float(label.sum(dtype=np.float64))
        self.rows += len(label)
        if group is None:
            return
        found, code = np.unique(group, return_inverse=True)
        self._ids, place = np.unique(np.concatenate([self._ids, found]), return_inverse=True)
        here = np.stack([np.bincount(code, label), np.bincount(code)], axis=1)
        self.groups, before = np.zeros((len(self._ids), 2)), self.groups
        np.add.at(self.groups, place, np.concatenate([before, here]))

    @property
    def mixed(self) -> npt.NDArray[np.bool_]:
        """Of each group, whether it has both labels."""
        return (self.groups[:, 0] > 0) & (self.groups[:, 0] < self.groups[:, 1])

    def faults(self, path: str, group_id: str | None, grouped: bool) -> Iterator[tuple[str, str]]:
        """What makes AUC, or gAUC if it is asked for, undefined: ``labels`` or ``groups``, and a sentence."""
        if self.clicks in (0.0, float(self.rows)):
            yield "labels", f"{path}: every label is {min(self.clicks, 1.0):.0f}; AUC needs clicks and non-clicks"
        elif grouped and len(self.groups) and not self.mixed.any():
            yield "groups", (
                f"{path}: every group of '{group_id}' has labels of one class, so gAUC is undefined; "
                "set another group_id, or take gAUC out of metrics and monitor"
            )


def check_labels(dataset: CTRDataset, metrics: list[str]) -> None:
    """Refuse a split on which a configured metric is undefined.

    Raises:
        DataError: a split has one class, or gAUC is asked for and every group has one class.
    """
    grouped = any(metric in ("gAUC", "avgAUC") for metric in metrics)
    group_id = dataset.feature_map.group_id
    for split in dataset.splits.values():
        tally = LabelTally()
        for part in split.parts():
            tally.add(part.label, part.group if grouped and split.name != "train" else None)
        for _, fault in tally.faults(split.path, group_id, grouped):
            raise DataError(fault)
        if not tally.mixed.all():
            logger.info("%s: gAUC leaves out %d of %d groups of '%s', which have one class",
                        split.name, int((~tally.mixed).sum()), len(tally.mixed), group_id)  # fmt: skip
