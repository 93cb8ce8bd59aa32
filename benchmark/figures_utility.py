"""Each point is a model's mean over seeds; n (experts), k (kept per token) and s (window stride) stand beside it. Of
several configurations of one such setting the point is the one with the most seeds, of these the best on validation.

Two rules count operations of one row's prediction. ``run``: as PyTorch runs them, embedding, block and head, the mean
over the first validation rows: what depends on an item or a history alone runs once for all their rows, and of the experts
only those that serve a row. ``paper``: the MoS paper's formulae, the shared expert and all experts on the tokens routed to
them; routers, embedding and head are left out. A plain backbone is then the shared expert alone, taken from a mixture over
the same backbone among the runs.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from typing import Any

import figures_style as style
from figures_data import finished_runs, latest, mean_scores, method_settings, on_one_data_set, path_of, shown

from model_zoo.analysis.trained_run import load_trained
from model_zoo.errors import ConfigError, UserError
from model_zoo.experiment.collect import Row, merits
from model_zoo.experiment.record_flops import count_flops
from model_zoo.experiment.report import table

RULES = {
    "run": "as run, embedding, block and head",
    "paper": "the paper's rule: shared expert and all experts, without routers, embedding and head",
}


def options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("runs", nargs="+", metavar="FOLDER", help="folders of runs, or folders above them")
    parser.add_argument("--count", choices=list(RULES), default="run", help="counting rule (default: %(default)s)")
    parser.add_argument("--dataset", metavar="ID", help="needed if the runs are on several data sets")
    parser.add_argument("--max-len", type=int, help="needed if the runs have several lengths")
    parser.add_argument("--metrics", nargs="+", default=["AUC", "gAUC"], help="default: %(default)s")
    parser.add_argument("--split", default="test", choices=("valid", "test"), help="default: %(default)s")


def command(chosen: argparse.Namespace) -> None:
    """Print the table, write numbers and picture."""
    found = finished_runs(chosen.runs)
    rows = latest(on_one_data_set(found.rows, chosen.dataset))
    lengths = sorted({row.max_len or 0 for row in rows})
    if chosen.max_len is None and len(lengths) > 1:
        raise ConfigError(f"the runs have several lengths; choose one of {', '.join(map(str, lengths))} with --max-len")
    rows = [row for row in rows if chosen.max_len in (None, row.max_len)]
    if not rows:
        raise ConfigError(f"--max-len {chosen.max_len}: no run has it; there are {', '.join(map(str, lengths))}")
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.model, _setting(row, found.records)].append(row)
    points = [_point(_best(group), setting, found.records, chosen) for (_, setting), group in groups.items()]
    points = _with_operations(points, chosen.count)
    metrics = [metric for metric in chosen.metrics if any(metric in point for point in points)]
    if not points or not metrics:
        raise ConfigError(f"no run has both operations and {' or '.join(chosen.metrics)} on {chosen.split}; "
                          "see the lines above")  # fmt: skip
    data, length = rows[0].dataset, rows[0].max_len
    files = style.Files(chosen.out, f"utility-{data}-{length}-{chosen.count}")
    files.numbers(points, **{"data set": data, "max_len": length, "split": chosen.split, "rule": RULES[chosen.count]})
    header = ["", "setting", "runs", "million operations", *metrics]
    lines = [[p["model"], p["setting"], str(p["runs"]), f"{p['operations'] / 1e6:.3f}", *(shown(p, m) for m in metrics)]
             for p in points]  # fmt: skip
    print(table(header, lines))
    print(f"operations of one row's prediction, {RULES[chosen.count]}; a multiply-add is 2")
    print(files.picture(draw(points, metrics, f"{data}, histories of {length}, {chosen.split}", chosen.count)))


def draw(points: list[dict[str, Any]], metrics: list[str], title: str, rule: str) -> Any:
    """A panel for each metric."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    figure = style.new_figure(5.6 * len(metrics) + 0.6, 5.0)
    figure.suptitle(f"Utility against operations: {title}\n{style.BARS}", fontsize=10)
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    backbones = sorted({point["backbone"] for point in points})
    for axes, metric in zip(panels, metrics, strict=True):
        here = [point for point in points if metric in point]
        for point in here:
            axes.errorbar(
                point["operations"], 100 * point[metric], yerr=100 * (point[f"{metric} sd"] or 0) or None, capsize=3,
                fmt=style.MARKERS[backbones.index(point["backbone"]) % len(style.MARKERS)], markersize=7,
                color=style.METHOD_COLOURS.get(point["method"], style.ORANGE),
            )  # fmt: skip
        costs = [point["operations"] for point in here]
        if costs and max(costs) > 5 * min(costs):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.margins(x=0.25, y=0.2)
        axes.grid(True, alpha=0.3)
        axes.set(ylabel=f"{metric}, %", xlabel=f"operations per row, a multiply-add is 2\n({RULES[rule]})")
        axes.xaxis.label.set_fontsize(8)
    for axes, metric in zip(panels, metrics, strict=True):
        here = [point for point in points if metric in point]
        places = [(point["operations"], 100 * point[metric]) for point in here]
        bars = [100 * (point[f"{metric} sd"] or 0) for point in here]
        style.place_labels(figure, axes, places, bars, [_label(point) for point in here])
    return figure


def _setting(row: Row, found: dict[str, dict[str, Any]]) -> str:
    parts = [method_settings(found[row.path]).get("shown", ""), "head dot" if row.head == "dot" else ""]
    return ", ".join(part for part in parts if part)


def _best(rows: list[Row]) -> list[Row]:
    """Of several configurations of one setting, the runs of the one that `merits` chooses."""
    merit = merits(rows)
    chosen = max(merit, key=lambda config: merit[config])
    if len(merit) > 1:
        print(f"{rows[0].model}: of {len(merit)} configurations the best on validation, {chosen}")
    return [row for row in rows if row.config == chosen]


def _point(
    rows: list[Row], setting: str, found: dict[str, dict[str, Any]], chosen: argparse.Namespace
) -> dict[str, Any]:
    record = found[rows[0].path]
    point = {"model": rows[0].model, "method": rows[0].method, "backbone": rows[0].backbone, "setting": setting}
    return {**point, **mean_scores(rows, chosen.split, chosen.metrics), "flops": _flops(rows[0], record, chosen.runs)}


def _flops(row: Row, record: dict[str, Any], folders: list[str]) -> dict[str, Any] | None:
    """As recorded, else counted on the run's own model."""
    if record.get("flops"):
        return dict(record["flops"])
    try:
        trained = load_trained(path_of(row, folders))
    except UserError as error:
        print(f"operations of {row.path} are neither recorded nor to be counted: {error}")
        return None
    return count_flops(trained.model, trained.dataset, trained.params["max_len"])


def _with_operations(points: list[dict[str, Any]], rule: str) -> list[dict[str, Any]]:
    """The points that have operations by the rule, with them in place of ``flops``; the others are said."""
    shared = {
        point["backbone"]: point["flops"]["paper"]["shared"]
        for point in points
        if point["flops"] and point["flops"].get("paper")
    }
    kept = []
    for point in points:
        flops = point.pop("flops")
        if rule == "run":
            operations = flops and flops["prediction"]["total"]
        elif point["method"]:
            paper = flops and flops.get("paper")
            operations = paper and paper["shared"] + paper["every_expert"]
        else:
            operations = shared.get(point["backbone"])
        if operations is None:
            print(f"left out {point['model']} {point['setting']}: no operations by this rule")
        else:
            kept.append({**point, "operations": operations})
    return kept


def _label(point: dict[str, Any]) -> str:
    return f"{point['model']}\n{point['setting']}".strip()
