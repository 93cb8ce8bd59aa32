"""DSelect-k: k selectors that each spell an expert's number in relaxed bits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo.layers.routers import Routing
from model_zoo.layers.sequence import Sequence
from model_zoo.layers.token_router import Aggregate, RouterLinear, gating_tokens, no_routing, row_mean, token_mean

#: least mass on existing experts that the reachability loss tells apart from none
LEAST_MASS = 1e-6


class DSelectKRouter(nn.Module):
    """``g(x) = sum_j softmax(w(x))_j r_j(x)``, r_j the selector j's weights on the experts; z and w are linear in x.

    Expert e is written in ``m = ceil(log2 n)`` bits, most significant first, and a selector weighs it by
    ``r_j[e] = prod_b (S(z_jb) if bit b of e is 1 else 1 - S(z_jb))``, S the cubic smooth-step over ``(-gamma/2, gamma/2)``.
    S is exactly 0 or 1 outside, so a token is read by few experts once its z are large; at the start it is read by all.
    An expert reads the tokens whose g is positive. If n is no power of two, mass on codes of no expert is lost (the
    gates then sum to less than 1); the reachability loss, the mean over real tokens and selectors of ``1 / sum_e r_j[e]``,
    keeps it low.

    Args:
        input_dim: width of a token.
        num_experts: n.
        topk_experts: k, the number of selectors.
        aggregate: whose gates weigh the experts, see `gating_tokens`.
        gamma: width of the smooth-step.
        entropy_weight: weight of the selectors' mean entropy.
        reachability_weight: weight of the reachability loss.
        renormalize: g is divided by its sum (not done as published).

    Raises:
        ValueError: ``topk_experts`` or ``gamma`` out of range.

    Source: Hazimeh et al., DSelect-k (arXiv 2106.03760), sections 3 and 4, and its released code (per-example gating).
    """

    codes: Tensor

    def __init__(
        self,
        input_dim: int,
        num_experts: int,
        *,
        topk_experts: int = 2,
        aggregate: Aggregate = "last",
        gamma: float = 1.0,
        entropy_weight: float = 0.0,
        reachability_weight: float = 1e-2,
        renormalize: bool = False,
    ) -> None:
        super().__init__()
        if not 1 <= topk_experts <= num_experts:
            raise ValueError(f"topk_experts ({topk_experts}) must lie in 1..{num_experts}, the number of experts")
        if gamma <= 0:
            raise ValueError(f"gamma ({gamma}) must be positive")
        self.num_experts = num_experts
        self.topk = topk_experts
        self.aggregate: Aggregate = aggregate
        self.gamma = gamma
        self.entropy_weight = entropy_weight
        self.reachability_weight = reachability_weight
        self.renormalize = renormalize
        self.bits = (num_experts - 1).bit_length()
        shifts = torch.arange(self.bits - 1, -1, -1)
        codes = (torch.arange(num_experts).unsqueeze(1) >> shifts & 1).bool()  # [n, m], most significant bit first
        self.register_buffer("codes", codes, persistent=False)
        self.z = RouterLinear(input_dim, topk_experts * self.bits) if self.bits else None
        self.w = RouterLinear(input_dim, topk_experts)
        self.init_weights()

    def init_weights(self) -> None:
        """Initial z (uniform within gamma / 100, inside the smooth-step) and w; called again after FuxiCTR's reset."""
        for linear, reach in ((self.z, self.gamma / 100), (self.w, 0.05)):
            for value in () if linear is None else linear.parameters():
                nn.init.uniform_(value, -reach, reach)

    def forward(self, tokens: Sequence, losses: list[Tensor] | None = None) -> Routing:
        """Route; in training the weighted regularisers are appended to ``losses``."""
        if tokens.index.numel() == 0:
            return no_routing(tokens, self.num_experts)
        selected = self.selectors(tokens.items)  # [U, k, n]
        if losses is not None and self.training:
            losses.extend(self._regularisers(selected, tokens))
        gate = (self.w(tokens.items).softmax(-1).unsqueeze(-1) * selected).sum(1)  # [U, n]
        if self.renormalize:
            gate = gate / gate.sum(-1, keepdim=True).clamp(min=torch.finfo(gate.dtype).tiny)
        gating = gating_tokens(tokens, self.aggregate)
        gates = row_mean(F.embedding(gating.index, gate), gating.mask)
        return Routing((gate > 0)[tokens.index], gates.to(tokens.items.dtype))

    def selectors(self, inputs: Tensor) -> Tensor:
        """r of each input, ``[U, d] -> [U, k, n]``."""
        wide = torch.promote_types(inputs.dtype, torch.float32)
        selected = torch.ones(len(inputs), self.topk, self.num_experts, dtype=wide, device=inputs.device)
        if self.z is None:  # one expert
            return selected
        z = self.z(inputs).view(len(inputs), self.topk, self.bits)
        ramp = (z / self.gamma + 0.5).clamp(0, 1)
        one, zero = _cubic(ramp), _cubic(1 - ramp)  # S and 1 - S, each exactly 0 at its end
        for bit in range(self.bits):
            selected = selected * torch.where(self.codes[:, bit], one[..., bit, None], zero[..., bit, None])
        return selected

    def _regularisers(self, selected: Tensor, tokens: Sequence) -> list[Tensor]:
        """The weighted losses in force."""
        terms = []
        if self.entropy_weight:
            entropy = -(selected * (selected + 1e-6).log()).sum(-1).mean(1)  # [U]
            terms.append(self.entropy_weight * token_mean(entropy, tokens))
        if self.reachability_weight and self.num_experts != 1 << self.bits:
            mass = selected.sum(-1).clamp(min=LEAST_MASS)  # [U, k]
            terms.append(self.reachability_weight * token_mean(mass.reciprocal().mean(1), tokens))
        return terms


def _cubic(ramp: Tensor) -> Tensor:
    """``3 u^2 - 2 u^3``: with ``u = z / gamma + 1/2`` the smooth-step ``-2 z^3 / gamma^3 + 3 z / (2 gamma) + 1/2``."""
    return ramp.square() * (3 - 2 * ramp)
