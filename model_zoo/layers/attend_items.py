"""Softmax attention over rows of an item table, for any number of queries at once."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as ListOf
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model_zoo.layers.sequence import Sequence

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
class AttendPlan:
    """The arguments of one `attend_items` call, its items left open.

    Attributes:
        query, index, mask, keep, attend_padding: see `attend_items`.
    """

    query: Tensor
    index: Tensor
    mask: Tensor
    keep: Tensor | None
    attend_padding: bool


class PlannedBlock(Protocol):
    """A block whose only work on item rows is attention: ``forward`` is plan, attend, finish."""

    def plan(self, query: Tensor, sequence: Sequence) -> list[AttendPlan] | None:
        """What to attend to; None if the rows hold nothing."""

    def finish(self, query: Tensor, pooled: list[Tensor] | None) -> Tensor:
        """The block's answer from the results of its plans."""


def run_planned(block: PlannedBlock, query: Tensor, sequence: Sequence) -> Tensor:
    """The block's answer, its attention over the items done together."""
    plans = block.plan(query, sequence)
    return block.finish(query, attend_plans(plans, sequence.items) if plans else None)


def attend_plans(plans: ListOf[AttendPlan], items: Tensor) -> list[Tensor]:
    """`attend_items` of every plan, with as few passes over the item table as give the same results.

    Plans over the very same index run as heads of one; then plans of equally many heads run as one, padded to the longest.
    Plans that attend to padding run alone: more columns would change them.
    """
    sharing: dict[int, list[int]] = {}
    for number, plan in enumerate(plans):
        sharing.setdefault(-1 - number if plan.attend_padding else id(plan.index), []).append(number)
    joined = [_join_heads([plans[number] for number in numbers]) for numbers in sharing.values()]
    results: dict[int, Tensor] = {}
    for numbers, pooled in zip(sharing.values(), _attend_joined(joined, items), strict=True):
        results |= zip(numbers, pooled.split([plans[number].query.shape[1] for number in numbers], 1), strict=True)
    return [results[number] for number in range(len(plans))]


def _join_heads(plans: list[AttendPlan]) -> AttendPlan:
    """Plans over one index as the heads of one plan."""
    if len(plans) == 1:
        return plans[0]
    first = plans[0]
    keep = None
    if any(plan.keep is not None for plan in plans):
        keep = torch.cat([_dropout_factors(plan) for plan in plans], 1)
    return AttendPlan(torch.cat([plan.query for plan in plans], 1), first.index, first.mask, keep, first.attend_padding)


def _attend_joined(plans: list[AttendPlan], items: Tensor) -> list[Tensor]:
    """`attend_items` of plans over different indices."""
    results: dict[int, Tensor] = {}
    merged: dict[int, list[int]] = {}
    for number, plan in enumerate(plans):
        if plan.attend_padding:
            results[number] = attend_items(plan.query, items, plan.index, plan.mask, plan.keep, True)
        else:
            merged.setdefault(plan.query.shape[1], []).append(number)
    for numbers in merged.values():
        group = [plans[number] for number in numbers]
        columns = max(plan.index.shape[1] for plan in group)
        short = [columns - plan.index.shape[1] for plan in group]
        keep = None
        if any(plan.keep is not None for plan in group):
            factors = [_dropout_factors(plan) for plan in group]
            keep = torch.cat([F.pad(kept, (0, missing)) for kept, missing in zip(factors, short, strict=True)])
        pooled = attend_items(
            torch.cat([plan.query for plan in group]),
            items,
            torch.cat([F.pad(plan.index, (0, missing)) for plan, missing in zip(group, short, strict=True)]),
            torch.cat([F.pad(plan.mask, (0, missing)) for plan, missing in zip(group, short, strict=True)]),
            keep,
        )
        results |= zip(numbers, pooled.split([plan.query.shape[0] for plan in group]), strict=True)
    return [results[number] for number in range(len(plans))]


def _dropout_factors(plan: AttendPlan) -> Tensor:
    return plan.query.new_ones(*plan.query.shape[:2], plan.index.shape[1]) if plan.keep is None else plan.keep
