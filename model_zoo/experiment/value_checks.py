"""One value of a config by itself: its type, and the range of its numbers."""

from __future__ import annotations

import inspect
import math
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from model_zoo.faults import Fault, shown

#: smallest value of a number, or of each of a list of numbers, where the constructor that reads it has no rule of its own:
#: what a constructor refuses, `config_checks.model_faults` finds there
LOWER_BOUNDS = {
    "epochs": 1, "batch_size": 1, "max_len": 1, "early_stop_patience": 1, "eval_steps": 1, "seed": 0, "hash_seed": 0,
    "memory_limit_mib": 1, "prefetch": 0, "checkpoint_minutes": 0, "checkpoint_steps": 1, "embedding_dim": 1,
    "accumulation_steps": 1, "attention_dim": 1, "num_heads": 1, "codebook_dim": 1, "router_hidden": 1, "kmeans_seed": 0,
    "phase1_epochs": 1, "phase2_epochs": 0, "phase3_epochs": 1, "kmeans_tokens": 0, "revive_dead": 0,
    "commitment_weight": 0, "align_weight": 0, "aux_weight": 0, "entropy_weight": 0, "reachability_weight": 0,
    "z_loss_weight": 0, "router_init_std": 0,
}  # fmt: skip
#: numbers that do nothing at 0
ABOVE_ZERO = ("learning_rate", "phase_lrs", "max_gradient_norm", "score_scale")
SEED_LIMIT = 2**32  # numpy's


def checked(key: str, value: Any, annotation: Any, default: Any = None) -> tuple[Any, list[Fault]]:
    """A value as its type has it, and what is wrong with it by itself.

    Args:
        default: shown as an example of what to write.
    """
    try:
        typed = _typed(value, annotation)
    except ValidationError as error:
        example = "" if default in (None, inspect.Parameter.empty) else f"; write for example `{key}: {default}`"
        place = tuple(part for part in error.errors()[0]["loc"] if isinstance(part, int))
        return value, [Fault((key, *place), f"{key}: {shown(value)}: {_reason(error)}{example}")]
    fault = _out_of_bounds(key, typed)
    return typed, [Fault((key,), f"{key}: {shown(value)}: {fault}")] if fault else []


@cache
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation)


def _typed(value: Any, annotation: Any) -> Any:
    """A value of the annotated type. Nothing becomes another type but text that spells a number, and 8.0 for 8.

    Raises:
        ValidationError: pydantic's, of the value as it was written.
    """
    number = value if annotation in (str, str | None) else _number(value)
    for candidate in (number, _whole(number), value):
        try:
            return _adapter(annotation).validate_python(candidate, strict=True)
        except ValidationError:
            continue
    return _adapter(annotation).validate_python(value, strict=True)


def _number(value: Any) -> Any:
    """Text that spells a number as that number, in lists too."""
    if isinstance(value, list):
        return [_number(each) for each in value]
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    return value


def _whole(value: Any) -> Any:
    """Numbers like 8.0 as 8, in lists too."""
    if isinstance(value, list):
        return [_whole(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _out_of_bounds(key: str, value: Any) -> str | None:
    """What is wrong with a number, or with one of a list or mapping of numbers."""
    several = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]
    low = 1 if key.endswith("hidden_units") else LOWER_BOUNDS.get(key)
    for number in several:
        if isinstance(number, bool) or not isinstance(number, int | float):
            continue
        if not math.isfinite(number):
            return "must be a finite number"
        if key in ABOVE_ZERO and number <= 0:
            return "must be above 0"
        if key.endswith("dropout") and not 0 <= number < 1:
            return "must be at least 0 and below 1"
        if low is not None and number < low:
            return f"must be at least {low}"
        if key == "seed" and number >= SEED_LIMIT:
            return f"must be below {SEED_LIMIT}"
    return None


def _reason(error: ValidationError) -> str:
    """One clause for what pydantic says: the types that would have been right."""
    said = list(dict.fromkeys(each["msg"][0].lower() + each["msg"][1:] for each in error.errors()))
    return " or ".join([said[0], *(each.removeprefix("input should be ") for each in said[1:3])])
