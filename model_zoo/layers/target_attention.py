"""Multi-head target attention over a sequence, optionally truncated to each head's top-k tokens."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo.layers.sequence import Sequence

MASKED_SCORE = -1.0e9


class _AttendItems(torch.autograd.Function):
    """`attend_items` with a backward of two batched products and one scatter."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, items: Tensor, index: Tensor, mask: Tensor, keep: Tensor | None,
                attend_padding: bool) -> Tensor:  # fmt: skip
        vectors = items.index_select(0, index.reshape(-1)).view(*index.shape, -1)  # [R, K, d]
        scores = query @ vectors.transpose(1, 2)  # [R, H, K]
        weight = scores.masked_fill_(~mask.unsqueeze(1), MASKED_SCORE).softmax(-1)
        if not attend_padding:
            weight = weight * mask.unsqueeze(1)
        kept = weight if keep is None else weight * keep
        ctx.save_for_backward(query, vectors, index, weight, kept, keep, mask)
        ctx.num_items = items.shape[0]
        return kept @ vectors

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, vectors, index, weight, kept, keep, mask = ctx.saved_tensors
        d_weight = grad @ vectors.transpose(1, 2)  # [R, H, K]
        if keep is not None:
            d_weight = d_weight * keep
        # softmax; a masked score is a constant and passes no gradient
        d_scores = weight * (d_weight - (weight * d_weight).sum(-1, keepdim=True)) * mask.unsqueeze(1)
        d_query = d_scores @ vectors
        d_items = None
        if ctx.needs_input_grad[1]:
            # each position's row receives kept^T grad + d_scores^T query: one product with the two stacked
            rows = torch.cat([kept, d_scores], 1).transpose(1, 2) @ torch.cat([grad, query], 1)
            d_items = rows.new_zeros(ctx.num_items, rows.shape[-1])
            d_items.index_add_(0, index.reshape(-1), rows.view(-1, rows.shape[-1]))
        return d_query, d_items, None, None, None, None


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


class TargetAttention(nn.Module):
    """Scaled dot-product attention of the target item over its history, four projections without bias.

    Scores are linear in the item vector, so the key projection is absorbed into the query, ``(W_k^T q) . x``, and values
    are pooled before they are projected, ``W_v (sum_l a_l x_l)``: nothing is projected per position. With ``topk`` the
    kept tokens are chosen without a gradient (none reaches a dropped token) and only kept rows are differentiated.

    Args:
        item_dim: d.
        attention_dim: a, over all heads.
        num_heads: h; must divide a.
        dropout: probability on the attention weights.
        topk: tokens kept per head; None keeps all.
        attend_padding: a row without a real token attends evenly to its padding, as LongCTR does; otherwise it gives zeros.

    Source: TWIN (arXiv 2302.02352): the search (GSU) and the attention (ESU) share their projections.
    """

    def __init__(
        self,
        item_dim: int,
        attention_dim: int,
        num_heads: int = 1,
        dropout: float = 0.0,
        topk: int | None = None,
        attend_padding: bool = False,
    ) -> None:
        super().__init__()
        if attention_dim % num_heads:
            raise ValueError(f"attention_dim ({attention_dim}) must be a multiple of num_heads ({num_heads})")
        self.num_heads = num_heads
        self.topk = topk
        self.attend_padding = attend_padding
        self.out_dim = item_dim
        self.W_q = nn.Linear(item_dim, attention_dim, bias=False)
        self.W_k = nn.Linear(item_dim, attention_dim, bias=False)
        self.W_v = nn.Linear(item_dim, attention_dim, bias=False)
        self.W_o = nn.Linear(attention_dim, item_dim, bias=False)
        self.dropout = dropout

    def forward(self, query: Tensor, sequence: Sequence) -> Tensor:
        """Attend.

        Args:
            query: ``[B, d]`` target item.
            sequence: history of T tokens.

        Returns:
            ``[B, d]``; zeros for rows without a real token (unless ``attend_padding``).
        """
        batch, length = sequence.index.shape
        if length == 0 or batch == 0:
            return query.new_zeros(batch, self.out_dim)
        heads, dim = self.num_heads, query.shape[1]
        head_query = self.W_q(query).view(batch, heads, -1)  # [B, h, a/h]
        absorbed = torch.einsum("bhe,hed->bhd", head_query, self.W_k.weight.view(heads, -1, dim))
        absorbed = absorbed / math.sqrt(head_query.shape[2])
        index, mask = sequence.index, sequence.mask  # [B, T], shared by the heads
        if self.topk is not None and self.topk < length:
            kept = self._select(absorbed, sequence)  # [B, h, k] columns
            index = index.unsqueeze(1).expand(-1, heads, -1).gather(2, kept).flatten(0, 1)  # [B * h, k]
            mask = mask.unsqueeze(1).expand(-1, heads, -1).gather(2, kept).flatten(0, 1)
            absorbed = absorbed.reshape(batch * heads, 1, dim)
        keep = None
        if self.training and self.dropout > 0:
            ones = absorbed.new_ones(absorbed.shape[0], absorbed.shape[1], index.shape[1])
            keep = F.dropout(ones, self.dropout)
        pooled = attend_items(absorbed, sequence.items, index, mask, keep, self.attend_padding).view(batch, heads, dim)
        values = torch.einsum("bhd,hed->bhe", pooled, self.W_v.weight.view(heads, -1, dim))
        return self.W_o(values.reshape(batch, -1))

    @torch.no_grad()
    def _select(self, absorbed: Tensor, sequence: Sequence) -> Tensor:
        """Columns of each head's ``topk`` best-scored tokens, ``[B, h, topk]``."""
        assert self.topk is not None
        batch, length = sequence.index.shape
        # by groups of rows whose gathered vectors fit in a core's cache; on a GPU in fewer, larger groups
        budget = 2**26 if absorbed.is_cuda else 2**18
        rows = max(budget // (length * absorbed.shape[2]), 1)
        scores = absorbed.new_empty(batch, self.num_heads, length)
        for start in range(0, batch, rows):
            group = slice(start, start + rows)
            vectors = sequence.items[sequence.index[group]]
            torch.matmul(absorbed[group], vectors.transpose(1, 2), out=scores[group])
        return scores.masked_fill_(~sequence.mask.unsqueeze(1), MASKED_SCORE).topk(self.topk, dim=-1).indices
