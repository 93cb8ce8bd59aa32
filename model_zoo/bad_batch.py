"""The batch that stopped a training, and what its step began with: kept on disk, and read again."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from model_zoo.batch import AnyBatch, Batch
from model_zoo.errors import DataError
from model_zoo.files import write_whole_with
from model_zoo.layers.theme_codebook import ThemeCodebook

if TYPE_CHECKING:
    from model_zoo.training import TrainingLoop

#: modules whose training forward moves their buffers
MOVING = (nn.modules.batchnorm._BatchNorm, ThemeCodebook)
#: what a LongCTR batch holds before its mask
LONGCTR_PARTS = ("columns", "items")


@dataclass(frozen=True)
class StepStart:
    """What a training forward changes, as it was before: running statistics, codebooks, random streams."""

    moving: Sequence[tuple[nn.Module, str, Tensor]]
    random: dict[str, Tensor]

    @classmethod
    def of(cls, model: TrainingLoop) -> StepStart:
        """As it is now."""
        modules = (module for module in model.modules() if module.training and isinstance(module, MOVING))
        moving = [(m, name, buffer.clone()) for m in modules for name, buffer in m.named_buffers(recurse=False)]
        random = {"cpu": torch.get_rng_state()}
        if model.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(model.device)
        return cls(moving, random)

    def restore(self, model: TrainingLoop) -> None:
        """Put it back."""
        for module, name, before in self.moving:
            getattr(module, name).copy_(before)
        set_random(model, self.random)


def set_random(model: TrainingLoop, random: dict[str, Tensor]) -> None:
    """Set the random streams that ``random`` holds and the model's device has."""
    torch.set_rng_state(random["cpu"])
    if "cuda" in random and model.device.type == "cuda":
        torch.cuda.set_rng_state(random["cuda"], model.device)


def write_batch(path: str, batch: AnyBatch, start: StepStart, place: dict[str, Any]) -> None:
    """Write a batch and the random streams of its step to a ``.npz`` file, whole or not at all.

    Args:
        batch: a `Batch` is written with its row numbers in the training file as ``rows``; its context columns, and the
            columns of a LongCTR batch, under ``<part>.<column>``.
        place: numbers and text that say where in the training it was.

    Raises:
        FileError: the disk is full, or the folder cannot be written.
    """
    arrays = {name: np.asarray(value) for name, value in place.items()}
    arrays |= {f"random.{name}": state.numpy() for name, state in start.random.items()}
    for name, value in parts(batch).items():
        arrays[name] = value.detach().cpu().numpy()
    write_whole_with(path, lambda file: np.savez_compressed(file, **arrays))  # type: ignore[arg-type]


def read_batch(path: str) -> tuple[AnyBatch, dict[str, Tensor]]:
    """What `write_batch` wrote: the batch, and the random streams of its step.

    Raises:
        DataError: the file is missing, damaged, or another one.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: torch.from_numpy(file[name]) for name in file.files if file[name].dtype.kind != "U"}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        reason = type(error).__name__
        raise DataError(f"{path}: cannot be read as a saved batch ({reason}); run the training again") from None
    random = _under("random", arrays)
    if "cpu" not in random or not ({"history", "target", "label", "rows"} <= arrays.keys() or "mask" in arrays):
        raise DataError(f"{path}: holds no saved batch; give the bad_batch.npz that a stopped training wrote")
    if "target" in arrays:
        plain = {field.name: arrays.get(field.name) for field in fields(Batch) if field.name != "context"}
        return Batch(**plain, context=_under("context", arrays)), random  # type: ignore[arg-type]
    columns, items = (_under(part, arrays) for part in LONGCTR_PARTS)
    return (columns, items, arrays["mask"]), random


def paths(folder: str) -> tuple[str, str]:
    """Where a stopped training's batch and the weights of that step lie in a run folder."""
    return os.path.join(folder, "bad_batch.npz"), os.path.join(folder, "bad_batch.model")


def parts(batch: AnyBatch) -> dict[str, Tensor]:
    """A batch's tensors by the names that `write_batch` gives them."""
    if isinstance(batch, Batch):
        own = {field.name: getattr(batch, field.name) for field in fields(batch)}
        context = own.pop("context")
        return {**{k: v for k, v in own.items() if v is not None}, **{f"context.{k}": v for k, v in context.items()}}
    parts = {f"{part}.{k}": v for part, columns in zip(LONGCTR_PARTS, batch[:2], strict=True) for k, v in columns.items()}
    return {**parts, "mask": batch[2]}


def _under(part: str, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}."): value for name, value in arrays.items() if name.startswith(f"{part}.")}
