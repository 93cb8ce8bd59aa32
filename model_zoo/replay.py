"""A step run again, and searched for the first number that is not finite."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from model_zoo.bad_batch import StepStart, parts, read_batch, set_random
from model_zoo.batch import AnyBatch, Batch
from model_zoo.regularization import add_gradient

if TYPE_CHECKING:
    from model_zoo.training import TrainingLoop

Where = Literal["input", "weight", "output", "loss", "gradient"]


@dataclass(frozen=True)
class Finding:
    """The first number of a step that is not finite.

    Attributes:
        where: in the batch itself, a weight before the step, a module's output, the loss, or a gradient.
        name: the input column, the parameter, or the module.
    """

    where: Where
    name: str

    def __str__(self) -> str:
        return {
            "input": f"the batch's column {self.name} holds it already",
            "weight": f"the weight {self.name} was not finite before this step",
            "output": f"it first shows in the output of {self.name}",
            "loss": f"it first shows in {self.name}",
            "gradient": f"it first shows in the gradient of {self.name}",
        }[self.where]


def replay(path: str, model: TrainingLoop) -> dict[str, Any]:
    """Run the saved batch forward and backward in training mode, on the random streams of its step.

    The model is left as it was. Load the weights of that step first: ``model.load_weights(".../bad_batch.model")``.

    Args:
        path: the ``bad_batch.npz`` that a stopped training wrote.
        model: of the same config.

    Returns:
        ``first``, a `Finding` or None if every number is finite; the ``loss``, the ``gradient_norm``, and ``gradients``,
        the names of parameters whose gradient has a norm that is not finite.

    Raises:
        DataError: the file is missing, damaged, or another one.
    """
    batch, random = read_batch(path)
    before, training = StepStart.of(model), model.training
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        model.train()
        moving = StepStart.of(model)
        set_random(model, random)
        try:
            return examine(model, batch)
        finally:
            moving.restore(model)
    finally:
        model.train(training)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        before.restore(model)


def examine(model: TrainingLoop, batch: AnyBatch) -> dict[str, Any]:
    """`replay` of a batch in hand, on the model's present mode and random streams; changes gradients and buffers."""
    for parameter in model.parameters():
        parameter.grad = None
    found: list[Finding] = [Finding("input", name) for name, values in _inputs(model, batch) if _bad(values)]
    found += [Finding("weight", name) for name, values in model.named_parameters() if _bad(values.detach())]
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if name:
                hook = module.register_forward_hook(partial(_watch, name, found))
                hooks.callback(hook.remove)
        answer = model.forward(batch)
    if _bad(answer["y_pred"].detach()):
        found.append(Finding("output", "the prediction"))
    shield(answer)
    loss = model.data_loss(answer, model.get_labels(batch))
    if not math.isfinite(loss.detach()):
        found.append(Finding("loss", "the loss"))
    if loss.requires_grad:
        loss.backward()
    whole = loss.detach() + add_gradient(model._regularizer_terms(), 1.0)
    if not found and not math.isfinite(whole):
        found.append(Finding("loss", "the regularisation term"))
    norms = {name: float(gradient_norm([p])) for name, p in model.named_parameters() if p.grad is not None}
    spoiled = [name for name, norm in norms.items() if not math.isfinite(norm)]
    found += [Finding("gradient", name) for name in spoiled]
    return {
        "first": found[0] if found else None,
        "loss": float(whole),
        "gradient_norm": float(gradient_norm(model.parameters())),
        "gradients": spoiled,
    }


def shield(answer: dict[str, Any]) -> Tensor:
    """Put 1/2 in the place of predictions that are not finite: torch's cross entropy ends the process's CUDA at a NaN.

    Returns:
        bool ``[]``: all were finite.
    """
    finite = torch.isfinite(answer["y_pred"].detach())
    answer["y_pred"] = torch.where(finite, answer["y_pred"], 0.5)
    return finite.all()


@torch.no_grad()
def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The joint 2-norm of the parameters' gradients, ``[]``; 0 if there are none."""
    gradients = []
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
            gradients.append(parameter.grad.values())
        elif parameter.grad is not None:
            gradients.append(parameter.grad)
    if not gradients:
        return torch.zeros(())
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))


def _inputs(model: TrainingLoop, batch: AnyBatch) -> Iterator[tuple[str, Tensor]]:
    """Every input column of a batch, those of its items included."""
    yield from parts(batch).items()
    table = getattr(model, "item_features", None)
    if isinstance(batch, Batch) and table is not None:
        rows = torch.cat([batch.history.flatten(), batch.target]).to(model.device).long().unique()
        yield from table.rows(rows).items()


def _watch(name: str, found: list[Finding], module: nn.Module, inputs: Any, output: Any) -> None:
    """Forward hook: note an output that holds a NaN or +inf (-inf is what masked scores are), or gets a bad gradient."""
    for values in _tensors(output):
        if bool((values.detach().isnan() | values.detach().isposinf()).any()):
            found.append(Finding("output", name))
        if values.requires_grad:
            values.register_hook(partial(_watch_gradient, name, found))


def _watch_gradient(name: str, found: list[Finding], gradient: Tensor) -> None:
    if _bad(gradient):
        found.append(Finding("gradient", f"the output of {name}"))


def _tensors(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors inside a module's output."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))


def _bad(values: Tensor) -> bool:
    values = values.coalesce().values() if values.is_sparse else values
    return values.is_floating_point() and not bool(torch.isfinite(values).all())
