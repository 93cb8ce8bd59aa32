"""MoS, Mixture of Sequence: theme-routed item and window experts beside the global one, in place of a sequence block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from model_zoo.layers.blocks import call_block
from model_zoo.layers.random_state import isolated_rng
from model_zoo.layers.routed_experts import RoutedExperts, RoutedTokens, fusable, run_experts, run_fused
from model_zoo.layers.routers import GateNorm, Routing, ThemeRouter
from model_zoo.layers.sequence import Sequence, SharedSequence
from model_zoo.layers.session_windows import SESSIONS, SessionWindows
from model_zoo.layers.taxonomy import Taxonomy
from model_zoo.layers.theme_codebook import EmaMode, ThemeCodebook
from model_zoo.layers.timed_sequence import times_of
from model_zoo.layers.windows import WindowAlign, WindowDivisor, WindowMeans, Windows


class MoS(nn.Module):
    """``y = (1 - a_I - a_W) y_G + a_I y_I + a_W y_W`` over copies of one sequence block (MoS, eq. 5-8).

    The global expert reads the whole history, item experts the items of their theme, window experts sliding-window means
    of their theme. A branch that a row cannot have (no history; no window) leaves its weight to the global expert. With
    ``alpha_item = alpha_window = 0`` the module is the global block, bit for bit, and holds nothing else.

    ``alpha_item`` and ``alpha_window`` are the weights in force; the three-phase trainer moves them (``set_fusion``) and
    they travel in the state dict, so a checkpoint of any phase predicts as it did when it was written.

    Args:
        block_factory: makes one block with ``out_dim``.
        item_dim: d, width of an item vector.
        n_item_experts: experts on items; 0 = no item branch.
        n_window_experts: experts on windows; 0 = no window branch.
        topk_item: themes kept per item.
        topk_window: themes kept per window.
        alpha_item: final weight of the item branch.
        alpha_window: final weight of the window branch; ``alpha_item + alpha_window <= 1``.
        codebook_dim: D of both codebooks.
        router_hidden: hidden width of h; None = D.
        router_temperature: divides the cosines before the softmax.
        router_input: ``item`` routes x_v, ``item_target`` routes ``[x_v ; q]``.
        router_linear: h is one linear map instead of a two-layer MLP.
        router_bias: h's layers have biases. Without them (default) h(cx) = c h(x) for c > 0, so a cosine does not depend
            on a vector's length. With them, once h is trained, biases outgrow small item vectors, every h(x) points the
            same way, and all items end in one theme.
        shared_router: both branches use one h (each keeps its codebook).
        gate_norm: see `ThemeRouter`.
        gate_source: whose theme weighs the experts: the ``last`` token (the paper) or the ``target`` item.
        codebook: ``ema`` (the paper) or ``learned`` by gradient.
        ema_decay: g of eq. 4.
        ema_mode: see `ThemeCodebook`.
        ema_assign: ``topk`` members move a code, or only the ``top1`` ones.
        ema_normalize: average unit vectors.
        revive_dead: replace a code idle for so many updates; 0 = never.
        commitment_weight: weight of the VQ-VAE commitment loss on both routers.
        align_weight: weight of ``|y_routed - sg(y_G)|^2`` while training experts.
        window_size: items per window.
        window_stride: items between windows.
        window_align: ``right`` keeps every recent item, ``left`` is the literal definition.
        window_divide_by: ``count`` of items present, or always the window's ``size``.
        short_history: a history shorter than a window is one ``partial`` window, or has no window branch (``skip``).
        empty_history: an empty history gives the ``global`` block's answer, or ``zeros``.
        windows: ``fixed``, or beyond the paper one per ``session`` of the history: needs the times of its events, see
            `SessionWindows`. The keys of fixed windows then have nothing to set.
        session_gap: seconds without an event after which the next event begins a session.
        codebook_init: ``kmeans`` (the paper), or beyond it ``taxonomy``: codes start from the centroids of the items'
            categories, see `Taxonomy`.
        taxonomy_feature: the categorical item feature that holds an item's category.
        taxonomy_weight: weight of `Taxonomy.penalty` on both routers, which keeps h(x) near the themes of its category.

    Raises:
        ValueError: weights or counts out of range.

    Source: MoS: Mixture of Sequence (WWW 2026), sections on routing, multi-scale fusion and training.
    """

    has_losses = True
    #: rows that a history must serve in the mean, for it to pay to route it once for all of them
    rows_to_share = 8

    def __init__(
        self,
        block_factory: Callable[[], nn.Module],
        item_dim: int,
        *,
        n_item_experts: int = 5,
        n_window_experts: int = 5,
        topk_item: int = 1,
        topk_window: int = 1,
        alpha_item: float = 0.25,
        alpha_window: float = 0.25,
        codebook_dim: int = 32,
        router_hidden: int | None = None,
        router_temperature: float = 1.0,
        router_input: Literal["item", "item_target"] = "item",
        router_linear: bool = False,
        router_bias: bool = False,
        shared_router: bool = False,
        gate_norm: GateNorm = "topk_softmax",
        gate_source: Literal["last", "target"] = "last",
        codebook: Literal["ema", "learned"] = "ema",
        ema_decay: float = 0.999,
        ema_mode: EmaMode = "batch_mean",
        ema_assign: Literal["topk", "top1"] = "topk",
        ema_normalize: bool = False,
        revive_dead: int = 0,
        commitment_weight: float = 0.0,
        align_weight: float = 0.0,
        window_size: int = 8,
        window_stride: int = 4,
        window_align: WindowAlign = "right",
        window_divide_by: WindowDivisor = "count",
        short_history: Literal["partial", "skip"] = "partial",
        empty_history: Literal["global", "zeros"] = "global",
        windows: Literal["fixed", "session"] = "fixed",
        session_gap: int = 1800,
        codebook_init: Literal["kmeans", "taxonomy"] = "kmeans",
        taxonomy_feature: str | None = None,
        taxonomy_weight: float = 0.0,
    ) -> None:
        super().__init__()
        if min(alpha_item, alpha_window) < 0 or alpha_item + alpha_window > 1 + 1e-9:
            raise ValueError(
                f"alpha_item ({alpha_item}) and alpha_window ({alpha_window}) must be >= 0 and sum to at most 1"
            )
        for name, count, topk in (("item", n_item_experts, topk_item), ("window", n_window_experts, topk_window)):
            if count and not 1 <= topk <= count:
                raise ValueError(f"topk_{name} ({topk}) must lie in 1..n_{name}_experts ({count})")
        if not 0 <= ema_decay <= 1:
            raise ValueError(f"ema_decay ({ema_decay}) must lie in 0..1")
        if window_size < 1 or window_stride < 1:
            raise ValueError(f"window_size ({window_size}) and window_stride ({window_stride}) must be at least 1")
        if router_temperature <= 0:
            raise ValueError(f"router_temperature ({router_temperature}) must be positive")
        if session_gap < 0:
            raise ValueError(f"session_gap ({session_gap}) must be at least 0 seconds")
        if windows == "session" and (window_align, window_divide_by, short_history) != ("right", "count", "partial"):
            raise ValueError("windows: session has whole sessions: leave out window_align, window_divide_by, short_history")
        if taxonomy_weight < 0:
            raise ValueError(f"taxonomy_weight ({taxonomy_weight}) must be at least 0")
        if codebook_init == "taxonomy" or taxonomy_weight:
            key = "taxonomy_weight" if taxonomy_weight else "codebook_init"
            if taxonomy_feature is None:
                raise ValueError(f"{key} needs taxonomy_feature: the name of the item feature that holds categories")
            if router_input != "item":
                raise ValueError(f"{key} needs router_input: item, not {router_input}")
        self.router_input = router_input
        self.gate_source = gate_source
        self.window_size = window_size
        self.window_stride = window_stride
        self.window_align: WindowAlign = window_align
        self.window_divide_by: WindowDivisor = window_divide_by
        self.short_history = short_history
        self.empty_history = empty_history
        self.commitment_weight = commitment_weight
        self.align_weight = align_weight
        self.window_kind = windows
        self.session_gap = session_gap
        self.codebook_init = codebook_init
        self.taxonomy_feature = taxonomy_feature if codebook_init == "taxonomy" or taxonomy_weight else None
        self.taxonomy_weight = taxonomy_weight
        self.final_alphas = (
            alpha_item if n_item_experts else 0.0,
            alpha_window if n_window_experts else 0.0,
        )
        self.global_expert = block_factory()
        self.out_dim: int = self.global_expert.out_dim  # type: ignore[assignment]
        self.item_experts: RoutedExperts | None = None
        self.item_router: ThemeRouter | None = None
        self.window_experts: RoutedExperts | None = None
        self.window_router: ThemeRouter | None = None

        def router(themes: int, topk: int, encoder: nn.Module | None) -> ThemeRouter:
            book = ThemeCodebook(
                themes,
                codebook_dim,
                decay=ema_decay,
                ema_mode=ema_mode,
                normalize=ema_normalize,
                learned=codebook == "learned",
                revive_after=revive_dead,
            )
            return ThemeRouter(
                item_dim * 2 if router_input == "item_target" else item_dim,
                book,
                codebook_dim=codebook_dim,
                topk=topk,
                hidden=router_hidden,
                temperature=router_temperature,
                gate_norm=gate_norm,
                ema_assign_top1=ema_assign == "top1",
                linear=router_linear,
                bias=router_bias,
                encoder=encoder,
            )

        with isolated_rng():  # the backbone's own initialisation does not depend on how many experts stand beside it
            if self.final_alphas[0] > 0:
                self.item_experts = RoutedExperts(block_factory, n_item_experts)
                self.item_router = router(n_item_experts, topk_item, None)
            if self.final_alphas[1] > 0:
                encoder = self.item_router.h if shared_router and self.item_router else None
                self.window_experts = RoutedExperts(block_factory, n_window_experts)
                self.window_router = router(n_window_experts, topk_window, encoder)
        self.update_codebooks = False
        self.alpha_item, self.alpha_window = self.final_alphas

    def expert_modules(self) -> list[nn.Module]:
        """Everything beside the global expert: experts, routers, codebooks (trained in phases 2 and 3)."""
        modules = (self.item_experts, self.item_router, self.window_experts, self.window_router)
        return [module for module in modules if module is not None]

    def use_taxonomy(self, num_categories: int) -> None:
        """Give each router the table of its categories' themes, still empty: categories are 0 .. num_categories - 1."""
        for router in (self.item_router, self.window_router):
            if router is not None:
                taxonomy = Taxonomy(num_categories, router.codebook.num_themes)
                router.taxonomy = taxonomy.to(router.codebook.codes.device)

    def set_fusion(self, alpha_item: float, alpha_window: float, *, update_codebooks: bool = False) -> None:
        """Put fusion weights in force; a branch that does not exist leaves its weight to the other one."""
        if self.item_experts is None:
            alpha_item, alpha_window = 0.0, (alpha_item + alpha_window if self.window_experts is not None else 0.0)
        elif self.window_experts is None:
            alpha_item, alpha_window = alpha_item + alpha_window, 0.0
        self.alpha_item, self.alpha_window = alpha_item, alpha_window
        self.update_codebooks = update_codebooks

    def get_extra_state(self) -> Tensor:
        """The fusion weights in force, float64 ``[2]``."""
        return torch.tensor([self.alpha_item, self.alpha_window], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Put the checkpoint's fusion weights in force."""
        self.alpha_item, self.alpha_window = (float(value) for value in state)

    def windows(self, sequence: Sequence) -> WindowMeans:
        """The sliding windows, or the sessions, that the window experts read."""
        if self.window_kind == "session":
            return SessionWindows(sequence, self.session_gap)
        shortest = self.window_size if self.short_history == "skip" else 0
        return Windows(
            sequence, self.window_size, self.window_stride, self.window_align, self.window_divide_by, shortest
        )

    def window_tokens(self, sequence: Sequence) -> Sequence:
        """Window means in time order, as tokens."""
        return self.windows(sequence).sequence()

    @property
    def sole_block(self) -> nn.Module | None:
        """The global expert while it alone has a weight; see `serving`."""
        return self.global_expert if self.alpha_item + self.alpha_window < 1e-9 else None

    @property
    def shares(self) -> bool:
        """Whether it can read a history once for several rows: it routes a token without its row's target."""
        return self.router_input == "item"

    def forward(
        self, query: Tensor, sequence: Sequence | SharedSequence, losses: list[Any] | None = None
    ) -> Tensor:
        """Interest of each row towards its target.

        Args:
            query: ``[B, d]`` target items.
            sequence: histories; shared ones (only where ``shares``) are routed once for all their rows.
            losses: auxiliary loss terms (already weighted) are appended here.

        Returns:
            ``[B, out_dim]``.

        Raises:
            ConfigError: session windows, and the histories have no times.
        """
        if self.window_kind == "session" and self.window_router is not None:  # also before the window experts' phase
            times_of(sequence.histories if isinstance(sequence, SharedSequence) else sequence, *SESSIONS)
        base = max(1.0 - (self.alpha_item + self.alpha_window), 0.0)
        base = 0.0 if base < 1e-9 else base
        if base == 1.0:
            return call_block(self.global_expert, query, sequence, losses)
        whole = base > 0
        routed: list[RoutedTokens] = []
        weights: list[Tensor] = []  # [B, 1] each
        for alpha, name in ((self.alpha_item, "item"), (self.alpha_window, "window")):
            if alpha > 0:
                branch = self._route(name, query, sequence, losses)
                weights.append(alpha * branch.active.unsqueeze(1).to(query.dtype))
                routed.append(branch)
        served = torch.stack(weights).sum(0)
        global_weight = base + (self.alpha_item + self.alpha_window - served).clamp(min=0)
        blocks = [self.global_expert, *(block for branch in routed for block in branch.experts)]
        if fusable(blocks, sequence):
            attending = self.global_expert if whole else None
            overall, answers = run_fused(query, sequence, attending, routed)  # type: ignore[arg-type]
        else:
            overall = call_block(self.global_expert, query, sequence, losses) if whole else None
            answers = [self._answer(branch, query, sequence) for branch in routed]
        output = self._rest(query, sequence, global_weight, losses) if overall is None else global_weight * overall
        if losses is not None and self.align_weight and self.training:
            goal = overall.detach() if overall is not None else self._still_answer(query, sequence)
            for weight, answer in zip(weights, answers, strict=True):
                present = (weight > 0).to(answer.dtype)  # [B, 1]
                gap = (answer - goal).square().mean(1, keepdim=True) * present
                losses.append(self.align_weight * gap.sum() / present.sum().clamp(min=1))
        for weight, answer in zip(weights, answers, strict=True):
            output = output + weight * answer
        if self.empty_history == "zeros":
            output = output * (sequence.lengths > 0).unsqueeze(1)
        return output

    @torch.no_grad()
    def route(self, query: Tensor, sequence: Sequence) -> dict[str, RoutedTokens]:
        """Tokens and routing of the branches that there are, ``item`` and ``window``, whatever their weights in force."""
        routers = {"item": self.item_router, "window": self.window_router}
        return {name: self._route(name, query, sequence, None) for name, router in routers.items() if router is not None}

    def _route(
        self, name: str, query: Tensor, sequence: Sequence | SharedSequence, losses: list[Any] | None
    ) -> RoutedTokens:
        """The ``item`` or ``window`` branch's tokens and their routing; rows without a token are not active.

        Of shared histories, the tokens and their members are by history, gates and activity by row.
        """
        experts: RoutedExperts = getattr(self, f"{name}_experts")
        router: ThemeRouter = getattr(self, f"{name}_router")
        histories = sequence.histories if isinstance(sequence, SharedSequence) else sequence
        windows = self.windows(histories) if name == "window" else None
        if isinstance(windows, Windows) and windows.align == "right" and self.router_input == "item":
            tokens: Sequence | Windows = windows
        else:
            tokens = histories if windows is None else windows.sequence()
        active = sequence.per_row(tokens.mask.any(1))
        if tokens.mask.shape[1] == 0 or not bool(active.any()):
            count = len(experts.experts)
            nobody = Routing(tokens.mask.new_zeros(*tokens.mask.shape, count), query.new_zeros(len(query), count))
            return RoutedTokens(list(experts.experts), tokens, nobody, active)
        inputs = tokens if isinstance(tokens, Windows) else self.router_inputs(query, tokens)
        gating = None
        if self.gate_source == "target":
            gating = torch.cat([query, query], -1) if self.router_input == "item_target" else query
        if losses is not None and self.commitment_weight and self.training:
            vectors = inputs.sequence() if isinstance(inputs, Windows) else inputs
            losses.append(self.commitment_weight * router.commitment(vectors))
        if losses is not None and self.taxonomy_weight and self.training:
            assert router.taxonomy is not None, "use_taxonomy comes first"
            losses.append(self.taxonomy_weight * router.taxonomy.penalty(router, inputs))
        routing = router(inputs, gating, update_codebook=self.update_codebooks and self.training)
        if gating is None:
            routing = replace(routing, gates=sequence.per_row(routing.gates))
        return RoutedTokens(list(experts.experts), tokens, routing, active)

    def _answer(self, branch: RoutedTokens, query: Tensor, sequence: Sequence | SharedSequence) -> Tensor:
        """A branch's weighted expert answers ``[B, out]``, one expert at a time."""
        tokens = branch.tokens.sequence() if isinstance(branch.tokens, Windows) else branch.tokens
        read = SharedSequence(tokens, sequence.owner) if isinstance(sequence, SharedSequence) else tokens
        return run_experts(branch.experts, query, read, branch.routing, branch.active)

    @torch.no_grad()
    def _still_answer(self, query: Tensor, sequence: Sequence | SharedSequence) -> Tensor:
        """The global answer as in evaluation: no dropout, no batch statistics."""
        was_training = [(module, module.training) for module in self.global_expert.modules()]
        self.global_expert.eval()
        try:
            return call_block(self.global_expert, query, sequence)
        finally:
            for module, training in was_training:
                module.training = training

    def _rest(
        self, query: Tensor, sequence: Sequence | SharedSequence, weight: Tensor, losses: list[Any] | None
    ) -> Tensor:
        """The global answer where it has no weight but for rows that have nothing else."""
        rows = (weight.squeeze(1) > 1e-9).nonzero().squeeze(1)
        output = query.new_zeros(query.shape[0], self.out_dim)
        if rows.numel():
            answer = call_block(self.global_expert, query[rows], sequence.select(rows), losses)
            output = output.index_add(0, rows, weight[rows] * answer)
        return output

    def router_inputs(self, query: Tensor, tokens: Sequence) -> Sequence:
        """Router inputs by position: the token's vector, with the target's behind it if ``router_input`` says so."""
        if self.router_input == "item":
            return tokens
        vectors = tokens.vectors
        target = query.unsqueeze(1).expand(-1, vectors.shape[1], -1)
        return Sequence.from_vectors(torch.cat([vectors, target], -1), tokens.mask)
