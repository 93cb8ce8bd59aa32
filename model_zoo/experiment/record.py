"""What a run leaves behind: one folder with config, log, figures and checkpoints, and one line in the results table."""

from __future__ import annotations

import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
import yaml

from model_zoo.errors import ConfigError

PACKAGES = ("torch", "fuxictr", "numpy", "polars", "scikit-learn", "h5py", "pydantic", "mamba-ssm")


def new_run_folder(model_root: str, dataset_id: str, expid: str, seed: int) -> str:
    """A folder of its own for this run, ``<model_root>/<dataset_id>/<expid>/<time>-seed<seed>``.

    Raises:
        ConfigError: it cannot be made.
    """
    stem = os.path.join(model_root, dataset_id, expid, f"{time.strftime('%Y%m%d-%H%M%S')}-seed{seed}")
    for number in range(1, 1000):
        folder = stem if number == 1 else f"{stem}-{number}"
        try:
            os.makedirs(folder)
            return folder
        except OSError as error:
            if not os.path.isdir(folder):
                raise ConfigError(f"{folder}: cannot be made ({error.strerror}); choose another model_root") from None
    raise ConfigError(f"{stem}: used a thousand times; choose another model_root")


def write_whole(path: str, text: str) -> None:
    """Write a text file whole or not at all."""
    partial = f"{path}.partial"
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_json(path: str, value: Any) -> None:
    """Write json whole or not at all; a number that is NaN or infinite, which json lacks, becomes null."""
    write_whole(path, json.dumps(_finite(value), indent=2, default=str, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_yaml(path: str, value: Any) -> None:
    """Write yaml whole or not at all."""
    write_whole(path, yaml.safe_dump(value, sort_keys=True, allow_unicode=True, default_flow_style=None))


def environment(root: str) -> dict[str, Any]:
    """Versions, git commit and hardware."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "git_commit": git_commit(root),
        "hardware": {
            "machine": platform.machine(),
            "system": platform.system(),
            "cpus": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def git_commit(root: str) -> str | None:
    """The repository's commit, with ``+changes`` if the work tree differs; None outside a repository."""
    try:
        commit = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        if commit.returncode:
            return None
        status = subprocess.run(
            ["git", "-C", root, "status", "--porcelain"], capture_output=True, text=True, timeout=10
        )
        return commit.stdout.strip() + ("+changes" if status.stdout.strip() else "")
    except (OSError, subprocess.TimeoutExpired):
        return None


def peak_memory() -> dict[str, float]:
    """Peak resident memory of this process, and peak CUDA memory if a GPU was used, in MiB."""
    unit = 1024 if sys.platform != "darwin" else 1024 * 1024
    peak = {"resident_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        peak["cuda_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return peak


def append_result(path: str, command: str, expid: str, dataset_id: str, scores: dict[str, dict[str, float]]) -> None:
    """Append LongCTR's one-line record of a run to a results table.

    A single write in append mode: lines of runs that end together do not mix.
    """

    def shown(split: str) -> str:
        return " - ".join(f"{name}: {value:.6f}" for name, value in scores.get(split, {}).items())

    line = (
        f" {time.strftime('%Y%m%d-%H%M%S')},[command] python {command},[exp_id] {expid},[dataset_id] {dataset_id},"
        f"[train] N.A.,[val] {shown('valid')},[test] {shown('test')}\n"
    )
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)
