"""Runs that were stopped: found again by their experiment, checked, and gone on with in their own folder."""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from glob import escape, glob
from typing import Any

import torch
import yaml

from model_zoo.compat import FUXICTR_VERSION
from model_zoo.errors import ConfigError, DataError
from model_zoo.experiment.config import Config
from model_zoo.experiment.record import installed_version, read_record
from model_zoo.resume import read_state_file

logger = logging.getLogger("model_zoo")

CONFIG_FILE, STATE_FILE, RECORD_FILE = "config.yaml", "training_state.pt", "metrics.json"
LOCK_FILE, LOG_FILE = "run.lock", "run.log"
#: keys that change where and how a run works, not what it computes
NOT_COMPARED = {
    "gpu", "verbose", "prefetch", "data_on_device", "model_root", "data_root", "checkpoint_minutes", "checkpoint_steps",
    "trackers",
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A run folder that holds a config.

    Attributes:
        folder: ``<model_root>/<dataset_id>/<expid>/<time>-seed<seed>``.
        expid: experiment id.
        params: the config that it began with.
    """

    folder: str
    expid: str
    params: dict[str, Any]

    @classmethod
    def read(cls, folder: str) -> Run:
        """The run in ``folder``.

        Raises:
            ConfigError: the folder or its config is missing or unreadable.
        """
        path = os.path.join(folder, CONFIG_FILE)
        try:
            with open(path, encoding="utf-8") as file:
                content = yaml.safe_load(file)
        except OSError as error:
            raise ConfigError(f"--resume {folder}: {path}: {error.strerror}; give the folder that a run made") from None
        except (yaml.YAMLError, UnicodeDecodeError):
            raise ConfigError(f"{path}: not valid yaml; start the experiment without --resume") from None
        if not isinstance(content, dict) or len(content) != 1 or not isinstance(next(iter(content.values())), dict):
            raise ConfigError(f"{path}: not the config of one run; start the experiment without --resume")
        expid, params = next(iter(content.items()))
        return cls(folder, str(expid), params)

    def record(self) -> dict[str, Any] | None:
        """What the finished run recorded; None if it has not come so far.

        Raises:
            RecordError: the record cannot be read.
        """
        path = os.path.join(self.folder, RECORD_FILE)
        return read_record(path) if os.path.exists(path) else None

    @property
    def state_path(self) -> str:
        """Where its training's state lies, if any was written."""
        return os.path.join(self.folder, STATE_FILE)

    def config(self) -> Config:
        """Its config, to be validated like any other."""
        config = Config(self.expid)
        for key, value in self.params.items():
            config.set(key, value, os.path.join(self.folder, CONFIG_FILE))
        return config


def newest_run(params: dict[str, Any], expid: str) -> Run | None:
    """The newest run of an experiment and seed; None if there is none.

    Raises:
        ConfigError: it began with another config; names the keys.
    """
    place = os.path.join(params["model_root"], params["dataset_id"], expid)
    name = re.compile(rf"\d{{8}}-\d{{6}}-seed{params['seed']}(-\d+)?")
    folders = [path for path in glob(os.path.join(escape(place), "*")) if name.fullmatch(os.path.basename(path))]
    started = [folder for folder in folders if os.path.exists(os.path.join(folder, CONFIG_FILE))]
    if not started:
        return None
    run = Run.read(max(started, key=lambda folder: os.stat(os.path.join(folder, CONFIG_FILE)).st_mtime_ns))
    changed = sorted(key for key in {*run.params, *params} - NOT_COMPARED if run.params.get(key) != params.get(key))
    if changed:
        shown = ", ".join(f"{key} ({run.params.get(key)!r:.60}, now {params.get(key)!r:.60})" for key in changed[:4])
        raise ConfigError(
            f"--resume: the newest run of {expid}, {run.folder}, has another config: {shown}"
            f"{f' and {len(changed) - 4} more' if len(changed) > 4 else ''}; set them back, name the folder of the run "
            "to resume, or start anew without --resume"
        )
    return run


def identity(fingerprint: dict[str, str]) -> dict[str, Any]:
    """What must not change between a run's processes: data; and what should not: versions, threads."""
    return {
        "data": fingerprint,
        "torch": torch.__version__,
        "fuxictr": FUXICTR_VERSION,
        "numba": installed_version("numba") or "not installed",
        "threads": torch.get_num_threads(),
    }


def saved_state(run: Run, now: dict[str, Any]) -> dict[str, Any] | None:
    """The state of a run's training; None if it was stopped before its first one.

    Args:
        now: `identity` of this process.

    Raises:
        DataError: a data file differs from the one that the run began with.
        ConfigError: the state cannot be read.
    """
    if not os.path.exists(run.state_path):
        logger.info("%s: stopped before its first saved state; it starts from the beginning", run.folder)
        return None
    state = read_state_file(run.state_path)
    before = state["identity"]
    changed = [name for name, digest in before["data"].items() if now["data"].get(name) != digest]
    if changed or set(before["data"]) != set(now["data"]):
        names = ", ".join(changed) or "the list of files"
        raise DataError(f"--resume {run.folder}: {names} changed since the run began; put the files back, or start anew")
    for name in ("torch", "fuxictr", "numba", "threads"):
        if before.get(name, now[name]) != now[name]:  # states of before numba was used do not name it
            logger.warning("resumed with %s %s, begun with %s: the result may differ in its last digits from a run "
                           "without a stop", name, now[name], before[name])  # fmt: skip
    return state
