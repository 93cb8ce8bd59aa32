"""DIEN's attention of a target over the interests of a history."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo.layers.din_scores import DinScores

AttentionType = Literal["bilinear_attention", "dot_attention", "din_attention"]


class InterestAttention(nn.Module):
    """Scores ``h . q``, ``h^T W q`` or DIN's net over interest and target.

    Args:
        dim: d, width of targets and interests.
        kind: which of the three.
        hidden_units: of DIN's net.
        hidden_activations: of DIN's net.
        dropout: of DIN's net.

    Source: Zhou et al., DIEN, AAAI 2019 (arXiv 1809.03672), eq. 11 (bilinear), with FuxiCTR's alternatives.
    """

    def __init__(
        self,
        dim: int,
        kind: AttentionType,
        hidden_units: list[int],
        hidden_activations: str | list[str],
        dropout: float,
    ) -> None:
        super().__init__()
        if kind == "din_attention":
            self.net = DinScores(dim, hidden_units, hidden_activations, dropout=dropout)
        elif kind == "bilinear_attention":
            self.W_kernel = nn.Parameter(torch.eye(dim))
        self.kind = kind

    def forward(self, query: Tensor, row: Tensor, interests: Tensor) -> Tensor:
        """Scores ``[N]`` of ``interests [N, d]`` that belong to the rows ``row [N]`` of ``query [B, d]``."""
        if self.kind == "din_attention":
            return self.net(query, row, interests)
        if self.kind == "bilinear_attention":
            query = F.linear(query, self.W_kernel)
        return (interests * F.embedding(row, query)).sum(1)
