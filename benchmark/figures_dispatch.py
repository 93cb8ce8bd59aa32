"""Which expert reads each occurrence of an item, by run: a column for each run, a row for each item.

An occurrence is a position among the newest max_len items of a user's history; it counts for the expert with the largest
gate among those that read it, in evaluation mode. A router that looks at the item alone chooses the same expert every time.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from typing import Any

import figures_style as style
import numpy as np
from figures_data import run_folder

from model_zoo.analysis.dispatch import Dispatch, dispatch
from model_zoo.analysis.trained_run import load_trained
from model_zoo.errors import ConfigError
from model_zoo.experiment.report import table


@dataclass(frozen=True)
class Routed:
    """One run's dispatch."""

    label: str
    dataset_id: str
    found: Dispatch


def options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of finished runs, all on one data set")
    parser.add_argument("--least", type=int, default=8, help="occurrences an item must have (default: %(default)s)")
    parser.add_argument("--items", type=int, nargs="+", help="item_index of the items (default: the most and the least "
                        "popular one in the first run's histories)")  # fmt: skip


def command(chosen: argparse.Namespace) -> None:
    """Print the table, write numbers and picture."""
    if chosen.least < 1:
        raise ConfigError(f"--least {chosen.least}: must be at least 1")
    runs = []
    for folder in dict.fromkeys(chosen.runs):
        trained = load_trained(run_folder(folder))
        params = trained.params
        label = f"{params['model']}, seed {params['seed']}"
        runs.append(Routed(label, f"{params['dataset_id']}, {trained.dataset.num_items - 1} items", dispatch(trained)))
        print(f"{label}: {os.path.normpath(folder)}; its router looks at: {runs[-1].found.router_input}")
    if len(names := sorted({run.dataset_id for run in runs})) > 1:
        raise ConfigError(f"the runs are on different data ({' / '.join(names)}); name runs on one data set")
    items = _items(chosen, runs[0].found)
    rows = [_row(run, item, title, chosen.least) for title, item in items.items() for run in runs]
    data = runs[0].dataset_id.partition(",")[0]
    files = style.Files(chosen.out, f"dispatch-{data}")
    files.numbers(rows, **{"data set": data, "least occurrences": chosen.least})
    most = max(run.found.counts.shape[1] - 1 for run in runs)
    header = ["", "item", "occurrences", *(f"expert {e}" for e in range(most)), "unread", "main expert's share, all items"]
    print(table(header, [_line(row, most) for row in rows]))
    print(files.picture(draw(runs, items, data, chosen.least)))


def draw(runs: list[Routed], items: dict[str, int], data: str, least: int) -> Any:
    """Histograms."""
    figure = style.new_figure(max(2.7 * len(runs) + 0.8, 5.5), 2.5 * len(items) + 0.9)
    figure.suptitle(f"Expert of each occurrence of an item, {data}", fontsize=11)
    panels = figure.subplots(len(items), len(runs), squeeze=False, sharey=True)
    for line, (title, item) in zip(panels, items.items(), strict=True):
        for axes, run in zip(line, runs, strict=True):
            counts = run.found.counts[item]
            share = counts / max(counts.sum(), 1)
            axes.bar(np.arange(len(share) - 1), share[:-1], color=style.COLOURS[0], width=0.75)
            unread = share[-1] > 0
            if unread:
                axes.bar(len(share) - 1, share[-1], color="white", edgecolor=style.GREY, hatch="///", width=0.75)
            ticks = list(range(len(share) - 1 + unread))
            axes.set_xticks(ticks, [*map(str, range(len(share) - 1)), *(["unread"] if unread else [])], fontsize=8)
            axes.set(ylim=(0, 1.02), xlim=(-0.6, len(ticks) - 0.4))
            axes.grid(True, axis="y", alpha=0.3)
            axes.set_axisbelow(True)
            axes.set_title(f"{run.label}\n{title}: {int(counts.sum())} occurrences", fontsize=8)
        line[0].set_ylabel("share of occurrences")
    for axes, run in zip(panels[-1], runs, strict=True):
        share = run.found.consistency(least)
        axes.set_xlabel(f"expert\n(main expert's share over\nall items with >= {least}: {share:.2f})", fontsize=8)
    return figure


def _items(chosen: argparse.Namespace, found: Dispatch) -> dict[str, int]:
    if not chosen.items:
        most, fewest = found.extremes(chosen.least)
        return {f"most popular, item {most}": most, f"least popular, item {fewest}": fewest}
    for item in chosen.items:
        if not 0 < item < len(found.counts):
            raise ConfigError(f"--items {item}: items are numbered from 1 to {len(found.counts) - 1}")
        if not found.occurrences[item]:
            raise ConfigError(f"--items {item}: is in no history; choose another item")
    return {f"item {item}": item for item in chosen.items}


def _row(run: Routed, item: int, title: str, least: int) -> dict[str, Any]:
    counts = run.found.counts[item].tolist()
    experts = {f"expert {e}": count for e, count in enumerate(counts[:-1])}
    return {"run": run.label, "shown": title, "item": item, "occurrences": sum(counts), **experts, "unread": counts[-1],
            "router input": run.found.router_input, "consistency": run.found.consistency(least)}  # fmt: skip


def _line(row: dict[str, Any], experts: int) -> list[str]:
    counts = [str(row.get(f"expert {e}", "")) for e in range(experts)]
    return [row["run"], str(row["item"]), str(row["occurrences"]), *counts, str(row["unread"]), f"{row['consistency']:.3f}"]
