"""Numbers guarded: a step whose prediction, loss or gradient is not finite stops the training before it moves a weight."""

from __future__ import annotations

import logging
import math
import os
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from model_zoo.bad_batch import StepStart, paths, write_batch
from model_zoo.batch import AnyBatch
from model_zoo.errors import FileError, UserError
from model_zoo.replay import Finding, examine, gradient_norm, replay, shield

if TYPE_CHECKING:
    from model_zoo.training import TrainingLoop

logger = logging.getLogger("model_zoo")

__all__ = ["NotFiniteError", "StepStart", "check_step", "replay", "shield"]

#: parameters that a message names
NAMED = 3


class NotFiniteError(UserError):
    """A training step came to a NaN or infinite number; the weights are those before it."""


def check_step(
    model: TrainingLoop, batch: AnyBatch, start: StepStart, predicted: Tensor, loss: Tensor
) -> tuple[Tensor, float]:
    """Stop the training unless a step's predictions, loss and gradients are finite; one wait for the device in all.

    To be called between a batch's backward and the optimizer. Gradients of earlier batches of an accumulation group
    were checked with these; so what is not finite is this batch's.

    Args:
        model: the gradients are its parameters'.
        batch: of this step.
        start: taken before its forward.
        predicted: what `shield` returned.
        loss: ``[]``, the regulariser included.

    Returns:
        The loss, on the CPU, and the norm of the gradients.

    Raises:
        NotFiniteError: with the place in the training, what is not finite, the files for a replay, and what to try.
    """
    norm = gradient_norm(model.parameters())
    figures = torch.stack([loss.double(), norm.to(loss.device).double(), predicted.double()]).cpu()
    total, size, finite = figures.tolist()
    if not (finite and math.isfinite(total) and math.isfinite(size)):
        _stop(model, batch, start, bool(finite), total, size)
    return figures[0].to(loss.dtype), size


def _stop(model: TrainingLoop, batch: AnyBatch, start: StepStart, finite: bool, loss: float, norm: float) -> NoReturn:
    """Undo the step's forward, keep the batch, find the culprit, say so."""
    start.restore(model)
    names = [name for name, p in model.named_parameters() if p.grad is not None and not math.isfinite(gradient_norm([p]))]
    model.optimizer.zero_grad()
    if not finite:
        what = "a prediction is not a finite number"
    elif not math.isfinite(loss):
        what = f"the loss is {loss}"
    else:
        shown = f"{', '.join(names[:NAMED])}{f' and {len(names) - NAMED} more' if len(names) > NAMED else ''}"
        what = f"the gradient's norm is {norm} ({shown or 'each parameter alone is finite'})"
    kept = _keep(model, batch, start)
    found: Finding | None = examine(model, batch)["first"]
    start.restore(model)
    model.optimizer.zero_grad()
    raise NotFiniteError(
        "{phase} epoch {epoch}, batch {batch}: ".format(**_place(model)) + f"{what}; "
        f"{found or 'run again, the batch gives finite numbers'}; no weight was changed, {_intact(model)}; {kept}; "
        f"{_advice(model, found)}"
    )


def _keep(model: TrainingLoop, batch: AnyBatch, start: StepStart) -> str:
    """Write the batch and the weights that it met; a clause that says where."""
    rows, weights = paths(os.path.dirname(model.checkpoint))
    place = {
        **_place(model), "epochs_trained": model.epochs_trained,
        "seed": -1 if getattr(model, "seed", None) is None else model.seed,
    }  # fmt: skip
    try:
        os.makedirs(os.path.dirname(rows), exist_ok=True)
        write_batch(rows, batch, start, place)
        model.save_weights(weights)
    except (FileError, OSError) as error:
        return f"the batch could not be kept ({error})"
    return f"the batch is in {rows} and the weights that it met are beside it, for model_zoo.guards.replay"


def _place(model: TrainingLoop) -> dict[str, Any]:
    """Where the training is; counted from 1. A single `train_step` outside of a training is its first."""
    counts = {"epoch": "_epoch_index", "batch": "_batch_index", "step": "_total_steps"}
    return {"phase": model.phase_name, **{name: getattr(model, count, 0) + 1 for name, count in counts.items()}}


def _intact(model: TrainingLoop) -> str:
    """A clause that names the checkpoint to go back to."""
    best = [record["phase"] for record in model.history if record.get("best")]
    if not best:
        return "and there is no checkpoint yet"
    at = model.checkpoint
    if best[-1] != model.phase_name and hasattr(model, "phase_checkpoint"):
        at = model.phase_checkpoint(best[-1])
    return f"the checkpoint {at} ({best[-1]}'s best) is intact"


def _advice(model: TrainingLoop, found: Finding | None) -> str:
    if found is not None and found.where == "input":
        return "mend these rows of the data"
    rate = model.optimizer.param_groups[0]["lr"]
    return f"try a lower learning_rate (now {rate:g}) or max_gradient_norm (now {model._max_gradient_norm:g})"
