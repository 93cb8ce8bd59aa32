"""What a config's values must be beside each other: names that exist, lists of one length, a model that can be built."""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from model_zoo.compat import FeatureMap, get_regularizer
from model_zoo.embedding import Pretrained
from model_zoo.errors import ConfigError, UserError
from model_zoo.experiment.trackers import tracker_faults
from model_zoo.faults import Fault, nearest, shown
from model_zoo.layers.random_state import isolated_rng
from model_zoo.pipeline.metrics import check_metrics
from model_zoo.registry import get_model, model_keys
from model_zoo.sequential_ctr import SequentialCTR

#: losses of probabilities and labels. FuxiCTR would evaluate any other text as Python, and torch.nn.functional has losses
#: of logits, of signs and of classes, which would train on a wrong number
LOSSES = ("binary_crossentropy", "binary_cross_entropy", "bce", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")
#: those of torch.optim that work from parameters, a learning rate and dense gradients alone
OPTIMIZERS = ("adam", *sorted(
    name for name in torch.optim.__all__
    if isinstance(getattr(torch.optim, name), type) and issubclass(getattr(torch.optim, name), torch.optim.Optimizer)
    and name not in ("Optimizer", "LBFGS", "SparseAdam", "Muon")
))  # fmt: skip
#: FuxiCTR's own names, in any case, and the layers of torch.nn that act on each number by itself
FUXICTR_ACTIVATIONS = ("relu", "sigmoid", "tanh", "softmax", "prelu", "dice")
ACTIVATIONS = ("Identity", *(
    name for name in nn.modules.activation.__all__
    if name not in ("Threshold", "MultiheadAttention", "GLU", "Softmax2d", "Softmin", "LogSoftmax")
))  # fmt: skip
#: hidden layers, and the keys that may hold a value for each of them
PER_LAYER = {
    "dnn_hidden_units": ("dnn_activations", "net_dropout"),
    "parallel_dnn_hidden_units": ("dnn_activations", "net_dropout"),
    "stacked_dnn_hidden_units": ("dnn_activations", "net_dropout"),
    "dcn_hidden_units": ("hidden_activations", "net_dropout"),
    "mlp1_hidden_units": ("mlp1_hidden_activations", "mlp1_dropout"),
    "mlp2_hidden_units": ("mlp2_hidden_activations", "mlp2_dropout"),
    "attention_hidden_units": ("attention_hidden_activations", "attention_activation"),
}
FALLING = ("logloss", "binary_crossentropy")
#: rows of a trial model's tables
TRIAL_ROWS = 2
DEFAULT_DIM: int = inspect.signature(SequentialCTR).parameters["embedding_dim"].default


def lookup_faults(values: dict[str, Any]) -> Iterator[Fault]:
    """Activations, regularisers, optimizer, loss and metrics that do not exist; lists that do not fit their layers."""
    for key, value in values.items():
        if key.endswith(("activation", "activations")):
            for name in value if isinstance(value, list) else [value]:
                if name is not None and name not in ACTIVATIONS and str(name).lower() not in FUXICTR_ACTIVATIONS:
                    near = nearest(name, (*ACTIVATIONS, "Dice"))
                    yield Fault((key,), f"{key}: {name!r}: write relu, or the name of a layer in torch.nn{near}")
    for units, keys in PER_LAYER.items():
        for key in keys:
            given, layers = values.get(key), values.get(units)
            if isinstance(given, list) and isinstance(layers, list) and len(given) != len(layers):
                yield Fault((key,), f"{key} has {len(given)} entries for the {len(layers)} layers of {units}; "
                                    "write one for each, or one value for all")  # fmt: skip
    for key in ("embedding_regularizer", "net_regularizer"):
        try:
            sound = all(0 <= weight < math.inf for _, weight in get_regularizer(values.get(key) or None))
        except (NotImplementedError, ValueError):
            sound = False
        if not sound:
            yield Fault((key,), f"{key}: {values[key]!r}: write a number, l1(x), l2(x) or l1_l2(x,y), none below 0")
    for key, known in (("optimizer", OPTIMIZERS), ("loss", LOSSES)):
        name = values.get(key, known[0])
        if name not in known:
            yield Fault((key,), f"{key}: {shown(name)}: not one of {', '.join(known)}{nearest(name, known)}")
    yield from (Fault(("trackers",), f"trackers: {text}") for text in tracker_faults(values["trackers"]))
    yield from metric_faults(values)
    yield from category_and_time_faults(values)


def category_and_time_faults(values: dict[str, Any]) -> Iterator[Fault]:
    """Sessions without times; a category that is no item feature."""
    if values.get("windows") == "session" and not values.get("time_col"):
        yield Fault(("windows",), "windows: session needs the times of events; name their list column of user_info.parquet "
                                  "(seconds) with time_col in the dataset config, or set windows: fixed")  # fmt: skip
    name = values.get("category_col")
    columns = [entry for entry in values.get("feature_cols") or [] if entry.get("source") == "item"]
    known = [entry["name"] for entry in columns if entry.get("type") == "categorical" and entry.get("active", True)]
    if name and name not in known:
        fix = f"choose from {', '.join(map(str, known))}" if known else "take it out"
        yield Fault(("category_col",), f"category_col: {name}: no categorical item feature; {fix}")


def metric_faults(values: dict[str, Any]) -> Iterator[Fault]:
    """Metrics that cannot be computed, and a monitor that would keep the worst epoch."""
    monitor = {values["monitor"]: 1.0} if isinstance(values["monitor"], str) else values["monitor"]
    said: set[str] = set()
    for key, names in (("metrics", values["metrics"]), ("monitor", monitor)):
        if not names:
            example = "[AUC]" if key == "metrics" else "AUC"
            yield Fault((key,), f"{key}: names no metric; write for example `{key}: {example}`")
        for number, name in enumerate(names):
            try:
                check_metrics([name], grouped=bool(values["group_id"]))
            except ConfigError as error:
                if name in said:
                    continue
                said.add(name)
                place = (key, number) if key == "metrics" else (key, name)
                yield Fault(place, f"{key}: {str(error).removeprefix('metrics: ')}")
    falling_is_better = values.get("monitor_mode", "max") == "min"
    for name, weight in monitor.items():
        falls = name in FALLING
        if weight and (weight > 0) == (falls != falling_is_better):
            fix = f"{name}: {-weight:g}" if len(monitor) > 1 else f"monitor_mode: {'max' if falling_is_better else 'min'}"
            way = "falls" if falls else "rises"
            reason = f"{way} as a model gets better, so this keeps the worst epoch"
            yield Fault(("monitor", name), f"monitor: {name}: {reason}; set `{fix}`")


def model_faults(values: dict[str, Any], feature_map: FeatureMap | None) -> Iterator[Fault]:
    """What the model's constructors refuse, all of it.

    What one key may be beside another is a constructor's rule and stands there alone: here the model is built, with
    tables of two rows, and where it refuses, the keys that its sentence names go back to their defaults for the next try.

    Args:
        values: valid, each by itself.
        feature_map: None if the data set's features are not known; then neither are faults that come of the items' width.
    """
    params = {**values, "gpu": -1, "compile": False}
    keys = model_keys(values["model"])
    repaired = False
    while text := _refusal(params, feature_map or stand_in()):
        named = [key for key in _named(text, [*keys, "feature_cols", "use_features"]) if key in params]
        if repaired and not named:  # it comes of a default that took the place of a wrong value
            return
        if feature_map is not None or "width of" not in text:
            yield Fault((named[0] if named else "model",), text)
        wrong = [key for key in named if key in keys]
        if not wrong:
            return
        for key in wrong:
            del params[key]
        repaired = True


def _refusal(params: dict[str, Any], feature_map: FeatureMap) -> str | None:
    """Why a model cannot be built; None if it can."""
    small, vectors = trial_features(feature_map, params.get("embedding_dim", DEFAULT_DIM))
    try:
        with isolated_rng():
            trial_model(params["model"])(small, pretrained=vectors, **params)
    except (UserError, ValueError, NotImplementedError) as error:
        return str(error)
    except AssertionError:  # FuxiCTR's, of activations
        return f"{params['model']} cannot be built: a list of activations is not as long as its layers; write one for all"
    except (RuntimeError, MemoryError, OverflowError) as error:
        reason = str(error).split("\n")[0] or "out of memory"
        return f"{params['model']} cannot be built ({reason}); make its layers smaller"
    return None


def _named(text: str, keys: Iterable[str]) -> list[str]:
    """The keys that a sentence names, in its order."""
    found = {key: match.start() for key in keys if (match := re.search(rf"(?<!\w){re.escape(key)}(?!\w)", text))}
    return sorted(found, key=found.__getitem__)


def trial_model(name: str) -> type[SequentialCTR]:
    """The model's class without what takes time and refuses nothing: drawing weights, an optimizer."""
    model = get_model(name)
    skipped = {"reset_parameters": lambda self: None, "use_optimizer": lambda self, learning_rate: None}
    return type(model.__name__, (model,), {**skipped, "__module__": model.__module__})


def trial_features(feature_map: FeatureMap, embedding_dim: int) -> tuple[FeatureMap, Pretrained]:
    """The features with the smallest vocabularies, and made-up pretrained vectors for them."""
    small = copy.copy(feature_map)
    small.default_emb_dim = embedding_dim
    small.features = {
        name: {**spec, "vocab_size": TRIAL_ROWS} if "vocab_size" in spec else spec
        for name, spec in feature_map.features.items()
    }
    known = torch.ones(TRIAL_ROWS, dtype=torch.bool)
    vectors = {
        name: (torch.zeros(TRIAL_ROWS, spec.get("pretrain_dim", spec.get("embedding_dim", embedding_dim))), known)
        for name, spec in small.features.items()
        if "pretrained_emb" in spec
    }
    return small, vectors


def stand_in() -> FeatureMap:
    """One item feature, where the data set's are not known."""
    feature_map = FeatureMap("unknown", "")
    feature_map.labels = ["label"]
    feature_map.features = {"item": {"type": "categorical", "source": "item", "vocab_size": TRIAL_ROWS, "padding_idx": 0}}
    return feature_map
