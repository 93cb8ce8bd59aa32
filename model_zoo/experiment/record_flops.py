"""A trained model's operations, for its run's record."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import numpy as np

from model_zoo.experiment.flops import block_flops, route
from model_zoo.experiment.flops_formula import analytic_flops
from model_zoo.pipeline.dataset import CTRDataset, Split
from model_zoo.pipeline.loader import SequenceLoader
from model_zoo.sequential_ctr import SequentialCTR

logger = logging.getLogger("model_zoo")

#: validation rows that operations are counted on, few enough for about a second with recurrent models, less with others
ROWS = 100


def count_flops(model: SequentialCTR, dataset: CTRDataset, max_len: int) -> dict[str, Any] | None:
    """Operations of one row, for the record: the mean of a few rows spread over the validation split.

    Counted as PyTorch runs them (`flops.block_flops`), and, of a method whose blocks have a formula, as the MoS paper
    counts them (`flops_formula.analytic_flops`): all experts evaluated, the share of those that serve a row apart.

    Args:
        max_len: newest history items kept.

    Returns:
        ``rows``, ``rule``; ``prediction`` and ``training``, each with ``embedding``, ``block``, ``head``, ``total``;
        ``paper``: ``shared``, ``every_expert``, ``serving_experts``, or None. None, and a warning, if they cannot be
        counted.
    """
    try:
        return _count_flops(model, dataset, max_len)
    except Exception as error:  # whatever it is, it must not cost a trained model its record
        logger.warning("operations are not in the record: %s: %s", type(error).__name__, error)
        return None


def _count_flops(model: SequentialCTR, dataset: CTRDataset, max_len: int) -> dict[str, Any]:
    loader = SequenceLoader(dataset, "valid", ROWS, max_len, prefetch=0)
    if isinstance(loader.split, Split):
        batch = loader.batch(np.unique(np.linspace(0, len(loader.split) - 1, ROWS).astype(np.int64)))
    else:  # streamed: its first rows, as it is read in order only
        batch = next(iter(loader))
    batch = batch.to(model.device)
    counted = block_flops(model, batch)
    rows = counted.rows
    found: dict[str, Any] = {"rows": rows, "rule": "operations per row, a multiply-add being 2, without the optimizer"}
    for kind in ("prediction", "training"):
        parts = {part: getattr(getattr(counted, part), kind).total / rows for part in ("embedding", "block", "head")}
        found[kind] = {**parts, "total": sum(parts.values())}
    found["paper"] = None
    if model.method_layers():
        with suppress(ValueError):  # a block without a formula
            found["paper"] = {name: value / rows for name, value in asdict(analytic_flops(route(model, batch))).items()}
    return found
