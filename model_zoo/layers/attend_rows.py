"""Softmax attention over rows of an item table by sparse products: nothing of the size ``[R, K, d]`` is formed."""

from __future__ import annotations

from collections.abc import Sequence as ListOf
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model_zoo.layers.attend_items import MASKED_SCORE, attend_items, gathered
from model_zoo.layers.item_rows import Entries, Part, pool_rows, sparse_rows, spread

#: heads of one row up to which reading each item once per head costs less than gathering it once for all
FEW_HEADS = 3


@dataclass(frozen=True)
class RowReads:
    """What N queries read.

    Attributes:
        index: ``[N, K]`` int64 rows of the item table.
        mask: ``[N, K]`` bool, True = real.
        keep: ``[N, K]`` dropout factors, or None.
        attend_padding: a query without a real row attends evenly to all K; otherwise it gives zeros.
        scores: ``[N, K]`` the products of query and rows if they are known already.
        weight: ``[N, K]`` weights in place of the softmax; constants, and the query has no part in the answer.
    """

    index: Tensor
    mask: Tensor
    keep: Tensor | None = None
    attend_padding: bool = False
    scores: Tensor | None = None
    weight: Tensor | None = None


def attend_rows(queries: ListOf[Tensor], reads: ListOf[RowReads], items: Tensor) -> list[Tensor]:
    """``sum_k softmax_k(query_n . x_nk) keep_nk x_nk``, one ``[N, d]`` per entry of ``queries`` (``[N, d]`` each, scaled).

    The gradients of all of them reach the item table in one sum. Where sparse products do not serve (`sparse_rows`),
    the items are gathered by groups of queries.
    """
    if not sparse_rows(items):
        answers = []
        for query, read in zip(queries, reads, strict=True):
            if read.weight is not None:
                answers.append(pool_rows(items, read.index, read.weight * read.mask))
                continue
            keep = None if read.keep is None else read.keep.unsqueeze(1)
            found = attend_items(query.unsqueeze(1), items, read.index, read.mask, keep, read.attend_padding)
            answers.append(found.squeeze(1))
        return answers
    return list(_AttendRows.apply(items, tuple(reads), *queries))


def attend_heads(query: Tensor, items: Tensor, index: Tensor, mask: Tensor, keep: Tensor | None = None) -> Tensor:
    """`attend_items` by whichever way suits: sparse products for few heads, a gather that serves all of many heads.

    Args:
        query: ``[R, H, d]``, already scaled.
        items: ``[U, d]``.
        index: ``[R, K]`` int64 rows of ``items``.
        mask: ``[R, K]`` bool, True = real.
        keep: ``[R, H, K]`` dropout factors, or None.

    Returns:
        ``[R, H, d]``; zeros for rows without a real token.
    """
    heads = query.shape[1]
    if not sparse_rows(items) or heads > FEW_HEADS:
        return attend_items(query, items, index, mask, keep)
    read = RowReads(
        index.repeat_interleave(heads, 0), mask.repeat_interleave(heads, 0), None if keep is None else keep.flatten(0, 1)
    )
    return attend_rows([query.to(items.dtype).flatten(0, 1)], [read], items)[0].view(query.shape)


@torch.no_grad()
def row_scores(query: Tensor, items: Tensor, index: Tensor, mask: Tensor) -> Tensor:
    """``query_n . x_nk`` ``[N, K]``, very low where ``mask`` is False; arguments as in `RowReads`, no gradient."""
    if sparse_rows(items):
        entries = Entries(index, mask)
        return entries.dense(entries.dots(query, items), MASKED_SCORE).masked_fill_(~mask, MASKED_SCORE)
    scores = items.new_empty(index.shape)
    for rows, vectors in gathered(items, index):
        torch.matmul(query[rows].unsqueeze(1), vectors.transpose(1, 2), out=scores[rows].unsqueeze(1))
    return scores.masked_fill_(~mask, MASKED_SCORE)


@dataclass(frozen=True)
class Attended:
    """What the backward of one `RowReads` needs beside queries and items.

    Attributes:
        entries: the rows read.
        weight: ``[E]`` attention weights before dropout.
        keep: ``[E]`` dropout factors, or None.
        scored: the weights are a softmax over scores; ``mask`` ``[N, K]`` = those scores that were not constants, or None.
    """

    entries: Entries
    weight: Tensor
    keep: Tensor | None
    scored: bool
    mask: Tensor | None

    @property
    def used(self) -> Tensor:
        """``[E]`` the weights after dropout."""
        return self.weight if self.keep is None else self.weight * self.keep

    @staticmethod
    def of(query: Tensor, read: RowReads, items: Tensor) -> Attended:
        """The weights of a read."""
        keep = None
        if read.weight is not None:
            share = (read.weight * read.mask).to(items.dtype)
            entries = Entries(read.index, share != 0)
        else:
            entries = Entries(read.index, None if read.attend_padding else read.mask)
            scores = read.scores
            if scores is None:
                scores = entries.dense(entries.dots(query, items), MASKED_SCORE)
            share = scores.masked_fill(~read.mask, MASKED_SCORE).softmax(-1)
            share = share if read.attend_padding else share * read.mask
            keep = None if read.keep is None else entries.flat(read.keep)
        mask = read.mask if read.attend_padding else None
        return Attended(entries, entries.flat(share), keep, read.weight is None, mask)

    def backward(self, query: Tensor, grad: Tensor, items: Tensor) -> tuple[Tensor | None, Part]:
        """Gradient of the queries (None if they have no part), and what the items receive, from ``grad [N, d]``."""
        if not self.scored:
            return None, (self.entries, [(grad, self.used)])
        d_scores = self.d_scores(grad, items)
        return self.entries.pool(items, d_scores), (self.entries, [(grad, self.used), (query, d_scores)])

    def d_scores(self, grad: Tensor, items: Tensor) -> Tensor:
        """``[E]`` gradients of the scores from those of the answers, ``grad [N, d]``."""
        d_weight = self.entries.dots(grad, items)
        dense = self.entries.dense(d_weight if self.keep is None else d_weight * self.keep, 0.0)
        share = self.entries.dense(self.weight, 0.0)
        found = share * (dense - (share * dense).sum(1, keepdim=True))
        if self.mask is not None:  # a masked score is a constant and passes no gradient
            found = found * self.mask
        return self.entries.flat(found)


class _AttendRows(torch.autograd.Function):
    """Keeps weights and queries; the backward reads the item table again."""

    @staticmethod
    def forward(ctx: Any, items: Tensor, reads: tuple[RowReads, ...], *queries: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(items.device.type, enabled=False):
            ctx.attended = [Attended.of(query, read, items) for read, query in zip(reads, queries, strict=True)]
            pooled = tuple(done.entries.pool(items, done.used) for done in ctx.attended)
        ctx.save_for_backward(items, *queries)
        return pooled

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        items, *queries = ctx.saved_tensors
        d_queries: list[Tensor | None] = []
        parts = []
        with torch.autocast(items.device.type, enabled=False):
            for given, query, done in zip(grads, queries, ctx.attended, strict=True):
                found, part = done.backward(query, given.contiguous(), items)
                d_queries.append(found)
                parts.append(part)
            d_items = spread(parts, items.shape[0]) if ctx.needs_input_grad[0] else None
        return d_items, None, *d_queries
