"""How fast: loader, train step, evaluation, memory and scoring, beside LongCTR's own code.

``python benchmark/speed.py --longctr DIR`` (a checkout of https://github.com/reczoo/LongCTR; its loader needs
``pip install keras_preprocessing``) measures each case in a process of its own, ours and LongCTR's alternating in it, and
writes ``SPEED.md`` and ``speed.json`` beside this file after each. Cases that ``speed.json`` holds already are left out;
without ``--longctr`` only ours are measured. The scan is compared where ``mambapy`` is installed. With ``--device cuda``
everything runs on the GPU, at 8,192 rows.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from flops import write_data
from machine import ROOT, describe
from speed_cases import OTHERS, OURS, REFERENCE, SHAPE, Case, Result, spec_of
from speed_kinds import KINDS, measure
from speed_longctr import LongCTR
from speed_report import BACKBONES, POOLED, document, lines_of

from model_zoo.errors import ConfigError, answered
from model_zoo.experiment.record import environment, write_json, write_whole
from model_zoo.registry import get_model, model_keys

HERE = os.path.dirname(os.path.abspath(__file__))
#: seconds after which a case is given up
PATIENCE = 3600
MARK = "RESULT "


def default_models() -> list[str]:
    """Each backbone plain, under MoS and under GShard with as many experts."""
    parts = [backbone.partition(":") for backbone in BACKBONES]
    return [f"{method}{name}{colon}{own}" for name, colon, own in parts for method in ("", "MoS_", "GShard_")]


def groups(models: list[str]) -> dict[str, list[str]]:
    """Models by the plain backbone that they are compared with; settings of the backbone are the group's.

    Raises:
        ConfigError: there is no such model.
    """
    found: dict[str, list[str]] = defaultdict(list)
    for model in models:
        name, _, text = model.partition(":")
        try:
            plain = get_model(name).backbone.name
        except KeyError as error:
            raise ConfigError(f"--models {model}: {error.args[0]}") from None
        settings, keys = re.split(r",(?=\w+=)", text) if text else [], model_keys(plain)
        shared = [setting for setting in settings if setting.partition("=")[0] in keys]
        own = [setting for setting in settings if setting not in shared]
        found[_with(plain, shared)].append(_with(name, own))
    return found


def _with(name: str, settings: list[str]) -> str:
    return f"{name}:{','.join(settings)}" if settings else name


def batch_of(kind: str, backbone: str, length: int, device: str) -> int:
    """Rows of a batch: LongCTR's loader has 8,192; its models' steps are affordable on a CPU at fewer."""
    name = backbone.partition(":")[0]
    if kind == "score":
        return {"TransAct": 64 if backbone == POOLED else 250}.get(name, 1000)
    if kind == "loader":
        return 8192
    if device != "cpu":
        return 2048 if name in ("TransAct", "Mamba4Rec") else 8192
    if name == "TransAct":
        return 128 if length <= 200 else 32
    return 256 if name == "Mamba4Rec" else 1024 if length <= 200 else 512


def plan(chosen: argparse.Namespace, longctr: LongCTR | None) -> list[Case]:
    """The cases that the options ask for, without their folders."""
    common = Case("", device=chosen.device, longctr=longctr.folder if longctr else None, settings=tuple(chosen.set),
                  repeats=chosen.repeats, limit=chosen.limit, threads=chosen.threads,
                  clock=chosen.clock)  # fmt: skip
    cases = []
    for kind in chosen.cases:
        if kind == "metrics":
            cases.append(replace(common, kind=kind, models=(OURS, "FuxiCTR"), device="cpu"))
        elif kind == "scan":
            others = ("mambapy",) if importlib.util.find_spec("mambapy") else ()
            cases.append(replace(common, kind=kind, models=(OURS, *others)))
        for length in chosen.lengths if kind not in ("metrics", "scan") else []:
            asked = {"": [OURS]} if kind == "loader" else groups(chosen.models or default_models())
            for backbone, models in asked.items():
                known = longctr is not None and (kind == "loader" or longctr.has(backbone.partition(":")[0]))
                batch = chosen.batch or batch_of(kind, backbone, length, chosen.device)
                names = (*models, REFERENCE) if known else tuple(models)
                cases.append(replace(common, kind=kind, backbone=backbone, models=names, length=length, batch=batch))
    return cases


# ---- processes -----------------------------------------------------------------------------------------------------------


def run_case(case: Case) -> Result:
    """Measure a case in a process of its own; of ``memory``, each model in one.

    Raises:
        RuntimeError: the process failed; with its exit code and the last line that it wrote.
    """
    if case.kind != "memory":
        return _launch(case)[0]
    merged = Result("MiB", {}, {})
    for model in case.models:
        try:
            found, sampled = _launch(replace(case, models=(model,)))
            own = found.values[model][0]
            merged.values[model] = [max(own, sampled) if case.device == "cpu" else own]
        except RuntimeError as error:
            merged.notes[model] = str(error)
    return merged


def _launch(case: Case) -> tuple[Result, float]:
    """Its result, and the most MiB that the process and its workers were seen to hold together."""
    threads = {"OMP_NUM_THREADS": str(case.threads), "MKL_NUM_THREADS": str(case.threads)}
    command = [sys.executable, os.path.join(HERE, "speed.py"), "--one", case.to_json()]
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=output, stderr=errors, env={**os.environ, **threads})
        peak = [0.0]
        watcher = threading.Thread(target=_watch, args=(process, peak), daemon=True)
        if case.kind == "memory":  # reading the map of a large process slows it
            watcher.start()
        try:
            code = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"no end after {PATIENCE} seconds") from None
        finally:
            process.kill()
            process.wait()
        for file in (output, errors):
            file.seek(0)
        written, complaints = output.read(), errors.read()
    results = [line for line in written.splitlines() if line.startswith(MARK)]
    if code or not results:
        lines = (complaints.strip() or "no output").splitlines()
        raise RuntimeError(f"exit code {code}: {lines[-1]}")
    return Result(**json.loads(results[-1].removeprefix(MARK))), peak[0]


def _watch(process: subprocess.Popen[Any], peak: list[float]) -> None:
    while process.poll() is None:
        peak[0] = max(peak[0], sum(_proportional_mib(pid) for pid in _family(process.pid)))
        time.sleep(0.1)


def _family(parent: int) -> list[int]:
    """A process and all that it started; on systems without /proc only itself."""
    children: dict[int, list[int]] = defaultdict(list)
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            children[int(entry.read_text().rpartition(")")[2].split()[1])].append(int(entry.parent.name))
        except (OSError, ValueError, IndexError):
            continue
    family = [parent]
    for pid in family:
        family += children[pid]
    return family


def _proportional_mib(pid: int) -> float:
    """What a process holds, its share of what it shares; 0 if the system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
    except OSError:
        return 0.0


# ---- record --------------------------------------------------------------------------------------------------------------


def load(folder: str) -> dict[str, dict[str, Any]]:
    """The rows of an earlier call."""
    path = os.path.join(folder, "speed.json")
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as file:
        return json.load(file)["cases"]


def save(folder: str, rows: dict[str, dict[str, Any]]) -> None:
    """Both files, each whole."""
    write_json(os.path.join(folder, "speed.json"), {"cases": rows})
    write_whole(os.path.join(folder, "SPEED.md"), document(rows, ", ".join(SHAPE)))


def row_of(case: Case, result: Result, longctr: LongCTR | None) -> dict[str, Any]:
    """What is kept of a case."""
    names = ("kind", "backbone", "length", "batch", "device", "clock", "settings", "repeats", "threads")
    kept = {name: getattr(case, name) for name in names}
    found = environment(ROOT)
    machine = describe({**found["hardware"], "torch_threads": case.threads}, found["versions"])
    if case.clock != "wall":
        machine += "; processor seconds"
    if case.device != "cpu":
        machine += f"; {found['hardware']['gpu']}"
    return {
        **kept, **asdict(result), "machine": machine, "git_commit": found["git_commit"],
        "longctr_commit": longctr.commit if longctr and case.theirs else None,
    }  # fmt: skip


def data_folder(root: str, length: int) -> str:
    """The data set of a length, made if it is not there."""
    folder = os.path.join(root, str(length))
    if not os.path.exists(os.path.join(folder, "train.parquet")):
        write_data(Path(folder), spec_of(length), length)
    return folder


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--cases", nargs="+", choices=list(KINDS), default=list(KINDS))
    models = " ".join(default_models())
    options.add_argument("--models", nargs="+", metavar="MODEL[:KEY=VALUE,...]", help=f"default: {models}")
    options.add_argument("--lengths", nargs="+", type=int, default=[50, 200, 1000])
    options.add_argument("--repeats", type=int, default=5, help="measurements of each, after a warm-up")
    options.add_argument("--limit", type=float, default=120, help="seconds after which a model is not repeated again")
    options.add_argument("--longctr", metavar="DIR", help="a checkout of reczoo/LongCTR")
    options.add_argument("--batch", type=int, help="rows of a batch (of candidates, in `score`) in every case")
    options.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: processor seconds")
    options.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options.add_argument("--data", metavar="DIR", help="keep data sets there, in DIR/<length> (default: made, and deleted)")
    options.add_argument("--out", default=HERE, metavar="DIR", help="where both files go (default: this folder)")
    options.add_argument("--again", action="store_true", help="run cases that have a row, too")
    options.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of models that have the key")
    options.add_argument("--one", help=argparse.SUPPRESS)
    return options


@answered
def main(argv: list[str] | None = None) -> int:
    """Run what is missing; returns 1 if something failed (it is tried again in the next call), 2 for wrong options."""
    chosen = parser().parse_args(argv)
    if chosen.one:
        print(MARK + json.dumps(asdict(measure(Case.from_json(chosen.one)))))
        return 0
    longctr = LongCTR(chosen.longctr) if chosen.longctr else None
    cases = plan(chosen, longctr)
    os.makedirs(chosen.out, exist_ok=True)
    rows = load(chosen.out)
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        for number, case in enumerate(cases, 1):
            known = rows.get(case.key, {"values": {}})["values"]
            if not chosen.again and set(case.models) <= set(known):
                continue
            # those that were measured before are measured again, so that a row's figures are of one run
            case = replace(case, models=tuple(dict.fromkeys([*(n for n in known if n != REFERENCE), *case.models])))
            folder = data_folder(chosen.data or scratch, case.length) if case.length else ""
            try:
                result = run_case(replace(case, folder=folder))
            except RuntimeError as error:
                failed += 1
                print(f"[{number}/{len(cases)}] {case.key}: failed: {error}", flush=True)
                continue
            failed += any(name not in OTHERS for name in result.notes)  # theirs is a note, and ours measured
            row = row_of(case, result, longctr)
            if result.values:
                rows[case.key] = row
                save(chosen.out, rows)
            difference = "" if result.difference is None else f" (largest difference {result.difference:.1e})"
            print(f"[{number}/{len(cases)}] {case.key}{difference}", flush=True)
            for line in lines_of(row):
                print("    " + " | ".join(line), flush=True)
    print(f"{len(rows)} cases in {os.path.join(chosen.out, 'SPEED.md')}, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    # so that the process of a case ends with this one
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
