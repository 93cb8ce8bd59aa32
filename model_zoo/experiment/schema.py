"""Which keys an experiment may set, and of what type: taken from the constructors that read them."""

from __future__ import annotations

import difflib
import inspect
import math
from functools import cache
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from model_zoo.errors import ConfigError
from model_zoo.experiment.config import Config
from model_zoo.pipeline.metrics import check_metrics

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
}
DATA_KEYS: dict[str, Any] = {
    "data_root": str,
    "data_format": Literal["parquet"],
    "train_data": str,
    "valid_data": str,
    "test_data": str | None,
    "user_info": str,
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
#: smallest value of a number, or of each of a list of numbers
LOWER_BOUNDS = {
    "epochs": 1, "batch_size": 1, "max_len": 1, "embedding_dim": 1, "accumulation_steps": 1, "early_stop_patience": 1,
    "eval_steps": 1, "learning_rate": 0, "attention_dim": 1, "num_heads": 1, "topk": 1, "codebook_dim": 1,
    "n_item_experts": 0, "n_window_experts": 0, "phase1_epochs": 1, "phase2_epochs": 0, "phase3_epochs": 1,
    "kmeans_tokens": 0, "window_size": 1, "window_stride": 1, "seed": 0,
    "hash_bits": 1, "num_hashes": 1, "hash_seed": 0, "short_seq_len": 2, "alpha": 0, "beta": 0, "n_experts": 0,
    "topk_experts": 1, "aux_weight": 0, "first_k_cols": 1, "transformer_layers": 1, "d_state": 1, "d_conv": 1,
    "num_layers": 1, "expand": 1, "hidden_dim": 1, "inner_dim": 1, "max_positions": 1,
    "router_hidden": 1, "router_init_std": 0, "last_k": 1, "low_rank": 1, "dim_feedforward": 1, "num_cross_layers": 1,
    "memory_limit_mib": 1, "prefetch": 0,
    "dnn_hidden_units": 1, "embedding_regularizer": 0, "net_regularizer": 0, "max_gradient_norm": 0,
}  # fmt: skip
SEED_LIMIT = 2**32  # numpy's
REQUIRED = ("model", "dataset_id", "train_data", "valid_data", "user_info", "item_info", "feature_cols", "label_col")
DEFAULTS: dict[str, Any] = {
    "model_root": "./checkpoints/", "seed": 2024, "epochs": 100, "batch_size": 8192, "max_len": 50, "shuffle": True,
    "metrics": ["gAUC", "AUC", "logloss"], "monitor": {"gAUC": 1, "AUC": 1}, "verbose": 1, "gpu": -1,
    "group_id": None, "embedding_dim": 10, "max_gradient_norm": 10.0,
    "memory_limit_mib": None, "prefetch": None, "data_on_device": "auto",
}  # fmt: skip


def allowed_keys(model: str) -> dict[str, Any]:
    """Every key that an experiment with this model may set, with its type.

    Raises:
        KeyError: no such model.
    """
    from model_zoo.registry import model_keys

    keys = {**RUN_KEYS, **DATA_KEYS}
    for name, parameter in model_keys(model).items():
        keys[name] = Any if parameter.annotation is inspect.Parameter.empty else parameter.annotation
    return keys


def validate(config: Config) -> dict[str, Any]:
    """The config's values with defaults filled in and every value of its declared type.

    Yaml's ``1e-5`` (a string, for want of a dot) becomes the number it means.

    Raises:
        ConfigError: all problems in one message: key, where it was set, and the fix.
    """
    if "model" not in config.values:
        raise ConfigError(f"{config.expid}: no 'model'; name one, for example `model: MoS_TWIN`")
    try:
        allowed = allowed_keys(str(config.values["model"]))
    except KeyError as error:
        raise ConfigError(f"{config.origin['model']}: {error.args[0]}") from None
    problems = [f"no '{key}'; add it" for key in REQUIRED if key not in config.values]
    values: dict[str, Any] = dict(DEFAULTS)
    for key, value in config.values.items():
        where = config.origin[key]
        if key in IGNORED_KEYS:
            continue
        if key not in allowed:
            near = difflib.get_close_matches(key, [*allowed, *IGNORED_KEYS], n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            problems.append(f"{where}: unknown key '{key}' for model {config.values['model']}{hint}")
            continue
        try:
            values[key] = _adapter(allowed[key]).validate_python(_number(value, allowed[key]))
        except ValidationError as error:
            problems.append(f"{where}: {key}: {value!r}: {_reason(error)}")
            continue
        fault = _out_of_bounds(key, values[key])
        if fault:
            problems.append(f"{where}: {key}: {value!r}: {fault}")
    if values["seed"] >= SEED_LIMIT:
        problems.append(f"{config.origin['seed']}: seed: {values['seed']}: must be below {SEED_LIMIT}")
    try:
        monitored = [values["monitor"]] if isinstance(values["monitor"], str) else [*values["monitor"]]
        if not monitored:
            problems.append("monitor: names no metric; write for example `monitor: AUC`")
        check_metrics([*values["metrics"], *monitored], grouped=bool(values["group_id"]))
    except ConfigError as error:
        problems.append(str(error))
    if problems:
        raise ConfigError(f"{config.expid}: {'; '.join(problems)}")
    return values


@cache
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation)


def _out_of_bounds(key: str, value: Any) -> str | None:
    """What is wrong with a number, or with one of a list of numbers."""
    low, high = LOWER_BOUNDS.get(key), None
    if key.endswith("dropout"):
        low, high = 0, 1
    if key.endswith("hidden_units"):
        low = 1
    for number in value if isinstance(value, list) else [value]:
        if not isinstance(number, int | float):
            continue
        if math.isnan(number):
            return "must be a number"
        if low is not None and number < low:
            return f"must be at least {low}"
        if high is not None and number > high:
            return f"must be at most {high}"
    return None


def _number(value: Any, annotation: Any) -> Any:
    """Text that spells a number as that number, unless the key holds text."""
    if isinstance(value, str) and annotation not in (str, str | None):
        try:
            return float(value)
        except ValueError:
            pass
    return value


def _reason(error: ValidationError) -> str:
    """One clause for a pydantic error."""
    first = error.errors()[0]["msg"]
    return first[0].lower() + first[1:]
