"""SASRec: causal self-attention over the history; the interest is its newest position."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo.layers.encoder_layer import EncoderLayer
from model_zoo.layers.sequence import Sequence


class SASRecBlock(nn.Module):
    """Item vectors plus learned positions, pre-norm causal attention layers, layer norm; the newest position's vector.

    Positions count from the newest item (0), so neither padding nor a longer history moves them; items older than
    ``max_positions`` share the oldest position's vector. Of the last layer only the newest position's query is computed.
    The interest does not depend on the target, which meets it in the head.

    Args:
        item_dim: d.
        num_layers: attention layers.
        num_heads: attention heads; must divide d.
        hidden_dropout: on item vectors with their positions, and in and after both halves of a layer.
        attention_dropout: on attention weights.
        inner_dim: hidden width of the feed-forward nets; None = d, as in the paper.
        max_positions: rows of the position table.
        head: ``dnn`` gives the vector, ``dot`` its inner product with the target as ``[B, 1]`` logits, the paper's scoring.

    Raises:
        ValueError: a size below 1, a dropout outside 0..1, or ``num_heads`` does not divide d.

    Source: Kang and McAuley, SASRec (arXiv 1808.09781), section III.
    """

    def __init__(
        self,
        item_dim: int,
        *,
        num_layers: int = 2,
        num_heads: int = 2,
        hidden_dropout: float = 0.2,
        attention_dropout: float = 0.2,
        inner_dim: int | None = None,
        max_positions: int = 1000,
        head: Literal["dnn", "dot"] = "dnn",
    ) -> None:
        super().__init__()
        inner = item_dim if inner_dim is None else inner_dim
        for key, value in (("num_layers", num_layers), ("inner_dim", inner), ("max_positions", max_positions)):
            if value < 1:
                raise ValueError(f"{key} must be at least 1, not {value}")
        for key, rate in (("hidden_dropout", hidden_dropout), ("attention_dropout", attention_dropout)):
            if not 0 <= rate <= 1:
                raise ValueError(f"{key} must lie in 0..1, not {rate}")
        self.head = head
        self.out_dim = 1 if head == "dot" else item_dim
        self.positions = nn.Parameter(torch.empty(max_positions, item_dim))
        # the scale of FuxiCTR's embeddings, so that neither items nor positions drown at the start
        nn.init.normal_(self.positions, std=1e-4)
        self.dropout = nn.Dropout(hidden_dropout)
        self.layers = nn.ModuleList(
            SASRecLayer(
                item_dim, num_heads, inner, hidden_dropout, attention_dropout=attention_dropout, norm="pre", eps=1e-8
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(item_dim, eps=1e-8)

    def forward(self, query: Tensor, sequence: Sequence) -> Tensor:
        """Interest of each row.

        Args:
            query: ``[B, d]`` target items; read by ``head: dot`` only.
            sequence: histories.

        Returns:
            ``[B, out_dim]``; zeros for empty rows.
        """
        batch, length = sequence.index.shape
        if batch == 0 or length == 0:
            return query.new_zeros(batch, self.out_dim)
        age = torch.arange(length - 1, -1, -1, device=query.device).clamp(max=len(self.positions) - 1)
        tokens = self.dropout(sequence.vectors + F.embedding(age, self.positions))
        for layer in self.layers[:-1]:
            tokens = layer(tokens, sequence.mask, causal=True)
        newest = self.norm(self.layers[-1].newest(tokens, sequence.mask))  # type: ignore[operator]
        interest = newest.masked_fill(~sequence.mask[:, -1:], 0)
        return (interest * query).sum(-1, keepdim=True) if self.head == "dot" else interest


class SASRecLayer(EncoderLayer):
    """A pre-norm encoder layer that can answer for the newest position alone."""

    def newest(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """The last column of ``forward``.

        Scores are linear in the key's token, so the key projection is absorbed into the one query, and values are pooled
        before they are projected: per position there are two products of width d for each head and no projection.

        Args:
            tokens: ``[B, T, d]``, T >= 1; finite at padding positions too.
            mask: ``[B, T]`` bool, True = real.

        Returns:
            ``[B, d]``; for an empty row something finite.
        """
        attention, heads, dim = self.self_attn, self.self_attn.num_heads, tokens.shape[2]
        of_query, of_key, of_value = attention.in_proj_weight.chunk(3)  # [d, d] each
        query_bias, _, value_bias = attention.in_proj_bias.chunk(3)  # the key's adds the same to all of a row's scores
        read = self.norm1(tokens)
        query = F.linear(read[:, -1], of_query, query_bias).unflatten(1, (heads, -1))  # [B, h, e]
        absorbed = torch.einsum("bhe,hed->bhd", query, of_key.view(heads, -1, dim)) / math.sqrt(dim // heads)
        scores = absorbed @ read.transpose(1, 2)  # [B, h, T]
        weights = scores.masked_fill(~mask.unsqueeze(1), torch.finfo(scores.dtype).min).softmax(-1)
        weights = F.dropout(weights, self.attention_dropout, self.training)
        values = torch.einsum("bhd,hed->bhe", weights @ read, of_value.view(heads, -1, dim))
        values = values + weights.sum(-1, keepdim=True) * value_bias.view(heads, -1)
        attended = tokens[:, -1] + self.dropout1(attention.out_proj(values.flatten(1)))
        return attended + self._feed_forward(self.norm2(attended))
