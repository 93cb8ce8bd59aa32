"""How cost grows: a training step's time and memory against L, the number of experts, and the number of items.

``python benchmark/scaling.py`` measures every model at every point of three axes, one size moving and the others as in
``BASE``, and writes ``scaling.json`` and ``SCALING.md`` beside this file, and ``scaling.png`` if there is matplotlib (extra
``plots``). Points that ``scaling.json`` holds already, at the same batch size, are left out.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from typing import Any

from machine import ROOT, this_machine
from scaling_point import CLOCKS, measure, method_of
from scaling_report import AXES, Row, document, draw, fits

from model_zoo.experiment.record import git_commit, write_json, write_whole

HERE = os.path.dirname(os.path.abspath(__file__))
BACKBONES = ("TWIN", "SDIM", "TransAct", "Mamba4Rec")
MODELS = [*BACKBONES, *(f"MoS_{backbone}" for backbone in BACKBONES), "GShard_TWIN"]
POINTS = {
    "length": [50, 100, 200, 500, 1_000, 2_000, 5_000],
    "experts": [1, 2, 4, 8, 16],
    "items": [10_000, 30_000, 100_000, 300_000, 1_000_000, 2_000_000],
}
#: MicroVideo's item count, LongCTR's length, the MoS paper's experts
BASE = {"length": 200, "experts": 5, "items": 24_323}
#: rows of a batch: an exponent does not depend on them, but a scan over 5,000 items takes seconds a row
BATCH = 64
SLOW_BATCH = {"Mamba4Rec": 2}


def batch_of(model: str, chosen: int | None) -> int:
    """The batch size asked for, or the model's own."""
    return chosen or SLOW_BATCH.get(model.rpartition("_")[2], BATCH)


def plan(models: list[str], axes: list[str], points: dict[str, list[int]]) -> list[tuple[str, str, int]]:
    """Model, axis and value of every point; plain backbones have no experts to vary."""
    return [
        (model, axis, value)
        for axis in axes
        for model in models
        if axis != "experts" or method_of(model) != "plain"
        for value in points[axis]
    ]


def load(folder: str) -> list[Row]:
    """The rows of an earlier call."""
    path = os.path.join(folder, "scaling.json")
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        return json.load(file)["rows"]


def save(folder: str, rows: list[Row]) -> None:
    """Json and document, each whole; models in the order of `MODELS`, points ascending."""
    place = {model: number for number, model in enumerate(MODELS)}
    rows.sort(key=lambda row: (place.get(row["model"], len(place)), row["model"], row["axis"], row["value"]))
    exponents = [
        {"model": model, "axis": axis, "quantity": quantity, **vars(one)} for model, axis, quantity, one in fits(rows)
    ]
    write_json(os.path.join(folder, "scaling.json"), {"rows": rows, "exponents": exponents})
    picture = "scaling.png" if os.path.exists(os.path.join(folder, "scaling.png")) else None
    write_whole(os.path.join(folder, "SCALING.md"), document(rows, picture))


def run(wanted: list[tuple[str, str, int]], options: argparse.Namespace, base: dict[str, int]) -> list[Row]:
    """Measure what is missing, saving after every point; returns all rows."""
    rows = load(options.out)
    machine, commit = this_machine(), git_commit(ROOT)
    for number, (model, axis, value) in enumerate(wanted, 1):
        batch = batch_of(model, options.batch)
        same = [row for row in rows if (row["model"], row["axis"], row["value"]) == (model, axis, value)]
        if any(row["batch"] == batch for row in same):
            continue
        started = time.perf_counter()
        sizes = {**base, axis: value}
        found: dict[str, Any] = measure(model, batch, options.repeats, options.clock, **sizes)
        gc.collect()
        rows = [row for row in rows if row not in same]
        row = {"model": model, "axis": axis, "value": value, "batch": batch, **sizes, "repeats": options.repeats}
        rows.append({**row, **found, "clock": options.clock, "machine": machine, "git_commit": commit})
        save(options.out, rows)
        print(
            f"[{number}/{len(wanted)}] {model}, {axis} {value:,}: {found['seconds'] * 1e3:.0f} ms, step "
            f"{found['step_mib']:.0f} MiB ({time.perf_counter() - started:.0f} s)",
            flush=True,
        )
    return rows


def main(argv: list[str] | None = None) -> None:
    """Measure, write the files, print the exponents."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--models", nargs="+", default=MODELS, metavar="MODEL", help="default: %(default)s")
    options.add_argument("--axes", nargs="+", default=list(AXES), choices=list(AXES), help="default: all")
    options.add_argument("--batch", type=int, help=f"rows (default: {BATCH}, {SLOW_BATCH} for slow backbones)")
    options.add_argument("--repeats", type=int, default=3, help="timed steps of a point (default: %(default)s)")
    options.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: for a busy machine")
    options.add_argument("--out", default=HERE, metavar="DIR", help="where the files go (default: this folder)")
    chosen = options.parse_args(argv)
    os.makedirs(chosen.out, exist_ok=True)
    rows = run(plan(chosen.models, chosen.axes, POINTS), chosen, BASE)
    if not draw(rows, os.path.join(chosen.out, "scaling.png")):
        print("scaling.png is not drawn: matplotlib is missing; pip install 'longctr-mos[plots]'", file=sys.stderr)
    save(chosen.out, rows)
    for model, axis, quantity, one in fits(rows):
        mark = " worse than linear" if axis == "length" and one.steep else ""
        slopes = f"{axis}^{one.exponent:.2f}, at the end {one.end:.2f}"
        print(f"{model}: {quantity} ~ {slopes}, worst point {one.deviation:.0%} off{mark}")


if __name__ == "__main__":
    main()
