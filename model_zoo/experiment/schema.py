"""Which keys an experiment may set, and of what type: taken from the constructors that read them."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator
from typing import Any, Literal

from model_zoo.experiment.config import Config
from model_zoo.experiment.config_checks import lookup_faults, model_faults
from model_zoo.experiment.paths import missing_files, name_faults
from model_zoo.experiment.value_checks import checked
from model_zoo.faults import Fault, nearest, refusal, shown
from model_zoo.pipeline.feature_map import draft_feature_map
from model_zoo.registry import model_keys, model_names

Monitor = str | dict[str, float]

#: keys of the run itself and of FuxiCTR's BaseModel
RUN_KEYS: dict[str, Any] = {
    "model": str,
    "dataset_id": str,
    "model_id": str,
    "model_root": str,
    "seed": int,
    "gpu": int,
    "epochs": int,
    "batch_size": int,
    "max_len": int,
    "shuffle": bool,
    "task": Literal["binary_classification"],
    "metrics": list[str],
    "monitor": Monitor,
    "monitor_mode": Literal["max", "min"],
    "early_stop_patience": int,
    "eval_steps": int | None,
    "save_best_only": bool,
    "reduce_lr_on_plateau": bool,
    "max_gradient_norm": float,
    "verbose": int,
    "group_id": str | None,
    "use_features": list[str] | None,
    "feature_specs": list[dict[str, Any]] | None,
    "checkpoint_minutes": float | None,
    "checkpoint_steps": int | None,
    "trackers": list[str],
    "deterministic": bool,
}
DATA_KEYS: dict[str, Any] = {
    "data_root": str,
    "data_format": Literal["parquet"],
    "train_data": str,
    "valid_data": str,
    "test_data": str | None,
    "user_info": str,
    "time_col": str | None,
    "category_col": str | None,
    "item_info": str,
    "feature_cols": list[dict[str, Any]],
    "label_col": dict[str, Any] | list[dict[str, Any]],
    "rebuild_dataset": Literal[False],
    "memory_limit_mib": int | None,
    "prefetch": int | None,
    "data_on_device": bool | Literal["auto"],
}
#: keys that LongCTR's and FuxiCTR's configs carry and that have nothing to set here
IGNORED_KEYS = {
    "num_workers", "pickle_feature_encoder", "debug_mode", "feature_config",
    # field names that models of FuxiCTR's csv pipeline need; here `source: item` says which columns describe items
    "item_info_fields", "target_item_field", "sequence_item_field", "din_target_field", "din_sequence_field",
    "dien_target_field", "dien_sequence_field", "dien_neg_seq_field",
}  # fmt: skip
REQUIRED = ("model", "dataset_id", "train_data", "valid_data", "user_info", "item_info", "feature_cols", "label_col")
DEFAULTS: dict[str, Any] = {
    "model_root": "./checkpoints/", "seed": 2024, "epochs": 100, "batch_size": 8192, "max_len": 50, "shuffle": True,
    "metrics": ["gAUC", "AUC", "logloss"], "monitor": {"gAUC": 1, "AUC": 1}, "verbose": 1, "gpu": -1,
    "group_id": None, "embedding_dim": 10, "max_gradient_norm": 10.0,
    "memory_limit_mib": None, "prefetch": None, "data_on_device": "auto",
    "checkpoint_minutes": 10.0, "checkpoint_steps": None, "trackers": ["csv", "tensorboard"], "deterministic": False,
}  # fmt: skip


#: of keys without a default, for messages
EXAMPLES = {"label_col": {"name": "is_click"}, "dataset_id": "kuairand_sample"}


def allowed_keys(model: str) -> dict[str, Any]:
    """Every key that an experiment with this model may set, with its type.

    Raises:
        KeyError: no such model.
    """
    keys = {**RUN_KEYS, **DATA_KEYS}
    for name, parameter in model_keys(model).items():
        keys[name] = Any if parameter.annotation is inspect.Parameter.empty else parameter.annotation
    return keys


def validate(config: Config, root: str | None = None) -> dict[str, Any]:
    """The config's values with defaults filled in, every value of its declared type, and a model that can be built of them.

    Yaml's ``1e-5`` (a string, for want of a dot) becomes the number it means.

    Args:
        root: the repository; given, data files must be there, too.

    Raises:
        ConfigError: all problems in one message, a line each: file and line, key, value, and the fix.
    """
    faults, allowed, known_model = _model(config)
    faults += _missing(config)
    values: dict[str, Any] = dict(DEFAULTS)
    examples = {**_constructors_defaults(config.values["model"] if known_model else None), **DEFAULTS, **EXAMPLES}
    for key, value in config.values.items():
        if key in IGNORED_KEYS or key == "model":
            continue
        if key not in allowed:
            faults.append(Fault((key,), _unknown(key, config, allowed, known_model)))
            continue
        value, wrong = checked(key, value, allowed[key], examples.get(key))
        faults += wrong
        if not wrong:
            values[key] = value
    faults += [*name_faults(values), *lookup_faults(values)]
    feature_map = None
    if values.keys() >= {"dataset_id", "feature_cols", "label_col"}:
        feature_map, wrong = draft_feature_map(values)
        faults += wrong
        if not any(spec.get("source") == "item" for spec in feature_map.features.values()) and wrong:
            feature_map = None
    if known_model:
        values["model"] = config.values["model"]
        sound = {key: value for key, value in values.items() if (key,) not in {fault.place[:1] for fault in faults}}
        faults += model_faults({**DEFAULTS, **sound}, feature_map)
    if root is not None:
        faults += missing_files(values, root)
    if faults or config.problems:
        placed = sorted(((config.where(fault.place) or config.experiment, fault.text) for fault in faults), key=_line)
        lines = [f"{where}: {text}" if where else text for where, text in placed]
        raise refusal([*config.problems, *lines], config.expid)
    return values


def _constructors_defaults(model: str | None) -> dict[str, Any]:
    return {key: parameter.default for key, parameter in model_keys(model).items()} if model else {}


def _line(placed: tuple[str | None, str]) -> tuple[str, int]:
    """Sorts faults by file and line."""
    path, _, line = (placed[0] or "").rpartition(":")
    return path, int(line) if line.isdigit() else 0


def _model(config: Config) -> tuple[list[Fault], dict[str, Any], bool]:
    """What is wrong with the model's name; the keys that it may have, or any model if it is none; whether it is one."""
    name = config.values.get("model")
    try:
        if isinstance(name, str):
            return [], allowed_keys(name), True
        text = "no 'model'; name one, for example `model: MoS_TWIN`"
        if name is not None:
            text = f"model: {shown(name)}: must be the name of a model, for example MoS_TWIN"
    except KeyError as error:
        text = str(error.args[0])
    keys: dict[str, Any] = {}
    for model in model_names():
        for key, annotation in allowed_keys(model).items():
            keys[key] = annotation if keys.get(key, annotation) == annotation else Any
    return [Fault(("model",), text)], keys, False


def _missing(config: Config) -> Iterator[Fault]:
    """Required keys that are nowhere; not those of a data set that is not known, as its absence is said already."""
    absent = [key for key in REQUIRED if key not in config.values]
    for key in absent if config.dataset is not None or not config.problems else []:
        where = f" to {config.dataset}" if config.dataset and key in DATA_KEYS else ""
        if key != "model":
            yield Fault((key,), f"no '{key}'; add it{where}")


def _unknown(key: str, config: Config, allowed: dict[str, Any], known_model: bool) -> str:
    """That no such key is read, and which one may be meant, or whose it is."""
    if not known_model:
        return f"unknown key '{key}'{nearest(key, [*allowed, *IGNORED_KEYS])}"
    model = config.values["model"]
    text = f"unknown key '{key}' for model {model}"
    holders = [name for name in model_names() if key in model_keys(name)]
    if not holders:
        return f"{text}{nearest(key, [*allowed, *IGNORED_KEYS])}"
    near = difflib.get_close_matches(model, holders, n=1, cutoff=0.0)
    return f"{text}; it is a key of {near[0]}: choose that model, or take the key out"
