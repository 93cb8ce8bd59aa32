"""MiaSRec: one intent per item of the session, of which a sparse transform keeps the important ones."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo.layers.encoder_layer import EncoderLayer
from model_zoo.layers.entmax import entmax, masked_softmax
from model_zoo.layers.sequence import Sequence


class MiasRecBlock(nn.Module):
    """MiaSRec's kept intents, summarised for the target.

    Tokens are the session's mean item vector (position 0) and its items, positions counted from the newest (1); each
    also says whether its item stands in the session once or more often. A bidirectional transformer and a highway gate
    turn token l into the intent ``o_l``. ``entmax`` of ``Linear [o_0; o_l]`` over the session decides which intents are
    kept. Kept intents are unit vectors, so the amount of importance cancels: it chooses, and gets no gradient.
    An empty history gives zeros.

    Two items of a session are the same if their vectors are equal. So batches of item indices and LongCTR's batches,
    which have a row of ``items`` for each position, get the same answer; it costs one sort of ``items``. The mean token
    is no item: it has no count, and adds to none.

    Args:
        item_dim: d, width of an item vector.
        num_layers: encoder layers.
        num_heads: attention heads; must divide d.
        inner_dim: hidden width of the encoder's feed-forward nets.
        hidden_dropout: on item vectors, encoder input, residual branches and the target.
        attention_dropout: on attention weights.
        beta: weight of the best intent's cosine against the mean cosine's.
        temperature: divides cosines.
        entmax_alpha: 1 < alpha <= 2; the larger, the fewer intents are kept.
        intent_mode: ``paper`` keeps intents of real tokens by importance. ``released`` does what the authors' code does
            with its own settings (alpha = -1): every intent is kept, and padding, as a zero vector at its position, makes
            intents too, which compete for the maximum (the mean is over real tokens). Answers then depend on how far
            the batch is padded.
        max_positions: rows of the position table; older items share the last.
        head: ``dot`` gives ``(beta max_l cos(o_l, q) + (1 - beta) mean_l cos(o_l, q)) / temperature`` as ``[B, 1]`` logits,
            the paper's scoring; ``dnn`` gives ``sum_l softmax_l(cos(o_l, q) / temperature) o_l``, ``[B, d]``.

    Raises:
        ValueError: a setting out of range.

    Source: Choi et al., Multi-intent-aware Session-based Recommendation, SIGIR 2024 (arXiv 2405.00986), and its release;
    alpha = 1.5 is our choice.
    """

    def __init__(
        self,
        item_dim: int,
        *,
        num_layers: int = 2,
        num_heads: int = 2,
        inner_dim: int = 256,
        hidden_dropout: float = 0.1,
        attention_dropout: float = 0.1,
        beta: float = 0.9,
        temperature: float = 0.07,
        entmax_alpha: float = 1.5,
        intent_mode: Literal["paper", "released"] = "paper",
        max_positions: int = 512,
        head: Literal["dnn", "dot"] = "dnn",
    ) -> None:
        super().__init__()
        counts = [("num_layers", 1, num_layers), ("inner_dim", 1, inner_dim), ("max_positions", 2, max_positions)]
        for key, least, count in counts:
            if count < least:
                raise ValueError(f"{key} must be at least {least}, not {count}")
        for key, rate in [("hidden_dropout", hidden_dropout), ("attention_dropout", attention_dropout)]:
            if not 0 <= rate < 1:
                raise ValueError(f"{key} must be at least 0 and below 1, not {rate}")
        if not 0 <= beta <= 1:
            raise ValueError(f"beta must be within 0 and 1, not {beta}")
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, not {temperature}")
        if not 1 < entmax_alpha <= 2:
            raise ValueError(f"entmax_alpha must be above 1 and at most 2, not {entmax_alpha}")
        self.beta = beta
        self.temperature = temperature
        self.entmax_alpha = entmax_alpha
        self.intent_mode = intent_mode
        self.head = head
        self.out_dim = 1 if head == "dot" else item_dim
        self.position = nn.Embedding(max_positions, item_dim)
        self.repeats = nn.Embedding(3, item_dim, padding_idx=0)  # no item, once, more often
        self.norm = nn.LayerNorm(item_dim, eps=1e-12)
        self.dropout = nn.Dropout(hidden_dropout)
        self.encoder = nn.ModuleList(
            EncoderLayer(
                item_dim,
                num_heads,
                inner_dim,
                hidden_dropout,
                attention_dropout=attention_dropout,
                inner_dropout=0.0,
                activation="gelu",
                eps=1e-12,
            )
            for _ in range(num_layers)
        )
        self.highway = nn.Linear(2 * item_dim, item_dim)
        self.importance = nn.Linear(2 * item_dim, 1)
        self.init_weights()

    def init_weights(self) -> None:
        """Matrices and tables N(0, 0.02^2), biases zero, layer norms the identity."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
            else:
                nn.init.constant_(parameter, float("norm" in name and name.endswith("weight")))
        with torch.no_grad():
            self.repeats.weight[0].zero_()

    def forward(self, query: Tensor, sequence: Sequence) -> Tensor:
        """Interest ``[B, d]`` or logits ``[B, 1]`` for the targets ``query [B, d]``."""
        tokens, real = self._tokens(sequence)
        intents = self._intents(tokens, real, sequence)  # [B, 1 + T, d]
        kept, averaged = self._selected(intents, real)
        intents = F.normalize(intents, dim=-1)
        target = F.normalize(self.dropout(query), dim=-1)
        cosine = (intents @ target.unsqueeze(2)).squeeze(2)  # [B, 1 + T]
        if self.head == "dnn":
            return torch.einsum("bt,btd->bd", masked_softmax(cosine / self.temperature, kept), intents)
        best = cosine.masked_fill(~kept, -2.0).amax(1) * kept.any(1)
        mean = (cosine * averaged).sum(1) / averaged.sum(1).clamp(min=1)
        return ((self.beta * best + (1 - self.beta) * mean) / self.temperature).unsqueeze(1)

    def _tokens(self, sequence: Sequence) -> tuple[Tensor, Tensor]:
        """The mean item vector, then the items: ``[B, 1 + T, d]``, zeros at padding, and which of them are real."""
        mask = sequence.mask.unsqueeze(2)
        vectors = sequence.vectors * mask
        mean = vectors.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        real = torch.cat([sequence.mask.any(1, keepdim=True), sequence.mask], 1)
        return self.dropout(torch.cat([mean, vectors], 1)), real

    def _intents(self, tokens: Tensor, real: Tensor, sequence: Sequence) -> Tensor:
        """``o`` of every token, highway included."""
        length = sequence.index.shape[1]
        age = torch.arange(length + 1, 0, -1, device=tokens.device) % (length + 1)  # of the mean token 0, then T, ..., 1
        repeats = F.pad(repeat_counts(sequence), (1, 0))
        hidden = tokens + self.position(age.clamp(max=self.position.num_embeddings - 1)) + self.repeats(repeats)
        hidden = self.dropout(self.norm(hidden))
        for layer in self.encoder:
            hidden = layer(hidden, real)
        gate = torch.sigmoid(self.highway(torch.cat([tokens, hidden], -1)))
        return gate * tokens + (1 - gate) * hidden

    @torch.no_grad()
    def _selected(self, intents: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Intents that count, and those that the mean is over: ``[B, 1 + T]`` bool; neither in an empty row."""
        if self.intent_mode == "released":
            return real[:, :1].expand_as(real), real
        kept = self.importance_of(intents, real) > 0
        return kept, kept

    def importance_of(self, intents: Tensor, real: Tensor) -> Tensor:
        """Importance of each intent in its session, ``[B, 1 + T]``: adds up to 1, and is exactly 0 for dropped ones."""
        pairs = torch.cat([intents[:, :1].expand_as(intents), intents], -1)
        return entmax(self.importance(pairs).squeeze(2), self.entmax_alpha, real)


@torch.no_grad()
def repeat_counts(sequence: Sequence) -> Tensor:
    """1 where an item's vector stands once in its row, 2 where more often, 0 at padding: ``[B, T]`` int64."""
    if "same" not in sequence.memo:
        sequence.memo["same"] = torch.unique(sequence.items, dim=0, return_inverse=True)[1]
    same = sequence.memo["same"]
    apart = torch.arange(-sequence.index.shape[1], 0, device=same.device)  # padding is like nothing else
    ordered, column = torch.where(sequence.mask, same[sequence.index], apart).sort(1)
    equal = ordered[:, 1:] == ordered[:, :-1]
    repeated = F.pad(equal, (1, 0)) | F.pad(equal, (0, 1))
    return sequence.mask * (1 + torch.zeros_like(column).scatter_(1, column, repeated.long()))
