"""Softmax attention over rows of an item table, for any number of queries at once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model_zoo.layers.sequence import SharedSequence

MASKED_SCORE = -1.0e9
#: item vector elements gathered at a time on a CPU
GATHERED_FLOATS = 2**19


class _AttendItems(torch.autograd.Function):
    """`attend_items` by groups of rows; the backward gathers again instead of keeping ``[R, K, d]``."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, items: Tensor, index: Tensor, mask: Tensor, keep: Tensor | None,
                attend_padding: bool) -> Tensor:  # fmt: skip
        weight = query.new_empty(*query.shape[:2], index.shape[1])  # [R, H, K]
        pooled = torch.empty_like(query)
        for rows, vectors in gathered(items, index):  # [r, K, d]
            scores = query[rows] @ vectors.transpose(1, 2)
            torch.softmax(scores.masked_fill_(~mask[rows].unsqueeze(1), MASKED_SCORE), -1, out=weight[rows])
            if not attend_padding:
                weight[rows] *= mask[rows].unsqueeze(1)
            kept = weight[rows] if keep is None else weight[rows] * keep[rows]
            torch.matmul(kept, vectors, out=pooled[rows])
        ctx.save_for_backward(query, items, index, mask, keep, weight)
        return pooled

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, items, index, mask, keep, weight = ctx.saved_tensors
        d_query = torch.empty_like(query)
        d_items = torch.zeros_like(items) if ctx.needs_input_grad[1] else None
        grad = grad.contiguous()
        for rows, vectors in gathered(items, index):
            d_weight = grad[rows] @ vectors.transpose(1, 2)  # [r, H, K]
            kept = weight[rows]
            if keep is not None:
                d_weight, kept = d_weight * keep[rows], kept * keep[rows]
            # softmax; a masked score is a constant and passes no gradient
            d_scores = weight[rows] * (d_weight - (weight[rows] * d_weight).sum(-1, keepdim=True))
            d_scores *= mask[rows].unsqueeze(1)
            torch.matmul(d_scores, vectors, out=d_query[rows])
            if d_items is not None:
                # each position's item receives kept^T grad + d_scores^T query: one product with the two stacked
                left = torch.cat([kept, d_scores], 1).transpose(1, 2)
                torch.bmm(left, torch.cat([grad[rows], query[rows]], 1), out=vectors)
                d_items.index_add_(0, index[rows].reshape(-1), vectors.view(-1, vectors.shape[-1]))
        return d_query, d_items, None, None, None, None


def gathered(items: Tensor, index: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Groups of rows of ``index [R, K]`` with their item vectors ``[r, K, d]``, which the next group overwrites.

    Autocast is off while a group is worked on: results are written into tensors of the items' type.

    A group's vectors fit in a core's cache (on a GPU groups are larger): they are read from the table, used and dropped
    without a trip through memory, and no group allocates.
    """
    columns, dim = index.shape[1], items.shape[1]
    budget = 2**28 if items.is_cuda else GATHERED_FLOATS
    size = max(min(budget // max(columns * dim, 1), index.shape[0]), 1)
    buffer = items.new_empty(size * columns, dim)
    for start in range(0, index.shape[0], size):
        flat = index[start : start + size].reshape(-1)
        vectors = torch.index_select(items, 0, flat, out=buffer[: len(flat)])
        with torch.autocast(items.device.type, enabled=False):
            yield slice(start, start + size), vectors.view(min(size, index.shape[0] - start), columns, dim)


def attend_items(
    query: Tensor, items: Tensor, index: Tensor, mask: Tensor, keep: Tensor | None = None, attend_padding: bool = False
) -> Tensor:
    """``sum_l softmax_l(query . x_l) keep_l x_l`` over indexed item vectors.

    Args:
        query: ``[R, H, d]``, already scaled.
        items: ``[U, d]``.
        index: ``[R, K]`` int64 rows of ``items``.
        mask: ``[R, K]`` bool, True = real.
        keep: ``[R, H, K]`` dropout factors (0 or 1 / (1 - p)), or None.
        attend_padding: rows without a real token attend evenly to all K; otherwise they give zeros.

    Returns:
        ``[R, H, d]``.
    """
    return _AttendItems.apply(query, items, index, mask, keep, attend_padding)


@dataclass(frozen=True)
class HistoryGroup:
    """Some histories of a `SharedSequence` and the batch rows that read them, padded to C rows a history.

    Attributes:
        history: ``[p]`` int64 which histories.
        vectors: ``[p, T, d]`` their item vectors, overwritten by the next group.
        slots: ``[p, C]`` int64 batch row in each slot, any row where ``filled`` is False.
        filled: ``[p, C]`` bool, or None if every slot holds a row.
    """

    history: Tensor
    vectors: Tensor
    slots: Tensor
    filled: Tensor | None

    @property
    def rows(self) -> Tensor:
        """``[r]`` the batch rows, history by history."""
        return self.slots.flatten() if self.filled is None else self.slots[self.filled]

    def unpad(self, values: Tensor) -> Tensor:
        """``[p, C, ...]`` as ``[r, ...]`` in the order of ``rows``."""
        return values.flatten(0, 1) if self.filled is None else values[self.filled]


def grouped_histories(sequence: SharedSequence) -> Iterator[HistoryGroup]:
    """All histories that have rows, each gathered once, those of similarly many rows together.

    A group fits in a core's cache, as in `gathered`, and at least half of its slots are filled. Needs T >= 1.
    """
    items, index, owner = sequence.histories.items.detach(), sequence.histories.index, sequence.owner
    length, dim = index.shape[1], items.shape[1]
    most = max((2**28 if items.is_cuda else GATHERED_FLOATS) // (length * dim), 1)
    counts = torch.bincount(owner, minlength=index.shape[0])
    by_history = owner.argsort(stable=True)
    first = counts.cumsum(0) - counts  # place of each history's first row in by_history
    order = counts.argsort(descending=True)
    sizes = counts[order].tolist()
    buffer = items.new_empty(min(most, len(sizes)) * length, dim)
    start = 0
    while start < len(sizes) and sizes[start]:
        end = start + 1
        while end < min(start + most, len(sizes)) and 2 * sizes[end] >= sizes[start]:
            end += 1
        history = order[start:end]
        slot = torch.arange(sizes[start], device=owner.device)
        filled = slot < counts[history].unsqueeze(1) if sizes[end - 1] < sizes[start] else None
        slots = by_history[(first[history].unsqueeze(1) + slot).clamp_(max=len(owner) - 1)]
        flat = index[history].reshape(-1)
        vectors = torch.index_select(items, 0, flat, out=buffer[: len(flat)]).view(end - start, length, dim)
        with torch.autocast(items.device.type, enabled=False):
            yield HistoryGroup(history, vectors, slots, filled)
        start = end


@torch.no_grad()
def attend_shared(query: Tensor, sequence: SharedSequence, topk: int | None = None) -> Tensor:
    """`attend_items` for rows that share histories: the rows of a history are queries of one product with its items.

    Args:
        query: ``[B, H, d]``, already scaled.
        sequence: shared histories.
        topk: tokens that each head of each row attends to; None = all.

    Returns:
        ``[B, H, d]``; zeros for rows without a real token.
    """
    items, index, mask = sequence.histories.items, sequence.histories.index, sequence.histories.mask
    query = query.to(items.dtype)
    pooled = torch.zeros_like(query)
    heads, dim, length = query.shape[1], query.shape[2], index.shape[1]
    if length == 0:
        return pooled
    for group in grouped_histories(sequence):
        histories, places = group.slots.shape
        asked = query[group.slots].view(histories, places * heads, dim)
        scores = asked @ group.vectors.transpose(1, 2)  # [p, C H, T]
        real = mask[group.history]  # [p, T]
        if not bool(real.all()):
            scores.masked_fill_(~real.unsqueeze(1), MASKED_SCORE)
        if topk is None or topk >= length:
            answer = scores.softmax(-1) @ group.vectors * real.any(1)[:, None, None]
            pooled[group.rows] = group.unpad(answer.view(histories, places, heads, dim))
            continue
        best, column = best_scored(group.unpad(scores.view(histories, places, heads, length)), topk)  # [r, H, k]
        token = column + sequence.owner[group.rows].view(-1, 1, 1) * length  # in the flattened histories
        weight = best.softmax(-1) * mask.flatten()[token]
        kept = index.flatten()[token].view(-1, topk)
        sums = F.embedding_bag(kept, items, mode="sum", per_sample_weights=weight.view(-1, topk))
        pooled[group.rows] = sums.view(-1, heads, dim)
    return pooled


def best_scored(scores: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """``scores.topk(topk)`` over the last dimension, in no particular order; of equal scores any.

    Long rows are searched in two steps: the best entries lie in the ``topk`` strides whose best entry is highest.

    Returns:
        ``(scores, columns)``, ``[..., topk]`` each.
    """
    length = scores.shape[-1]
    step = math.isqrt(length // topk)  # then both searches are equally long
    if step < 3:
        return tuple(scores.topk(topk, dim=-1, sorted=False))  # type: ignore[return-value]
    strides = length // step
    whole = strides * step
    stride = scores[..., :whole].unflatten(-1, (step, strides)).amax(-2).topk(topk, dim=-1, sorted=False).indices
    offset = torch.arange(step, device=scores.device).unsqueeze(1) * strides
    column = (stride.unsqueeze(-2) + offset).flatten(-2)  # [..., step topk]
    rest = torch.arange(whole, length, device=scores.device).expand(*column.shape[:-1], -1)  # in no stride
    column = torch.cat([column, rest], -1)
    best, place = scores.gather(-1, column).topk(topk, dim=-1, sorted=False)
    return best, column.gather(-1, place)
