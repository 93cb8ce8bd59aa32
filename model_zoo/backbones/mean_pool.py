"""The mean of the history: the block of models whose whole work is done by their head."""

from __future__ import annotations

from torch import Tensor, nn

from model_zoo.layers.positions import Positions
from model_zoo.layers.sequence import Sequence


class MeanPoolBlock(nn.Module):
    """Mean of the history's item vectors; the target is not read.

    Args:
        item_dim: d, width of an item vector.
        longctr_compat: FuxiCTR's ``MaskedAveragePooling`` as LongCTR calls it: padding's vectors are in the sum, not in
            the count, and an empty history's sum is divided by 1e-12.
    """

    def __init__(self, item_dim: int, *, longctr_compat: bool = False) -> None:
        super().__init__()
        self.longctr_compat = longctr_compat
        self.out_dim = item_dim

    def forward(self, query: Tensor, sequence: Sequence) -> Tensor:
        """``[B, d]``; zeros for an empty history. ``query`` is not read."""
        counts = sequence.lengths.unsqueeze(1).to(sequence.items.dtype)
        if self.longctr_compat:
            everything = sequence.mask | True
            return Positions.of(sequence, everything).pool(sequence.items) / (counts + 1e-12)
        return Positions.of(sequence).pool(sequence.items) / counts.clamp(min=1)
