"""Calling a sequence block, whether or not it has auxiliary losses or reads a history once for several rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from model_zoo.layers.sequence import Sequence, SharedSequence

#: rows that a history must serve in the mean, for an attention block to gain from reading it once for all of them
ROWS_TO_SHARE = 32


def call_block(
    block: nn.Module, query: Tensor, sequence: Sequence | SharedSequence, losses: list[Any] | None = None
) -> Tensor:
    """``block(query, sequence)``; a block with a true ``has_losses`` appends its auxiliary losses to ``losses``.

    Shared histories reach only blocks with a true ``shares``, in evaluation without gradients; all others, and all that
    train, get one history per row.
    """
    if isinstance(sequence, SharedSequence):
        predicting = not block.training and not torch.is_grad_enabled()
        if not (predicting and getattr(block, "shares", False)):
            sequence = sequence.expanded()
    if losses is not None and getattr(block, "has_losses", False):
        return block(query, sequence, losses)
    return block(query, sequence)


def serving(block: nn.Module) -> nn.Module:
    """The block that answers now: a mixture's global expert as long as no other expert has a weight, else ``block``."""
    return getattr(block, "sole_block", None) or block
