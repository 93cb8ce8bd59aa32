"""Soft search: every token scored against the target, and the sum of the tokens by those scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model_zoo.layers.attend_items import gathered


class _SoftSearch(torch.autograd.Function):
    """By groups of rows; the backward gathers again instead of keeping ``[R, K, d]``. Vectors stand as rows ``[r, 1, d]``:
    a batched product of a matrix and a column is several times slower."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, items: Tensor, index: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        query, mask = query.unsqueeze(1), mask.unsqueeze(1)
        scores = query.new_empty(mask.shape)
        pooled = torch.empty_like(query)
        for rows, vectors in gathered(items, index):  # [r, K, d]
            scores[rows] = query[rows] @ vectors.transpose(1, 2) * mask[rows]
            torch.bmm(scores[rows], vectors, out=pooled[rows])
        ctx.save_for_backward(query, items, index, mask, scores)
        scores = scores.squeeze(1)
        ctx.mark_non_differentiable(scores)
        return pooled.squeeze(1), scores

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        query, items, index, mask, scores = ctx.saved_tensors
        grad = grad.contiguous().unsqueeze(1)
        d_query = torch.empty_like(query)
        d_items = torch.zeros_like(items) if ctx.needs_input_grad[1] else None
        for rows, vectors in gathered(items, index):
            d_scores = grad[rows] @ vectors.transpose(1, 2) * mask[rows]
            torch.bmm(d_scores, vectors, out=d_query[rows])
            if d_items is not None:
                # each position's item receives score * grad + d_score * query: one product with the two stacked
                left = torch.cat([scores[rows], d_scores], 1).transpose(1, 2)
                torch.bmm(left, torch.cat([grad[rows], query[rows]], 1), out=vectors)
                d_items.index_add_(0, index[rows].reshape(-1), vectors.flatten(0, 1))
        return d_query.squeeze(1), d_items, None, None


def soft_search(query: Tensor, items: Tensor, index: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """``sum_l s_l x_l`` with ``s_l = query . x_l`` over indexed item vectors.

    Args:
        query: ``[R, d]``.
        items: ``[U, d]``.
        index: ``[R, K]`` int64 rows of ``items``.
        mask: ``[R, K]`` bool, True = real.

    Returns:
        ``(the sum [R, d], scores [R, K] without gradient, 0 at padding)``.
    """
    return _SoftSearch.apply(query.to(items.dtype), items, index, mask)
