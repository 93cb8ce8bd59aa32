"""Figures of others: the paper's printed ones, LongCTR's recorded ones, and what contradicts what in them."""

from __future__ import annotations

import os
from functools import cache

from leaderboard import REFERENCE, read_table

from model_zoo.experiment.statistics import ranks


@cache
def paper_figures() -> dict[tuple[str, str, str, str], dict[str, str]]:
    """Backbone, method, data set and head to the paper's line, percent as printed."""
    lines = read_table(os.path.join(REFERENCE, "paper.csv"))
    return {(line["backbone"], line["method"], line["dataset_id"], line["head"]): line for line in lines}


@cache
def longctr_figures() -> dict[tuple[str, str, int], dict[str, float]]:
    """Model, data set and length to the test metrics of the run of LongCTR's with the best validation AUC + gAUC."""
    best: dict[tuple[str, str, int], tuple[float, dict[str, float]]] = {}
    for line in read_table(os.path.join(REFERENCE, "longctr_runs.csv.gz")):
        key = (line["model"], line["dataset"], int(line["max_len"]))
        chosen_by = float(line["val_AUC"]) + float(line["val_gAUC"])
        if key not in best or chosen_by > best[key][0]:
            best[key] = chosen_by, {metric: float(line[f"test_{metric}"]) for metric in ("AUC", "gAUC", "logloss")}
    return {key: figures for key, (_, figures) in best.items()}


@cache
def footnotes() -> dict[str, dict[str, str]]:
    """Letter to ``text`` and ``shown``: ``always`` if the paper's figures are, ``cited``, or with LongCTR's figures."""
    return {line["id"]: line for line in read_table(os.path.join(REFERENCE, "footnotes.csv"))}


def paper_ranks(backbone: str, metric: str) -> dict[str, float]:
    """Method to its mean rank in the paper's table 1, counted from the figures that it prints; empty if it has none."""
    by_data: dict[str, dict[str, float]] = {}
    for (name, method, dataset, _), line in paper_figures().items():
        if name == backbone and line["table"] == "1":
            by_data.setdefault(dataset, {})[method] = float(line[metric])
    ranked = [dict(zip(figures, ranks(list(figures.values())), strict=True)) for figures in by_data.values()]
    return {method: sum(own[method] for own in ranked) / len(ranked) for method in (ranked[0] if ranked else {})}
