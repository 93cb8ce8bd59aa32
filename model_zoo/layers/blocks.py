"""Calling a sequence block, whether or not it has auxiliary losses."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from model_zoo.layers.sequence import Sequence


def call_block(block: nn.Module, query: Tensor, sequence: Sequence, losses: list[Any] | None = None) -> Tensor:
    """``block(query, sequence)``; a block with a true ``has_losses`` appends its auxiliary losses to ``losses``."""
    if losses is not None and getattr(block, "has_losses", False):
        return block(query, sequence, losses)
    return block(query, sequence)
