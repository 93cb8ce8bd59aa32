"""What `speed.py`'s figures must reach, and the tables of what they are."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from machine import markdown
from speed_cases import OURS, REFERENCE

POOLED = "TransAct:concat_max_pool=True"
BACKBONES = ["TWIN", "SDIM", "TransAct", POOLED, "Mamba4Rec"]
Row = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """``than``'s median must be at least ``ratio`` times ``model``'s, and results differ by at most ``equal``.

    A ``length`` of 0 is any.
    """

    kind: str
    backbone: str
    model: str
    length: int
    than: str
    ratio: float
    equal: float = math.inf


@dataclass(frozen=True)
class Bound:
    """``model``'s median must be at most ``seconds``, on ``device``, at ``batch`` rows (0: any)."""

    kind: str
    backbone: str
    model: str
    length: int
    seconds: float
    device: str = "cpu"
    batch: int = 0


GOALS = [
    *(Goal("loader", "", OURS, length, REFERENCE, ratio) for length, ratio in ((50, 70), (200, 110), (1000, 130))),
    *(Goal("step", "TWIN", "TWIN", length, REFERENCE, ratio) for length, ratio in ((50, 8), (200, 18), (1000, 50))),
    *(Goal("step", "SDIM", "SDIM", length, REFERENCE, ratio) for length, ratio in ((200, 10), (1000, 20))),
    Goal("step", POOLED, "TransAct", 200, REFERENCE, 1.8),
    Goal("step", "TransAct", "TransAct", 200, REFERENCE, 25),
    *(Goal("step", name, f"MoS_{name}", 200, REFERENCE, 4) for name in ("TWIN", "SDIM")),
    *(Goal("step", name, "MoS_TransAct", 200, REFERENCE, 1) for name in ("TransAct", POOLED)),
    *(Goal("step", name, f"MoS_{name}", 0, name, 1 / 2) for name in ("TWIN", "SDIM")),
    *(Goal("step", name, "MoS_TransAct", 0, "TransAct", 1 / 1.6) for name in ("TransAct", POOLED)),
    *(
        Goal("step", name, f"MoS_{name.partition(':')[0]}", 0, f"GShard_{name.partition(':')[0]}", 1)
        for name in BACKBONES
    ),
    *(Goal("epoch", "TWIN", "TWIN", length, REFERENCE, ratio) for length, ratio in ((50, 9), (200, 20))),
    *(Goal("evaluate", name, name, 200, REFERENCE, 25) for name in ("TWIN", "SDIM")),
    *(Goal("memory", "TWIN", "TWIN", length, REFERENCE, 5) for length in (50, 200)),
    *(Goal("score", name, name, 1000, REFERENCE, 80) for name in ("TWIN", "SDIM")),
    Goal("scan", "", OURS, 0, "mambapy", 8),
    Goal("metrics", "", OURS, 0, "FuxiCTR", 150, equal=1e-12),
]
#: four times the roofline of one H200, counted (4.3 TB/s, 60 TFLOP/s fp32), at 8,192 rows (TransAct: 2,048)
ROOFLINE_MS = {
    ("TWIN", "TWIN"): (1.4, 1.4), ("TWIN", "MoS_TWIN"): (1.5, 2.4), ("SDIM", "SDIM"): (1.0, 1.4),
    ("TransAct", "TransAct"): (1.2, 1.3),
}  # fmt: skip
BOUNDS = [
    *(Bound("score", name, name, 1000, 0.025) for name in ("TWIN", "SDIM")),
    Bound("score", "TWIN", "MoS_TWIN", 1000, 0.060),
    *(
        Bound("step", *names, length, 4e-3 * ms, "cuda", 2048 if names[0] == "TransAct" else 8192)
        for names, both in ROOFLINE_MS.items()
        for length, ms in zip((200, 1000), both, strict=True)
    ),
]
#: on a GPU, the most that the loader may take of a train step
LOADER_SHARE = 0.05
TITLES = {
    "loader": "Loader, rows per second",
    "step": "Train step",
    "evaluate": "Load and evaluate, rows per second",
    "epoch": "Load and train, rows per second",
    "memory": "Peak memory of an epoch",
    "score": "One user, many candidates",
    "scan": "Selective scan, forward and backward",
    "metrics": "gAUC, AUC and logloss",
}


def median(row: Row, name: str) -> float | None:
    """A model's median in a row, None if it has none."""
    return statistics.median(row["values"][name]) if row["values"].get(name) else None


def goals_of(row: Row, model: str) -> Iterator[str]:
    """Each goal that the row of ``model`` has, and whether it is reached; CPU goals are not judged on a GPU."""
    own = median(row, model)
    for goal in GOALS:
        other = median(row, goal.than)
        if not _meant(goal, row, model) or row["device"] != "cpu" or own is None or other is None:
            continue
        found = other / own
        reached = found >= goal.ratio and (row["difference"] or 0.0) <= goal.equal
        equal = f", equal to {goal.equal:g}" if goal.equal < math.inf else ""
        yield _verdict(reached, f">= {goal.ratio:.3g}x {goal.than}{equal}", f"{found:.3g}x")
    for bound in BOUNDS:
        here = (row["device"], row["batch"]) == (bound.device, bound.batch or row["batch"])
        if _meant(bound, row, model) and here and own is not None:
            yield _verdict(own <= bound.seconds, f"<= {1e3 * bound.seconds:.3g} ms", f"{1e3 * own:.3g} ms")


def _meant(goal: Goal | Bound, row: Row, model: str) -> bool:
    """Whether a row's model is meant; a mixture may have settings of its own (``MoS_TWIN:topk_item=1``)."""
    wanted = (goal.kind, goal.backbone, goal.model, goal.length or row["length"])
    return wanted == (row["kind"], row["backbone"], model.partition(":")[0], row["length"])


def _verdict(reached: bool, goal: str, found: str) -> str:
    return f"{goal}: reached" if reached else f"{goal}: **missed** ({found})"


def amount(row: Row, value: float | None) -> str:
    """A median in the unit that readers want."""
    if value is None:
        return "-"
    if row["unit"] == "s/row":
        return f"{1 / value:,.0f}"
    if row["unit"] == "MiB":
        return f"{value:,.0f} MiB"
    return f"{1e3 * value:,.3g} ms" if value < 1 else f"{value:,.3g} s"


def reference_of(row: Row) -> str | None:
    """Whose figure a row's models are compared with."""
    return next((name for name in (REFERENCE, "mambapy", "FuxiCTR") if name in row["values"]), None)


def lines_of(row: Row) -> list[list[str]]:
    """A row's lines of its table: one for each of our models."""
    reference = reference_of(row)
    theirs = median(row, reference) if reference else None
    plain = median(row, row["backbone"].partition(":")[0])
    lines = []
    for model in [*row["values"], *row["notes"]]:
        if model == reference:
            continue
        own = median(row, model)
        if own is None:
            lines.append([*_names(row, model), "-", "-", "-", "-", row["notes"].get(model, "")])
            continue
        ratio = f"{theirs / own:.3g}x" if theirs else "-"
        of_plain = f"{own / plain:.3g}" if plain and plain != own else "-"
        goals = "; ".join(goals_of(row, model))
        lines.append([*_names(row, model), amount(row, own), amount(row, theirs), ratio, of_plain, goals])
    return lines


def _names(row: Row, model: str) -> list[str]:
    settings = [*filter(None, [row["backbone"].partition(":")[2]]), *row["settings"]]
    shown = f"{model} ({', '.join(settings)})" if settings else model
    return [shown, str(row["length"] or "-"), str(row["batch"] or "-"), row["device"]]


def loader_shares(rows: dict[str, Row]) -> list[list[str]]:
    """On a GPU: what part of a train step the loader takes."""
    loaders = {row["length"]: median(row, OURS) for row in rows.values() if row["kind"] == "loader"}
    lines = []
    for row in rows.values():
        load = loaders.get(row["length"])
        if row["kind"] != "step" or row["device"] == "cpu" or load is None:
            continue
        for model in row["values"]:
            step = median(row, model)
            if model != REFERENCE and step:
                share = load * row["batch"] / step
                verdict = "reached" if share < LOADER_SHARE else "**missed**"
                lines.append([*_names(row, model), f"{share:.1%}", f"< {LOADER_SHARE:.0%}: {verdict}"])
    return lines


def document(rows: dict[str, Row], shape: str) -> str:
    """All tables, and the machines that the rows come from."""
    ordered = {kind: [row for row in rows.values() if row["kind"] == kind] for kind in TITLES}
    machines = list(dict.fromkeys(row["machine"] for row in rows.values()))
    text = [
        "# Speed", "",
        "`python benchmark/speed.py --longctr DIR`: our models beside LongCTR's own code (of the same backbone, without",
        "experts), alternating in one process; medians. MicroVideo's shape, synthetic, every history full; " + shape + ".",
        "Ours runs with the C library's allocator as `run_expid.py` sets it (`model_zoo/allocator.py`), the reference with",
        "glibc's default, as its own script leaves it.",
        "What misses its goal, why, and what was tried: [SPEED_MISSED.md](SPEED_MISSED.md).",
        "`ratio` is the reference's figure by ours (above 1: ours is better), `of plain` ours by our own plain backbone's.",
        "", *(f"- {machine}{_holders(machine, rows, len(machines))}" for machine in machines),
    ]  # fmt: skip
    for kind, found in ordered.items():
        if not found:
            continue
        found.sort(key=lambda row: (_place(row["backbone"]), row["length"]))
        header = ["model", "L", "B", "device", "ours", "reference", "ratio", "of plain", "goals"]
        text += ["", f"## {TITLES[kind]}", "", markdown(header, [line for row in found for line in lines_of(row)])]
        equal = [f"{row['backbone']} {row['length'] or ''}".strip() + f" {row['difference']:.1e}" for row in found
                 if row["difference"] is not None]  # fmt: skip
        if equal:
            text += ["", "Largest difference from the reference's results, same weights: " + ", ".join(equal) + "."]
        notes = [f"- {row['backbone']} L={row['length']}: {name}: {note}" for row in found
                 for name, note in row["notes"].items()]  # fmt: skip
        notes += [f"- {row['backbone']} L={row['length']}: {row['remark']}" for row in found if row.get("remark")]
        text += ["", *notes] if notes else []
    if shares := loader_shares(rows):
        text += ["", "## The loader's part of a train step", ""]
        text += [markdown(["model", "L", "B", "device", "share", "goal"], shares)]
    return "\n".join([*text, ""])


def _place(backbone: str) -> int:
    return BACKBONES.index(backbone) if backbone in BACKBONES else len(BACKBONES)


def _holders(machine: str, rows: dict[str, Row], machines: int) -> str:
    """Which cases come from a machine, if not all."""
    return "" if machines == 1 else ": " + ", ".join(key for key, row in rows.items() if row["machine"] == machine)
