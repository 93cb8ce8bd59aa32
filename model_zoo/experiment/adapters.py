"""TensorBoard, wandb and MLflow as trackers; each is imported when a run wants it."""

from __future__ import annotations

import json
import os
import re
import sys
import types
import uuid
from typing import TYPE_CHECKING, Any

from model_zoo.files import write_whole

if TYPE_CHECKING:
    from model_zoo.experiment.trackers import TrackedRun

#: where a run keeps the ids that wandb and MLflow know it by, so that it goes on under them when it is resumed
IDS_FILE = "tracker_ids.json"
PROJECT = "longctr-mos"
#: MLflow takes so many parameters a request, of so many characters each
MLFLOW_PARAMS, MLFLOW_CHARACTERS = 100, 500


class TensorBoard:
    """Event files in ``<run folder>/tensorboard``: ``tensorboard --logdir checkpoints`` shows all runs.

    A resumed run's writer hides what an earlier process wrote of the steps that are made again.
    """

    def __init__(self, run: TrackedRun) -> None:
        if "tensorflow" not in sys.modules:
            # TensorBoard asks for this module to know that it must do without TensorFlow, whose import takes seconds
            sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("tensorboard.compat.notf"))
        from torch.utils.tensorboard import SummaryWriter

        self._open = SummaryWriter
        self._folder = os.path.join(run.folder, "tensorboard")
        self._writer: Any = None

    def start(self, config: dict[str, Any]) -> None:
        """Nothing: a writer is opened at the first step, which says what it replaces."""

    def log(self, step: int, figures: dict[str, float]) -> None:
        """One point a figure, on disk at once."""
        if self._writer is None:
            self._writer = self._open(self._folder, purge_step=step)
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def finish(self, summary: dict[str, float]) -> None:
        """Close the files."""
        if self._writer is not None:
            self._writer.close()


class Wandb:
    """A wandb run, named after the run folder; project ``longctr-mos`` unless ``WANDB_PROJECT`` names another.

    What wandb has of a step it keeps, so a resumed run does not log twice.
    """

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        self._wandb = wandb
        self._tracked = run
        self._run: Any = None

    def start(self, config: dict[str, Any]) -> None:
        """Begin the run, or go on with it."""
        identity = known_id(self._tracked.folder, "wandb") or uuid.uuid4().hex[:16]
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=self._tracked.name, id=identity, resume="allow",
            dir=self._tracked.folder, config=config,
        )  # fmt: skip
        keep_id(self._tracked.folder, "wandb", identity)

    def log(self, step: int, figures: dict[str, float]) -> None:
        """One wandb step."""
        self._run.log(figures, step=step)

    def finish(self, summary: dict[str, float]) -> None:
        """Set the summary and upload what is left."""
        self._run.summary.update(summary)
        self._run.finish(exit_code=0 if summary else 1)


class MLflow:
    """An MLflow run; server and experiment are those of ``MLFLOW_TRACKING_URI`` and ``MLFLOW_EXPERIMENT_NAME``.

    MLflow keeps every point, so steps made again after a resume are there twice, with the same values.
    """

    def __init__(self, run: TrackedRun) -> None:
        import mlflow

        self._mlflow = mlflow
        self._tracked = run

    def start(self, config: dict[str, Any]) -> None:
        """Begin the run with the config as its parameters, or go on with it."""
        identity = known_id(self._tracked.folder, "mlflow")
        if identity is not None:
            self._mlflow.start_run(run_id=identity)
            return
        started = self._mlflow.start_run(run_name=self._tracked.name)
        keep_id(self._tracked.folder, "mlflow", started.info.run_id)
        values = [(name, str(value)[:MLFLOW_CHARACTERS]) for name, value in config.items()]
        for first in range(0, len(values), MLFLOW_PARAMS):
            self._mlflow.log_params(dict(values[first : first + MLFLOW_PARAMS]))

    def log(self, step: int, figures: dict[str, float]) -> None:
        """One point a figure."""
        self._mlflow.log_metrics(_allowed(figures), step=step)

    def finish(self, summary: dict[str, float]) -> None:
        """Log the final scores and end the run."""
        if summary:
            self._mlflow.log_metrics(_allowed(summary))
        self._mlflow.end_run("FINISHED" if summary else "KILLED")


def known_id(folder: str, tracker: str) -> str | None:
    """The id that a tracker knows the run by; None for a new one.

    Raises:
        ValueError: the file is damaged.
    """
    path = os.path.join(folder, IDS_FILE)
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as file:
        return json.load(file).get(tracker)


def keep_id(folder: str, tracker: str, identity: str) -> None:
    """Remember it for a resume."""
    path = os.path.join(folder, IDS_FILE)
    kept = {}
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            kept = json.load(file)
    write_whole(path, json.dumps({**kept, tracker: identity}) + "\n")


def _allowed(figures: dict[str, float]) -> dict[str, float]:
    """Under names that MLflow takes: ``NDCG(k=5)`` becomes ``NDCG_k_5_``."""
    return {re.sub(r"[^\w\-./ ]", "_", name): value for name, value in figures.items()}
