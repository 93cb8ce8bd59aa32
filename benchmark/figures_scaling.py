"""From the records of finished runs: mean over seeds, bars are one standard deviation. ``--run`` trains what is missing.

The plain backbone stands at 0 experts. Runs of one line differ in length, number of experts and seed alone (and in k where
there are fewer experts than k).
"""

from __future__ import annotations

import argparse
import math
from collections import Counter, defaultdict
from typing import Any

import figures_style as style
from figures_data import finished_runs, latest, mean_scores, method_settings, on_one_data_set, shown
from figures_train import train

from model_zoo.errors import ConfigError
from model_zoo.experiment.collect import Row, config_digest
from model_zoo.experiment.report import table

#: keys that move along a line
MOVING = {"max_len", "n_item_experts", "n_window_experts", "n_experts", "topk_item", "topk_window", "topk_experts"}
LENGTH, EXPERTS = "length", "experts"


def options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("runs", nargs="+", metavar="FOLDER", help="folders of runs, or above; --run writes to the first")
    parser.add_argument("--dataset", metavar="ID", help="needed if the runs are on several data sets")
    parser.add_argument("--metrics", nargs="+", default=["AUC", "gAUC"], help="default: %(default)s")
    parser.add_argument("--split", default="test", choices=("valid", "test"), help="default: %(default)s")
    parser.add_argument("--experts-at", type=int, metavar="N", help="experts of runs by length (default: the commonest)")
    parser.add_argument("--length-at", type=int, metavar="L", help="length of runs by experts (default: the commonest)")
    more = parser.add_argument_group("training")
    more.add_argument("--run", dest="train", nargs="+", default=[], metavar="EXPID", help="train these where missing")
    more.add_argument("--lengths", type=int, nargs="+", default=[], help="max_len of the runs, experts as configured")
    more.add_argument("--experts", type=int, nargs="+", default=[], help="experts, at --length-at or as configured")
    more.add_argument("--seeds", type=int, nargs="+", default=[2024], help="default: %(default)s")
    more.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for every run; repeatable")
    more.add_argument("--gpu", type=int, default=-1)


def command(chosen: argparse.Namespace) -> None:
    """Print the table, write numbers and picture."""
    if chosen.train:
        train(chosen)
    found = finished_runs(chosen.runs)
    rows = latest(on_one_data_set(found.rows, chosen.dataset))
    experts = {row.path: method_settings(found.records[row.path]).get("n", 0) for row in rows}
    fixed_n, fixed_length = _fixed(rows, experts, chosen)
    lines = []
    by_setting = _lines(rows, found.records)
    expids = Counter(line[0].expid for line in by_setting.values())
    for (model, digest), line in by_setting.items():
        name = line[0].expid if expids[line[0].expid] == 1 else f"{line[0].expid} {digest}"
        places: dict[tuple[int, int], list[Row]] = defaultdict(list)
        for row in line:
            places[row.max_len or 0, experts[row.path]].append(row)
        for (length, n), group in sorted(places.items()):
            if len({row.config for row in group}) > 1:
                names = ", ".join(sorted({row.expid for row in group}))
                raise ConfigError(f"{model} of {length} items and {n} experts has several settings ({names}); name the "
                                  "folders of one")  # fmt: skip
            scores = mean_scores(group, chosen.split, chosen.metrics)
            where = {"model": model, "method": group[0].method, "backbone": group[0].backbone, "line": name}
            lines.append({**where, LENGTH: length, EXPERTS: n, **scores})
    metrics = [metric for metric in chosen.metrics if any(metric in row for row in lines)]
    if not metrics:
        raise ConfigError(f"no run has {' or '.join(chosen.metrics)} on {chosen.split}; choose other --metrics or --split")
    data = rows[0].dataset
    files = style.Files(chosen.out, f"scaling-{data}")
    files.numbers(lines, **{"data set": data, "split": chosen.split, "experts against length": fixed_n,
                            "length against experts": fixed_length})  # fmt: skip
    cells = [[row["line"], str(row[LENGTH]), str(row[EXPERTS]), str(row["runs"]), *(shown(row, m) for m in metrics)]
             for row in lines]  # fmt: skip
    print(table(["", LENGTH, EXPERTS, "runs", *metrics], cells))
    print(files.picture(draw(lines, metrics, f"{data}, {chosen.split}", fixed_n, fixed_length)))


def draw(rows: list[dict[str, Any]], metrics: list[str], title: str, fixed_n: int, fixed_length: int) -> Any:
    """A row of panels for each metric: against length, against experts."""
    figure = style.new_figure(11.5, 3.6 * len(metrics) + 0.6)
    figure.suptitle(f"Scaling: {title}\n{style.BARS}", fontsize=10)
    panels = figure.subplots(len(metrics), 2, squeeze=False, sharex="col")
    backbones = sorted({row["backbone"] for row in rows})
    handles = {}
    for (left, right), metric in zip(panels, metrics, strict=True):
        of_length = [row for row in rows if row[EXPERTS] in (0, fixed_n)]
        of_experts = [row for row in rows if row[LENGTH] == fixed_length]
        for axes, part, axis in ((left, of_length, LENGTH), (right, of_experts, EXPERTS)):
            for name in dict.fromkeys(row["line"] for row in part):
                mine = [row for row in part if row["line"] == name and metric in row]
                if axis == LENGTH:  # a mixture's own run without experts belongs to the other panel
                    mine = [row for row in mine if row[EXPERTS] == fixed_n or not row["method"]]
                if not mine:
                    continue
                first = mine[0]
                handles[name] = axes.errorbar(
                    [row[axis] for row in mine], [100 * row[metric] for row in mine],
                    [math.nan if (sd := row[f"{metric} sd"]) is None else 100 * sd for row in mine], capsize=3,
                    linewidth=1.4,
                    **({"markersize": 6} if first["method"] else {"markersize": 9, "markerfacecolor": "none"}),
                    marker=style.MARKERS[backbones.index(first["backbone"]) % len(style.MARKERS)],
                    color=style.METHOD_COLOURS.get(first["method"], style.ORANGE), label=name,
                )  # fmt: skip
            values = sorted({row[axis] for row in part})
            axes.set_xticks(values, [str(value) for value in values])
            axes.margins(x=0.08, y=0.15)
            axes.grid(True, alpha=0.3)
            axes.tick_params(labelbottom=True)
        left.set(ylabel=f"{metric}, %", xlabel=f"items of a history (n = {fixed_n} experts)")
        right.set(ylabel=f"{metric}, %", xlabel=f"experts of a router, n (histories of {fixed_length}; 0: none)")
    figure.legend(list(handles.values()), list(handles), loc="outside right upper", fontsize=8)
    return figure


def _lines(rows: list[Row], found: dict[str, dict[str, Any]]) -> dict[tuple[str, str], list[Row]]:
    """Runs of the same model and configuration but for what moves."""
    lines = defaultdict(list)
    for row in rows:
        fixed = {key: value for key, value in found[row.path]["config"].items() if key not in MOVING}
        lines[row.model, config_digest(fixed)].append(row)
    return lines


def _fixed(rows: list[Row], experts: dict[str, int], chosen: argparse.Namespace) -> tuple[int, int]:
    """The number of experts against length, and the length against experts."""
    numbers = Counter(experts[row.path] for row in rows if experts[row.path])
    n = chosen.experts_at if chosen.experts_at is not None else _commonest(numbers)
    if numbers and n not in numbers:
        raise ConfigError(f"--experts-at {n}: no run has as many; there are {', '.join(map(str, sorted(numbers)))}")
    lengths = Counter(row.max_len or 0 for row in rows if not numbers or experts[row.path])
    length = chosen.length_at if chosen.length_at is not None else _commonest(lengths)
    if length not in lengths:
        raise ConfigError(f"--length-at {length}: no run has it; there are {', '.join(map(str, sorted(lengths)))}")
    return n, length


def _commonest(counts: Counter[int]) -> int:
    """The value of most runs, the largest of equals; 0 of none."""
    return max(counts, key=lambda value: (counts[value], value), default=0)
