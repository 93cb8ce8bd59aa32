"""GShard's router: a softmax gate per token and experts of limited capacity."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo.layers.routers import Routing
from model_zoo.layers.sequence import Sequence
from model_zoo.layers.token_router import Aggregate, RouterLinear, gating_tokens, no_routing, row_imbalance, row_mean


class GShardRouter(nn.Module):
    """Top-k gating with capacity: each token asks for its k best experts, and an expert serves its first C applicants.

    The gate is ``softmax(W x)`` (no bias). The group that shares capacity is one row's real tokens, t of them, so rows do
    not compete: ``C = max(min_capacity, ceil(factor k t / n))``. All first choices claim places before any second choice
    does; within a choice the newest token goes first, because the newest token weighs the experts' answers and
    chronological order (``legacy_order``) drops it first. A claim beyond C is dropped: gate 0, the others unchanged.
    Among equal gates the lower-numbered expert is the better one.

    GShard has k = 2; with k > 2 every choice after the first is treated as its second. With k = 1 the gate is the raw
    probability, through which the router still learns.

    Args:
        input_dim: width of a token.
        num_experts: n.
        topk_experts: k.
        aggregate: whose gates weigh the experts, see `gating_tokens`.
        capacity_factor_train: ``factor`` while training.
        capacity_factor_eval: ``factor`` in evaluation.
        min_capacity: least C.
        second_expert_threshold: in training a later choice is tried with probability ``min(1, gate / threshold)``; in
            evaluation, and with 0, always.
        aux_weight: weight of the balance loss ``n sum_e f_e m_e``, f the share of first choices and m the mean gate over
            a row's real tokens, averaged over rows; 1 if choices and gates are spread evenly. 0 = no loss.
        router_init_std: W starts as N(0, std^2).
        legacy_order: places are claimed oldest token first.
        normalize_gates: k > 1 gates of a token are divided by their sum, before any is dropped.

    Raises:
        ValueError: a count, factor or threshold out of range.

    Source: Lepikhin et al., GShard (arXiv 2006.16668), Algorithm 1, as configured in lingvo.
    """

    def __init__(
        self,
        input_dim: int,
        num_experts: int,
        *,
        topk_experts: int = 2,
        aggregate: Aggregate = "last",
        capacity_factor_train: float = 1.25,
        capacity_factor_eval: float = 2.0,
        min_capacity: int = 1,
        second_expert_threshold: float = 0.5,
        aux_weight: float = 0.01,
        router_init_std: float = 0.02,
        legacy_order: bool = False,
        normalize_gates: bool = True,
    ) -> None:
        super().__init__()
        if not 1 <= topk_experts <= num_experts:
            raise ValueError(f"topk_experts ({topk_experts}) must lie in 1..{num_experts}, the number of experts")
        if not all(0 < factor < math.inf for factor in (capacity_factor_train, capacity_factor_eval)):
            raise ValueError(
                f"capacity_factor_train ({capacity_factor_train}) and capacity_factor_eval ({capacity_factor_eval}) "
                "must be positive and finite; n_experts / topk_experts drops nothing"
            )
        if min_capacity < 0 or second_expert_threshold < 0:
            raise ValueError(
                f"min_capacity ({min_capacity}) and second_expert_threshold ({second_expert_threshold}) must be >= 0"
            )
        self.num_experts = num_experts
        self.topk = topk_experts
        self.aggregate: Aggregate = aggregate
        self.capacity_factors = (capacity_factor_eval, capacity_factor_train)
        self.min_capacity = min_capacity
        self.second_expert_threshold = second_expert_threshold
        self.aux_weight = aux_weight
        self.router_init_std = router_init_std
        self.legacy_order = legacy_order
        self.normalize = normalize_gates and topk_experts > 1
        self.linear = RouterLinear(input_dim, num_experts, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Initial W; called again after FuxiCTR's reset."""
        nn.init.normal_(self.linear.weight, std=self.router_init_std)

    def forward(self, tokens: Sequence, losses: list[Tensor] | None = None) -> Routing:
        """Route; in training the balance loss is appended to ``losses``."""
        if tokens.index.numel() == 0:
            return no_routing(tokens, self.num_experts)
        probability = self.linear(tokens.items).softmax(-1)  # [U, n]
        gate, choice = probability.sort(dim=-1, descending=True, stable=True)
        gate, choice = gate[:, : self.topk], choice[:, : self.topk]  # [U, k], best first
        experts = choice[tokens.index]  # [B, T, k]
        if losses is not None and self.training and self.aux_weight:
            every = F.embedding(tokens.index, probability)
            losses.append(self.aux_weight * row_imbalance(every, experts[..., 0], tokens.mask))
        if self.normalize:
            gate = gate / (gate.sum(-1, keepdim=True) + 1e-9)
        served = self._serve(experts, gate.detach()[tokens.index], tokens.mask)  # [B, T, k]
        members = served.new_zeros(*tokens.index.shape, self.num_experts).scatter(2, experts, served)
        gating = gating_tokens(tokens, self.aggregate)
        columns = gating.index.shape[1]
        kept = F.embedding(gating.index, gate) * served[:, -columns:]  # [B, columns, k]
        gates = kept.new_zeros(*gating.index.shape, self.num_experts).scatter(2, experts[:, -columns:], kept)
        return Routing(members, row_mean(gates, gating.mask).to(tokens.items.dtype))

    def capacity(self, lengths: Tensor) -> Tensor:
        """C of groups of the given numbers of tokens, in integers: a float's ceil would round 2.0000000001 up."""
        per_token = Fraction(str(self.capacity_factors[self.training])) * self.topk / self.num_experts
        return (-(-lengths * per_token.numerator // per_token.denominator)).clamp(min=self.min_capacity)

    def _serve(self, experts: Tensor, gates: Tensor, mask: Tensor) -> Tensor:
        """``[B, T, k]`` bool: which of the tokens' choices ``experts`` (gates beside) find a place; positive gates only."""
        limit = self.capacity(mask.sum(1)).unsqueeze(1)  # [B, 1]
        if not self.legacy_order:
            experts, gates, mask = experts.flip(1), gates.flip(1), mask.flip(1)
        taken = torch.zeros(len(mask), self.num_experts, dtype=torch.int32, device=mask.device)
        served = []
        for order in range(self.topk):
            applies, expert = mask, experts[..., order]  # [B, T]
            if order and self.training:
                draw = torch.rand(mask.shape, device=mask.device, dtype=gates.dtype)
                applies = mask & (draw * self.second_expert_threshold < gates[..., order])
            claim = torch.zeros(*mask.shape, self.num_experts, dtype=torch.int32, device=mask.device)
            count = claim.scatter_(2, expert.unsqueeze(2), applies.unsqueeze(2).int()).cumsum(1, dtype=torch.int32)
            place = taken.gather(1, expert) + count.gather(2, expert.unsqueeze(2)).squeeze(2)  # counted from 1
            served.append(applies & (place <= limit))
            taken = taken + count[:, -1]
        found = torch.stack(served, -1) & (gates > 0)
        return found if self.legacy_order else found.flip(1)
