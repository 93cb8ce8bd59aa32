"""One epoch of each model on the shipped sample: test AUC, seconds, peak memory, parameters.

``python benchmark/zoo.py`` runs ``<Model>_smoke`` for every registered model, each in a process of its own, and writes
``ZOO.md`` and ``zoo.json`` beside this file after every one. Models that ``zoo.json`` holds already are left out.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from machine import ROOT, describe, markdown

from model_zoo.experiment.record import write_json, write_whole
from model_zoo.registry import model_names

HERE = os.path.dirname(os.path.abspath(__file__))
HEADER = [
    "model", "test AUC", "test gAUC", "test logloss", "epochs", "training s", "total s", "peak MiB", "parameters",
    "embedding", "block", "head", "of these in experts",
]  # fmt: skip


def run_model(model: str, config: str, overrides: list[str]) -> dict[str, Any]:
    """The row of one model.

    Raises:
        RuntimeError: the run failed; with its exit code and the last line that it wrote.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, os.path.join(ROOT, "run_expid.py"), "--config", config, "--expid", f"{model}_smoke"]
        settings = [f"model_root={folder}", *overrides]
        command += ["--gpu", "-1", *(part for setting in settings for part in ("--set", setting))]
        done = subprocess.run(command, capture_output=True, text=True)
        records = glob.glob(os.path.join(folder, "*", "*", "*", "metrics.json"))
        if done.returncode or len(records) != 1:
            lines = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
            raise RuntimeError(f"exit code {done.returncode}, {len(records)} record(s): {lines[-1]}")
        with open(records[0], encoding="utf-8") as file:
            return row_of(json.load(file))


def row_of(record: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a run's record."""
    epochs: dict[str, int] = {}
    for entry in record["history"]:
        epochs[entry["phase"]] = entry["epoch"]
    return {
        "model": record["model"],
        "test": record["scores"]["final"]["test"],
        "epochs": epochs,
        "seconds": record["seconds"],
        "peak_mib": record["peak_memory"]["resident_mib"],
        "parameters": record["parameters"],
        "seed": record["seed"],
        "git_commit": record["git_commit"],
        "machine": describe(record["hardware"], record["versions"]),
    }


def document(rows: dict[str, dict[str, Any]], note: str = "") -> str:
    """The table, models in the registry's order, under a note on how it was made."""
    names = model_names()
    order = sorted(rows, key=lambda name: (names.index(name) if name in names else len(names), name))
    lines = []
    for name in order:
        row = rows[name]
        scores = [f"{row['test'][metric]:.4f}" for metric in ("AUC", "gAUC", "logloss")]
        seconds = [f"{row['seconds'][part]:.1f}" for part in ("fit", "total")]
        counts = [f"{row['parameters'][part]:,}" for part in ("total", "embedding", "block", "head", "experts")]
        epochs = "+".join(str(count) for count in row["epochs"].values())
        lines.append([name, *scores, epochs, *seconds, f"{row['peak_mib']:,.0f}", *counts])
    by_machine = Counter(rows[name]["machine"] for name in order).most_common()
    most, *others = (f"- {machine}" for machine, _ in by_machine)
    if others:
        most += ": all other models"
        others = [line + _holders(line[2:], rows, order) for line in others]
    return "\n".join([
        "# Every model, one epoch on the shipped sample",
        "",
        "`python benchmark/zoo.py`: `<Model>_smoke` on `data/kuairand_sample`, small settings, one seed: a check that each",
        "model trains, not a ranking. MoS has an epoch in each of its three phases. Training seconds include evaluation;",
        "the peak is the process's resident memory, libraries included.",
        "",
        most,
        *others,
        *([f"- {note}"] if note else []),
        "",
        markdown(HEADER, lines),
        "",
    ])  # fmt: skip


def _holders(machine: str, rows: dict[str, dict[str, Any]], order: list[str]) -> str:
    """Which rows come from a machine that is not most rows' one."""
    return ": " + ", ".join(name for name in order if rows[name]["machine"] == machine)


def save(folder: str, rows: dict[str, dict[str, Any]], note: str = "") -> None:
    """Both files, each whole."""
    write_json(os.path.join(folder, "zoo.json"), {"note": note, "models": rows})
    write_whole(os.path.join(folder, "ZOO.md"), document(rows, note))


def load(folder: str) -> tuple[dict[str, dict[str, Any]], str]:
    """The rows and the note of an earlier call."""
    path = os.path.join(folder, "zoo.json")
    if not os.path.exists(path):
        return {}, ""
    with open(path, encoding="utf-8") as file:
        record = json.load(file)
    return record["models"], record.get("note", "")


def main(argv: list[str] | None = None) -> int:
    """Run what is missing; returns 1 if a model failed (it is tried again in the next call)."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--models", nargs="+", metavar="MODEL", help="only these (default: all registered ones)")
    options.add_argument("--jobs", type=int, default=1, help="runs at a time; more than one disturbs the seconds")
    options.add_argument("--again", action="store_true", help="run models that have a row, too")
    options.add_argument("--out", default=HERE, metavar="DIR", help="where both files go (default: this folder)")
    options.add_argument("--note", help="a line on how the runs were made (default: the earlier call's)")
    options.add_argument("--config", default=os.path.join(ROOT, "config"), metavar="DIR", help="as of run_expid.py")
    options.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of run_expid.py")
    chosen = options.parse_args(argv)
    os.makedirs(chosen.out, exist_ok=True)
    rows, note = load(chosen.out)
    note = note if chosen.note is None else chosen.note
    if rows:
        save(chosen.out, rows, note)
    wanted = [name for name in chosen.models or model_names() if chosen.again or name not in rows]
    failed = 0
    with ThreadPoolExecutor(max_workers=max(chosen.jobs, 1)) as pool:
        runs = {pool.submit(run_model, name, chosen.config, chosen.set): name for name in wanted}
        for number, run in enumerate(as_completed(runs), 1):
            name = runs[run]
            try:
                rows[name] = run.result()
            except RuntimeError as error:
                failed += 1
                print(f"[{number}/{len(wanted)}] {name}: failed: {error}", flush=True)
                continue
            save(chosen.out, rows, note)
            auc, seconds, peak = rows[name]["test"]["AUC"], rows[name]["seconds"]["fit"], rows[name]["peak_mib"]
            print(f"[{number}/{len(wanted)}] {name}: test AUC {auc:.4f}, {seconds:.1f} s, {peak:.0f} MiB", flush=True)
    print(f"{len(rows)} models in {os.path.join(chosen.out, 'ZOO.md')}, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
