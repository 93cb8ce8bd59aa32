"""The positions of a batch of histories one after the other, without the padding between them."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from model_zoo.layers.sequence import Sequence


@dataclass(frozen=True)
class Positions:
    """N positions, row after row, each row's oldest first.

    Attributes:
        row: ``[N]`` int64, the batch row that a position belongs to.
        item: ``[N]`` int64, its row of the item table.
        counts: ``[B]`` int64, positions of each batch row.
    """

    row: Tensor
    item: Tensor
    counts: Tensor

    @staticmethod
    def of(sequence: Sequence, read: Tensor | None = None) -> Positions:
        """The real positions, or those that ``read`` (``[B, T]`` bool) marks."""
        read = sequence.mask if read is None else read
        return Positions(read.nonzero()[:, 0], sequence.index[read], read.sum(1))

    def pool(self, items: Tensor, weight: Tensor | None = None) -> Tensor:
        """``sum_l weight_l x_l`` of each batch row, ``[B, d]``; zeros for a row without a position.

        Args:
            items: ``[U, d]``.
            weight: ``[N]``; None = 1.
        """
        first = self.counts.cumsum(0) - self.counts
        weight = None if weight is None else weight.to(items.dtype)
        return F.embedding_bag(self.item, items, first, mode="sum", per_sample_weights=weight)


def projected(index: Tensor, items: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``items[index] @ weight^T + bias``, ``[*index.shape, a]``, computed per item or per position, whichever are fewer.

    Args:
        index: int64, any shape.
        items: ``[U, d]``.
        weight: ``[a, d]``.
        bias: ``[a]``.
    """
    if index.numel() < items.shape[0]:
        return F.linear(F.embedding(index, items), weight, bias)
    return F.embedding(index, F.linear(items, weight, bias))
