"""Heads with a cross network: TransAct's and DCNv2's."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from model_zoo.compat import CrossNetMix, CrossNetV2, MLP_Block
from model_zoo.layers.heads import HeadInputs, HeadShape

Activations = str | list[str]
Rates = float | list[float]


class TransActHead(nn.Module):
    """``MLP([CrossNet(z) ; MLP(z)])`` with ``z = [context ; target ; interest]``.

    Args:
        shape: widths.
        dcn_cross_layers: cross layers, ``x_{i+1} = x_i + x_0 * (W_i x_i + b_i)``.
        dcn_hidden_units: hidden widths of the net beside them; None = [256, 128, 64].
        mlp_hidden_units: hidden widths of the net on top; None = none.
        hidden_activations: activation in both nets.
        net_dropout: dropout in the net beside.
        batch_norm: batch normalisation in the net beside.

    Raises:
        ValueError: no hidden layer in the net beside, or a negative number of cross layers.

    Source: LongCTR's TransAct; cross layers: Wang et al., DCN V2, WWW 2021 (arXiv 2008.13535), eq. 1.
    """

    def __init__(
        self,
        shape: HeadShape,
        *,
        dcn_cross_layers: int = 3,
        dcn_hidden_units: list[int] | None = None,
        mlp_hidden_units: list[int] | None = None,
        hidden_activations: Activations = "ReLU",
        net_dropout: Rates = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        _at_least("dcn_cross_layers", dcn_cross_layers, 0)
        units = _hidden("dcn_hidden_units", dcn_hidden_units, [256, 128, 64])
        self.crossnet = CrossNetV2(shape.width, dcn_cross_layers)
        self.parallel_dnn = MLP_Block(
            input_dim=shape.width,
            hidden_units=units,
            hidden_activations=hidden_activations,
            dropout_rates=net_dropout,
            batch_norm=batch_norm,
        )
        self.mlp = MLP_Block(
            input_dim=shape.width + units[-1],
            output_dim=1,
            hidden_units=list(mlp_hidden_units or []),
            hidden_activations=hidden_activations,
        )

    def forward(self, inputs: HeadInputs) -> Tensor:
        """Logits ``[B, 1]``."""
        joined = inputs.joined()
        return self.mlp(torch.cat([self.crossnet(joined), self.parallel_dnn(joined)], dim=-1))


class DCNv2Head(nn.Module):
    """A cross network over ``z = [context ; target ; interest]``, alone, under, or beside a deep net.

    Args:
        shape: widths.
        model_structure: ``crossnet_only``; ``stacked``: the deep net reads the cross network; ``parallel``: both read z;
            ``stacked_parallel``: one deep net of each kind.
        use_low_rank_mixture: cross layers as a gated mixture of low-rank maps.
        low_rank: their rank.
        num_experts: how many are mixed.
        stacked_dnn_hidden_units: hidden widths of the stacked net; None = [500, 500, 500].
        parallel_dnn_hidden_units: hidden widths of the parallel net; None = [500, 500, 500].
        dnn_activations: activation in both.
        num_cross_layers: cross layers.
        net_dropout: dropout in both.
        batch_norm: batch normalisation in both.

    Raises:
        ValueError: counts out of range, or a deep net of the chosen structure without a hidden layer.

    Source: Wang et al., DCN V2, WWW 2021 (arXiv 2008.13535), section 3: eq. 1, low-rank mixture eq. 4, structures fig. 1.
    """

    def __init__(
        self,
        shape: HeadShape,
        *,
        model_structure: Literal["crossnet_only", "stacked", "parallel", "stacked_parallel"] = "parallel",
        use_low_rank_mixture: bool = False,
        low_rank: int = 32,
        num_experts: int = 4,
        stacked_dnn_hidden_units: list[int] | None = None,
        parallel_dnn_hidden_units: list[int] | None = None,
        dnn_activations: Activations = "ReLU",
        num_cross_layers: int = 3,
        net_dropout: Rates = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        for key, value, least in (
            ("num_cross_layers", num_cross_layers, 0),
            ("low_rank", low_rank, 1),
            ("num_experts", num_experts, 1),
        ):
            _at_least(key, value, least)
        if use_low_rank_mixture:
            self.crossnet = CrossNetMix(shape.width, num_cross_layers, low_rank=low_rank, num_experts=num_experts)
        else:
            self.crossnet = CrossNetV2(shape.width, num_cross_layers)

        def deep(units: list[int]) -> MLP_Block:
            return MLP_Block(
                input_dim=shape.width,
                hidden_units=units,
                hidden_activations=dnn_activations,
                dropout_rates=net_dropout,
                batch_norm=batch_norm,
            )

        self.stacked_dnn = self.parallel_dnn = None
        width = 0 if "stacked" in model_structure else shape.width
        if "stacked" in model_structure:
            units = _hidden("stacked_dnn_hidden_units", stacked_dnn_hidden_units, [500, 500, 500])
            self.stacked_dnn = deep(units)
            width += units[-1]
        if "parallel" in model_structure:
            units = _hidden("parallel_dnn_hidden_units", parallel_dnn_hidden_units, [500, 500, 500])
            self.parallel_dnn = deep(units)
            width += units[-1]
        self.fc = nn.Linear(width, 1)

    def forward(self, inputs: HeadInputs) -> Tensor:
        """Logits ``[B, 1]``."""
        joined = inputs.joined()
        crossed = self.crossnet(joined).view_as(joined)  # the mixture drops the batch axis of a batch of one
        parts = [crossed if self.stacked_dnn is None else self.stacked_dnn(crossed)]
        if self.parallel_dnn is not None:
            parts.append(self.parallel_dnn(joined))
        return self.fc(torch.cat(parts, dim=-1))


def _at_least(key: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{key} must be at least {least}, not {value}")


def _hidden(key: str, units: list[int] | None, default: list[int]) -> list[int]:
    """Hidden widths, of which there must be one."""
    if units is None:
        return default
    if not units:
        raise ValueError(f"{key} must name at least one layer, not {units}")
    return list(units)
