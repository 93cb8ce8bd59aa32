"""Where the figures of a run's evaluations go: metrics.csv, TensorBoard, wandb, MLflow, or an object of the user's own."""

from __future__ import annotations

import csv
import difflib
import importlib
import inspect
import io
import logging
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from model_zoo.experiment.adapters import MLflow, TensorBoard, Wandb
from model_zoo.files import write_whole

logger = logging.getLogger("model_zoo")

CSV_FILE = "metrics.csv"
CSV = "csv"
#: names under which a record's own numbers are tracked; other ones are tracked as ``train/<key>``
NAMES = {"train_loss": "train/loss", "seconds": "time/training", "eval_seconds": "time/evaluation"}
#: keys of a record that its row in ``metrics.csv`` begins with, or that are text
PLACE = ("phase", "epoch", "step", "best", "warnings")
#: what a `Tracker` must have
METHODS = ("start", "log", "finish")
DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


class Tracker(Protocol):
    """What receives a run's figures. An exception of its methods ends the tracking, not the run."""

    def start(self, config: dict[str, Any]) -> None:
        """The run begins, or goes on after a stop: then figures of some steps come a second time, with the same values.

        Args:
            config: the validated keys of the experiment.
        """

    def log(self, step: int, figures: dict[str, float]) -> None:
        """An evaluation.

        Args:
            step: training steps since the run began, phases before included.
            figures: finite numbers by name, ``valid/AUC``, ``train/loss``, ``routing/item/share/0`` ...
        """

    def finish(self, summary: dict[str, float]) -> None:
        """The run ends.

        Args:
            summary: final scores, ``final/test/AUC`` ...; empty if it was stopped.
        """


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker's factory is told.

    Attributes:
        folder: the run folder, the same when a run is resumed.
        name: ``<expid> <run folder's name>``.
    """

    folder: str
    name: str


Factory = Callable[[TrackedRun], Tracker]
FACTORIES: dict[str, Factory] = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": MLflow}


def register_tracker(name: str, factory: Factory) -> None:
    """Let the config key ``trackers`` name a tracker of the user's own; for files given with ``--load``.

    Raises:
        ValueError: the name is taken by another one, or is ``csv``.
    """
    if name == CSV or FACTORIES.get(name, factory) is not factory:
        raise ValueError(f"{name} is a tracker already; give this one another name")
    FACTORIES[name] = factory


def tracker_faults(names: list[str]) -> list[str]:
    """What is wrong with the value of the key ``trackers``, a clause for each name; imports nothing."""
    known = [CSV, *FACTORIES]
    faults = []
    for number, name in enumerate(names):
        if name in names[:number]:
            faults.append(f"{name!r} is listed twice")
        elif name not in known and not DOTTED.fullmatch(name):
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"write {', '.join(known)}, or package.module:Class"
            faults.append(f"{name!r} is no tracker; {hint}")
    return faults


def make_tracker(name: str, run: TrackedRun) -> Tracker:
    """The tracker of a name in ``trackers``.

    ``package.module:Class`` imports a module of this Python's and calls one of its classes, if that has the methods of
    `Tracker`; importing runs the module's own code, so read this key in a config of somebody else's before running it.
    Nothing is evaluated, and no other function can be named: factories are registered (`register_tracker`).

    Raises:
        Exception: whatever keeps it from being made.
    """
    if name in FACTORIES:
        return FACTORIES[name](run)
    module, _, attribute = name.partition(":")
    found = getattr(importlib.import_module(module), attribute)
    if not inspect.isclass(found) or not all(callable(getattr(found, method, None)) for method in METHODS):
        raise TypeError(f"must be a class with the methods {', '.join(METHODS)}")
    tracker: Tracker = found(run)  # type: ignore[call-arg, assignment]
    return tracker


class Trackers:
    """The trackers of one run; a listener of the training loop. One that fails is given up with a warning.

    As a context manager it ends the tracking on the way out, whatever the reason.

    Args:
        names: the value of the config key ``trackers``.
        folder: the run folder.
        expid: experiment id.
        history: the model's, of which ``metrics.csv`` is written: a resumed run drops what comes after its saved state.
    """

    def __init__(self, names: list[str], folder: str, expid: str, history: list[dict[str, Any]]) -> None:
        self.names = names
        self.run = TrackedRun(folder, f"{expid} {os.path.basename(folder)}")
        self.history = history
        self.active: dict[str, Tracker] = {}
        self._csv_failed = False

    def start(self, config: dict[str, Any]) -> None:
        """Make the trackers and start them."""
        for name in self.names:
            if name != CSV and (tracker := self._attempt(name, make_tracker, name, self.run)) is not None:
                self.active[name] = tracker
                self._attempt(name, tracker.start, config)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *error: object) -> None:
        self.finish({})

    def __call__(self, record: dict[str, Any]) -> None:
        """Track an evaluation, whose record is the last of the history."""
        self._write_csv()
        step = total_steps(self.history)[-1]
        found = {name: value for name, value in figures(record).items() if math.isfinite(value)}
        for name, tracker in list(self.active.items()):
            self._attempt(name, tracker.log, step, found)

    def finish(self, summary: dict[str, Any]) -> None:
        """End the tracking; a second call does nothing.

        Args:
            summary: final scores, by split and metric; empty if the run was stopped.
        """
        if summary:
            self._write_csv()
        flat = {name: value for name, value in _flat("final", summary) if math.isfinite(value)}
        for name, tracker in list(self.active.items()):
            self._attempt(name, tracker.finish, flat)
        self.active.clear()

    def _attempt(self, name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except ModuleNotFoundError as error:
            if name == "tensorboard":  # in the list by default
                logger.info("no TensorBoard files: %s; for them: pip install tensorboard", error)
            else:
                logger.warning("tracker %s: %s; the run goes on without it", name, error)
        except (Exception, SystemExit) as error:  # whatever a tracker does, the training is worth more
            reason = " ".join(str(error).split())
            logger.warning("tracker %s: %s: %s; the run goes on without it", name, type(error).__name__, reason)
        self.active.pop(name, None)
        return None

    def _write_csv(self) -> None:
        if CSV not in self.names:
            return
        try:
            write_whole(os.path.join(self.run.folder, CSV_FILE), csv_text(self.history))
        except Exception as error:  # the next evaluation writes it whole again
            if not self._csv_failed:
                logger.warning("tracker csv: %s; the run goes on", error)
            self._csv_failed = True


def total_steps(history: list[dict[str, Any]]) -> list[int]:
    """Training steps at each evaluation since the run began; a phase counts up to its last evaluation."""
    before = 0
    steps: list[int] = []
    for number, record in enumerate(history):
        if number and record["phase"] != history[number - 1]["phase"]:
            before = steps[-1]
        steps.append(before + record["step"])
    return steps


def figures(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of an evaluation's record by name, ``<group>/<name>``."""
    found = {"train/epoch": float(record["epoch"])}
    for key, value in record.items():
        if key not in PLACE:
            name = key if isinstance(value, dict) else NAMES.get(key, f"train/{key}")
            found.update(_flat("train/gradient_norm" if key == "gradient_norm" else name, value))
    return found


def csv_text(history: list[dict[str, Any]]) -> str:
    """A history as csv, one row an evaluation; ``pandas.read_csv`` reads it as it is.

    Columns: phase, epoch, step (of the phase), total_step, best, warnings (their causes), then every figure that any
    evaluation has, empty where one has it not.
    """
    rows = []
    for record, total in zip(history, total_steps(history), strict=True):
        place = {name: record[name] for name in ("phase", "epoch", "step")}
        causes = "; ".join(record.get("warnings", {}))
        found = {name: value for name, value in figures(record).items() if name != "train/epoch"}
        rows.append({**place, "total_step": total, "best": record["best"], "warnings": causes, **found})
    columns = dict.fromkeys(name for row in rows for name in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flat(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """Every number inside nested dictionaries and lists, with its path."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(f"{name}/{key}", item)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _flat(f"{name}/{number}", item)
    elif not isinstance(value, str | bool | None):
        yield name, float(value)
