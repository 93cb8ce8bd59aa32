"""What ``benchmark/scaling.py`` makes of its points: fitted exponents, a document and a picture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from machine import markdown
from scaling_point import method_of

AXES = {"length": "items of a history, L", "experts": "experts of a router, n", "items": "items of the table"}
QUANTITIES = {"seconds": "training step, s", "mib": "memory, MiB"}
#: an exponent in L above this one is called worse than linear, or a slope of the last two points above the other one,
#: which shows a steeper part of the cost earlier but has the noise of two points
LINEAR, LINEAR_END = 1.1, 1.3
COLOURS = {"TWIN": "tab:blue", "SDIM": "tab:orange", "Mamba4Rec": "tab:green", "TransAct": "tab:red"}
LINES = {"plain": ("-", "o"), "MoS": ("--", "s"), "GShard": (":", "^")}

Row = dict[str, Any]


@dataclass(frozen=True)
class Fit:
    """``y = factor x^exponent`` over some points.

    Attributes:
        deviation: the worst point's, ``|y / fit - 1|``.
        end: the exponent between the last two points.
    """

    exponent: float
    factor: float
    deviation: float
    end: float

    @property
    def steep(self) -> bool:
        """Worse than linear."""
        return self.exponent > LINEAR or self.end > LINEAR_END


def fit(points: list[tuple[float, float]]) -> Fit | None:
    """Least squares of log y on log x over the larger half of the points (two at least); None if there is only one."""
    points = sorted(points)[-max(math.ceil(len(points) / 2), 2) :]
    if len(points) < 2:
        return None
    x, y = [math.log(a) for a, _ in points], [math.log(b) for _, b in points]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
    factor = math.exp(mean_y - slope * mean_x)
    end = (y[-1] - y[-2]) / (x[-1] - x[-2])
    return Fit(slope, factor, max(abs(b / (factor * a**slope) - 1) for a, b in points), end)


def memory(row: Row) -> float:
    """MiB held at a step's worst moment."""
    return row["standing_mib"] + row["step_mib"]


def curve(rows: list[Row], model: str, axis: str, quantity: str) -> list[tuple[float, float]]:
    """A model's points along an axis, ascending: of ``seconds`` or ``mib``."""
    mine = [row for row in rows if row["model"] == model and row["axis"] == axis]
    return sorted((row["value"], memory(row) if quantity == "mib" else row[quantity]) for row in mine)


def fits(rows: list[Row]) -> list[tuple[str, str, str, Fit]]:
    """Model, axis, quantity and fit of every curve of two points or more."""
    found = []
    for axis in AXES:
        for model in dict.fromkeys(row["model"] for row in rows):
            for quantity in QUANTITIES:
                fitted = fit(curve(rows, model, axis, quantity))
                if fitted:
                    found.append((model, axis, quantity, fitted))
    return found


def document(rows: list[Row], picture: str | None) -> str:
    """The tables, with what is needed to read them, and a link to the picture if there is one."""
    fitted = fits(rows)
    steep = [
        f"{model}'s {'time' if quantity == 'seconds' else 'memory'} ({one.exponent:.2f}, {one.end:.2f} at the end)"
        for model, axis, quantity, one in fitted
        if axis == "length" and one.steep
    ]
    lines = [
        "# How cost grows",
        "",
        "`python benchmark/scaling.py`: `<model>_microvideo`, GShard `budget_matched`; full histories, items drawn",
        "uniformly. One of L, n and items moves, the others are as the first column says; MoS is in its joint phase.",
        "A point is the median training step in ms, and in brackets MiB at its worst moment: parameters, optimizer state,",
        "item table, and what the step allocates. An exponent is the slope of log cost on log x over the larger half of",
        "the points; beside it how far the worst of these points lies from the fit, and the slope of the last two points.",
        "",
        *dict.fromkeys(f"- {row['machine']}; {row['clock']} time" for row in rows),
        "",
        f"Worse than linear in L (exponent above {LINEAR}, or {LINEAR_END} at the end): {', '.join(steep) or 'none'}.",
        *(["", f"![step time and memory by L, n and items]({picture})"] if picture else []),
    ]
    for axis, title in AXES.items():
        if any(row["axis"] == axis for row in rows):
            lines += ["", f"## Against {title}", "", axis_table(rows, axis), "", exponent_table(fitted, axis)]
    return "\n".join(lines) + "\n"


def axis_table(rows: list[Row], axis: str) -> str:
    """All models' points along one axis."""
    mine = [row for row in rows if row["axis"] == axis]
    values = sorted({row["value"] for row in mine})
    cells = {(row["model"], row["value"]): f"{row['seconds'] * 1e3:,.0f} ({memory(row):,.0f})" for row in mine}
    lines = []
    for model in dict.fromkeys(row["model"] for row in mine):
        first = next(row for row in mine if row["model"] == model)
        others = {"B": first["batch"], "L": first["length"], "n": first["experts"], "items": first["items"]}
        others.pop({"length": "L", "experts": "n", "items": "items"}[axis])
        if method_of(model) == "plain":
            others.pop("n", None)
        told = ", ".join(f"{name} {number:,}" for name, number in others.items())
        lines.append([model, told, *(cells.get((model, value), "") for value in values)])
    return markdown(["model", "others", *(f"{value:,}" for value in values)], lines)


def exponent_table(fitted: list[tuple[str, str, str, Fit]], axis: str) -> str:
    """The fits along one axis."""
    found = {(model, quantity): one for model, its, quantity, one in fitted if its == axis}
    lines = []
    for model in dict.fromkeys(model for model, _ in found):
        shown = [model]
        for quantity in QUANTITIES:
            one = found[model, quantity]
            fitted_curve = f"{one.factor:.3g} x^{one.exponent:.2f}"
            shown += [f"{one.exponent:.2f}", fitted_curve, f"{one.deviation:.0%}", f"{one.end:.2f}"]
        lines.append(shown)
    header = ["model"]
    for title in QUANTITIES.values():
        header += [f"{title}: exponent", "fit", "worst point", "last two"]
    return markdown(header, lines)


def draw(rows: list[Row], path: str) -> bool:
    """Write the picture: time above memory, a column an axis, exponents in the legend; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    found = {(model, axis, quantity): one for model, axis, quantity, one in fits(rows)}
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(16, 8.5), layout="constrained")
    panels = figure.subplots(len(QUANTITIES), len(AXES), sharex="col", sharey="row", squeeze=False)
    for (quantity, unit), line in zip(QUANTITIES.items(), panels, strict=True):
        for (axis, title), panel in zip(AXES.items(), line, strict=True):
            for model in models:
                points = curve(rows, model, axis, quantity)
                if points:
                    panel.plot(*zip(*points, strict=True), **_style(model))
            panel.set_xscale("log")
            panel.set_yscale("log")
            values = sorted({row["value"] for row in rows if row["axis"] == axis})
            panel.set_xticks(values, [f"{value:,}" for value in values], rotation=30)
            panel.minorticks_off()
            panel.grid(True, which="major", alpha=0.3)
            if quantity == "mib":
                panel.set_xlabel(title)
        line[0].set_ylabel(unit)
        handles = [line[0].plot([], [], label=_label(model, quantity, found), **_style(model))[0] for model in models]
        line[-1].legend(
            handles=handles, loc="center left", bbox_to_anchor=(1.02, 0.5), prop={"family": "monospace", "size": 9},
            title=f"{'exponents in':<15}     L     n items", title_fontproperties={"family": "monospace", "size": 9},
            alignment="right",
        )  # fmt: skip
    figure.savefig(path, dpi=110)
    return True


def _style(model: str) -> dict[str, Any]:
    """Colour by backbone, line and marker by method."""
    line, marker = LINES[method_of(model)]
    colour = COLOURS.get(model.rpartition("_")[2], "tab:gray")
    return {"color": colour, "linestyle": line, "marker": marker, "markersize": 4, "linewidth": 1.4}


def _label(model: str, quantity: str, found: dict[tuple[str, str, str], Fit]) -> str:
    """A model's name and its three exponents, in columns."""
    cells = [found.get((model, axis, quantity)) for axis in AXES]
    return f"{model:<15}" + "".join(" " * 6 if one is None else f"{one.exponent:6.2f}" for one in cells)
