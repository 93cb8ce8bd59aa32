"""``torch.compile`` of a head's dense layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model_zoo.compat import CrossNetMix, CrossNetV2, MLP_Block
from model_zoo.errors import ConfigError


def compile_dense(head: nn.Module, device: torch.device) -> None:
    """Compile the MLPs and cross networks inside ``head`` in place: names in the state dict do not change.

    Blocks are left alone: their shapes differ from batch to batch, and routing branches on data.

    Raises:
        ConfigError: ``torch.compile`` does not work for this device here.
    """
    try:
        torch.compile(_trial)(torch.zeros(2, device=device))
    except Exception as error:  # the compiler, and whatever it needs, fails in many ways
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(f"compile: torch.compile does not work on {device} here ({reason}); set compile: False") from None
    for module in head.modules():
        if isinstance(module, MLP_Block | CrossNetV2 | CrossNetMix):
            module.compile()


def _trial(values: Tensor) -> Tensor:
    return values.sin() + 1
