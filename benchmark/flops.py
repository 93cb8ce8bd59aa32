"""Operations and train-step times of MoS beside its rivals: where does "53 % of the operations" hold?

``python benchmark/flops.py`` builds ``MoS_<backbone>_microvideo`` and its rivals with as many experts as one of MoS's
routers (``literal``) and as both (``budget_matched``), on synthetic data of MicroVideo's shape whose histories have all
``--length`` items. They are measured when routers have just been started (MoS's codebooks by k-means), and after a few
training steps. A backbone may be given other settings: ``TransAct:transformer_layers=2,batch_size=32``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import flops_tables as tables
from flops_models import entries, few_steps, measure, start, step_seconds
from machine import ROOT

from model_zoo.experiment.record import environment, write_json, write_whole
from model_zoo.pipeline.synthetic import MICROVIDEO, SyntheticSpec, generate
from model_zoo.pipeline.synthetic_files import write

#: the second TransAct computes every position, at a cost quadratic in them; the slow ones have smaller batches
BACKBONES = ["TWIN", "SDIM", "TransAct", "TransAct:concat_max_pool=True,batch_size=16", "Mamba4Rec:batch_size=32"]


def write_data(folder: Path, spec: SyntheticSpec, shortest: int) -> None:
    """The data set's files; only impressions after at least ``shortest`` items are kept."""
    data = generate(spec)
    rows = {}
    for split, table in data.rows.items():
        kept = table.seq_len >= shortest
        rows[split] = type(table)(*(column[kept] for column in vars(table).values()))
    write(replace(data, rows=rows), folder)


def compare(backbone: str, options: argparse.Namespace, folder: str) -> list[dict[str, Any]]:
    """Every model over one backbone, in both states."""
    overrides = [f"batch_size={options.batch}", f"max_len={options.length}", *options.set]
    compared = entries(backbone, overrides, folder)
    batches = [batch for batch in islice(compared[0].loader, max(options.batches, options.timed + 1))]
    rows = []
    for state in ("start", "trained"):
        for entry in compared:
            if state == "start":
                start(entry)
            else:
                few_steps(entry, batches, options.steps)
        measured = [measure(entry, batches[0]) | {"state": state} for entry in compared]
        plain = measured[0]
        seconds = step_seconds(compared, batches[: options.timed + 1])
        for row, own in zip(measured, seconds, strict=True):
            row |= {"seconds": own, **{f"{kind}_extra": row[kind] - plain[kind] for kind in ("prediction", "training")}}
        rows += measured
    return rows


def main(argv: list[str] | None = None) -> None:
    """Print the tables and one json line per model and state."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--backbones", nargs="+", default=BACKBONES, metavar="NAME[:KEY=VALUE,...]")
    options.add_argument("--length", type=int, default=200, help="items of every history (default: %(default)s)")
    options.add_argument("--any-length", action="store_true", help="histories as long as they are, cut at --length")
    options.add_argument("--batch", type=int, default=128, help="rows per batch (default: %(default)s)")
    options.add_argument("--batches", type=int, default=10, help="distinct training batches (default: %(default)s)")
    options.add_argument("--steps", type=int, default=3, help="training steps per phase (default: %(default)s)")
    options.add_argument("--timed", type=int, default=3, help="timed steps per model (default: %(default)s)")
    options.add_argument("--users", type=int, default=2_000, help="of the synthetic data (default: %(default)s)")
    options.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for every model; repeatable")
    options.add_argument("--out", metavar="DIR", help="write FLOPS.md and flops.json there, after each backbone")
    chosen = options.parse_args(argv)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        needed = 4 * chosen.batch * max(chosen.batches, chosen.timed + 1)
        longer = {"history_mean": max(300, 2 * chosen.length), "history_max": max(1_200, 4 * chosen.length)}
        spec = replace(MICROVIDEO, users=chosen.users, rows=(max(needed, 10_000), 100, 100), **longer)
        write_data(Path(folder), spec, 1 if chosen.any_length else chosen.length)
        for backbone in chosen.backbones:
            started = time.perf_counter()
            rows += compare(backbone, chosen, folder)
            print(f"{backbone}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
            if chosen.out:
                save(rows, chosen)
    print(f"{tables.document(rows, chosen)}\n")
    for row in rows:
        print(json.dumps(row))


def save(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Both files, each whole."""
    os.makedirs(options.out, exist_ok=True)
    write_whole(os.path.join(options.out, "FLOPS.md"), tables.document(rows, options) + "\n")
    chosen = {name: value for name, value in vars(options).items() if name != "out"}
    write_json(os.path.join(options.out, "flops.json"), {"options": chosen, "rows": rows, **environment(ROOT)})


if __name__ == "__main__":
    main()
