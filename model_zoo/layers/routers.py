"""Routers: which experts read each token of a sequence, and with what weight each expert's answer counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from model_zoo.layers.sequence import Sequence
from model_zoo.layers.theme_codebook import ThemeCodebook

GateNorm = Literal["topk_softmax", "softmax_then_mask"]


@dataclass(frozen=True)
class Routing:
    """A router's decision for one batch.

    Attributes:
        experts: ``[B, T, k]`` int64 experts that read each token (meaningless where the sequence's mask is False).
        chosen: ``[B, k]`` int64 experts whose answers count for the row.
        gates: ``[B, k]`` their weights; rows that no expert serves have zeros.
    """

    experts: Tensor
    chosen: Tensor
    gates: Tensor

    def reads(self, expert: int, rows: Tensor) -> Tensor:
        """``[R, T]`` bool: the tokens of ``rows`` that ``expert`` reads (before masking padding)."""
        return (self.experts[rows] == expert).any(-1)


class ThemeRouter(nn.Module):
    """MoS's router: cosine of ``h(x)`` to the theme codebook, top-k (eq. 2-3), ``h`` a two-layer MLP.

    Membership carries no gradient; the gates do, through the kept cosines of the gating token alone. With ``topk=1`` and
    ``gate_norm="topk_softmax"`` the only gate is exactly 1, so ``h`` receives no gradient (the literal eq. 2).

    Args:
        input_dim: width of a router input x.
        codebook: the themes; its dimension is h's output width.
        codebook_dim: D.
        topk: k.
        hidden: width of h's hidden layer; None = D.
        temperature: cosines are divided by it before the softmax.
        gate_norm: ``topk_softmax`` = softmax over kept scores (eq. 2); ``softmax_then_mask`` = softmax over all themes,
            dropped ones set to zero, no renormalisation.
        ema_assign_top1: only the best theme's members move the codebook.
        linear: h is one linear map (for k-means in the item space).
        bias: h's layers have biases.
        encoder: a given h, shared with another router.
    """

    def __init__(
        self,
        input_dim: int,
        codebook: ThemeCodebook,
        *,
        codebook_dim: int,
        topk: int = 1,
        hidden: int | None = None,
        temperature: float = 1.0,
        gate_norm: GateNorm = "topk_softmax",
        ema_assign_top1: bool = False,
        linear: bool = False,
        bias: bool = False,
        encoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        hidden = hidden or codebook_dim
        if encoder is not None:
            self.h = encoder
        elif linear:
            self.h = nn.Linear(input_dim, codebook_dim, bias=bias)
        else:
            self.h = nn.Sequential(
                nn.Linear(input_dim, hidden, bias=bias), nn.ReLU(), nn.Linear(hidden, codebook_dim, bias=bias)
            )
        self.codebook = codebook
        self.topk = topk
        self.temperature = temperature
        self.gate_norm = gate_norm
        self.ema_assign_top1 = ema_assign_top1

    def encode(self, inputs: Tensor) -> Tensor:
        """h(x), fp32 whatever the autocast state: ``[..., input_dim] -> [..., D]``."""
        with torch.autocast(inputs.device.type, enabled=False):
            return self.h(inputs.float() if inputs.dtype != torch.double else inputs)

    def forward(
        self, tokens: Sequence, gating: Tensor | None = None, *, update_codebook: bool = False
    ) -> Routing:
        """Route.

        Args:
            tokens: sequence of router inputs, T >= 1.
            gating: ``[B, input_dim]`` inputs whose themes gate the experts; None = each row's newest token (eq. 6-7).
            update_codebook: apply eq. 4 with this batch's members after scoring.
        """
        with torch.no_grad():
            hidden = self.encode(tokens.items)  # [U, D]
            best = self.codebook.cosine(hidden).topk(self.topk, dim=-1).indices  # [U, k]
        experts = best[tokens.index]  # [B, T, k]
        if gating is None:
            gating, chosen = tokens.last_vectors, experts[:, -1]
        else:
            with torch.no_grad():
                chosen = self.codebook.cosine(self.encode(gating)).topk(self.topk, dim=-1).indices
        gates = self._gates(gating, chosen)
        if update_codebook:
            members = best[:, :1] if self.ema_assign_top1 else best
            self.codebook.ema_update(hidden, members, occurrences(tokens))
        return Routing(experts, chosen, gates)

    def commitment(self, tokens: Sequence) -> Tensor:
        """VQ-VAE commitment term: mean over real tokens and their themes of ``|h(x) - sg(W_i)|^2``."""
        hidden = self.encode(tokens.items)
        best = self.codebook.cosine(hidden.detach()).topk(self.topk, dim=-1).indices
        gap = (hidden.unsqueeze(1) - self.codebook.codes.detach()[best]).square().sum(-1).mean(1)  # [U]
        weight = occurrences(tokens).to(gap.dtype)
        return (gap * weight).sum() / weight.sum().clamp(min=1)

    def _gates(self, gating: Tensor, chosen: Tensor) -> Tensor:
        """Weights ``[B, k]`` of the chosen experts from the cosines of the gating inputs (eq. 2)."""
        if self.topk == 1 and self.gate_norm == "topk_softmax":
            return torch.ones(chosen.shape, dtype=gating.dtype, device=gating.device)
        scores = self.codebook.cosine(self.encode(gating)) / self.temperature  # [B, n]
        if self.gate_norm == "topk_softmax":
            return scores.gather(1, chosen).softmax(-1).to(gating.dtype)
        return scores.softmax(-1).gather(1, chosen).to(gating.dtype)


def occurrences(tokens: Sequence) -> Tensor:
    """``[U]`` how many real positions hold each row of ``tokens.items``."""
    return torch.bincount(tokens.index[tokens.mask], minlength=tokens.items.shape[0])
