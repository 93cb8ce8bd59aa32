"""What makes two configurations the same, and the name that a configuration gets from it."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from model_zoo.experiment.schema import DEFAULTS, allowed_keys
from model_zoo.experiment.unfinished import NOT_COMPARED
from model_zoo.experiment.value_checks import checked
from model_zoo.registry import model_keys

#: besides what does not change a result: the seed, which a run has beside its configuration, and the name made here
LEFT_OUT = NOT_COMPARED | {"seed", "model_id"}
#: bytes of a digest; two of 10,000 configurations share one with a probability of 5e-5, and that is detected
DIGEST_BYTES = 5


def canonical(params: Mapping[str, Any]) -> dict[str, str]:
    """What a configuration computes, apart from its seed: key to value, as text that tells types apart, in key order.

    Two configurations are the same if their values are equal once validated: the 1 of a number is 1.0, ``1e-3`` the text is
    0.001 the number; but True is not 1, and "1" is neither. A value that equals its default is left out, so that giving it
    and not giving it are the same, and a key added by a later version renames nothing. The order of keys has no meaning,
    the order in a list has.

    Args:
        params: validated.
    """
    defaults = _defaults(params["model"])
    texts = {key: _text(value) for key, value in params.items() if key not in LEFT_OUT}
    return {key: texts[key] for key in sorted(texts) if texts[key] != defaults.get(key)}


def digest(params: Mapping[str, Any]) -> str:
    """Ten hexadecimal digits (BLAKE2) of what a configuration computes, its seed apart."""
    text = json.dumps(canonical(params), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).hexdigest()


@cache
def _defaults(model: str) -> dict[str, str]:
    """Key to the text of its default, as validation would give it back."""
    types = allowed_keys(model)
    found = {key: parameter.default for key, parameter in model_keys(model).items()}
    values = {key: value for key, value in {**found, **DEFAULTS}.items() if value is not inspect.Parameter.empty}
    return {key: _text(checked(key, value, types[key])[0]) for key, value in values.items() if key in types}


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=lambda other: {type(other).__name__: str(other)})
