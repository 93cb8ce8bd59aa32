"""Atten-Mixer: the newest items, taken 1 to K at a time, attend over the session at several levels of intent."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo.layers.entmax import masked_softmax
from model_zoo.layers.sequence import Sequence


class AttenMixerBlock(nn.Module):
    """Atten-Mixer's session vector ``s``, a unit vector, or its scaled cosine to the target.

    With unit item vectors h (newest h_t), level i = 1..K asks ``q_i = Linear_i [h_t; ...; h_(t-i+1)]`` (zeros before the
    first item). Each head softens ``2 sigmoid(q_i . k_l)`` over the session, L_p-pools the K levels and softens twice the
    pool again into one set of weights: ``s = normalize(Linear [LayerNorm(sum_l a_l v_l); h_t])``. Neither s nor its
    attention sees the target. An empty history gives zeros.

    A level's query is scaled to unit length over its features, as items are: its scores then stay comparable whatever
    the number of items in it. The released code divides by the norm over the K levels instead; ``legacy_view`` does too.

    Args:
        item_dim: d, width of an item vector.
        last_k: K, levels, and newest items they read.
        num_heads: attention heads; must divide d.
        lp_pool: p of the pooling over levels.
        input_dropout: on item vectors before they get unit length, position by position, and with ``head: dot`` on the
            unit target. With 0, training projects keys and values once per distinct item, as evaluation does.
        attention_dropout: on the final weights.
        score_scale: factor of the cosine with ``head: dot``.
        legacy_view: what the released code computes: queries and keys are cut into heads by a view of their memory, which
            mixes positions (levels) with features; queries are normalised across levels; padding, of which every row has
            a column more, takes part in the first softmax. Answers then depend on how far the batch is padded.
        head: ``dnn`` gives s ``[B, d]``, ``dot`` gives ``score_scale cos(s, q)`` as ``[B, 1]`` logits, the paper's scoring.

    Raises:
        ValueError: a setting out of range.

    Source: Zhang et al., Efficiently Leveraging Multi-level User Intent for Session-based Recommendation via Atten-Mixer
    Network, WSDM 2023 (arXiv 2206.12781); projections, normalisations and constants from the authors' release.
    """

    def __init__(
        self,
        item_dim: int,
        *,
        last_k: int = 7,
        num_heads: int = 8,
        lp_pool: int = 4,
        input_dropout: float = 0.1,
        attention_dropout: float = 0.1,
        score_scale: float = 16.0,
        legacy_view: bool = False,
        head: Literal["dnn", "dot"] = "dnn",
    ) -> None:
        super().__init__()
        for key, least, value in [("last_k", 1, last_k), ("num_heads", 1, num_heads), ("lp_pool", 1, lp_pool)]:
            if value < least:
                raise ValueError(f"{key} must be at least {least}, not {value}")
        for key, rate in [("input_dropout", input_dropout), ("attention_dropout", attention_dropout)]:
            if not 0 <= rate < 1:
                raise ValueError(f"{key} must be at least 0 and below 1, not {rate}")
        if item_dim % num_heads:
            raise ValueError(f"num_heads ({num_heads}) must divide the width of an item vector ({item_dim})")
        self.last_k = last_k
        self.num_heads = num_heads
        self.lp_pool = lp_pool
        self.input_dropout = input_dropout
        self.attention_dropout = attention_dropout
        self.score_scale = score_scale
        self.legacy_view = legacy_view
        self.head = head
        self.out_dim = 1 if head == "dot" else item_dim
        self.levels = nn.ModuleList([nn.Linear(i * item_dim, item_dim) for i in range(1, last_k + 1)])
        self.W_q = nn.Linear(item_dim, item_dim)
        self.W_k = nn.Linear(item_dim, item_dim)
        self.W_v = nn.Linear(item_dim, item_dim)
        self.norm = nn.LayerNorm(item_dim, eps=1e-8)
        self.session = nn.Linear(2 * item_dim, item_dim)
        self.init_weights()

    def init_weights(self) -> None:
        """Every parameter, the layer norm's too, uniform within 1 / sqrt(d)."""
        bound = self.norm.normalized_shape[0] ** -0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, query: Tensor, sequence: Sequence) -> Tensor:
        """Session vectors ``[B, d]``, or logits ``[B, 1]`` for the targets ``query [B, d]``."""
        if sequence.index.numel() == 0:
            return query.new_zeros(query.shape[0], self.out_dim)
        units = self._units(sequence)
        newest = self._newest(units)  # [B, K, d]
        mixed = self._attend(self._level_queries(newest), units)
        session = F.normalize(self.session(torch.cat([self.norm(mixed), newest[:, 0]], 1)), dim=-1)
        session = session * sequence.mask.any(1, keepdim=True)
        if self.head == "dnn":
            return session
        target = F.dropout(F.normalize(query, dim=-1), self.input_dropout, self.training)
        return self.score_scale * (session * target).sum(1, keepdim=True)

    def _units(self, sequence: Sequence) -> Sequence:
        """The history of unit vectors; a row per position if they are dropped out, since each position draws its own."""
        if not self.training or self.input_dropout == 0:
            return Sequence(F.normalize(sequence.items, dim=-1), sequence.index, sequence.mask)
        dropped = F.dropout(sequence.vectors, self.input_dropout)
        return Sequence.from_vectors(F.normalize(dropped, dim=-1), sequence.mask)

    def _newest(self, units: Sequence) -> Tensor:
        """The K newest items, newest first, zeros beyond the history: ``[B, K, d]``."""
        newest = units.last(self.last_k)
        vectors = newest.vectors * newest.mask.unsqueeze(2)
        return F.pad(vectors.flip(1), (0, 0, 0, self.last_k - vectors.shape[1]))

    def _level_queries(self, newest: Tensor) -> Tensor:
        """``[B, K, d]``: level i reads the i newest items."""
        levels = [linear(newest[:, :i].flatten(1)) for i, linear in enumerate(self.levels, 1)]
        return F.normalize(torch.stack(levels, 1), dim=1 if self.legacy_view else 2)

    def _attend(self, levels: Tensor, units: Sequence) -> Tensor:
        """``[B, d]``: every head's weighted sum of values; zeros for an empty row."""
        if self.legacy_view:
            units = self._left_aligned(units)
        keys = units.project(self.W_k)  # [B, T, d]
        values = units.project(self.W_v).view(*keys.shape[:2], self.num_heads, -1)
        real = units.mask.unsqueeze(1)  # [B, 1, T]
        if self.legacy_view:
            keys = torch.where(units.mask.unsqueeze(2), keys, self.W_k.bias)  # padding is a zero vector
        scores = torch.sigmoid(self._by_head(self.W_q(levels)) @ self._by_head(keys).transpose(2, 3))  # [B, H, K, T]
        weight = (2 * scores).softmax(-1) if self.legacy_view else masked_softmax(2 * scores, real.unsqueeze(1))
        pooled = torch.linalg.vector_norm(weight, ord=self.lp_pool, dim=2)  # [B, H, T]
        weight = F.dropout(masked_softmax(2 * pooled, real), self.attention_dropout, self.training)
        return torch.einsum("bht,bthe->bhe", weight, values).flatten(1)

    def _by_head(self, vectors: Tensor) -> Tensor:
        """``[B, N, d]`` to ``[B, H, N, d / H]``; under ``legacy_view`` the same memory read in that shape."""
        batch, count, dim = vectors.shape
        if self.legacy_view:
            return vectors.reshape(batch, self.num_heads, count, dim // self.num_heads)
        return vectors.view(batch, count, self.num_heads, -1).transpose(1, 2)

    @staticmethod
    def _left_aligned(sequence: Sequence) -> Sequence:
        """As the release pads: T + 1 columns, real tokens first, in every row a column of padding at the end."""
        length, lengths = sequence.index.shape[1], sequence.lengths.unsqueeze(1)
        column = torch.arange(length + 1, device=sequence.index.device)
        index = sequence.index.gather(1, (column + length - lengths).clamp(max=length - 1))
        return Sequence(sequence.items, index, column < lengths)
