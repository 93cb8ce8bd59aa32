"""What the figures have in common: colours that colour-blind people can tell apart, labels that do not overlap, files."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from model_zoo.errors import ConfigError
from model_zoo.experiment.record import write_json
from model_zoo.files import write_whole, write_whole_with

#: Okabe and Ito's palette
BLACK, ORANGE, SKY, GREEN, BLUE, RED, PINK = "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"
COLOURS = (BLUE, RED, GREEN, ORANGE, PINK, SKY, BLACK)
GREY = "#777777"
METHOD_COLOURS = {"": BLACK, "MoS": RED, "GShard": BLUE, "DSelectK": GREEN, "ExpertChoice": PINK}
MARKERS = "osD^vP*X<>"
SEQUENTIAL = "cividis"
DPI = 150
#: half a marker, in pixels of a screen; offset in points beyond which a line joins label and point
MARK, FAR = 7, 12
BARS = "mean over seeds, bars: one standard deviation (none: one seed)"


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure, in inches.

    Raises:
        ConfigError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("no picture: matplotlib is missing; pip install 'longctr-mos[plots]'") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # knows how large a text is
    return figure


class Files:
    """Where one figure goes: ``<folder>/<name>.png``, with ``.json`` and ``.csv`` beside it."""

    def __init__(self, folder: str, name: str) -> None:
        os.makedirs(folder, exist_ok=True)
        self.stem = os.path.join(folder, re.sub(r"[^\w.+-]+", "_", name))

    def numbers(self, rows: Sequence[Mapping[str, Any]], **about: Any) -> None:
        """Write the rows as csv, and as json with what is said about them."""
        write_json(f"{self.stem}.json", {**about, "rows": list(rows)})
        write_whole(f"{self.stem}.csv", as_csv(rows))

    def picture(self, figure: Any) -> str:
        """Write the picture; returns its path."""
        path = f"{self.stem}.png"
        write_whole_with(path, lambda file: figure.savefig(file, format="png", dpi=DPI))
        return path


def as_csv(rows: Iterable[Mapping[str, Any]]) -> str:
    """Csv text with every key that a row has."""
    rows = list(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def place_labels(
    figure: Any, axes: Any, points: Sequence[tuple[float, float]], bars: Sequence[float], texts: Sequence[str]
) -> None:
    """Write a text beside each point, at the nearest place where it covers no other text, no point and no error bar.

    The axes' limits must be set, and the layout final but for these texts.

    Args:
        bars: half the length of each point's vertical bar.
    """
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    renderer = figure.canvas.get_renderer()
    ends = [axes.transData.transform([(x, y - bar), (x, y + bar)]) for (x, y), bar in zip(points, bars, strict=True)]
    taken = [Bbox.from_extents(low[0], low[1], high[0], high[1]).padded(MARK) for low, high in ends]
    inside = axes.get_window_extent(renderer)
    for point, text in zip(points, texts, strict=True):
        mark = axes.transData.transform(point)
        label = axes.annotate(text, point, xytext=(0, 0), textcoords="offset points", fontsize=7, linespacing=1.1)
        label.set_path_effects([withStroke(linewidth=2, foreground="white")])
        best, least, its_box = (0.0, 0.0), float("inf"), taken[0]
        for place in _places():
            _put(label, place)
            box = label.get_window_extent(renderer).padded(1)
            outside = max(inside.x0 - box.x0, box.x1 - inside.x1, inside.y0 - box.y0, box.y1 - inside.y1, 0)
            cost = 100 * sum(box.overlaps(other) for other in taken) + outside
            if cost < least:
                best, least, its_box = place, cost, box
            if not cost:
                break
        _put(label, best)
        taken.append(its_box)
        if max(abs(best[0]), abs(best[1])) > FAR:
            end = axes.transData.inverted().transform(_nearest(its_box, mark))
            axes.plot(*zip(point, end, strict=True), color=GREY, linewidth=0.6, zorder=1)


def _places() -> Iterable[tuple[float, float]]:
    """Offsets in points, the nearest first."""
    for distance in (7, 10, 14, 19, 25, 32, 40, 50, 62, 76, 92, 110):
        for x, y in ((1, 0), (-1, 0), (0, 1), (0, -1), (0.8, 0.8), (-0.8, 0.8), (0.8, -0.8), (-0.8, -0.8)):
            yield distance * x, distance * y
        for x, y in ((0.95, 0.4), (-0.95, 0.4), (0.95, -0.4), (-0.95, -0.4)):
            yield distance * x, distance * y


def _put(label: Any, place: tuple[float, float]) -> None:
    label.set_position(place)
    label.set_horizontalalignment("center" if abs(place[0]) < 1 else "left" if place[0] > 0 else "right")
    label.set_verticalalignment("center" if abs(place[1]) < 1 else "bottom" if place[1] > 0 else "top")


def _nearest(box: Any, mark: Any) -> tuple[float, float]:
    return min(max(mark[0], box.x0), box.x1), min(max(mark[1], box.y0), box.y1)
