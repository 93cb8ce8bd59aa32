"""State dicts on disk: written whole or not at all, read with a sentence for what keeps them from loading."""

from __future__ import annotations

import os
import pickle

import torch
from torch import Tensor

from model_zoo.errors import ConfigError


def write_state(state: dict[str, Tensor], path: str) -> None:
    """Write a state dict whole or not at all."""
    partial = f"{path}.partial"
    try:
        torch.save(state, partial)
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def read_state(path: str) -> dict[str, Tensor]:
    """A state dict, on the CPU.

    Raises:
        ConfigError: the file is missing or cannot be read.
    """
    if not os.path.exists(path):
        raise ConfigError(f"{path}: no such checkpoint")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError):
        raise ConfigError(f"{path}: cannot be read as a checkpoint; give another file, or train again") from None


def misfits(own: dict[str, Tensor], given: dict[str, Tensor]) -> list[str]:
    """What keeps a state dict from loading, a clause for each parameter; nothing is loaded before this is empty."""
    faults = [f"{name} is missing" for name in own if name not in given]
    faults += [f"{name} is not in this model" for name in given if name not in own]
    for name, value in own.items():
        if name in given and given[name].shape != value.shape:
            faults.append(f"{name} is {tuple(given[name].shape)}, not {tuple(value.shape)}")
    return faults
