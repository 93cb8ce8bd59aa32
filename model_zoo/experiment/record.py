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
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
import yaml

from model_zoo.errors import ConfigError, UserError
from model_zoo.files import append_line, write_whole

#: format of ``metrics.json``. 1, without the key ``format``: before ``format``, ``log``, ``flops`` and ``model_config``
FORMAT_VERSION = 2
#: what every record has, and of which type
REQUIRED = {"expid": str, "dataset_id": str, "model": str, "seed": int, "config": dict, "scores": dict}
#: what records of format 1 may lack, and of which type it is; a mapping or list is empty then, anything else None
ADDED: dict[str, type] = {
    "log": str, "flops": dict, "model_config": dict, "command": str, "finished": str, "resumes": list, "baselines": dict,
    "history": list, "parameters": dict, "seconds": dict, "peak_memory": dict, "versions": dict, "hardware": dict,
    "git_commit": str, "data_fingerprint": dict,
}  # fmt: skip
#: what may be None in a record of today
UNKNOWN = {"log", "flops", "command", "finished", "git_commit"}
PACKAGES = ("torch", "fuxictr", "numpy", "polars", "scikit-learn", "h5py", "pydantic", "numba", "mamba-ssm")


class RecordError(UserError):
    """A run's record cannot be used; with the reason."""


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


def read_record(path: str) -> dict[str, Any]:
    """A run's record, as `run.run` wrote it; of an older format, what it lacks is filled in with nothing known.

    Returns:
        The record, in which a score that is no number is None.

    Raises:
        RecordError: it is unreadable, of a newer format, not the record of a run, or without any score.
    """
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror or error}); name another run") from None
    except (ValueError, RecursionError):
        raise RecordError(f"{path}: not valid json; run the experiment again") from None
    if not isinstance(found, dict):
        raise RecordError(f"{path}: not the record of a run, but a {type(found).__name__}; name another file")
    written = found.get("format", 1)
    if isinstance(written, bool) or not isinstance(written, int) or written < 1:
        raise RecordError(f"{path}: format {written!r:.40} is not known; run the experiment again")
    if written > FORMAT_VERSION:
        raise RecordError(
            f"{path}: written by a newer version (format {written}, this one reads up to {FORMAT_VERSION}); update"
        )
    empty = {key: None if key in UNKNOWN else kind() for key, kind in ADDED.items()}
    record = {**empty, "format": written, **_finite(found)}
    for key, kind in {**REQUIRED, **ADDED}.items():
        known = record.get(key)
        if not (isinstance(known, kind) and not isinstance(known, bool)) and not (known is None and key in UNKNOWN):
            raise RecordError(f"{path}: not the record of a run, '{key}' is missing or wrong; run the experiment again")
    final = record["scores"].get("final")
    if not isinstance(final, dict) or not all(isinstance(split, dict) for split in final.values()):
        raise RecordError(f"{path}: not the record of a run, 'scores' lacks the final model's; run the experiment again")
    if not any(isinstance(value, float | int) for split in final.values() for value in split.values()):
        raise RecordError(f"{path}: no metric of the final model is a number; look at the run's log, or run it again")
    return record


def write_yaml(path: str, value: Any) -> None:
    """Write yaml whole or not at all."""
    write_whole(path, yaml.safe_dump(value, sort_keys=True, allow_unicode=True, default_flow_style=None))


def installed_version(package: str) -> str | None:
    """The version of a package, None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def environment(root: str) -> dict[str, Any]:
    """Versions, git commit and hardware."""
    installed = {package: found for package in PACKAGES if (found := installed_version(package)) is not None}
    return {
        "versions": {"python": platform.python_version(), **installed},
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


def append_result(
    path: str,
    command: str,
    expid: str,
    dataset_id: str,
    scores: Mapping[str, Mapping[str, float | None]],
    when: str | None = None,
) -> bool:
    """Append LongCTR's one-line record of a run to a results table; runs that end together append one after the other.

    Args:
        scores: split to metric to value; None, as json has it for what is no number, is shown as nan.
        when: the line's time stamp, ``%Y%m%d-%H%M%S``; the very same line is then not appended again. Default: now.

    Returns:
        Whether the line was appended.

    Raises:
        FileError: the table cannot be written; the lines that were there before are untouched.
    """
    line = result_line(when or time.strftime("%Y%m%d-%H%M%S"), command, expid, dataset_id, scores)
    return append_line(path, line, once=when is not None)


def result_line(
    when: str, command: str, expid: str, dataset_id: str, scores: Mapping[str, Mapping[str, float | None]]
) -> str:
    """LongCTR's one-line record of a run, without a line break."""

    def shown(split: str) -> str:
        values = {name: math.nan if value is None else value for name, value in scores.get(split, {}).items()}
        return " - ".join(f"{name}: {value:.6f}" for name, value in values.items())

    line = (
        f" {when},[command] python {command},[exp_id] {expid},"
        f"[dataset_id] {dataset_id},[train] N.A.,[val] {shown('valid')},[test] {shown('test')}"
    )
    return " ".join(line.splitlines())
