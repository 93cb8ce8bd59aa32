"""Sliding windows over a batch of histories: the tokens of MoS's window experts."""

from __future__ import annotations

from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from model_zoo.layers.item_rows import pool_rows
from model_zoo.layers.sequence import Sequence
from model_zoo.layers.timed_sequence import TimedSequence, timed

WindowAlign = Literal["right", "left"]
WindowDivisor = Literal["count", "size"]

#: in a sequence's memo: the category of each row of its items, int64 ``[U]``, 0 = none
CATEGORY = "category"


class WindowMeans:
    """Means of item vectors over N windows of a batch's histories, in row-major order, each row's oldest first.

    Attributes:
        source: the histories.
        mask: ``[B, W]`` bool, which windows exist.
    """

    source: Sequence
    mask: Tensor

    def means(self, table: Tensor) -> Tensor:
        """Window means of the rows of a table ``[U, D]`` over the items, ``[N, D]``."""
        raise NotImplementedError

    def members(self) -> tuple[Tensor, Tensor]:
        """The window (in 0..N-1) and the item row of every item in a window, int64 ``[E]`` each."""
        raise NotImplementedError

    def times(self) -> Tensor | None:
        """``[B, W]`` int64, when the newest item of each window was; None if the histories have no times."""
        raise NotImplementedError

    @property
    def index(self) -> Tensor:
        """``[B, W]`` the place of each existing window among the N, 0 elsewhere."""
        return (self.mask.reshape(-1).cumsum(0) - 1).clamp(min=0).view(self.mask.shape)

    @cached_property
    def category(self) -> Tensor | None:
        """``[N]`` the category that most items of each window have (of several the lowest number); see `CATEGORY`."""
        known = self.source.memo.get(CATEGORY)
        if known is None:
            return None
        owner, row = self.members()
        return majority(owner, known[row], int(self.mask.sum()))

    def sequence(self) -> Sequence:
        """The windows as tokens of a sequence."""
        means = self.means(self.source.items)
        memo = {} if self.category is None else {CATEGORY: self.category}
        if means.shape[0] == 0:
            means, memo = means.new_zeros(1, means.shape[1]), {name: one.new_zeros(1) for name, one in memo.items()}
        return timed(Sequence(means, self.index, self.mask, memo=memo), self.times())


class Windows(WindowMeans):
    """Means of item vectors over sliding windows, in time order; a mean is formed only where it is asked for.

    ``align="right"`` counts windows from the newest item: window j covers the items that are [j*stride, j*stride+size)
    from the end, and exists if j = 0 and the row is not empty or if it adds at least one item to window j-1. So no recent
    item is lost and a row's windows do not depend on the batch's padded length. ``align="left"`` is the literal reading of
    the MoS paper's window definition (full windows only, from the oldest item).

    Args:
        source: the histories.
        size: items per window.
        stride: items between the starts of neighbouring windows.
        divide_by: ``"count"`` divides by the number of items in the window, ``"size"`` always by ``size``.
        shortest: rows with fewer items have no window.

    Attributes:
        mask: ``[B, W]`` bool, which windows exist; right-aligned windows stand at the right end of their row.
    """

    def __init__(
        self,
        source: Sequence,
        size: int,
        stride: int,
        align: WindowAlign = "right",
        divide_by: WindowDivisor = "count",
        shortest: int = 0,
    ) -> None:
        self.source, self.size, self.stride, self.align, self.divide_by = source, size, stride, align, divide_by
        length, device = source.index.shape[1], source.index.device
        lengths = source.lengths.unsqueeze(1)  # [B, 1]
        if align == "right":
            reach = max(size, stride)  # items from the end that a window's predecessor covers or skips
            self.count = 1 + max(-((reach - length) // stride), 0) if length else 0
            from_end = torch.arange(self.count - 1, -1, -1, device=device) * stride  # [W], oldest window first
            #: ``[1 or B, W]`` column of each window's oldest item, negative where a window reaches beyond the row
            self.start = (length - size - from_end).unsqueeze(0)
            exists = torch.where(from_end == 0, lengths > 0, lengths > from_end - stride + reach)
        else:
            self.count = max((length - size) // stride + 1, 0)
            from_start = torch.arange(self.count, device=device) * stride
            self.start = (length - lengths) + from_start
            exists = from_start + size <= lengths
        self.mask = exists & (lengths >= shortest)

    @cached_property
    def bags(self) -> tuple[Tensor, Tensor]:
        """Item rows int64 and weights of every existing window, ``[N, size]`` each, windows in row-major order."""
        if self.align == "right" and self.count:  # the same columns in every row: a view serves
            beyond = -int(self.start[0, 0])  # columns before the first that the oldest window covers, or it leaves out
            index, real = (
                F.pad(values, (beyond, 0)).unfold(1, self.size, self.stride)
                for values in (self.source.index, self.source.mask)
            )
        else:
            column, real = self._columns(self.start)
            index = self.source.index.gather(1, column).view(real.shape)
        if bool(self.mask.all()):
            index, real = index.reshape(-1, self.size), real.reshape(-1, self.size)
        else:
            index, real = index[self.mask], real[self.mask]
        return index, self._weights(real)

    def means(self, table: Tensor) -> Tensor:
        """Window means of the rows of a table ``[U, D]`` over the items, ``[N, D]`` for the N existing windows."""
        index, weight = self.bags
        if index.shape[0] == 0:
            return table.new_zeros(0, table.shape[1])
        return pool_rows(table, index, weight)

    def members(self) -> tuple[Tensor, Tensor]:
        index, weight = self.bags
        return (weight != 0).nonzero()[:, 0], index[weight != 0]

    def times(self) -> Tensor | None:
        if not isinstance(self.source, TimedSequence):
            return None
        length = self.source.times.shape[1]
        newest = (self.start + self.size - 1).clamp(0, max(length - 1, 0)).expand_as(self.mask)
        return self.source.times.gather(1, newest)

    def sequence(self) -> Sequence:
        """The windows as tokens of a sequence, right-aligned."""
        windows = super().sequence()
        return windows if self.align == "right" else windows.compact(self.mask)

    @property
    def last_vectors(self) -> Tensor:
        """``[B, d]`` means of each row's newest window (right-aligned windows only; zeros for a row without items)."""
        column, real = self._columns(self.start[:, -1:])
        index, weight = self.source.index.gather(1, column), self._weights(real[:, 0])
        return pool_rows(self.source.items, index, weight)

    def _columns(self, start: Tensor) -> tuple[Tensor, Tensor]:
        """Columns ``[B, W * size]`` of the windows that start at ``start``, and which are real items ``[B, W, size]``."""
        batch, length = self.source.index.shape
        column = (start.unsqueeze(2) + torch.arange(self.size, device=start.device)).expand(batch, -1, -1)
        inside = (column >= 0) & (column < length)
        flat = column.clamp(0, max(length - 1, 0)).flatten(1)
        return flat, self.source.mask.gather(1, flat).view(inside.shape) & inside

    def _weights(self, real: Tensor) -> Tensor:
        weight = real.to(self.source.items.dtype)
        return weight / (weight.sum(1, keepdim=True).clamp(min=1) if self.divide_by == "count" else self.size)


def majority(owner: Tensor, category: Tensor, count: int) -> Tensor:
    """The most frequent category among the entries of each owner, int64 ``[count]``; of several the lowest number.

    Args:
        owner: ``[E]`` int64 in [0, count).
        category: ``[E]`` int64; entries of category 0 do not count, and an owner that has no other gets 0.
    """
    span = int(category.max()) + 1 if category.numel() else 1
    real = category > 0
    found, times = torch.unique(owner[real] * span + category[real], return_counts=True)
    rank = times * span + (span - found % span)
    best = rank.new_zeros(count).scatter_reduce_(0, found // span, rank, "amax")
    return torch.where(best > 0, span - best % span, 0)
