"""DIN: the history summed with weights from a small net over target and item."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from model_zoo.layers.attend_items import MASKED_SCORE
from model_zoo.layers.din_scores import DinScores
from model_zoo.layers.positions import Positions
from model_zoo.layers.sequence import Sequence


class DINBlock(nn.Module):
    """``sum_l a(q, x_l) x_l`` with `DinScores` as a.

    Args:
        item_dim: d, width of an item vector.
        attention_hidden_units: hidden widths of the scoring net; None = [64].
        attention_hidden_activations: their activation; ``Dice`` has batch statistics, taken over the real items.
        attention_output_activation: of a weight.
        attention_dropout: dropout in the scoring net.
        din_use_softmax: normalise weights by a softmax over the history.
        longctr_compat: Dice's batch statistics count padding too, and a softmax over an empty history is an even one over
            its padding.

    Source: Zhou et al., DIN, KDD 2018 (arXiv 1706.06978), eq. 3, as in FuxiCTR's ``DIN_Attention``.
    """

    #: parts of LongCTR's parameter names and ours
    LONGCTR_NAMES: ClassVar[dict[str, str]] = {"attention_layers.attention_layer.": "attention."}

    def __init__(
        self,
        item_dim: int,
        *,
        attention_hidden_units: list[int] | None = None,
        attention_hidden_activations: str | list[str] = "Dice",
        attention_output_activation: str | None = None,
        attention_dropout: float = 0.0,
        din_use_softmax: bool = False,
        longctr_compat: bool = False,
    ) -> None:
        super().__init__()
        self.attention = DinScores(
            item_dim,
            [64] if attention_hidden_units is None else attention_hidden_units,
            attention_hidden_activations,
            attention_output_activation,
            attention_dropout,
        )
        self.softmax = din_use_softmax
        self.longctr_compat = longctr_compat
        self.out_dim = item_dim

    def forward(self, query: Tensor, sequence: Sequence) -> Tensor:
        """``[B, d]`` interest towards ``query [B, d]``; zeros for an empty history."""
        mask = sequence.mask
        read = torch.ones_like(mask) if self.longctr_compat else mask
        places = Positions.of(sequence, read)
        scores = self.attention(query, places.row, sequence.items, places.item)  # [N]
        weights = scores.new_zeros(mask.shape).masked_scatter(read, scores)  # [B, T]
        if self.softmax and mask.shape[1]:
            weights = weights.masked_fill(~mask, MASKED_SCORE).softmax(1)
        elif self.longctr_compat:
            weights = weights * mask
        return places.pool(sequence.items, weights.masked_select(read))
