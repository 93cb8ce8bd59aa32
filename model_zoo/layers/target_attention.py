"""Multi-head target attention over a sequence, optionally truncated to each head's top-k tokens."""

import math

import torch
from torch import Tensor, nn

from model_zoo.layers.attend_items import attend_shared
from model_zoo.layers.attention_branches import BranchRead, run_block
from model_zoo.layers.sequence import Sequence, SharedSequence


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
        use_scale: divide scores by the square root of a head's width.
        use_qkvo: False leaves the four projections out: heads are slices of the item vectors, and a = d.

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
        use_scale: bool = True,
        use_qkvo: bool = True,
    ) -> None:
        super().__init__()
        attention_dim = attention_dim if use_qkvo else item_dim
        if attention_dim % num_heads:
            name = "attention_dim" if use_qkvo else "the width of an item vector"
            raise ValueError(f"{name} ({attention_dim}) must be a multiple of num_heads ({num_heads})")
        self.num_heads = num_heads
        self.topk = topk
        self.attend_padding = attend_padding
        self.out_dim = item_dim
        self.use_qkvo = use_qkvo
        if use_qkvo:
            self.W_q = nn.Linear(item_dim, attention_dim, bias=False)
            self.W_k = nn.Linear(item_dim, attention_dim, bias=False)
            self.W_v = nn.Linear(item_dim, attention_dim, bias=False)
            self.W_o = nn.Linear(attention_dim, item_dim, bias=False)
        self.dropout = dropout
        self.scale = math.sqrt(attention_dim // num_heads) if use_scale else 1.0
        # with one head, W_q^T W_k and W_o W_v are d x d maps, cheaper per row than two d x a ones if d < 2a
        self.folds = use_qkvo and num_heads == 1 and item_dim < 2 * attention_dim

    def forward(self, query: Tensor, sequence: Sequence | SharedSequence) -> Tensor:
        """Attend.

        Args:
            query: ``[B, d]`` target item.
            sequence: history of T tokens; shared ones only where ``shares``.

        Returns:
            ``[B, d]``; zeros for rows without a real token (unless ``attend_padding``).
        """
        if isinstance(sequence, SharedSequence):
            return self.finish(query, [attend_shared(self.absorb(query), sequence, self.topk)])
        return run_block(self, query, sequence)

    @property
    def shares(self) -> bool:
        """Whether it can read a history once for several rows."""
        return not self.attend_padding

    @property
    def attends(self) -> bool:
        """Attention is all that the block does with the history."""
        return not self.attend_padding

    def reads(self) -> list[BranchRead]:
        """One branch over all tokens."""
        dropout = self.dropout if self.training else 0.0
        return [BranchRead(self.num_heads, None, self.topk, dropout, self.attend_padding)]

    def absorb(self, query: Tensor) -> Tensor:
        """Queries in the item space, ``[B, h, d]``: scores are their products with item vectors."""
        heads, dim = self.num_heads, query.shape[1]
        if self.folds:
            absorbed = (query @ (self.W_q.weight.T @ self.W_k.weight)).unsqueeze(1)
        elif self.use_qkvo:
            head_query = self.W_q(query).unflatten(1, (heads, -1))  # [B, h, a/h]
            absorbed = torch.einsum("bhe,hed->bhd", head_query, self.W_k.weight.view(heads, -1, dim))
        else:
            absorbed = query.unsqueeze(1) * self._slices(query)
        return absorbed / self.scale

    def finish(self, query: Tensor, pooled: list[Tensor] | None) -> Tensor:
        """Value and output projections of the pooled items."""
        if pooled is None:
            return query.new_zeros(query.shape[0], self.out_dim)
        heads, (batch, dim) = self.num_heads, query.shape
        if self.folds:
            return pooled[0].reshape(batch, dim) @ (self.W_o.weight @ self.W_v.weight).T
        by_head = pooled[0].reshape(batch, heads, dim)
        if not self.use_qkvo:
            return (by_head * self._slices(query)).sum(1)
        values = torch.einsum("bhd,hed->bhe", by_head, self.W_v.weight.view(heads, -1, dim))
        return self.W_o(values.flatten(1))

    def _slices(self, like: Tensor) -> Tensor:
        """``[h, d]`` one where an item vector's entry belongs to the head."""
        owner = torch.arange(self.out_dim, device=like.device) // (self.out_dim // self.num_heads)
        return (owner == torch.arange(self.num_heads, device=like.device).unsqueeze(1)).to(like.dtype)
