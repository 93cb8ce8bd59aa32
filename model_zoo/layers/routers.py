"""Routers: which experts read each token of a sequence, and with what weight each expert's answer counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo.layers.sequence import Sequence
from model_zoo.layers.theme_codebook import ThemeCodebook
from model_zoo.layers.windows import Windows

if TYPE_CHECKING:
    from model_zoo.layers.taxonomy import Taxonomy

GateNorm = Literal["topk_softmax", "softmax_then_mask"]


@dataclass(frozen=True)
class Routing:
    """A router's decision for one batch.

    Attributes:
        members: ``[B, T, n]`` bool, the experts that read each token (meaningless where the sequence's mask is False).
        gates: ``[B, n]`` weights of the experts' answers; an expert of weight 0 does not serve the row.
    """

    members: Tensor
    gates: Tensor

    def slots(self, active: Tensor) -> Tensor:
        """``[B, S]`` int64 experts that serve each row, S the most of any row; -1 where a row has fewer.

        Args:
            active: ``[B]`` bool; the other rows have no expert.
        """
        serves = (self.gates != 0) & active.unsqueeze(1)
        most = int(serves.sum(1).max()) if serves.numel() else 0
        found, expert = serves.to(torch.uint8).sort(dim=1, descending=True, stable=True)
        return torch.where(found[:, :most].bool(), expert[:, :most], -1)


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
        self.taxonomy: Taxonomy | None = None
        self.topk = topk
        self.temperature = temperature
        self.gate_norm = gate_norm
        self.ema_assign_top1 = ema_assign_top1

    def encode(self, inputs: Tensor) -> Tensor:
        """h(x), fp32 whatever the autocast state: ``[..., input_dim] -> [..., D]``."""
        with torch.autocast(inputs.device.type, enabled=False):
            return self.h(inputs.float() if inputs.dtype != torch.double else inputs)

    def encode_tokens(self, tokens: Sequence | Windows) -> Tensor:
        """h of every item row, or of every existing window, ``[U, D]``.

        h's first layer is linear, so it is applied to the items and its results are averaged over the windows: exact.
        """
        if isinstance(tokens, Sequence):
            return self.encode(tokens.items)
        items = tokens.source.items
        with torch.autocast(items.device.type, enabled=False):
            first, *rest = list(self.h) if isinstance(self.h, nn.Sequential) else [self.h]
            assert isinstance(first, nn.Linear)
            hidden = tokens.means(F.linear(items if items.dtype == torch.double else items.float(), first.weight))
            hidden = hidden if first.bias is None else hidden + first.bias
            for layer in rest:
                hidden = layer(hidden)
            return hidden

    def forward(
        self, tokens: Sequence | Windows, gating: Tensor | None = None, *, update_codebook: bool = False
    ) -> Routing:
        """Route.

        Args:
            tokens: sequence of router inputs, T >= 1, or windows of which h reads the means.
            gating: ``[B, input_dim]`` inputs whose themes gate the experts; None = each row's newest token (eq. 6-7).
            update_codebook: apply eq. 4 with this batch's members after scoring.
        """
        with torch.no_grad():
            hidden = self.encode_tokens(tokens)  # [U, D]
            best = self.codebook.nearest(hidden, self.topk)  # [U, k]
            table = torch.zeros(max(len(best), 1), self.codebook.num_themes, dtype=torch.bool, device=best.device)
            found = table.scatter_(1, best, True).index_select(0, tokens.index.reshape(-1))
            members = found.view(*tokens.index.shape, -1)  # [B, T, n]
            if gating is None:
                chosen = best[tokens.index[:, -1]] if len(best) else best.new_zeros(len(members), self.topk)
            else:
                chosen = self.codebook.nearest(self.encode(gating), self.topk)
        gates = self._gates(tokens.last_vectors if gating is None else gating, chosen)
        if update_codebook:
            moving = best[:, :1] if self.ema_assign_top1 else best
            self.codebook.ema_update(hidden, moving, occurrences(tokens))
        return Routing(members, gates)

    def commitment(self, tokens: Sequence) -> Tensor:
        """VQ-VAE commitment term: mean over real tokens and their themes of ``|h(x) - sg(W_i)|^2``."""
        hidden = self.encode(tokens.items)
        best = self.codebook.nearest(hidden.detach(), self.topk)
        gap = (hidden.unsqueeze(1) - self.codebook.codes.detach()[best]).square().sum(-1).mean(1)  # [U]
        weight = occurrences(tokens).to(gap.dtype)
        return (gap * weight).sum() / weight.sum().clamp(min=1)

    def _gates(self, gating: Tensor, chosen: Tensor) -> Tensor:
        """Weights ``[B, n]`` of the experts from the cosines of the gating inputs (eq. 2), zero for those not chosen."""
        weights = gating.new_zeros(len(chosen), self.codebook.num_themes)
        if self.topk == 1 and self.gate_norm == "topk_softmax":
            return weights.scatter(1, chosen, 1.0)
        scores = self.codebook.cosine(self.encode(gating)) / self.temperature  # [B, n]
        if self.gate_norm == "topk_softmax":
            kept = scores.gather(1, chosen).softmax(-1)
        else:
            kept = scores.softmax(-1).gather(1, chosen)
        return weights.scatter(1, chosen, kept.to(weights.dtype))


def occurrences(tokens: Sequence | Windows) -> Tensor:
    """``[U]`` how many real positions hold each item row; once each existing window."""
    if isinstance(tokens, Windows):
        return torch.ones(int(tokens.mask.sum()), dtype=torch.long, device=tokens.mask.device)
    index = tokens.index.reshape(-1) if bool(tokens.mask.all()) else tokens.index[tokens.mask]
    return torch.bincount(index, minlength=tokens.items.shape[0])
