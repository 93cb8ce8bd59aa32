"""What the training split says about items: how often each was clicked and shown."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from model_zoo.pipeline.dataset import CTRDataset


def training_counts(dataset: CTRDataset) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Clicks and impressions of each item in the training split, ``[items]`` each, the padding row included."""
    clicks, shown = np.zeros(dataset.num_items), np.zeros(dataset.num_items)
    for part in dataset.splits["train"].parts():
        clicks += np.bincount(part.item_index, weights=part.label, minlength=dataset.num_items)
        shown += np.bincount(part.item_index, minlength=dataset.num_items)
    return clicks, shown
