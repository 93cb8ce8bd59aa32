"""Batches on their way to an accelerator, each copied while the one before it is in use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model_zoo.batch import Batch


def pinned(shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
    """An uninitialised array in pinned memory, which torch reuses once the copies from it are through."""
    return torch.empty(shape, dtype=torch.from_numpy(np.empty(0, dtype)).dtype, pin_memory=True).numpy()


def transferred(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches on ``device`` (groups and row numbers stay), each copied while the one before it is in use.

    On CUDA the copies run on a stream of their own.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    ready: tuple[Batch, Any] | None = None
    for batch in batches:
        following = _sent(batch, device, stream)
        if ready is not None:
            yield _received(*ready)
        ready = following
    if ready is not None:
        yield _received(*ready)


def _sent(batch: Batch, device: torch.device, stream: Any) -> tuple[Batch, Any]:
    """The batch on its way, and the event of its arrival."""
    if stream is None:
        return batch.to(device), None
    with torch.cuda.stream(stream):
        moved = _mapped(batch, lambda tensor: tensor.pin_memory()).to(device)
        return moved, stream.record_event()


def _received(batch: Batch, event: Any) -> Batch:
    """The batch for the current stream, whose later work waits until it is there."""
    if event is None:
        return batch
    current = torch.cuda.current_stream(batch.target.device)
    current.wait_event(event)

    def keep(tensor: Tensor) -> Tensor:
        if tensor.is_cuda:
            tensor.record_stream(current)  # its memory was allocated on the other stream
        return tensor

    return _mapped(batch, keep)


def _mapped(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    changed: dict[str, Any] = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
    return replace(batch, context={name: change(column) for name, column in batch.context.items()}, **changed)
