"""DIN's scoring net: an MLP over target, token, their difference and their product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo.compat import MLP_Block
from model_zoo.layers.positions import projected


class DinScores(nn.Module):
    """``MLP([q ; x ; q - x ; q * x])``, one score per token.

    The first layer is linear in the token but for the product: ``W [q ; x ; q - x ; q * x] = (W_q + W_d) q +
    (W_x - W_d) x + W_p (q * x)``. The first term is computed once per row, the second once per item.

    Args:
        dim: d, width of targets and tokens.
        hidden_units: widths of the hidden layers.
        hidden_activations: their activation; ``Dice`` normalises over the tokens given while training.
        output_activation: of the score.
        dropout: on hidden units.

    Source: Zhou et al., DIN, KDD 2018 (arXiv 1706.06978), section 4.3; Dice: section 5.2.
    """

    def __init__(
        self,
        dim: int,
        hidden_units: list[int],
        hidden_activations: str | list[str] = "Dice",
        output_activation: str | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.mlp: nn.Sequential = MLP_Block(
            input_dim=4 * dim,
            output_dim=1,
            hidden_units=list(hidden_units),
            hidden_activations=hidden_activations,
            output_activation=output_activation,
            dropout_rates=dropout,
        ).mlp

    def forward(self, query: Tensor, row: Tensor, items: Tensor, item: Tensor | None = None) -> Tensor:
        """Score N tokens.

        Args:
            query: ``[B, d]`` targets.
            row: ``[N]`` each token's row of ``query``.
            items: ``[U, d]`` item vectors.
            item: ``[N]`` each token's row of ``items``; None: ``items`` are the tokens.

        Returns:
            ``[N]``.
        """
        if row.numel() == 0:
            return items.new_zeros(0)
        first = self.mlp[0]
        assert isinstance(first, nn.Linear)
        of_query, of_token, of_difference, of_product = first.weight.chunk(4, dim=1)  # [a, d] each
        tokens = items if item is None else F.embedding(item, items)
        linear = of_token - of_difference
        by_item = F.linear(tokens, linear) if item is None else projected(item, items, linear)  # [N, a]
        by_row = F.linear(query, of_query + of_difference, first.bias)  # [B, a]
        product = tokens * F.embedding(row, query)
        return self._rest(torch.addmm(by_item, product, of_product.T) + F.embedding(row, by_row)).squeeze(1)

    def _rest(self, hidden: Tensor) -> Tensor:
        """The layers behind the first. A lone token has no variance: its batch normalisation is that of evaluation."""
        rest = self.mlp[1:]
        norms = [m for m in rest.modules() if isinstance(m, nn.BatchNorm1d) and m.training] if len(hidden) == 1 else []
        for norm in norms:
            norm.eval()
        try:
            return rest(hidden)
        finally:
            for norm in norms:
                norm.train()
