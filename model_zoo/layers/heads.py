"""Heads: from a row's context, target item and interest to the click's logit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from model_zoo.compat import FeatureMap, MLP_Block

#: an auxiliary loss: an already weighted scalar, or a function of the labels ``[B, 1]`` that gives one
Loss = Tensor | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class HeadShape:
    """What a head is built for.

    Attributes:
        context_dim: width of the embedded context features, 0 if there are none.
        item_dim: d, width of the target item's vector.
        interest_dim: width of the block's answer.
        feature_map: for heads that embed features of their own.
        embedding_dim: width of one feature's embedding.
        output_activation: from logit to prediction.
        longctr_compat: reproduce LongCTR, quirks included.
    """

    context_dim: int
    item_dim: int
    interest_dim: int
    feature_map: FeatureMap
    embedding_dim: int
    output_activation: nn.Module
    longctr_compat: bool = False

    @property
    def width(self) -> int:
        """Width of ``[context ; target ; interest]``."""
        return self.context_dim + self.item_dim + self.interest_dim


@dataclass(frozen=True)
class HeadInputs:
    """What a head reads.

    Attributes:
        context: ``[B, context_dim]`` embedded context features, or None.
        target: ``[B, d]``.
        interest: ``[B, interest_dim]``.
        columns: the raw context columns.
        losses: auxiliary losses are appended here.
    """

    context: Tensor | None
    target: Tensor
    interest: Tensor
    columns: dict[str, Tensor]
    losses: list[Loss] = field(default_factory=list)

    def joined(self, interest: Tensor | None = None) -> Tensor:
        """``[context ; target ; interest]``, with another ``interest`` if one is given."""
        parts = [self.target, self.interest if interest is None else interest]
        return torch.cat(parts if self.context is None else [self.context, *parts], dim=-1)


class MLPHead(nn.Module):
    """``MLP([context ; target ; interest])``, the head of most of LongCTR's models.

    Args:
        shape: widths.
        dnn_hidden_units: widths of the hidden layers.
        dnn_activations: their activation.
        net_dropout: their dropout.
        batch_norm: batch normalisation in them.
    """

    def __init__(
        self,
        shape: HeadShape,
        *,
        dnn_hidden_units: list[int] | None = None,
        dnn_activations: str | list[str] = "ReLU",
        net_dropout: float | list[float] = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.dnn = self.mlp(shape.width, dnn_hidden_units, dnn_activations, net_dropout, batch_norm)

    @staticmethod
    def mlp(width: int, hidden_units: list[int] | None, activations: Any, dropout: Any, batch_norm: bool) -> MLP_Block:
        """FuxiCTR's MLP from ``width`` to one logit."""
        return MLP_Block(
            input_dim=width,
            output_dim=1,
            hidden_units=list(hidden_units if hidden_units is not None else [512, 128, 64]),
            hidden_activations=activations,
            dropout_rates=dropout,
            batch_norm=batch_norm,
        )

    def forward(self, inputs: HeadInputs) -> Tensor:
        """Logits ``[B, 1]``."""
        return self.dnn(inputs.joined())


class ScoreHead(nn.Module):
    """``score + b`` of a block that already compares history and target (``head: dot``); context is not read.

    Args:
        shape: ``interest_dim`` must be 1.
    """

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        if shape.interest_dim != 1:
            raise ValueError(f"head: dot needs a block that returns a score, not a vector of {shape.interest_dim}")
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, inputs: HeadInputs) -> Tensor:
        """Logits ``[B, 1]``."""
        return inputs.interest + self.bias
