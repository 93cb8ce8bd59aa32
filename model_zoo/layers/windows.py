"""Sliding windows over a batch of histories: the tokens of MoS's window experts."""

from __future__ import annotations

from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from model_zoo.layers.item_rows import Entries, pool_rows
from model_zoo.layers.sequence import Sequence

WindowAlign = Literal["right", "left"]
WindowDivisor = Literal["count", "size"]


class Windows:
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
        column, real = self._columns(self.start)
        index = self.source.index.gather(1, column).view(*real.shape)[self.mask]
        return index, self._weights(real[self.mask])

    def means(self, table: Tensor) -> Tensor:
        """Window means of the rows of a table ``[U, D]`` over the items, ``[N, D]`` for the N existing windows."""
        index, weight = self.bags
        if index.shape[0] == 0:
            return table.new_zeros(0, table.shape[1])
        return pool_rows(table, index, weight)

    @property
    def index(self) -> Tensor:
        """``[B, W]`` the place of each existing window among the N, 0 elsewhere."""
        return (self.mask.reshape(-1).cumsum(0) - 1).clamp(min=0).view(self.mask.shape)

    def sequence(self) -> Sequence:
        """The windows as tokens of a sequence, right-aligned."""
        means = self.means(self.source.items)
        if means.shape[0] == 0:
            means = self.source.items.new_zeros(1, self.source.items.shape[1])
        windows = Sequence(means, self.index, self.mask)
        return windows if self.align == "right" else windows.compact(self.mask)

    @property
    def last_vectors(self) -> Tensor:
        """``[B, d]`` means of each row's newest window (right-aligned windows only; zeros for a row without items)."""
        column, real = self._columns(self.start[:, -1:])
        index, weight = self.source.index.gather(1, column), self._weights(real[:, 0])
        return pool_rows(self.source.items, index, weight)

    @cached_property
    def rows_start(self) -> Tensor:
        """``[B + 1]`` the number of existing windows in the rows before each row."""
        return F.pad(self.mask.sum(1).cumsum(0), (1, 0))

    @cached_property
    def column(self) -> Tensor:
        """``[N]`` the place of each existing window in its row."""
        return self.mask.nonzero()[:, 1]

    def means_of(self, table: Tensor, rows: slice) -> Tensor:
        """`means` of the windows of some rows alone, without a gradient."""
        index, weight = self.bags
        start, end = int(self.rows_start[rows.start]), int(self.rows_start[rows.stop])
        entries = Entries(index[start:end], None)
        with torch.no_grad():
            return entries.pool(table, weight[start:end].reshape(-1).to(table.dtype))

    def by_item(self, weight: Tensor, rows: Tensor) -> Tensor:
        """Weights of windows as weights of the items that they average (right-aligned windows only).

        Args:
            weight: ``[N, W]``, 0 for windows that do not exist.
            rows: ``[N]`` int64, whose windows they are.

        Returns:
            ``[N, T]`` over the history's columns (anything at padding).
        """
        length, device = self.source.index.shape[1], weight.device
        weight = weight * self._inverse[rows]
        age = torch.arange(length - 1, -1, -1, device=device)
        answer = weight.new_zeros(len(rows), length)
        for before in range(-(-self.size // self.stride)):  # an item lies in so many windows
            number = age // self.stride - before  # counted from the newest
            inside = (number >= 0) & (number < self.count) & (age < number * self.stride + self.size)
            column = (self.count - 1 - number).clamp(0, self.count - 1)
            answer += weight.index_select(1, column) * inside
        return answer

    @cached_property
    def _inverse(self) -> Tensor:
        """``[B, W]`` one over the number of items that a window's sum is divided by."""
        dtype = self.source.items.dtype
        if self.divide_by == "size":
            return torch.full(self.mask.shape, 1 / self.size, dtype=dtype, device=self.start.device)
        oldest = (self.source.index.shape[1] - self.source.lengths).unsqueeze(1)  # [B, 1]
        count = self.start + self.size - torch.maximum(self.start, oldest)
        return 1 / count.clamp(min=1).to(dtype)

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
