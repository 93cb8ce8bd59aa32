"""FuxiCTR's feature map, made straight from a dataset config's ``feature_cols`` (no files, no vocabulary scan)."""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from model_zoo.compat import FeatureMap
from model_zoo.faults import Fault, Place, nearest, refusal, shown

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
SWITCHES = ("active", "freeze_emb")
NO_ENCODER = (None, "null", "None", "none")
DEFAULT_POOLING = "layers.MaskedAveragePooling()"
POOLINGS = (DEFAULT_POOLING, "layers.MaskedSumPooling()")
#: the texts that may stand under ``feature_encoder``, by type of feature: FuxiCTR evaluates them as Python
ENCODERS = {"sequence": POOLINGS} | dict.fromkeys(("categorical", "numeric", "embedding"), ("nn.Identity()",))


def build_feature_map(params: dict[str, Any]) -> FeatureMap:
    """The feature map that FuxiCTR's processor makes of LongCTR's configs (``rebuild_dataset: False``).

    Args:
        params: needs ``dataset_id``, ``feature_cols``, ``label_col``; reads ``data_root``, ``group_id``,
            ``embedding_dim``, ``use_features``, ``feature_specs``.

    Raises:
        ConfigError: entries of ``feature_cols`` are incomplete or unknown; names all of them, each by column and key.
    """
    feature_map, faults = draft_feature_map(params)
    if faults:
        raise refusal([fault.text for fault in faults], f"dataset {params['dataset_id']}")
    return feature_map


def draft_feature_map(params: dict[str, Any]) -> tuple[FeatureMap, list[Fault]]:
    """The same, wrong entries mended in some way or left out, and everything that is wrong with them.

    Args:
        params: as `build_feature_map` takes them; ``feature_cols`` and ``feature_specs`` are lists of mappings.
    """
    dataset, faults = params["dataset_id"], list[Fault]()
    overrides: dict[str, list[tuple[Place, dict[str, Any]]]] = {}
    for number, entry in enumerate(params.get("feature_specs") or []):
        for name in _names(entry, ("feature_specs", number), faults):
            overrides.setdefault(name, []).append((("feature_specs", number), entry))
    features: OrderedDict[str, dict[str, Any]] = OrderedDict()
    columns: set[str] = set()
    for number, entry in enumerate(params["feature_cols"]):
        place: Place = ("feature_cols", number)
        for name in _names(entry, place, faults):
            column = _Column(name, [(place, entry), *overrides.get(name, [])], faults)
            if column.get("active", True) is False:
                columns.add(name)
                continue
            if name in features:
                column.wrong("name", "listed twice; take one of the entries out")
                continue
            columns.add(name)
            features[name] = column.spec(features)
    label = _label(params["label_col"], faults)
    if features.get(label, {}).get("type", "meta") != "meta":
        text = f"feature_cols: {label}: is the label; a model that reads it learns nothing else: take it out"
        faults.append(Fault(("feature_cols",), text))
    for number, name in enumerate(params.get("use_features") or []):
        if name not in features:
            text = f"use_features: {name} not among feature_cols of {dataset}{nearest(name, features)}"
            faults.append(Fault(("use_features", number), text))
    for name, given in overrides.items():
        if name not in columns:
            text = f"feature_specs: {name} is not among feature_cols of {dataset}{nearest(name, columns)}"
            faults.append(Fault(given[0][0], text))
    if params.get("use_features"):
        features = OrderedDict((name, features[name]) for name in params["use_features"] if name in features)
    feature_map = FeatureMap(dataset, os.path.join(params.get("data_root") or "", dataset))
    feature_map.labels = [label]
    feature_map.group_id = params.get("group_id")
    feature_map.default_emb_dim = params.get("embedding_dim")
    feature_map.features = features
    feature_map.num_fields = feature_map.get_num_fields()
    feature_map.total_features = sum(
        1 if spec["type"] == "numeric" else spec.get("vocab_size", 0)
        for spec in features.values()
        if "share_embedding" not in spec
    )
    return feature_map, faults


def _label(label: Any, faults: list[Fault]) -> str:
    """The label column's name."""
    entries = label if isinstance(label, list) else [label]
    if len(entries) == 1 and isinstance(entries[0], dict) and isinstance(entries[0].get("name"), str):
        return str(entries[0]["name"])
    faults.append(Fault(("label_col",), "label_col: must name one column, for example {name: is_click}"))
    return ""


def _names(entry: dict[str, Any], place: Place, faults: list[Fault]) -> list[str]:
    """The column names of an entry, which may share one specification."""
    name = entry.get("name")
    names: list[Any] = name if isinstance(name, list) else [name]
    sound = [each for each in names if isinstance(each, str) and each and "." not in each]
    for each in names:
        if each not in sound:
            where = f"{place[0]}: entry {int(place[1]) + 1}: name: {shown(each)}"
            faults.append(Fault((*place, "name"), f"{where}: must be a column name (text, without a dot)"))
    return sound


@dataclass
class _Column:
    """One column's entry, its overrides after it.

    Attributes:
        name: the column's.
        entries: each with its place; later ones win.
        faults: what is wrong is added here.
    """

    name: str
    entries: list[tuple[Place, dict[str, Any]]]
    faults: list[Fault]
    entry: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.entry = {key: value for _, entry in self.entries for key, value in entry.items()}

    def get(self, key: str, default: Any = None) -> Any:
        """What the entry says under a key."""
        return self.entry.get(key, default)

    def wrong(self, key: str, text: str) -> None:
        """One fault, at the entry that set the key."""
        place = next((place for place, entry in reversed(self.entries) if key in entry), self.entries[0][0])
        self.faults.append(Fault((*place, key), f"{place[0]}: {self.name}: {text}"))

    def size(self, key: str) -> int | None:
        """A count, if there is one and it is sound."""
        value = self.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.wrong(key, f"{key}: {shown(value)}: must be a whole number, 1 or more")
            return None
        return value

    def spec(self, known: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """The column's specification as FuxiCTR's feature map holds it.

        Args:
            known: the columns before it.
        """
        for key in self.entry:
            if key not in COLUMN_KEYS:
                self.wrong(key, f"unknown key '{key}'{nearest(key, COLUMN_KEYS)}")
        for key in SWITCHES:
            if not isinstance(self.get(key, True), bool):
                self.wrong(key, f"{key}: {shown(self.get(key))}: must be True or False")
        sizes = {key: size for key in SIZES if (size := self.size(key)) is not None}
        kind = self.get("type")
        if kind not in FEATURE_TYPES:
            near = nearest(kind, FEATURE_TYPES)
            self.wrong("type", f"type must be one of {', '.join(FEATURE_TYPES)}, not {shown(kind)}{near}")
            kind = "categorical" if sizes.get("vocab_size") else "meta"
        if "category_processor" in self.entry:
            text = "category_processor is not applied to ready-made parquet files; encode the column"
            self.wrong("category_processor", text)
        if "pretrained_emb" in self.entry and kind not in ("categorical", "sequence"):
            self.wrong("pretrained_emb", f"pretrained_emb needs ids to look up: type categorical or sequence, not {kind}")
        if kind == "meta":
            return {"type": "meta"}
        spec: dict[str, Any] = {"source": self.source(), "type": kind}
        spec |= {key: sizes[key] for key in ("embedding_dim", "emb_output_dim") if key in sizes}
        encoder = self.encoder(kind)
        if encoder is not None:
            spec["feature_encoder"] = encoder
        if kind == "embedding" and "pretrain_dim" in sizes:
            spec["pretrain_dim"] = sizes["pretrain_dim"]
        if kind in ("categorical", "sequence"):
            self.add_vocabulary(spec, sizes, known)
        if kind == "sequence":
            if not self.get("max_len"):
                self.wrong("max_len", "a sequence feature needs max_len, the number of ids kept per row")
            spec["max_len"] = sizes.get("max_len", 1)
        return spec

    def source(self) -> str:
        """The part of the feature that a slip of the pen must not change: whether it describes items."""
        source = self.get("source", "")
        if not isinstance(source, str) or (source != "item" and nearest(source, ["item"])):
            self.wrong("source", f"source: {shown(source)}: write item for a column of item_info, or leave it out")
            return "item"
        return source

    def encoder(self, kind: str) -> str | None:
        """What FuxiCTR applies to the feature's embedding."""
        encoder = self.get("feature_encoder", DEFAULT_POOLING if kind == "sequence" else None)
        if kind == "sequence" and (encoder in NO_ENCODER or encoder == "nn.Identity()"):
            self.wrong("feature_encoder", f"feature_encoder: a sequence feature needs a pooling, as {DEFAULT_POOLING}")
            return DEFAULT_POOLING
        if encoder in NO_ENCODER:
            return None
        if encoder not in ENCODERS[kind]:
            allowed = " or ".join(ENCODERS[kind])
            text = f"feature_encoder: {shown(encoder)}: not one that a feature of type {kind} can have; write {allowed}"
            self.wrong("feature_encoder", f"{text}, or leave it out")
            return DEFAULT_POOLING if kind == "sequence" else None
        return str(encoder)

    def add_vocabulary(self, spec: dict[str, Any], sizes: dict[str, int], known: dict[str, dict[str, Any]]) -> None:
        """Vocabulary size, shared table and pretrained vectors of an id feature."""
        if "vocab_size" not in self.entry:
            self.wrong("vocab_size", "vocab_size is required (the largest id of the column + 1, or more)")
        spec["padding_idx"] = 0
        spec["vocab_size"] = sizes.get("vocab_size", 1)
        shared = self.get("share_embedding")
        if shared is not None:
            other = known.get(shared, {}) if isinstance(shared, str) else {}
            if "vocab_size" not in other:
                text = f"share_embedding: {shared} must be an id feature before it in feature_cols"
                self.wrong("share_embedding", text)
            elif other.get("embedding_dim") != spec.get("embedding_dim"):
                text = f"share_embedding: {shared} has another embedding_dim; one table has one width: make them the same"
                self.wrong("share_embedding", text)
            else:
                spec["share_embedding"] = shared
                spec["vocab_size"] = other["vocab_size"] = max(spec["vocab_size"], other["vocab_size"])
        if "pretrained_emb" in self.entry:
            self.add_vectors(spec, sizes)

    def add_vectors(self, spec: dict[str, Any], sizes: dict[str, int]) -> None:
        """Where an id feature's pretrained vectors are, and what becomes of them."""
        if not isinstance(self.entry["pretrained_emb"], str):
            self.wrong("pretrained_emb", f"pretrained_emb: {shown(self.entry['pretrained_emb'])}: must be a file's path")
        spec["pretrained_emb"] = str(self.entry["pretrained_emb"])
        spec["freeze_emb"] = self.get("freeze_emb", True)
        spec["pretrain_usage"] = self.get("pretrain_usage", "init")
        if spec["pretrain_usage"] not in PRETRAIN_USAGES:
            usage = f"pretrain_usage: {shown(spec['pretrain_usage'])}"
            self.wrong("pretrain_usage", f"{usage}: must be one of {', '.join(PRETRAIN_USAGES)}")
            spec["pretrain_usage"] = "init"
        if "pretrain_dim" in sizes:
            spec["pretrain_dim"] = sizes["pretrain_dim"]
