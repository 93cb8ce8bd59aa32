"""A post-norm encoder layer that computes only what is read, over tokens that repeat items and one target."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from model_zoo.layers.attend_items import attend_shared
from model_zoo.layers.attend_rows import attend_heads
from model_zoo.layers.dropout import dropout_factors
from model_zoo.layers.encoder_layer import EncoderLayer
from model_zoo.layers.positions import Positions, projected
from model_zoo.layers.sequence import Sequence, SharedSequence


class TransActLayer(EncoderLayer):
    """`EncoderLayer` over tokens ``[x_l ; q]`` that are given by their halves.

    ``W [x ; q] = W_x x + W_q q``: the item half of a projection is computed once per distinct item, the target half once
    per row. A layer behind the first reads its predecessor's answers as items and has no target half.

    Both methods equal ``torch.nn.TransformerEncoderLayer`` with the padding masked, at the positions that they answer for.
    """

    def all_positions(self, sequence: Sequence, target: Tensor | None) -> Sequence:
        """Encode every real position.

        Args:
            sequence: B rows of T tokens, at least one of them real; items of width w, or of the first half of w.
            target: ``[B, d]`` second half of every token of a row; None if items are whole tokens.

        Returns:
            The same rows with one item ``[N, w]`` for each of the N real positions.
        """
        places = Positions.of(sequence)
        tokens = _with_target(F.embedding(places.item, sequence.items), target, places.row)  # [N, w]
        hidden = self._answer(tokens, self._attend_all(sequence, target))
        index = (sequence.mask.flatten().cumsum(0) - 1).clamp(min=0).view(sequence.mask.shape)
        return Sequence(hidden, index, sequence.mask)

    def newest(self, sequence: Sequence | SharedSequence, target: Tensor | None, columns: int) -> Tensor:
        """Encode the newest ``columns`` columns; keys and values are never projected, queries and pooled tokens are.

        Args:
            sequence: as for `all_positions`, T >= ``columns``; shared histories in evaluation only.
            target: as for `all_positions`.

        Returns:
            ``[B, columns, w]``; finite at padding positions, whose answers mean nothing.
        """
        last = sequence.last(columns)
        read = last if isinstance(last, Sequence) else last.expanded()
        items, index = read.items, read.index
        batch, heads = index.shape[0], self.self_attn.num_heads
        rows = torch.arange(batch, device=index.device).unsqueeze(1).expand_as(index)
        tokens = _with_target(F.embedding(index, items), target, rows)  # [B, R, w]
        item_dim, width = items.shape[1], tokens.shape[2]
        (w_query, w_key, w_value), (b_query, _, b_value) = self._projections()
        query = F.linear(tokens, w_query, b_query).view(batch, columns, heads, width // heads)
        # a key's target half and bias shift all scores of a query alike: the softmax does not see them
        by_head = w_key[:, :item_dim].view(heads, width // heads, item_dim)
        absorbed = torch.einsum("brhe,hed->brhd", query, by_head).reshape(batch, columns * heads, item_dim)
        absorbed = (absorbed / math.sqrt(width // heads)).to(items.dtype)  # autocast lowers only one of them
        pooled, kept = self._pool(absorbed, sequence)  # [B, R h, d], [B, R h, 1]
        pooled = pooled.view(batch, columns, heads, item_dim)
        by_head = w_value[:, :item_dim].view(heads, width // heads, item_dim)
        offset = b_value if target is None else F.linear(target, w_value[:, item_dim:], b_value)  # [w] or [B, w]
        values = torch.einsum("brhd,hed->brhe", pooled, by_head)
        values = values + kept.view(batch, columns, heads, 1) * offset.view(-1, 1, heads, width // heads)
        return self._answer(tokens, self.self_attn.out_proj(values.reshape(batch, columns, width)))

    def _projections(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return self.self_attn.in_proj_weight.chunk(3), self.self_attn.in_proj_bias.chunk(3)

    def _answer(self, tokens: Tensor, attended: Tensor) -> Tensor:
        tokens = self.norm1(tokens + self.dropout1(attended))
        return self.norm2(tokens + self._feed_forward(tokens))

    def _pool(self, query: Tensor, sequence: Sequence | SharedSequence) -> tuple[Tensor, Tensor]:
        """Attention-weighted sums of items, and the sums of the weights that dropout kept (one without dropout)."""
        if isinstance(sequence, SharedSequence):
            return attend_shared(query, sequence), query.new_ones(*query.shape[:2], 1)
        if not self.training or self.attention_dropout == 0:
            pooled = attend_heads(query, sequence.items, sequence.index, sequence.mask)
            return pooled, query.new_ones(*query.shape[:2], 1)
        keep = dropout_factors((*query.shape[:2], sequence.index.shape[1]), self.attention_dropout, query)
        # a column of ones is pooled to the sum of the weights; its query is zero, so it adds nothing to the scores
        items = F.pad(sequence.items, (0, 1), value=1.0)
        pooled = attend_heads(F.pad(query, (0, 1)), items, sequence.index, sequence.mask, keep)
        return pooled[..., :-1], pooled[..., -1:]

    def _attend_all(self, sequence: Sequence, target: Tensor | None) -> Tensor:
        """Attention's answers ``[N, w]`` at the real positions."""
        batch, length = sequence.index.shape
        heads, item_dim = self.self_attn.num_heads, sequence.items.shape[1]
        out = self.self_attn.out_proj
        weight: Tensor = self.self_attn.in_proj_weight
        bias: Tensor = self.self_attn.in_proj_bias
        if heads == 1:  # then W_o W_v is one map w -> w, and values are projected once instead of twice
            (w_query, w_key, w_value), (b_query, b_key, b_value) = self._projections()
            weight = torch.cat([w_query, w_key, out.weight @ w_value])
            bias = torch.cat([b_query, b_key, out.weight @ b_value])
        if target is None:
            tokens = projected(sequence.index, sequence.items, weight, bias)  # [B, T, 3 w]
        else:
            tokens = projected(sequence.index, sequence.items, weight[:, :item_dim])
            tokens += F.linear(target, weight[:, item_dim:], bias).unsqueeze(1)
        query, key, value = tokens.view(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4)  # each [B, h, T, w / h]
        empty = ~sequence.mask.any(1, keepdim=True)  # nothing reads such a row; without a key its softmax may be nan
        allowed = (sequence.mask | empty)[:, None, None, :]
        rate = self.attention_dropout if self.training else 0.0
        answer = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, dropout_p=rate)
        real = sequence.mask.flatten().nonzero().squeeze(1)
        answer = answer.transpose(1, 2).reshape(batch * length, -1).index_select(0, real)
        return answer + out.bias if heads == 1 else out(answer)


def _with_target(items: Tensor, target: Tensor | None, row: Tensor) -> Tensor:
    """``[x ; q]`` of items ``[..., d]`` and the targets of their rows ``[...]``."""
    return items if target is None else torch.cat([items, F.embedding(row, target)], dim=-1)
