"""A training's whole state between two steps: taken, written, put back, so that it ends as if it had never stopped."""

from __future__ import annotations

import json
import logging
import random
import time
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from model_zoo.checkpoint import listed, misfits, read_checkpoint, write_checkpoint
from model_zoo.errors import ConfigError, FileError

if TYPE_CHECKING:
    from model_zoo.training import TrainingLoop

logger = logging.getLogger("model_zoo")

FORMAT = "longctr-mos training state"
VERSION = 1
#: where in a training: at a phase's beginning, between two of its steps, behind the last one
Stage = Literal["start", "training", "done"]
#: attributes of a `TrainingLoop` that say how far it is
PROGRESS = (
    "_epoch_index", "_batches_done", "_total_steps", "_evaluation_due", "_loss_sum", "_loss_count", "_rows_trained",
    "_best_metric", "_stopping_steps", "_stop_training", "_eval_steps", "epochs_trained", "_norm_sum", "_norm_max",
    "_norm_count", "_gradient_norm",
)  # fmt: skip


def capture(model: TrainingLoop, stage: Stage) -> dict[str, Any]:
    """Everything that the rest of a training depends on, as plain tensors, numbers and text.

    Args:
        stage: ``start`` of a phase or ``done``: the optimizer and the place in the phase do not count.
    """
    state: dict[str, Any] = {
        "stage": stage,
        "phase": model.phase_name,
        "model": model.state_dict(),
        "history": json.dumps(model.history, default=float),  # python's json gives every float back exactly
        "epochs_trained": model.epochs_trained,
        "random": _random_state(),
    }
    if stage == "training":
        named = dict(model.named_parameters())
        state["optimizer"] = model.optimizer.state_dict()
        state["gradients"] = {name: _parts(p.grad) for name, p in named.items() if p.grad is not None}
        state["progress"] = {name.strip("_"): _plain(getattr(model, name)) for name in PROGRESS}
        state["epoch_seconds"] = time.perf_counter() - model._epoch_start
    return state


def restore(model: TrainingLoop, state: dict[str, Any]) -> None:
    """Put ``state`` back; the optimizer must be the phase's own, over the same parameters.

    Raises:
        ConfigError: the state is another model's; nothing was changed then.
    """
    faults = misfits(model.state_dict(), state["model"])
    if faults:
        raise ConfigError(f"the saved training is of another model: {listed(faults)}; start without --resume")
    model.load_state_dict(state["model"])
    model.history[:] = json.loads(state["history"])
    model.epochs_trained = state["epochs_trained"]
    if state["stage"] == "training":
        model.optimizer.load_state_dict(state["optimizer"])
        for name, parameter in model.named_parameters():
            gradient = state["gradients"].get(name)
            parameter.grad = None if gradient is None else _joined(gradient, parameter)
        for name in PROGRESS:
            setattr(model, name, state["progress"][name.strip("_")])
        model._epoch_start = time.perf_counter() - state["epoch_seconds"]
    _set_random_state(state["random"])


class StateSaver:
    """Writes a training's state to one file, now and then.

    Args:
        path: the file.
        identity: what the run is (config, data, versions), written beside the state.
        minutes: of training between two writes; None: by steps only.
        steps: between two writes; None: by time only.
    """

    def __init__(self, path: str, identity: dict[str, Any], minutes: float | None = 10.0, steps: int | None = None) -> None:
        self.path = path
        self.identity = identity
        self.minutes = minutes
        self.steps = steps
        self.started = self._last = time.monotonic()
        self.seconds_before = 0.0
        self.resumes: list[dict[str, Any]] = []

    def go_on_from(self, state: dict[str, Any]) -> None:
        """Count on from an earlier process's seconds and resumes."""
        self.seconds_before = state["seconds"]
        progress = state.get("progress", {"epoch_index": 0, "total_steps": 0})
        place = {"epoch": progress["epoch_index"] + 1, "step": progress["total_steps"]}
        self.resumes = [*json.loads(state["resumes"]), {"phase": state["phase"], "stage": state["stage"], **place}]

    @property
    def seconds(self) -> float:
        """Seconds since the training began, those of its earlier processes included."""
        return self.seconds_before + time.monotonic() - self.started

    def after_step(self, model: TrainingLoop) -> None:
        """Write if it is time to; a full disk is a warning, as training can go on and the state before is intact."""
        timed = self.minutes is not None and time.monotonic() - self._last >= 60 * self.minutes
        if not timed and not (self.steps and model._total_steps % self.steps == 0):
            return
        try:
            self.write(model)
        except FileError as error:
            self._last = time.monotonic()
            logger.warning("%s; training goes on, --resume would start from the state before", error)

    def write(self, model: TrainingLoop, stage: Stage = "training") -> None:
        """Write the state, whole or not at all.

        Raises:
            FileError: the disk is full, or the folder cannot be written.
        """
        content = {
            "format": FORMAT, "version": VERSION, "identity": json.dumps(self.identity), "seconds": self.seconds,
            "resumes": json.dumps(self.resumes), **capture(model, stage),
        }  # fmt: skip
        write_checkpoint(self.path, content)
        self._last = time.monotonic()


def read_state_file(path: str) -> dict[str, Any]:
    """What `StateSaver` wrote; ``identity`` as the dictionary it was.

    Raises:
        ConfigError: the file cannot be read, or is of another kind or version.
    """
    state = read_checkpoint(path)
    if state.get("format") != FORMAT:
        raise ConfigError(f"{path}: holds no training state; start without --resume")
    if state.get("version") != VERSION:
        raise ConfigError(
            f"{path}: is of version {state.get('version')}, this package reads {VERSION}; resume with the package that "
            "wrote it, or start without --resume"
        )
    return {**state, "identity": json.loads(state["identity"])}


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic | Tensor) else value


def _parts(gradient: Tensor) -> list[Tensor]:
    """A gradient as dense tensors: itself, or a sparse one's indices and values."""
    return [gradient._indices(), gradient._values()] if gradient.is_sparse else [gradient]


def _joined(parts: list[Tensor], parameter: Tensor) -> Tensor:
    parts = [part.to(parameter.device) for part in parts]
    return parts[0] if len(parts) == 1 else torch.sparse_coo_tensor(
        parts[0], parts[1], parameter.shape, check_invariants=True
    )


def _random_state() -> dict[str, Any]:
    kind, key, place, has_gauss, cached = np.random.get_state()  # noqa: NPY002 the stream that FuxiCTR's seeding sets
    version, numbers, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": [str(kind), torch.from_numpy(np.asarray(key, dtype=np.int64)), int(place), int(has_gauss), float(cached)],
        "python": [version, torch.tensor(numbers), gauss],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, key, place, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, key.numpy().astype(np.uint32), place, has_gauss, cached))  # noqa: NPY002
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss))
