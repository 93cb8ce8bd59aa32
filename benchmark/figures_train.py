"""Training of the runs that a figure lacks, one after the other, each resumable."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence

from machine import ROOT

from model_zoo.errors import ConfigError
from model_zoo.experiment.config import load_config
from model_zoo.registry import configuration_keys, get_model, model_names

#: experiment, folder of its runs below the first, and ``KEY=VALUE`` changes
Point = tuple[str, str, list[str]]


def train(chosen: argparse.Namespace) -> None:
    """Train every point below the first folder; what is finished is left as it is, what was stopped goes on.

    Raises:
        ConfigError: nothing to train, an unknown experiment, or runs that failed (after all others were trained).
    """
    if not chosen.lengths and not chosen.experts:
        raise ConfigError("--run needs --lengths or --experts: the points to train")
    plan = [point for expid in chosen.train for point in points(expid, chosen)]
    train_points(plan, chosen)


def train_points(plan: Sequence[Point], chosen: argparse.Namespace) -> None:
    """Train each point with each seed, below the first folder.

    Raises:
        ConfigError: runs that failed (after all others were trained).
    """
    failed = []
    for number, (expid, folder, changes) in enumerate(plan, 1):
        for seed in chosen.seeds:
            sets = [*chosen.set, *changes, f"model_root={os.path.abspath(os.path.join(chosen.runs[0], folder))}"]
            command = [sys.executable, os.path.join(ROOT, "run_expid.py"), "--expid", expid, "--seed", str(seed)]
            command += ["--resume", "--gpu", str(chosen.gpu), *(["--config", chosen.config] if chosen.config else [])]
            for change in sets:
                command += ["--set", change]
            print(f"[{number}/{len(plan)}] {expid}, seed {seed}: {', '.join(changes)}", flush=True)
            code = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
            if code < 0 or code > 128:
                raise KeyboardInterrupt
            if code:
                failed.append(f"{expid} seed {seed} in {folder or changes[0]}")
    if failed:
        raise ConfigError(f"{len(failed)} run(s) failed: {'; '.join(failed)}; mend what they said, and call this again")


def points(expid: str, chosen: argparse.Namespace) -> list[Point]:
    """Experiment, folder below the first and ``KEY=VALUE`` of each point; plain backbones have no experts to vary."""
    own = os.path.join(ROOT, "config")
    config = load_config(chosen.config or own, expid, chosen.set, own)
    name = config.values.get("model")
    if name not in model_names():
        raise ConfigError(f"{expid}: model {name} is not one of this package")
    method = get_model(str(name)).method
    found = [(expid, f"L{length}", [f"max_len={length}"]) for length in chosen.lengths]
    if method is None:
        return found
    keys = configuration_keys(method.layer)
    pairs = [("n_item_experts", "topk_item"), ("n_window_experts", "topk_window"), ("n_experts", "topk_experts")]
    for n in chosen.experts:
        changes = [] if chosen.length_at is None else [f"max_len={chosen.length_at}"]
        for count, kept in pairs:
            if count in keys:
                most = config.values.get(kept, keys[kept].default)
                changes += [f"{count}={n}", *([f"{kept}={n}"] if 0 < n < most else [])]
        found.append((expid, f"n{n}" + (f"-L{chosen.length_at}" if chosen.length_at else ""), changes))
    return found
