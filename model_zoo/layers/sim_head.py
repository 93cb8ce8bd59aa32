"""SIM's head: one MLP reads the interest, another the pooled history of the search, which learns from its loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo.layers.heads import HeadInputs, HeadShape, MLPHead


class SIMHead(nn.Module):
    """``dnn([context ; target ; short ; long])``, and for the search's loss ``dnn_aux([context ; target ; pooled])``.

    The whole loss is ``alpha BCE(dnn_aux) + beta BCE(dnn)``: the model adds ``BCE(dnn)`` itself, the head appends the
    rest. Under ``longctr_compat`` it appends nothing: FuxiCTR 2.3.2 never called LongCTR's method with that loss, so the
    search was not trained in any recorded run.

    Args:
        shape: ``interest_dim`` is 3d, of a `SIMBlock`.
        alpha: weight of the search's loss.
        beta: weight of the prediction's loss.
        dnn_hidden_units: widths of the hidden layers of both MLPs.
        dnn_activations: their activation.
        net_dropout: their dropout.
        batch_norm: batch normalisation in them.

    Raises:
        ValueError: a negative weight, or an interest of another width.

    Source: SIM (arXiv 2006.05639), the loss of both stages.
    """

    def __init__(
        self,
        shape: HeadShape,
        *,
        alpha: float = 1.0,
        beta: float = 1.0,
        dnn_hidden_units: list[int] | None = None,
        dnn_activations: str | list[str] = "ReLU",
        net_dropout: float | list[float] = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        for name, weight in (("alpha", alpha), ("beta", beta)):
            if weight < 0:
                raise ValueError(f"{name} must not be negative, not {weight}")
        if shape.interest_dim != 3 * shape.item_dim:
            raise ValueError(f"SIM's head reads an interest of width 3d ({3 * shape.item_dim}), not {shape.interest_dim}")
        self.alpha, self.beta = alpha, beta
        self.longctr_compat = shape.longctr_compat
        self.interest_dim = 2 * shape.item_dim
        width = shape.width - shape.interest_dim
        settings = (dnn_hidden_units, dnn_activations, net_dropout, batch_norm)
        self.dnn_aux = MLPHead.mlp(width + shape.item_dim, *settings)
        self.dnn = MLPHead.mlp(width + self.interest_dim, *settings)

    def forward(self, inputs: HeadInputs) -> Tensor:
        """Logits ``[B, 1]``; what the losses need beside ``BCE(dnn)`` goes to ``inputs.losses``."""
        interest, pooled = inputs.interest[:, : self.interest_dim], inputs.interest[:, self.interest_dim :]
        # frozen heads are in evaluation mode while the blocks below them train
        learning = self.training or torch.is_grad_enabled()
        searched = self.dnn_aux(inputs.joined(pooled)) if learning else None
        logits = self.dnn(inputs.joined(interest))
        if searched is not None and not self.longctr_compat:
            inputs.losses.extend([weighted_bce(self.alpha, searched), weighted_bce(self.beta - 1, logits)])
        return logits


def weighted_bce(weight: float, logits: Tensor) -> Callable[[Tensor], Tensor]:
    """The label's function ``weight * BCE(sigmoid(logits), label)``, in single precision at least."""

    def loss(label: Tensor) -> Tensor:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return weight * F.binary_cross_entropy_with_logits(wide, label.to(wide.dtype))

    return loss
