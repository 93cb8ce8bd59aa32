"""A LongCTR data set: item table, ragged histories, splits; checked once, before any training."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from model_zoo.batch import ItemFeatures
from model_zoo.compat import FeatureMap
from model_zoo.errors import ConfigError, DataError
from model_zoo.pipeline import columns
from model_zoo.pipeline.histories import (
    Histories,
    digest,
    read_bounded_histories,
    read_histories,
    rows_in_order,
)
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
        """BLAKE2 digest of each file's bytes (32 hex digits)."""
        return {name: digest(path) for name, path in self.files.items()}


def load_dataset(feature_map: FeatureMap, params: dict[str, Any]) -> CTRDataset:
    """Read and check a data set.

    Args:
        feature_map: from `build_feature_map`.
        params: paths ``item_info``, ``user_info``, ``train_data``, ``valid_data``, ``test_data`` (the last may be
            absent); ``memory_limit_mib``, the bound on rows and histories in memory, and then ``data_root``.

    Raises:
        ConfigError: a path is not configured, or the bound is below what one row group takes.
        DataError: a file is missing or holds something wrong; names file, column and row.
    """
    files = {}
    for key in ("item_info", "user_info", "train_data", "valid_data", "test_data"):
        path = params.get(key)
        if not path and key != "test_data":
            raise ConfigError(f"dataset {params['dataset_id']}: no path under '{key}'")
        if path:
            files[key] = with_extension(path)
    item_columns = read_items(files["item_info"], feature_map)
    num_items = len(next(iter(item_columns.values())))
    limit = (params.get("memory_limit_mib") or 0) * 2**20
    if limit:
        cache = os.path.join(params.get("data_root") or "data", "history_cache")
        histories = read_bounded_histories(files["user_info"], num_items, limit // 2, cache)
    else:
        histories = read_histories(files["user_info"], num_items)
    splits: dict[str, Split | StreamedSplit] = {}
    for name in SPLITS:
        if f"{name}_data" in files:
            reader = SplitReader(files[f"{name}_data"], name, feature_map, histories.lengths, num_items)
            splits[name] = StreamedSplit.open(reader, limit // 2) if limit else reader.read()
    return CTRDataset(feature_map, item_columns, histories, splits, files)


def with_extension(path: str) -> str:
    """The path of a parquet file whose extension a config may leave out."""
    return path if path.endswith(".parquet") or os.path.exists(path) else f"{path}.parquet"


def read_items(path: str, feature_map: FeatureMap) -> dict[str, columns.Array]:
    """Item feature columns with row = item_index, whatever the order of the file's rows."""
    specs = {name: spec for name, spec in feature_map.features.items() if spec.get("source") == "item"}
    if not specs:
        raise ConfigError(f"dataset {feature_map.dataset_id}: no feature has `source: item`")
    table = columns.read_table(path, ["item_index", *specs])
    index = columns.integers(table["item_index"], path)
    order = rows_in_order(index, path, "item_index")
    if len(index) == 0 or index[order[0]] != 0:
        raise DataError(f"{path}: column 'item_index' has no 0; add the padding row, item_index 0, all features 0")
    width = feature_map.default_emb_dim
    return {name: feature_column(table[name], path, spec, width)[order] for name, spec in specs.items()}


def check_labels(dataset: CTRDataset, metrics: list[str]) -> None:
    """Refuse a split on which a configured metric is undefined.

    Raises:
        DataError: a split has one class, or gAUC is asked for and every group has one class.
    """
    grouped = any(metric in ("gAUC", "avgAUC") for metric in metrics)
    for split in dataset.splits.values():
        positives = 0.0
        ids, sums = np.zeros(0, np.int64), np.zeros((0, 2))  # of each group: clicks, rows
        for part in split.parts():
            positives += float(part.label.sum(dtype=np.float64))
            if split.name == "train" or part.group is None or not grouped:
                continue
            found, code = np.unique(part.group, return_inverse=True)
            ids, place = np.unique(np.concatenate([ids, found]), return_inverse=True)
            here = np.stack([np.bincount(code, part.label), np.bincount(code)], axis=1)
            sums, before = np.zeros((len(ids), 2)), sums
            np.add.at(sums, place, np.concatenate([before, here]))
        if positives in (0.0, float(len(split))):
            label = min(positives, 1.0)
            raise DataError(f"{split.path}: every label is {label:.0f}; AUC needs clicks and non-clicks")
        if not len(ids):
            continue
        mixed = (sums[:, 0] > 0) & (sums[:, 0] < sums[:, 1])
        group_id = dataset.feature_map.group_id
        if not mixed.any():
            raise DataError(
                f"{split.path}: every group of '{group_id}' has labels of one class, so gAUC is undefined; "
                "set another group_id, or take gAUC out of metrics and monitor"
            )
        if not mixed.all():
            logger.info("%s: gAUC leaves out %d of %d groups of '%s', which have one class",
                        split.name, int((~mixed).sum()), len(mixed), group_id)  # fmt: skip
