"""Sums over chosen rows of an item table and their gradients, without a tensor of a vector per position.

A batch names each distinct item many times. On a CPU, gathering ``[N, K, d]`` is memory traffic, and adding gradients back
with ``index_add_`` is serial and ten times slower than the sum itself. Here a dot product is formed where the item's
vector lies (`dots`), and a gradient's rows are sorted by item once, so that each item's sum is one bag over them
(`spread`): nothing is added twice to the same place, so results repeat whatever the number of threads.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence as ListOf
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

with warnings.catch_warnings():  # torch announces once per process that compressed sparse tensors are new
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 1], [0], [0.0], size=(1, 1), check_invariants=False)


#: the share of entries that are real from which on masked ones are read, too
DENSE_SHARE = 0.75


def sparse_rows(items: Tensor) -> bool:
    """Whether the functions here suit a table: on a GPU, or in half precision, gathers are better or all there is."""
    return items.device.type == "cpu" and items.dtype in (torch.float32, torch.float64)


class Entries:
    """Which rows of an item table each of N sums reads.

    Masked ones are left out if they are many. A few are cheaper read in vain than searched for: callers give every masked
    entry weight 0 and read nothing from its products.

    Args:
        index: ``[N, K]`` int64 rows of the table.
        mask: ``[N, K]`` bool, True = read; None = all.
    """

    def __init__(self, index: Tensor, mask: Tensor | None) -> None:
        self.shape = index.shape
        self.place: Tensor | None = None  # [E] of each entry among N K
        if mask is not None and int(mask.sum()) < DENSE_SHARE * mask.numel():
            self.place = mask.reshape(-1).nonzero().squeeze(1)
            self.starts = F.pad(mask.sum(1).cumsum(0), (1, 0))  # [N + 1]
        else:
            self.starts = torch.arange(index.shape[0] + 1, device=index.device) * index.shape[1]
        self.columns = self.flat(index)  # [E]

    def over(self, columns: Tensor) -> Entries:
        """The same entries at other rows, of another table: ``columns [E]``."""
        moved = copy.copy(self)
        moved.columns = columns
        return moved

    @property
    def owner(self) -> Tensor:
        """``[E]`` the sum that reads each entry."""
        return torch.repeat_interleave(self.starts.diff(), output_size=len(self.columns))

    def flat(self, values: Tensor) -> Tensor:
        """The read ones ``[E]`` of values ``[N, K]``."""
        return values.reshape(-1) if self.place is None else values.reshape(-1).index_select(0, self.place)

    def dense(self, values: Tensor, fill: float) -> Tensor:
        """``[N, K]`` from the values ``[E]`` of those read; masked entries hold ``fill`` or anything."""
        if self.place is None:
            return values.view(self.shape)
        return values.new_full(self.shape, fill).view(-1).index_copy_(0, self.place, values).view(self.shape)

    def dots(self, left: Tensor, items: Tensor) -> Tensor:
        """``left_n . x`` of every row read, ``[E]``; ``left [N, d]``, ``items [U, d]``."""
        if self.columns.numel() == 0:
            return left.new_zeros(0)
        if self.columns.numel() >= self.shape[0] * items.shape[0]:  # torch drops entries beyond a full matrix
            return (left @ items.T)[self.owner, self.columns]
        pattern = torch.sparse_csr_tensor(
            self.starts,
            self.columns,
            left.new_zeros(self.columns.numel()),
            size=(self.shape[0], items.shape[0]),
            check_invariants=False,
        )
        return torch.sparse.sampled_addmm(pattern, left, items.T, beta=0.0, out=pattern).values()

    def pool(self, items: Tensor, weight: Tensor) -> Tensor:
        """``sum_e weight_e x_e`` of each sum, ``[N, d]``; ``weight [E]``."""
        if self.columns.numel() == 0:
            return items.new_zeros(self.shape[0], items.shape[1])
        return F.embedding_bag(self.columns, items, self.starts[:-1], mode="sum", per_sample_weights=weight)


#: entries of N sums with, for some ``left [N, d]``, what each entry weighs it with, ``[E]``
Part = tuple[Entries, ListOf[tuple[Tensor, Tensor]]]


def spread(parts: ListOf[Part], num_items: int) -> Tensor:
    """The transpose of `Entries.pool`: each row of the table receives ``weight_e left_n`` from every entry e of it.

    Args:
        parts: entries, each with one or more of left vectors and weights.
        num_items: U.

    Returns:
        ``[U, d]``.
    """
    if len({len(pairs) for _, pairs in parts}) > 1:
        parts = [(entries, [pair]) for entries, pairs in parts for pair in pairs]
    columns = torch.cat([entries.columns for entries, _ in parts])
    lefts = torch.cat([torch.stack([left for left, _ in pairs], 1).flatten(0, 1) for _, pairs in parts])
    if columns.numel() == 0:
        return lefts.new_zeros(num_items, lefts.shape[1])
    owners, start = [], 0  # of each entry the sum in all of them
    for entries, pairs in parts:
        owners.append(entries.owner + start)
        start += len(pairs[0][0])
    count = len(parts[0][1])
    order = columns.int().argsort(stable=True)  # half the time of a sort of int64
    ends = torch.bincount(columns, minlength=num_items).cumsum(0)
    place = torch.cat(owners).index_select(0, order).unsqueeze(1) * count + torch.arange(count, device=order.device)
    weight = torch.cat([torch.stack([weight for _, weight in pairs], 1) for _, pairs in parts])
    return F.embedding_bag(
        place.view(-1),
        lefts,
        F.pad(ends[:-1], (1, 0)) * count,
        mode="sum",
        per_sample_weights=weight.index_select(0, order).view(-1),
    )


class _PoolRows(torch.autograd.Function):
    """`pool_rows`; the weights are constants."""

    @staticmethod
    def forward(ctx: Any, items: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        entries = Entries(index, weight != 0)
        flat = entries.flat(weight)
        ctx.entries, ctx.num_items = entries, items.shape[0]
        ctx.save_for_backward(flat)
        return entries.pool(items, flat)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (flat,) = ctx.saved_tensors
        return spread([(ctx.entries, [(grad.contiguous(), flat)])], ctx.num_items), None, None


def pool_rows(items: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """``out[n] = sum_k weight[n, k] items[index[n, k]]``, differentiable in ``items``.

    Args:
        items: ``[U, d]``.
        index: ``[N, K]`` int64.
        weight: ``[N, K]`` constants; where they are 0 nothing is read.
    """
    if sparse_rows(items) and not weight.requires_grad:
        return _PoolRows.apply(items, index, weight.to(items.dtype))
    return F.embedding_bag(index, items, mode="sum", per_sample_weights=weight.to(items.dtype))
