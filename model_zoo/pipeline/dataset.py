"""A LongCTR data set in memory: item table, ragged histories, splits; checked once, before any training."""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from model_zoo.batch import ItemFeatures
from model_zoo.compat import FeatureMap
from model_zoo.errors import ConfigError, DataError
from model_zoo.pipeline import columns
from model_zoo.pipeline.feature_map import ROW_COLUMNS

logger = logging.getLogger("model_zoo")

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Histories:
    """Every user's full item sequence, oldest first, as one flat array.

    Attributes:
        items: int32, all sequences one after the other.
        offsets: int64 ``[users + 1]``; user u's sequence is ``items[offsets[u]:offsets[u + 1]]``.
    """

    items: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Length of each user's sequence."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class Split:
    """The impressions of one file.

    Attributes:
        name: ``train``, ``valid`` or ``test``.
        path: the file.
        user_index, item_index, seq_len: int32 ``[N]``.
        label: float32 ``[N]``, 0 or 1.
        context: context feature columns, ``[N]`` or ``[N, m]``.
        group: int64 ``[N]``, or None without ``group_id``.
    """

    name: str
    path: str
    user_index: npt.NDArray[np.int32]
    item_index: npt.NDArray[np.int32]
    seq_len: npt.NDArray[np.int32]
    label: npt.NDArray[np.float32]
    context: dict[str, columns.Array]
    group: npt.NDArray[np.int64] | None

    def __len__(self) -> int:
        return len(self.label)


@dataclass(frozen=True)
class CTRDataset:
    """Item table, histories and splits of one data set."""

    feature_map: FeatureMap
    item_columns: dict[str, columns.Array]
    histories: Histories
    splits: dict[str, Split]
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
        return {name: _digest(path) for name, path in self.files.items()}


def load_dataset(feature_map: FeatureMap, params: dict[str, Any]) -> CTRDataset:
    """Read and check a data set.

    Args:
        feature_map: from `build_feature_map`.
        params: paths ``item_info``, ``user_info``, ``train_data``, ``valid_data``, ``test_data`` (the last may be absent).

    Raises:
        ConfigError: a path is not configured.
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
    histories = read_histories(files["user_info"], num_items)
    splits = {}
    for name in SPLITS:
        if f"{name}_data" in files:
            splits[name] = read_split(files[f"{name}_data"], name, feature_map, histories, num_items)
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
    order = _rows_in_order(index, path, "item_index")
    if len(index) == 0 or index[order[0]] != 0:
        raise DataError(f"{path}: column 'item_index' has no 0; add the padding row, item_index 0, all features 0")
    width = feature_map.default_emb_dim
    return {name: feature_column(table[name], path, spec, width)[order] for name, spec in specs.items()}


def read_histories(path: str, num_items: int) -> Histories:
    """Ragged histories with row = user_index, whatever the order of the file's rows."""
    named = "user_index" in columns.column_names(path)
    table = columns.read_table(path, ["user_index", "full_item_seq"] if named else ["full_item_seq"])
    values, offsets = columns.ragged(table["full_item_seq"], path)
    items = columns.integers(values, path, offsets)
    if named:
        index = columns.integers(table["user_index"], path)
        order = _rows_in_order(index, path, "user_index")
        if len(index) and index[order[0]] != 0:
            raise DataError(f"{path}: column 'user_index' starts at {index[order[0]]}; number the users from 0")
        items, offsets = _reordered(items, offsets, order)
    for bad, reason in (
        (items >= num_items, f"is not in item_info, whose last item_index is {num_items - 1}"),
        (items < 0, "is negative"),
        (items == 0, "is the padding item; take it out of the history"),
    ):
        if bad.any():
            place = int(np.argmax(bad))
            user = int(np.searchsorted(offsets, place, side="right")) - 1
            raise DataError(
                f"{path}: column 'full_item_seq', user_index {user}, position {place - offsets[user]}: "
                f"item {items[place]} {reason} ({int(bad.sum())} such events)"
            )
    return Histories(items.astype(np.int32), offsets)


def read_split(path: str, name: str, feature_map: FeatureMap, histories: Histories, num_items: int) -> Split:
    """One file of impressions, its row columns checked against items and histories."""
    label = feature_map.labels[0]
    specs = {
        feature: spec
        for feature, spec in feature_map.features.items()
        if spec["type"] != "meta" and spec.get("source") != "item"
    }
    group_id = feature_map.group_id
    wanted = dict.fromkeys([*ROW_COLUMNS, *specs, label, *([group_id] if group_id else [])])
    table = columns.read_table(path, list(wanted))
    if table.height == 0:
        raise DataError(f"{path}: no rows; the {name} split needs at least one impression")
    user = columns.integers(table["user_index"], path)
    item = columns.integers(table["item_index"], path)
    seq_len = columns.integers(table["seq_len"], path)
    target = columns.integers(table[label], path).astype(np.float32)
    users = len(histories.lengths)
    _check(user, (user < 0) | (user >= users), path, "user_index", f"user_info holds users 0..{users - 1}")
    _check(item, (item <= 0) | (item >= num_items), path, "item_index", f"item_info holds items 1..{num_items - 1}")
    longest = histories.lengths[user]
    _check(seq_len, seq_len < 0, path, "seq_len", "a length cannot be negative")
    _check(seq_len, seq_len > longest, path, "seq_len", "beyond the user's history in user_info; rebuild the split")
    _check(target, (target != 0) & (target != 1), path, label, "labels must be 0 or 1")
    group = columns.groups(table[group_id], path) if group_id else None
    width = feature_map.default_emb_dim
    context = {feature: feature_column(table[feature], path, spec, width) for feature, spec in specs.items()}
    narrow = [column.astype(np.int32) for column in (user, item, seq_len)]
    return Split(name, path, narrow[0], narrow[1], narrow[2], target, context, group)


def feature_column(
    series: pl.Series, path: str, spec: dict[str, Any], default_width: int | None = None
) -> columns.Array:
    """One feature's values as its type says: int32 ``[N]``, int32 ``[N, max_len]``, float32 ``[N]`` or ``[N, m]``.

    Args:
        default_width: the experiment's ``embedding_dim``, which an embedding feature has that names no width itself.

    Raises:
        DataError: a value that does not fit the feature's specification.
    """
    kind = spec["type"]
    if kind == "categorical":
        return columns.ids(series, path, spec["vocab_size"])
    if kind == "sequence":
        return columns.id_lists(series, path, spec["vocab_size"], spec["max_len"])
    if kind == "numeric":
        return columns.floats(series, path)
    encoder, embedding = spec.get("feature_encoder"), spec.get("embedding_dim", default_width)
    if not encoder:
        width = spec.get("pretrain_dim", embedding)
    elif "Identity" in str(encoder):
        width = spec.get("emb_output_dim", embedding)
    else:
        width = spec.get("pretrain_dim")
    return columns.vectors(series, path, width)


def check_labels(dataset: CTRDataset, metrics: list[str]) -> None:
    """Refuse a split on which a configured metric is undefined.

    Raises:
        DataError: a split has one class, or gAUC is asked for and every group has one class.
    """
    for split in dataset.splits.values():
        positives = float(split.label.sum())
        if positives in (0.0, float(len(split))):
            raise DataError(f"{split.path}: every label is {split.label[0]:.0f}; AUC needs clicks and non-clicks")
        if split.name == "train" or split.group is None or not any(m in ("gAUC", "avgAUC") for m in metrics):
            continue
        _, code = np.unique(split.group, return_inverse=True)
        clicks = np.bincount(code, weights=split.label)
        mixed = (clicks > 0) & (clicks < np.bincount(code))
        group_id = dataset.feature_map.group_id
        if not mixed.any():
            raise DataError(
                f"{split.path}: every group of '{group_id}' has labels of one class, so gAUC is undefined; "
                "set another group_id, or take gAUC out of metrics and monitor"
            )
        if not mixed.all():
            logger.info("%s: gAUC leaves out %d of %d groups of '%s', which have one class",
                        split.name, int((~mixed).sum()), len(mixed), group_id)  # fmt: skip


def _rows_in_order(index: npt.NDArray[np.int64], path: str, column: str) -> npt.NDArray[np.int64]:
    """The permutation that puts rows in order of ``index``, which must be a run of whole numbers."""
    order = np.argsort(index, kind="stable")
    steps = np.diff(index[order])
    if (steps != 1).any():
        place = int(np.argmax(steps != 1))
        found = index[order[place]]
        fault = "twice" if steps[place] == 0 else f"but no {found + 1}"
        raise DataError(f"{path}: column '{column}' has {found} {fault}; every index must stand there once")
    return order


def _reordered(
    values: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64], order: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """A ragged array with its rows in another order."""
    if np.array_equal(order, np.arange(len(order))):
        return values, offsets
    lengths = np.diff(offsets)[order]
    ends = np.concatenate([[0], np.cumsum(lengths)])
    place = np.arange(len(values)) + np.repeat(offsets[:-1][order] - ends[:-1], lengths)
    return values[place], ends


def _check(values: columns.Array, bad: npt.NDArray[np.bool_], path: str, column: str, reason: str) -> None:
    if bad.any():
        row = int(np.argmax(bad))
        raise DataError(f"{path}: column '{column}', row {row}: {values[row]}: {reason} ({int(bad.sum())} such rows)")


def _digest(path: str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
