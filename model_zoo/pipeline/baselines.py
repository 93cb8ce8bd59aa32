"""Scores that need no model: what any model has to beat."""

from __future__ import annotations

import numpy as np

from model_zoo.pipeline.dataset import CTRDataset
from model_zoo.pipeline.metrics import evaluate_metrics


def popularity_baselines(dataset: CTRDataset, split: str, metrics: list[str]) -> dict[str, dict[str, float]]:
    """Score a split by its target items' record in the training split.

    Returns:
        ``item popularity`` (training clicks of the item) and ``item CTR`` (its click rate, smoothed by one impression at
        the overall rate), each with ``metrics`` (logloss only for the latter).
    """
    train, part = dataset.splits["train"], dataset.splits[split]
    clicks = np.bincount(train.item_index, weights=train.label, minlength=dataset.num_items)
    shown = np.bincount(train.item_index, minlength=dataset.num_items)
    rate = (clicks + train.label.mean()) / (shown + 1.0)
    ranking = [name for name in metrics if name not in ("logloss", "binary_crossentropy")]
    return {
        "item popularity": evaluate_metrics(part.label, clicks[part.item_index], ranking, part.group),
        "item CTR": evaluate_metrics(part.label, rate[part.item_index], metrics, part.group),
    }
