"""Scores that need no model: what any model has to beat."""

from __future__ import annotations

import numpy as np

from model_zoo.pipeline.dataset import CTRDataset
from model_zoo.pipeline.item_counts import training_counts
from model_zoo.pipeline.metrics import evaluate_metrics


def popularity_baselines(dataset: CTRDataset, split: str, metrics: list[str]) -> dict[str, dict[str, float]]:
    """Score a split by its target items' record in the training split.

    Returns:
        ``item popularity`` (training clicks of the item) and ``item CTR`` (its click rate, smoothed by one impression at
        the overall rate), each with ``metrics`` (logloss only for the latter).
    """
    clicks, shown = training_counts(dataset)
    rate = (clicks + clicks.sum() / shown.sum()) / (shown + 1.0)
    scored = [(part.label, part.item_index, part.group) for part in dataset.splits[split].parts()]
    label, item = (np.concatenate([columns[side] for columns in scored]) for side in (0, 1))
    group = None if scored[0][2] is None else np.concatenate([columns[2] for columns in scored])
    ranking = [name for name in metrics if name not in ("logloss", "binary_crossentropy")]
    return {
        "item popularity": evaluate_metrics(label, clicks[item], ranking, group),
        "item CTR": evaluate_metrics(label, rate[item], metrics, group),
    }
