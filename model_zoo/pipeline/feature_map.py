"""FuxiCTR's feature map, made straight from a dataset config's ``feature_cols`` (no files, no vocabulary scan)."""

from __future__ import annotations

import os
from collections import OrderedDict
from typing import Any

from model_zoo.compat import FeatureMap
from model_zoo.errors import ConfigError

FEATURE_TYPES = ("meta", "categorical", "numeric", "sequence", "embedding")
#: keys of one entry of ``feature_cols`` (FuxiCTR's; ``dtype`` and ``active`` included)
COLUMN_KEYS = {
    "name", "active", "dtype", "type", "source", "vocab_size", "max_len", "embedding_dim", "emb_output_dim",
    "pretrain_dim", "pretrain_usage", "pretrained_emb", "freeze_emb", "feature_encoder", "share_embedding", "remap",
    "fill_na", "padding", "splitter", "min_categr_count", "normalizer", "preprocess", "category_processor",
}  # fmt: skip
#: columns that say whose impression a row is, in every LongCTR split
ROW_COLUMNS = ("user_index", "item_index", "seq_len")
PRETRAIN_USAGES = ("init", "sum", "concat")
#: keys of an entry that are counts
SIZES = ("vocab_size", "max_len", "embedding_dim", "emb_output_dim", "pretrain_dim")
NO_ENCODER = (None, "null", "None", "none")
DEFAULT_POOLING = "layers.MaskedAveragePooling()"


def build_feature_map(params: dict[str, Any]) -> FeatureMap:
    """The feature map that FuxiCTR's processor makes of LongCTR's configs (``rebuild_dataset: False``).

    Args:
        params: needs ``dataset_id``, ``feature_cols``, ``label_col``; reads ``data_root``, ``group_id``,
            ``embedding_dim``, ``use_features``, ``feature_specs``.

    Raises:
        ConfigError: an entry of ``feature_cols`` is incomplete or unknown; names the column and the key.
    """
    dataset = params["dataset_id"]
    feature_map = FeatureMap(dataset, os.path.join(params.get("data_root") or "", dataset))
    feature_map.labels = [_label(params["label_col"], f"dataset {dataset}: label_col")]
    feature_map.group_id = params.get("group_id")
    feature_map.default_emb_dim = params.get("embedding_dim")
    features: OrderedDict[str, dict[str, Any]] = OrderedDict()
    for number, entry in enumerate(params["feature_cols"], start=1):
        for name in _names(entry, f"dataset {dataset}: feature_cols: entry {number}"):
            where = f"dataset {dataset}: feature_cols: {name}"
            if not entry.get("active", True):
                continue
            if name in features:
                raise ConfigError(f"{where}: listed twice; take one of the entries out")
            features[name] = _spec({**entry, "name": name}, where, features)
    if params.get("use_features"):
        missing = [name for name in params["use_features"] if name not in features]
        if missing:
            raise ConfigError(f"use_features: {', '.join(missing)} not among feature_cols of {dataset}")
        features = OrderedDict((name, features[name]) for name in params["use_features"])
    for override in params.get("feature_specs") or []:
        for name in _names(override, "feature_specs"):
            _refuse_unknown(override, f"feature_specs: {name}")
            if name not in features:
                raise ConfigError(f"feature_specs: {name} is not among feature_cols of {dataset}")
            features[name].update({key: value for key, value in override.items() if key != "name"})
    feature_map.features = features
    feature_map.num_fields = feature_map.get_num_fields()
    feature_map.total_features = sum(
        1 if spec["type"] == "numeric" else spec.get("vocab_size", 0)
        for spec in features.values()
        if "share_embedding" not in spec
    )
    return feature_map


def _label(label: Any, where: str) -> str:
    """The label column's name."""
    entries = label if isinstance(label, list) else [label]
    if len(entries) != 1 or not isinstance(entries[0], dict) or not isinstance(entries[0].get("name"), str):
        raise ConfigError(f"{where}: must name one column, for example {{name: is_click}}")
    return str(entries[0]["name"])


def _names(entry: dict[str, Any], where: str) -> list[str]:
    """The column names of an entry, which may share one specification."""
    name = entry.get("name")
    names: list[Any] = name if isinstance(name, list) else [name]
    for each in names:
        if not isinstance(each, str) or not each or "." in each:
            raise ConfigError(f"{where}: name: {each!r}: must be a column name (text, without a dot)")
    return names


def _refuse_unknown(entry: dict[str, Any], where: str) -> None:
    unknown = sorted(str(key) for key in set(entry) - COLUMN_KEYS)
    if unknown:
        raise ConfigError(f"{where}: unknown key(s) {', '.join(unknown)}; known: {', '.join(sorted(COLUMN_KEYS))}")


def _refuse_wrong_sizes(entry: dict[str, Any], where: str) -> None:
    for key in SIZES:
        size = entry.get(key)
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ConfigError(f"{where}: {key}: {size!r}: must be a whole number, 1 or more")


def _spec(entry: dict[str, Any], where: str, known: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One feature's specification as FuxiCTR's feature map holds it."""
    _refuse_unknown(entry, where)
    _refuse_wrong_sizes(entry, where)
    kind = entry.get("type")
    if kind not in FEATURE_TYPES:
        raise ConfigError(f"{where}: type must be one of {', '.join(FEATURE_TYPES)}, not {kind!r}")
    if "category_processor" in entry:
        raise ConfigError(f"{where}: category_processor is not applied to ready-made parquet files; encode the column")
    if "pretrained_emb" in entry and kind not in ("categorical", "sequence"):
        raise ConfigError(f"{where}: pretrained_emb needs ids to look up: type categorical or sequence, not {kind}")
    if kind == "meta":
        return {"type": "meta"}
    spec: dict[str, Any] = {"source": entry.get("source", ""), "type": kind}
    for key in ("embedding_dim", "emb_output_dim"):
        if key in entry:
            spec[key] = entry[key]
    encoder = entry.get("feature_encoder", DEFAULT_POOLING if kind == "sequence" else None)
    if encoder not in NO_ENCODER:
        spec["feature_encoder"] = encoder
    if kind == "embedding" and "pretrain_dim" in entry:
        spec["pretrain_dim"] = entry["pretrain_dim"]
    if kind in ("categorical", "sequence"):
        _add_vocabulary(spec, entry, where, known)
    if kind == "sequence":
        if not entry.get("max_len"):
            raise ConfigError(f"{where}: a sequence feature needs max_len, the number of ids kept per row")
        spec["max_len"] = entry["max_len"]
        if encoder in NO_ENCODER or "Identity" in str(encoder):
            raise ConfigError(f"{where}: feature_encoder: a sequence feature needs a pooling, as {DEFAULT_POOLING}")
    return spec


def _add_vocabulary(
    spec: dict[str, Any], entry: dict[str, Any], where: str, known: dict[str, dict[str, Any]]
) -> None:
    """Vocabulary size, shared table and pretrained vectors of an id feature."""
    shared = entry.get("share_embedding")
    if shared is not None:
        if "vocab_size" not in known.get(shared, {}):
            raise ConfigError(f"{where}: share_embedding: {shared} must be an id feature before it in feature_cols")
        spec["share_embedding"] = shared
    if "vocab_size" not in entry:
        raise ConfigError(f"{where}: vocab_size is required (the largest id of the column + 1, or more)")
    spec["padding_idx"] = 0
    spec["vocab_size"] = entry["vocab_size"]
    if shared is not None:
        size = max(entry["vocab_size"], known[shared]["vocab_size"])
        spec["vocab_size"] = known[shared]["vocab_size"] = size
    if "pretrained_emb" in entry:
        spec["pretrained_emb"] = entry["pretrained_emb"]
        spec["freeze_emb"] = entry.get("freeze_emb", True)
        spec["pretrain_usage"] = entry.get("pretrain_usage", "init")
        if spec["pretrain_usage"] not in PRETRAIN_USAGES:
            usage = f"pretrain_usage: {spec['pretrain_usage']!r}"
            raise ConfigError(f"{where}: {usage}: must be one of {', '.join(PRETRAIN_USAGES)}")
        if "pretrain_dim" in entry:
            spec["pretrain_dim"] = entry["pretrain_dim"]
