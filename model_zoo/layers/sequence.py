"""A batch of histories as item rows and an index into them.

Anything that depends on an item alone is computed once per distinct item and then gathered, so a batch keeps its distinct
items' vectors (``items``) and where each stands (``index``). A batch that carries a vector per position is the special
case of as many items as positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WindowAlign = Literal["right", "left"]
WindowDivisor = Literal["count", "size"]


@dataclass(frozen=True)
class Sequence:
    """Histories, oldest first, real tokens at the right end of each row.

    Attributes:
        items: ``[U, d]`` vectors of the distinct items, U >= 1.
        index: ``[B, T]`` int64, the row of ``items`` at each position; any valid row where ``mask`` is False.
        mask: ``[B, T]`` bool, True = real.
    """

    items: Tensor
    index: Tensor
    mask: Tensor

    @staticmethod
    def from_vectors(vectors: Tensor, mask: Tensor) -> Sequence:
        """A sequence of given vectors ``[B, T, d]`` and mask ``[B, T]``: one item per position."""
        batch, length, dim = vectors.shape
        if length == 0:
            return Sequence(vectors.new_zeros(1, dim), mask.new_zeros(batch, 0, dtype=torch.long), mask.bool())
        index = torch.arange(batch * length, device=vectors.device).view(batch, length)
        return Sequence(vectors.reshape(-1, dim), index, mask.bool())

    @property
    def vectors(self) -> Tensor:
        """``[B, T, d]`` vectors by position (padding positions hold some item's vector: use ``mask``)."""
        return F.embedding(self.index, self.items)

    @property
    def lengths(self) -> Tensor:
        """``[B]`` number of real tokens."""
        return self.mask.sum(1)

    @property
    def last_vectors(self) -> Tensor:
        """``[B, d]`` vectors of the newest position (meaningless for an empty row). Needs T >= 1."""
        return F.embedding(self.index[:, -1], self.items)

    def project(self, linear: nn.Module) -> Tensor:
        """``linear`` of every position, ``[B, T, a]``, computed once per distinct item."""
        return F.embedding(self.index, linear(self.items))

    def last(self, count: int) -> Sequence:
        """The newest ``count`` columns."""
        start = self.index.shape[1] - count
        if start <= 0:
            return self
        return Sequence(self.items, self.index[:, start:], self.mask[:, start:])

    def select(self, rows: Tensor) -> Sequence:
        """The given batch rows (int64 ``[R]``)."""
        return Sequence(self.items, self.index[rows], self.mask[rows])

    def compact(self, keep: Tensor) -> Sequence:
        """Only the kept real tokens of each row, order unchanged, moved to the right end; T becomes the longest row's.

        Args:
            keep: ``[B, T]`` bool.
        """
        keep = keep & self.mask
        counts = keep.sum(1)
        length = int(counts.max()) if counts.numel() else 0
        first = (length - counts - 1).unsqueeze(1)  # the column before the oldest kept token's
        slot = torch.where(keep, first + keep.cumsum(1), length)  # dropped tokens share a spare column
        index = self.index.new_zeros(self.index.shape[0], length + 1).scatter_(1, slot, self.index)[:, :length]
        columns = torch.arange(length, device=index.device)
        return Sequence(self.items, index, columns >= (length - counts).unsqueeze(1))

    def right_aligned(self) -> Sequence:
        """This sequence, or its compaction if padding stands anywhere but before the first real token of a row."""
        gaps = self.mask[:, :-1] & ~self.mask[:, 1:]
        return self.compact(self.mask) if bool(gaps.any()) else self

    def windows(
        self, size: int, stride: int, align: WindowAlign = "right", divide_by: WindowDivisor = "count"
    ) -> Sequence:
        """Sliding-window means of the item vectors, in time order, as a sequence of windows.

        ``align="right"`` counts windows from the newest item: window j covers the items that are [j*stride, j*stride+size)
        from the end, and exists if j = 0 and the row is not empty or if it adds at least one item to window j-1. So no
        recent item is lost and a row's windows do not depend on the batch's padded length. ``align="left"`` is the literal
        reading of the MoS paper's window definition (full windows only, from the oldest item).

        Args:
            size: items per window.
            stride: items between the starts of neighbouring windows.
            divide_by: ``"count"`` divides by the number of items in the window, ``"size"`` always by ``size``.
        """
        batch, length = self.index.shape
        device = self.index.device
        offset = torch.arange(size, device=device)
        lengths = self.lengths.unsqueeze(1)  # [B, 1]
        if align == "right":
            reach = max(size, stride)  # items from the end that a window's predecessor covers or skips
            count = 1 + max(-((reach - length) // stride), 0) if length else 0
            from_end = torch.arange(count - 1, -1, -1, device=device) * stride  # [W], oldest window first
            column = (length - 1 - from_end.unsqueeze(1) - (size - 1 - offset)).expand(batch, -1, -1)
            exists = torch.where(from_end == 0, lengths > 0, lengths > from_end - stride + reach)  # [B, W]
        else:
            count = max((length - size) // stride + 1, 0)
            from_start = torch.arange(count, device=device) * stride
            column = (length - lengths).unsqueeze(2) + from_start.unsqueeze(1) + offset
            exists = from_start + size <= lengths
        inside = (column >= 0) & (column < length)
        column = column.clamp(0, max(length - 1, 0)).reshape(batch, count * size)
        index = self.index.gather(1, column).view(batch, count, size)
        real = self.mask.gather(1, column).view(batch, count, size) & inside
        bags, weight = index[exists], real[exists].to(self.items.dtype)
        if bags.shape[0] == 0:
            means = self.items.new_zeros(1, self.items.shape[1])
        else:
            divisor = weight.sum(1, keepdim=True) if divide_by == "count" else size
            means = F.embedding_bag(bags, self.items, mode="sum", per_sample_weights=weight / divisor)
        window = (exists.reshape(-1).cumsum(0) - 1).clamp(min=0).view(batch, count)
        windows = Sequence(means, window, exists)
        return windows if align == "right" else windows.compact(exists)


def distinct_items(index: Tensor, num_items: int) -> tuple[Tensor, Tensor]:
    """The distinct values of ``index`` in rising order, and each value's place among them.

    A bitmap over the vocabulary: linear in ``num_items`` and several times faster than a sort.

    Args:
        index: integer tensor of any shape, values in [0, num_items).

    Returns:
        ``(rows [U] int64, place)`` with ``rows[place] == index`` and ``place`` int64 of ``index``'s shape.
    """
    seen = torch.zeros(num_items, dtype=torch.bool, device=index.device)
    flat = index.reshape(-1).long()
    seen[flat] = True
    place = seen.cumsum(0) - 1
    return seen.nonzero().squeeze(1), place[flat].view(index.shape)
