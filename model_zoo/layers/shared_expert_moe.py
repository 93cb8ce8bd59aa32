"""The rival mixtures of experts: token routers over sequence experts, beside one shared expert on the whole history."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from model_zoo.layers.blocks import call_block
from model_zoo.layers.dselect_k_router import DSelectKRouter
from model_zoo.layers.expert_choice_router import ExpertChoiceRouter
from model_zoo.layers.gshard_router import GShardRouter
from model_zoo.layers.random_state import isolated_rng
from model_zoo.layers.routed_experts import RoutedExperts, RoutedTokens, fusable, run_fused
from model_zoo.layers.sequence import Sequence
from model_zoo.layers.token_router import Aggregate

Combine = Literal["convex", "sum"]
ExpertBudget = Literal["literal", "budget_matched"]


class SharedExpertMoE(nn.Module):
    """``y = (1 - a) F_shared(X) + a sum_i g_i F_i(S_i)`` over copies of one sequence block.

    Each token is routed by its own vector; expert i reads the subsequence S_i of the tokens routed to it. A row that no
    expert serves (no history, or its gating token was dropped) is left to the shared expert: ``y = F_shared(X)``. With
    ``alpha_routed = 0`` or ``n_experts = 0`` the module is the shared block, bit for bit, and holds nothing else.

    ``alpha_routed`` is the weight in force; a training in phases moves it, up to ``final_alpha``.

    Args:
        block_factory: makes one block with ``out_dim``.
        make_router: makes the router from the number of experts and ``topk_experts=``.
        n_experts: n.
        topk_experts: k, experts per token.
        alpha_routed: a.
        combine: ``convex`` as above, or ``sum``: ``y = F_shared(X) + a sum_i g_i F_i(S_i)``.
        expert_budget: ``literal`` takes n and k as given; ``budget_matched`` doubles both, the experts of a MoS that has
            n for items and n for windows.

    Raises:
        ValueError: ``alpha_routed``, ``n_experts`` or ``topk_experts`` out of range.

    Source: the baselines "MoE with a shared expert" of MoS: Mixture of Sequence (WWW 2026), complexity analysis and
    experiments; what an expert reads and how answers are weighed follows its eq. 5-6 with another router.
    """

    has_losses = True

    def __init__(
        self,
        block_factory: Callable[[], nn.Module],
        make_router: Callable[..., nn.Module],
        n_experts: int,
        topk_experts: int,
        alpha_routed: float,
        combine: Combine,
        expert_budget: ExpertBudget,
    ) -> None:
        super().__init__()
        if not 0 <= alpha_routed <= 1:
            raise ValueError(f"alpha_routed ({alpha_routed}) must lie in 0..1")
        if n_experts < 0:
            raise ValueError(f"n_experts ({n_experts}) must be >= 0")
        if n_experts and not 1 <= topk_experts <= n_experts:
            raise ValueError(f"topk_experts ({topk_experts}) must lie in 1..n_experts ({n_experts})")
        times = 2 if expert_budget == "budget_matched" else 1
        self.final_alpha = alpha_routed if n_experts else 0.0
        self.alpha_routed = self.final_alpha
        self.combine: Combine = combine
        self.global_expert = block_factory()
        self.out_dim: int = self.global_expert.out_dim  # type: ignore[assignment]
        self.experts: RoutedExperts | None = None
        self.router: nn.Module | None = None
        if self.final_alpha > 0:
            with isolated_rng():  # the backbone's own initialisation does not depend on what stands beside it
                self.experts = RoutedExperts(block_factory, times * n_experts)
                self.router = make_router(times * n_experts, topk_experts=times * topk_experts)

    def expert_modules(self) -> list[nn.Module]:
        """Everything beside the shared expert."""
        return [module for module in (self.experts, self.router) if module is not None]

    @property
    def sole_block(self) -> nn.Module | None:
        """The shared expert as long as no other expert has a weight."""
        return None if self.alpha_routed else self.global_expert

    def forward(self, query: Tensor, sequence: Sequence, losses: list[Tensor] | None = None) -> Tensor:
        """Interest of each row towards its target.

        Args:
            query: ``[B, d]`` target items.
            sequence: histories.
            losses: auxiliary loss terms (already weighted) are appended here.

        Returns:
            ``[B, out_dim]``.
        """
        if self.experts is None or self.router is None or not self.alpha_routed:
            return call_block(self.global_expert, query, sequence, losses)
        routing = self.router(sequence, losses)
        served = (routing.gates > 0).any(1)  # [B]
        if fusable([self.global_expert, *self.experts.experts], sequence):
            branch = RoutedTokens(list(self.experts.experts), sequence, routing, served)
            found, [routed] = run_fused(query, sequence, self.global_expert, [branch])  # type: ignore[arg-type]
            assert found is not None
            shared = found
        else:
            shared = call_block(self.global_expert, query, sequence, losses)
            routed = self.experts(query, sequence, routing, served)
        if self.combine == "sum":
            return shared + self.alpha_routed * routed
        weight = 1 - self.alpha_routed * served.to(shared.dtype).unsqueeze(1)
        return weight * shared + self.alpha_routed * routed

    @torch.no_grad()
    def routing_stats(self, tokens: Sequence) -> dict[str, float | list[float]]:
        """How the router, in its present mode, treats a batch; for reports.

        Returns:
            ``rows`` with history and their ``tokens``, the counts behind the means; ``fallback_rate``, share of rows that
            no expert serves; ``unread_rate``, share of tokens that no expert reads; ``experts_per_token``,
            ``experts_per_row`` (experts that serve it) and ``gate_margin`` (largest gate minus the second), means; and
            by expert ``share`` of all token readings, mean ``gate``, mean ``routed_length`` over all rows,
            ``served_rows`` that it serves, and over these ``served_length`` (0 if there are none). Empty if there is no
            router.
        """
        if self.router is None:
            return {}
        routing = self.router(tokens)
        members = (routing.members & tokens.mask.unsqueeze(2)).double()  # [B, T, n]
        present = tokens.mask.any(1)
        rows, count = present.sum(), tokens.mask.sum()
        serves = (routing.gates > 0).double()  # [B, n]
        read, lengths = members.sum((0, 1)), members.sum(1)  # [n], [B, n]
        top = routing.gates.double().topk(min(2, routing.gates.shape[1]), dim=1).values
        return {
            "rows": int(rows),
            "tokens": int(count),
            "fallback_rate": float((present & ~serves.any(1)).sum() / rows.clamp(min=1)),
            "unread_rate": float((tokens.mask & ~members.any(2)).sum() / count.clamp(min=1)),
            "experts_per_token": float(read.sum() / count.clamp(min=1)),
            "experts_per_row": float(serves.sum() / rows.clamp(min=1)),
            "share": (read / read.sum().clamp(min=1)).tolist(),
            "gate": (routing.gates.double().sum(0) / rows.clamp(min=1)).tolist(),
            "gate_margin": float(((top[:, 0] - top[:, -1]) * present).sum() / rows.clamp(min=1)),
            "routed_length": (read / rows.clamp(min=1)).tolist(),
            "served_rows": serves.sum(0).long().tolist(),
            "served_length": ((lengths * serves).sum(0) / serves.sum(0).clamp(min=1)).tolist(),
        }


class GShard(SharedExpertMoE):
    """`SharedExpertMoE` with `GShardRouter`; see both for the keys.

    Source: Lepikhin et al., GShard (arXiv 2006.16668), over sequence experts.
    """

    def __init__(
        self,
        block_factory: Callable[[], nn.Module],
        item_dim: int,
        *,
        n_experts: int = 5,
        topk_experts: int = 2,
        alpha_routed: float = 0.5,
        combine: Combine = "convex",
        aggregate: Aggregate = "last",
        expert_budget: ExpertBudget = "literal",
        capacity_factor_train: float = 1.25,
        capacity_factor_eval: float = 2.0,
        min_capacity: int = 1,
        second_expert_threshold: float = 0.5,
        aux_weight: float = 0.01,
        router_init_std: float = 0.02,
        legacy_order: bool = False,
        normalize_gates: bool = True,
    ) -> None:
        router = partial(
            GShardRouter,
            item_dim,
            aggregate=aggregate,
            capacity_factor_train=capacity_factor_train,
            capacity_factor_eval=capacity_factor_eval,
            min_capacity=min_capacity,
            second_expert_threshold=second_expert_threshold,
            aux_weight=aux_weight,
            router_init_std=router_init_std,
            legacy_order=legacy_order,
            normalize_gates=normalize_gates,
        )
        super().__init__(block_factory, router, n_experts, topk_experts, alpha_routed, combine, expert_budget)


class DSelectK(SharedExpertMoE):
    """`SharedExpertMoE` with `DSelectKRouter`; see both for the keys.

    Source: Hazimeh et al., DSelect-k (arXiv 2106.03760), per-example gates over sequence experts.
    """

    def __init__(
        self,
        block_factory: Callable[[], nn.Module],
        item_dim: int,
        *,
        n_experts: int = 5,
        topk_experts: int = 2,
        alpha_routed: float = 0.5,
        combine: Combine = "convex",
        aggregate: Aggregate = "last",
        expert_budget: ExpertBudget = "literal",
        gamma: float = 1.0,
        entropy_weight: float = 0.0,
        reachability_weight: float = 1e-2,
        renormalize: bool = False,
    ) -> None:
        router = partial(
            DSelectKRouter,
            item_dim,
            aggregate=aggregate,
            gamma=gamma,
            entropy_weight=entropy_weight,
            reachability_weight=reachability_weight,
            renormalize=renormalize,
        )
        super().__init__(block_factory, router, n_experts, topk_experts, alpha_routed, combine, expert_budget)


class ExpertChoice(SharedExpertMoE):
    """`SharedExpertMoE` with `ExpertChoiceRouter`; see both for the keys.

    Source: Zhou et al., Expert Choice Routing (arXiv 2202.09368), over sequence experts.
    """

    def __init__(
        self,
        block_factory: Callable[[], nn.Module],
        item_dim: int,
        *,
        n_experts: int = 5,
        topk_experts: int = 2,
        alpha_routed: float = 0.5,
        combine: Combine = "convex",
        aggregate: Aggregate = "last",
        expert_budget: ExpertBudget = "literal",
        choice_group: Literal["sequence", "batch"] = "sequence",
        router_init_std: float = 0.02,
        z_loss_weight: float = 0.0,
        last_gate: Literal["chosen", "softmax"] = "chosen",
    ) -> None:
        router = partial(
            ExpertChoiceRouter,
            item_dim,
            aggregate=aggregate,
            choice_group=choice_group,
            router_init_std=router_init_std,
            z_loss_weight=z_loss_weight,
            last_gate=last_gate,
        )
        super().__init__(block_factory, router, n_experts, topk_experts, alpha_routed, combine, expert_budget)
