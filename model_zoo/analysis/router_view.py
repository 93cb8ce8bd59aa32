"""What a trained run's routers do: the items and categories that each theme holds, and histories coloured by theme."""

from __future__ import annotations

import json
import logging
import os
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from model_zoo.analysis.routed_tokens import Example, Integers, Readings, observe
from model_zoo.analysis.trained_run import TrainedRun, load_trained
from model_zoo.errors import ConfigError, FileError
from model_zoo.experiment.unfinished import RECORD_FILE, Run
from model_zoo.files import write_whole
from model_zoo.pipeline.dataset import CTRDataset
from model_zoo.pipeline.histories import digest
from model_zoo.pipeline.loader import SequenceLoader

logger = logging.getLogger("model_zoo")

VIEW_FILE = "router_view.json"
#: of the file's content; another number is computed anew
VERSION = 1
#: validation batches that are looked at, of so many rows at most
BATCHES, ROWS = 8, 1024
#: histories shown, and their newest items
HISTORIES, NEWEST = 12, 100
#: of each theme: items, categories
TOP_ITEMS, TOP_CATEGORIES = 8, 6
#: the most read items that are called popular: a fifth of those that occur
POPULAR = 0.2
#: features with more values than this share of the items tell items apart rather than group them
GROUPING = 0.5


def router_view(folder: str) -> dict[str, Any]:
    """The view of a finished run, computed from its checkpoint once and kept beside it in ``router_view.json``.

    Returns:
        ``rows`` of the validation split looked at; ``branches``: of each router ``name``, ``tokens``, ``unread``, and by
        theme ``share`` of the readings, ``distinct`` items, ``popular`` share of readings that are of popular items,
        ``items`` with their counts, and by feature ``categories`` with their share in the theme and in all readings;
        ``sequences``: ``items``, their ``labels``, and ``themes`` by router.

    Raises:
        ConfigError: the folder holds no finished run of a model with a router, or its checkpoint cannot be used.
        DataError: its data are not there, or have changed.
    """
    checkpoint = _checkpoint(folder)
    if not os.path.exists(checkpoint):
        raise ConfigError(f"{checkpoint}: no such checkpoint; it is needed to see what its routers do")
    mark = digest(checkpoint)
    path = os.path.join(folder, VIEW_FILE)
    kept = _kept(path)
    if kept is not None and (kept.get("version"), kept.get("checkpoint")) == (VERSION, mark):
        return kept
    view = {"version": VERSION, "checkpoint": mark, **compute_view(load_trained(folder))}
    try:
        write_whole(path, json.dumps(view) + "\n")
    except FileError as error:
        logger.warning("%s; the router view is computed anew each time", error)
    return view


def has_view(folder: str) -> bool:
    """Whether a view is kept beside the run, computed from whatever checkpoint."""
    return os.path.exists(os.path.join(folder, VIEW_FILE))


def compute_view(run: TrainedRun) -> dict[str, Any]:
    """The view of a trained model, without what tells its file apart; see `router_view`.

    Raises:
        ConfigError: the model has no router, or none that has a part in its predictions and reads items as they are.
    """
    model, dataset = run.model, run.dataset
    if not model.method_layers():
        raise ConfigError(f"{type(model).__name__}: a plain backbone has no router")
    size = min(int(run.params["batch_size"]), ROWS)
    loader = SequenceLoader(dataset, "valid", size, int(run.params["max_len"]))
    readings, examples = observe(model, islice(loader, BATCHES), dataset.num_items)
    if not readings:
        raise ConfigError(f"{type(model).__name__}: no router that reads a history's items has a part in its predictions")
    features = grouping_features(dataset)
    popular = popular_items(dataset)
    return {
        "split": "valid",
        "rows": min(len(dataset.splits["valid"]), BATCHES * size),
        "branches": [
            {"name": name, **describe(entry, features, popular)} for name, entry in readings.items() if entry.tokens
        ],
        "sequences": [shown(example, features) for example in chosen_examples(examples)],
        "label": next(iter(features), None),
    }


def describe(entry: Readings, features: dict[str, Integers], popular: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """One router's themes.

    Args:
        features: name to the category of each item.
        popular: by item.
    """
    counts = entry.counts
    total = counts.sum(0)  # [n]
    each = np.maximum(total, 1)
    found: dict[str, Any] = {
        "tokens": entry.tokens,
        "unread": entry.unread,
        "share": (total / max(total.sum(), 1)).tolist(),
        "distinct": (counts > 0).sum(0).tolist(),
        "popular": (counts[popular].sum(0) / each).tolist(),
        "popular_overall": float(counts[popular].sum() / max(total.sum(), 1)),
        "items": [_largest(column, TOP_ITEMS) for column in counts.T],
        "categories": {},
    }
    for name, category in features.items():
        table = np.zeros((int(category.max(initial=0)) + 1, counts.shape[1]), np.int64)
        np.add.at(table, category, counts)
        overall = table.sum(1) / max(int(total.sum()), 1)
        found["categories"][name] = [
            [[value, count / int(each[theme]), float(overall[value])] for value, count in _largest(column, TOP_CATEGORIES)]
            for theme, column in enumerate(table.T)
        ]
    return found


def grouping_features(dataset: CTRDataset) -> dict[str, Integers]:
    """Categorical item features that group items, by name the category of each; the one with most values first."""
    found = {}
    for name, column in dataset.item_columns.items():
        if dataset.feature_map.features[name]["type"] == "categorical" and column.ndim == 1:
            values = len(np.unique(column))
            if 1 < values <= GROUPING * dataset.num_items:
                found[name] = values
    ordered = sorted(found, key=lambda name: (-found[name], name))
    return {name: np.asarray(dataset.item_columns[name], np.int64) for name in ordered}


def popular_items(dataset: CTRDataset) -> npt.NDArray[np.bool_]:
    """By item: is it one of the most frequent in all histories (`POPULAR`)?"""
    counts = np.bincount(dataset.histories.items, minlength=dataset.num_items)
    order = np.argsort(-counts, kind="stable")
    popular = np.zeros(len(counts), bool)
    popular[order[: int(np.ceil(POPULAR * (counts > 0).sum()))]] = True
    return popular


def chosen_examples(examples: list[Example]) -> list[Example]:
    """A few histories from long to short, evenly over their ranks."""
    ranked = sorted((example for example in examples if len(example.items) > 1), key=lambda one: -len(one.items))
    places = np.unique(np.linspace(0, max(len(ranked) - 1, 0), HISTORIES).astype(int))
    return [ranked[place] for place in places.tolist()] if ranked else []


def shown(example: Example, features: dict[str, Integers]) -> dict[str, Any]:
    """A history's newest items, and all of its tokens' themes that belong to them."""
    items = example.items[-NEWEST:]
    label = next(iter(features.values()), None)
    share = len(items) / len(example.items)
    themes = {}
    for name, tokens in example.themes.items():
        newest = tokens[-max(round(len(tokens) * share), 1) :] if len(tokens) else tokens
        themes[name] = [[theme for theme in token if theme >= 0] for token in newest.tolist()]
    labels = None if label is None else label[items].tolist()
    return {"length": len(example.items), "items": items.tolist(), "labels": labels, "themes": themes}


def _largest(column: Integers, count: int) -> list[list[int]]:
    """Place and value of the largest values above 0, the first of equal ones."""
    order = np.argsort(-column, kind="stable")[:count]
    return [[int(place), int(column[place])] for place in order if column[place] > 0]


def _checkpoint(folder: str) -> str:
    run = Run.read(folder)
    record = run.record()
    if record is None:
        raise ConfigError(f"{os.path.join(folder, RECORD_FILE)}: missing; the run is not finished")
    return os.path.join(folder, os.path.basename(record.get("checkpoint") or f"{run.expid}.model"))


def _kept(path: str) -> dict[str, Any] | None:
    """The view that was written there; None if there is none that can be read."""
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
