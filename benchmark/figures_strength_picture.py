"""The picture of hopping strength: scores and ceiling, gain over the backbone, recovery of themes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import figures_style as style

AXIS = "theme switches per 100 events (0: one session; not to scale)"
METRIC_COLOURS = (style.BLUE, style.ORANGE)
#: of a line of reference, so that it is seen at a single strength too
DASH = {"marker": "_", "markersize": 14}
#: between the lines of a panel, so that their bars do not cover each other; strengths are 1 apart
STEP = 0.1
Rows = Sequence[dict[str, Any]]
Lines = dict[str, list[dict[str, Any]]]


def draw(rows: Rows, metrics: Sequence[str], title: str) -> Any:
    """Left a panel of scores for each metric; right the gains, and below them the themes."""
    figure = style.new_figure(11.5, 7.6)
    figure.suptitle(f"When hopping helps a mixture: {title}\nscores and themes: {style.BARS}", fontsize=10)
    panels = figure.subplots(2, 2)
    strengths = sorted({row["switches"] for row in rows})
    lines: Lines = defaultdict(list)
    for row in rows:
        lines[row["line"]].append(row)
    for axes, metric in zip(panels[:, 0], metrics, strict=True):
        _scores(axes, lines, strengths, metric)
    _gains(panels[0, 1], lines, strengths, metrics)
    _themes(panels[1, 1], lines, strengths)
    for axes in panels.flat:
        axes.set_xticks(range(len(strengths)), [f"{value:g}" for value in strengths])
        axes.set_xlabel(AXIS, fontsize=9)
        axes.set_xlim(-0.5, len(strengths) - 0.5)
        axes.grid(True, alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, fontsize=8, frameon=False)
    return figure


def _scores(axes: Any, lines: Lines, strengths: list[float], metric: str) -> None:
    backbones = sorted({row["backbone"] for part in lines.values() for row in part})
    best = {row["switches"]: 100 * row[f"ceiling {metric}"] for part in lines.values() for row in part}
    axes.plot(range(len(best)), [best[s] for s in strengths], "--", **DASH, color=style.GREY,
              label="ceiling: the true probability")  # fmt: skip
    for number, (name, part) in enumerate(lines.items()):
        first = part[0]
        _line(axes, _places(part, strengths, number, len(lines)), [_percent(row.get(metric)) for row in part],
              [_percent(row.get(f"{metric} sd")) for row in part], name,
              marker=style.MARKERS[backbones.index(first["backbone"]) % len(style.MARKERS)],
              color=style.METHOD_COLOURS.get(first["method"], style.ORANGE),
              markerfacecolor=None if first["method"] else "white")  # fmt: skip
    axes.set_ylabel(f"{metric}, %")
    axes.set_title(f"{metric} on test rows", fontsize=10)


def _gains(axes: Any, lines: Lines, strengths: list[float], metrics: Sequence[str]) -> None:
    mixtures = {name: [row for row in part if "pairs" in row] for name, part in lines.items()}
    mixtures = {name: part for name, part in mixtures.items() if part}
    series = [(name, metric) for name in mixtures for metric in metrics]
    axes.axhline(0, color=style.BLACK, linewidth=0.8)
    for number, (name, metric) in enumerate(series):
        part, key = mixtures[name], f"gain {metric}"
        ends = [[abs(_percent(row.get(f"{key} {end}")) - _percent(row.get(key))) for row in part]
                for end in ("low", "high")]  # fmt: skip
        _line(axes, _places(part, strengths, number, len(series)), [_percent(row.get(key)) for row in part], ends,
              f"{name}, {metric}", marker=style.MARKERS[list(mixtures).index(name) % len(style.MARKERS)],
              color=METRIC_COLOURS[list(metrics).index(metric)])  # fmt: skip
    notes = sorted({row["note"] for part in mixtures.values() for row in part})
    axes.set(ylabel="gain, points of %")
    axes.set_title("\n".join(["gain over the plain backbone, seed by seed; bars: 95 % bootstrap", *filter(None, notes)]),
                   fontsize=9)  # fmt: skip
    if not series:
        _empty(axes, "no mixture beside its plain backbone")


def _themes(axes: Any, lines: Lines, strengths: list[float]) -> None:
    routed = {name: [row for row in part if "themes" in row] for name, part in lines.items()}
    routed = {name: part for name, part in routed.items() if part}
    for number, (name, part) in enumerate(routed.items()):
        places = _places(part, strengths, number, len(routed))
        marker = style.MARKERS[number % len(style.MARKERS)]
        _line(axes, places, [row["themes"] for row in part], [_bar(row["themes sd"]) for row in part],
              f"{name}'s item router", marker=marker, color=style.RED)  # fmt: skip
    for part in list(routed.values())[:1]:
        places = _places(part, strengths, 0, 1)
        kind = part[0]["k-means of"]
        for key, form, colour, label in (("k-means", "--", style.BLUE, f"k-means of {kind}"),
                                         ("chance", ":", style.GREY, "chance, 95 % below")):  # fmt: skip
            axes.plot(places, [row[f"themes by {key}"] for row in part], form, **DASH, color=colour, label=label)
    axes.set(ylabel="adjusted mutual information", ylim=(-0.03, 1.05))
    axes.set_title("themes of items: found against true", fontsize=10)
    if not routed:
        _empty(axes, "no run of MoS")


def _line(
    axes: Any, places: list[float], values: list[float], bars: Any, label: str, color: str, marker: str,
    markerfacecolor: str | None = None,
) -> None:  # fmt: skip
    axes.errorbar(places, values, yerr=bars, label=label, color=color, marker=marker, capsize=3, linewidth=1.4,
                  markersize=6, markerfacecolor=markerfacecolor or color)  # fmt: skip


def _places(part: Rows, strengths: list[float], number: int, count: int) -> list[float]:
    return [strengths.index(row["switches"]) + STEP * (number - (count - 1) / 2) for row in part]


def _percent(value: float | None) -> float:
    return math.nan if value is None else 100 * value


def _bar(value: float | None) -> float:
    return math.nan if value is None else value


def _empty(axes: Any, said: str) -> None:
    axes.text(0.5, 0.5, said, ha="center", va="center", color=style.GREY, transform=axes.transAxes)
