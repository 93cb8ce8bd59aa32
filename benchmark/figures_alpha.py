"""Phases 1 and 2 are those of a finished MoS run; phase 3 is trained again from them at every pair of weights.

The weights are multiples of 0.2 that sum to at most 1: 21 cells. The corner of the global expert alone is the backbone,
trained a second time. A run of another seed is another triangle; the picture shows their mean. Cells that are in the json
file already are not trained again.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Any

import figures_style as style
import numpy as np
from figures_data import run_folder

from model_zoo.analysis.alpha import Branching, branching, triangle
from model_zoo.errors import ConfigError
from model_zoo.experiment.collect import config_digest
from model_zoo.experiment.record import write_json


def options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of finished MoS runs, of one configuration")
    parser.add_argument("--epochs", type=int, help="at most, of phase 3 (default: as in the run)")
    parser.add_argument("--steps", type=int, default=5, help="1 / distance of two weights (default: %(default)s)")
    parser.add_argument("--metrics", nargs="+", default=["AUC", "gAUC"], help="default: %(default)s")
    parser.add_argument("--split", default="test", choices=("valid", "test"), help="default: %(default)s")


def command(chosen: argparse.Namespace) -> None:
    """Train the cells that are missing, write numbers and picture."""
    if chosen.steps < 1 or (chosen.epochs is not None and chosen.epochs < 1):
        raise ConfigError("--steps and --epochs must be at least 1")
    style.new_figure(1, 1)  # if that cannot be, say so before hours of training
    os.makedirs(chosen.out, exist_ok=True)
    tables, digests = [], set()
    for folder in dict.fromkeys(chosen.runs):
        branch = branching(run_folder(folder), chosen.epochs)
        digests.add((branch.params["model"], branch.params["dataset_id"], config_digest(branch.params)))
        if len(digests) > 1:
            raise ConfigError("the runs have several configurations; name runs that differ in the seed alone")
        tables.append(_cells(branch, chosen))
    rows = [_mean(cells, chosen) for cells in zip(*tables, strict=True)]
    metrics = [metric for metric in chosen.metrics if metric in rows[0]]
    if not metrics:
        raise ConfigError(f"{' and '.join(chosen.metrics)}: not among the runs' metrics on {chosen.split}")
    model, data, digest = digests.pop()
    files = style.Files(chosen.out, f"alpha-{model}-{data}-{digest}")
    files.numbers(rows, **{"data set": data, "model": model, "split": chosen.split, "runs": len(tables)})
    title = f"Phase 3 at every pair of weights: {model}, {data}, {chosen.split}, {len(tables)} run(s)"
    print(files.picture(draw(rows, metrics, title, chosen.steps)))


def draw(rows: list[dict[str, Any]], metrics: list[str], title: str, steps: int = 5) -> Any:
    """A triangle for each metric; the cell that validation would choose is outlined."""
    from matplotlib.patches import RegularPolygon

    figure = style.new_figure(5.4 * len(metrics), 4.9)
    figure.suptitle(title, fontsize=11)
    for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        values = np.array([100 * row[metric] for row in rows])
        image = axes.scatter([], [], c=[], cmap=style.SEQUENTIAL, vmin=values.min(), vmax=values.max())
        best = max(range(len(rows)), key=lambda i: sum(rows[i][f"valid {name}"] for name in metrics))
        for number, (row, value) in enumerate(zip(rows, values, strict=True)):
            x, y = _place(row["alpha_item"], row["alpha_window"])
            colour = image.cmap(image.norm(value))
            edge = {"edgecolor": style.RED, "linewidth": 3, "zorder": 3} if number == best else {"edgecolor": "white"}
            axes.add_patch(RegularPolygon((x, y), 6, radius=1 / steps / np.sqrt(3) * 0.97, facecolor=colour, **edge))
            dark = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] < 0.5
            ink = "white" if dark else "black"
            axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8, color=ink, zorder=4)
        for step in range(steps + 1):
            weight = step / steps
            x, y = _place(weight, 0)
            axes.text(x - 0.16, y, f"{weight:.2g}", ha="right", va="center", fontsize=8)
            x, y = _place(0, weight)
            axes.text(x, y - 0.15, f"{weight:.2g}", ha="center", va="top", fontsize=8)
        middle = {"ha": "center", "va": "center", "fontsize": 9}
        axes.text(-0.03, 0.56, "item experts' weight", rotation=60, **middle)
        axes.text(0.5, -0.28, "window experts' weight, the same parallel to the left edge", **middle)
        axes.set(xlim=(-0.3, 1.2), ylim=(-0.34, 1.08), aspect="equal")
        axes.text(-0.28, 1.0, f"{metric}, %", fontsize=12)
        axes.axis("off")
        figure.colorbar(image, ax=axes, shrink=0.7)
    best_is = "outlined: the cell with the best sum of these metrics on validation"
    figure.supxlabel(f"the rest of the weight is the global expert's; {best_is}", fontsize=8)
    return figure


def _place(alpha_item: float, alpha_window: float) -> tuple[float, float]:
    return alpha_window + alpha_item / 2, alpha_item * np.sqrt(3) / 2


def _cells(branch: Branching, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """The scores of every cell, from the run's json file as far as they are there, which grows with each new one."""
    path = os.path.join(chosen.out, f"alpha-cells-{branch.mark[:12]}-{branch.phase.epochs}.json")
    identity = {"checkpoint": branch.mark, "epochs": branch.phase.epochs, "config": config_digest(branch.params)}
    kept = _kept(path, identity)
    wanted = triangle(chosen.steps)
    for number, cell in enumerate(wanted, 1):
        key = f"{cell[0]:.4g} {cell[1]:.4g}"
        if key in kept:
            continue
        started = time.perf_counter()
        kept[key] = branch.score(cell)
        write_json(path, {**identity, "run": branch.run.folder, "cells": kept})
        shown = " ".join(f"{name} {value:.6f}" for name, value in kept[key]["valid"].items())
        print(f"[{number}/{len(wanted)}] item {cell[0]:g} window {cell[1]:g}: valid {shown} "
              f"({time.perf_counter() - started:.0f} s)", flush=True)  # fmt: skip
    return [{"alpha_item": i, "alpha_window": w, "scores": kept[f"{i:.4g} {w:.4g}"]} for i, w in wanted]


def _kept(path: str, identity: dict[str, Any]) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        raise ConfigError(f"{path}: not readable; move it away, and its cells are trained again") from None
    return dict(found["cells"]) if all(found.get(key) == value for key, value in identity.items()) else {}


def _mean(cells: tuple[dict[str, Any], ...], chosen: argparse.Namespace) -> dict[str, Any]:
    """One cell, averaged over runs."""
    row: dict[str, Any] = {"alpha_item": cells[0]["alpha_item"], "alpha_window": cells[0]["alpha_window"]}
    for split, front in ((chosen.split, ""), ("valid", "valid ")):
        for metric in chosen.metrics:
            values = [cell["scores"].get(split, {}).get(metric) for cell in cells]
            if all(value is not None for value in values):
                row[f"{front}{metric}"] = float(np.mean(values))
    return row
