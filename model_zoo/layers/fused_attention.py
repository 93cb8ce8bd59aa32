"""Attention of many experts over one history: its items are gathered once for all heads of all experts."""

from __future__ import annotations

from collections.abc import Sequence as ListOf
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model_zoo.layers.attend_items import MASKED_SCORE, gathered


@dataclass(frozen=True)
class BranchRead:
    """What one branch of an attention block reads of its tokens.

    Attributes:
        heads: number of heads.
        newest: only so many of the newest tokens; None = all.
        topk: only so many of the best-scored tokens per head; None = all.
        dropout: probability on the attention weights, in force now.
    """

    heads: int
    newest: int | None
    topk: int | None
    dropout: float


@dataclass(frozen=True)
class SlotReads:
    """What S experts per row read, all of one architecture.

    Attributes:
        members: ``[B, S, T]`` bool tokens of each slot, padding excluded.
        pooling: None if the tokens are the items; otherwise ``(membership [L, T], inverse [B, T])`` of `Windows.pooling`.
    """

    members: Tensor
    pooling: tuple[Tensor, Tensor] | None = None


def attend_slots(
    queries: ListOf[Tensor],
    reads: ListOf[SlotReads],
    branches: ListOf[BranchRead],
    items: Tensor,
    index: Tensor,
    mask: Tensor,
) -> list[Tensor]:
    """``sum_t softmax_t(query . token_t) token_t`` per row, slot and head; a slot without tokens gives zeros.

    Args:
        queries: one ``[B, S, H, d]`` per entry of ``reads``, absorbed into the item space; H heads over all ``branches``.
        reads: which tokens.
        branches: how the heads, in order, restrict them.
        items: ``[U, d]``.
        index: ``[B, L]`` int64 rows of ``items``, right-aligned.
        mask: ``[B, L]`` bool.

    Returns:
        One ``[B, S, H, d]`` per entry of ``reads``.
    """
    shapes = [query.shape for query in queries]
    flat = torch.cat([query.flatten(1, 2) for query in queries], 1)
    pooled = _AttendSlots.apply(flat.to(items.dtype), items, index, mask, tuple(reads), tuple(branches))
    parts = pooled.split([shape[1] * shape[2] for shape in shapes], 1)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


class _AttendSlots(torch.autograd.Function):
    """By groups of rows; the backward gathers the items again instead of keeping ``[B, L, d]``."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, items: Tensor, index: Tensor, mask: Tensor, reads: tuple[SlotReads, ...],
                branches: tuple[BranchRead, ...]) -> Tensor:  # fmt: skip
        heads = sum(branch.heads for branch in branches)
        weights = [query.new_empty(len(query), r.members.shape[1] * heads, r.members.shape[2]) for r in reads]
        keeps = [_dropout(weight, r, branches) for weight, r in zip(weights, reads, strict=True)]
        pooled = torch.empty_like(query)
        limits = [[_newest(read.members, branch.newest) for branch in branches] for read in reads]
        for rows, vectors in gathered(items, index):
            scores = query[rows] @ vectors.transpose(1, 2)  # [r, Q, L]
            kept = torch.empty_like(scores)
            start = 0
            for read, allowed, weight, keep in zip(reads, limits, weights, keeps, strict=True):
                mine = slice(start, start + weight.shape[1])
                start = mine.stop
                found = _pool(scores[:, mine], read, mask, rows)
                _softmax(found, [a[rows] for a in allowed], branches, weight[rows])
                used = weight[rows] if keep is None else weight[rows] * keep[rows]
                kept[:, mine] = _spread(used, read, mask, rows)
            torch.matmul(kept, vectors, out=pooled[rows])
        ctx.save_for_backward(query, items, index, mask, *weights, *[k for k in keeps if k is not None])
        ctx.reads, ctx.dropped = reads, [keep is not None for keep in keeps]
        return pooled

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, items, index, mask, *saved = ctx.saved_tensors
        reads: tuple[SlotReads, ...] = ctx.reads
        weights, masks = saved[: len(reads)], iter(saved[len(reads) :])
        keeps = [next(masks) if dropped else None for dropped in ctx.dropped]
        d_query = torch.empty_like(query)
        d_items = torch.zeros_like(items) if ctx.needs_input_grad[1] else None
        grad = grad.contiguous()
        for rows, vectors in gathered(items, index):
            d_kept = grad[rows] @ vectors.transpose(1, 2)  # [r, Q, L]
            left = d_kept.new_empty(d_kept.shape[0], 2 * d_kept.shape[1], d_kept.shape[2])
            start = 0
            for read, weight, keep in zip(reads, weights, keeps, strict=True):
                mine = slice(start, start + weight.shape[1])
                start = mine.stop
                d_weight, used = _pool(d_kept[:, mine], read, mask, rows), weight[rows]
                if keep is not None:
                    d_weight, used = d_weight * keep[rows], used * keep[rows]
                d_scores = weight[rows] * (d_weight - (weight[rows] * d_weight).sum(-1, keepdim=True))
                left[:, mine] = _spread(used, read, mask, rows)
                left[:, mine.start + query.shape[1] : mine.stop + query.shape[1]] = _spread(d_scores, read, mask, rows)
            torch.matmul(left[:, query.shape[1] :], vectors, out=d_query[rows])
            if d_items is not None:
                torch.bmm(left.transpose(1, 2), torch.cat([grad[rows], query[rows]], 1), out=vectors)
                d_items.index_add_(0, index[rows].reshape(-1), vectors.view(-1, vectors.shape[-1]))
        return d_query, d_items, None, None, None, None


def _pool(values: Tensor, read: SlotReads, mask: Tensor, rows: slice) -> Tensor:
    """Values by item ``[r, Q, L]`` averaged over each token's items, ``[r, Q, T]``; the transpose of `_spread`."""
    if read.pooling is None:
        return values
    membership, inverse = read.pooling
    return (values * mask[rows].unsqueeze(1)) @ membership * inverse[rows].unsqueeze(1)


def _spread(values: Tensor, read: SlotReads, mask: Tensor, rows: slice) -> Tensor:
    """Weights by token ``[r, Q, T]`` as weights by item ``[r, Q, L]``."""
    if read.pooling is None:
        return values
    membership, inverse = read.pooling
    return (values * inverse[rows].unsqueeze(1)) @ membership.T * mask[rows].unsqueeze(1)


def _newest(members: Tensor, count: int | None) -> Tensor:
    """The newest ``count`` members of each slot."""
    if count is None or count >= members.shape[2]:
        return members
    seen = members.cumsum(-1, dtype=torch.int32)
    return members & (seen > seen[..., -1:] - count)


def _softmax(scores: Tensor, allowed: ListOf[Tensor], branches: tuple[BranchRead, ...], out: Tensor) -> None:
    """Attention weights of scores ``[r, S * H, T]``, written to ``out``; zeros where a branch may not read."""
    slots = (allowed[0].shape[1], sum(branch.heads for branch in branches))
    scores, out = scores.unflatten(1, slots), out.unflatten(1, slots)  # [r, S, H, T]
    start = 0
    for branch, tokens in zip(branches, allowed, strict=True):
        heads = slice(start, start + branch.heads)
        start = heads.stop
        tokens = tokens.unsqueeze(2)
        mine = scores[:, :, heads].masked_fill(~tokens, MASKED_SCORE)
        if branch.topk is None or branch.topk >= mine.shape[-1]:
            out[:, :, heads] = mine.softmax(-1) * tokens
        else:
            best, place = mine.topk(branch.topk, dim=-1)
            out[:, :, heads] = torch.zeros_like(mine).scatter_(-1, place, best.softmax(-1)) * tokens


def _dropout(weight: Tensor, read: SlotReads, branches: tuple[BranchRead, ...]) -> Tensor | None:
    """Dropout factors of ``weight``'s shape, or None. Drawn as 16-bit integers: four from each 64-bit draw."""
    if not any(branch.dropout for branch in branches):
        return None
    count = weight.numel()
    draws = torch.empty((count + 3) // 4, dtype=torch.int64, device=weight.device)
    draws = draws.random_(-(2**63), None).view(torch.int16)[:count].view(weight.shape)
    slots = (read.members.shape[1], sum(branch.heads for branch in branches))
    factors, draws = torch.empty_like(weight).unflatten(1, slots), draws.unflatten(1, slots)
    start = 0
    for branch in branches:
        heads = slice(start, start + branch.heads)
        start = heads.stop
        dropped = round(branch.dropout * 2**16)  # of the 65,536 values
        scale = 2**16 / (2**16 - dropped) if dropped < 2**16 else 0.0
        torch.mul(draws[:, :, heads] >= dropped - 2**15, scale, out=factors[:, :, heads])
    return factors.flatten(1, 2)
