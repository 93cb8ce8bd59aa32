"""MoS's three-phase training: backbone warm-up, expert warm-up, joint; one FuxiCTR ``fit`` each."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from model_zoo.batch import AnyBatch
from model_zoo.errors import ConfigError
from model_zoo.files import copy_whole
from model_zoo.interrupts import held
from model_zoo.layers.mos import MoS
from model_zoo.layers.routers import ThemeRouter
from model_zoo.layers.routing_usage import usage_report
from model_zoo.layers.sequence import Sequence
from model_zoo.layers.theme_codebook import cosine_kmeans
from model_zoo.layers.windows import CATEGORY
from model_zoo.resume import restore
from model_zoo.sequential_ctr import SequentialCTR

logger = logging.getLogger("model_zoo")


Group = Literal["backbone", "experts"]


@dataclass(frozen=True)
class Phase:
    """One phase.

    Attributes:
        name: as shown.
        epochs: at most; early stopping may end it.
        learning_rate: of its own, new optimizer.
        trains: parameter groups with a gradient.
        alphas: fusion weights (item, window).
        update_codebooks: EMA on in its training forwards.
        patience: evaluations without a gain that end it.
    """

    name: str
    epochs: int
    learning_rate: float
    trains: tuple[Group, ...]
    alphas: tuple[float, float]
    update_codebooks: bool
    patience: int


class ThreePhaseCTR(SequentialCTR):
    """A model with a MoS layer, trained in three phases.

    Phase 1 trains embedding, global expert and head exactly as the plain backbone of the same seed. Then the codebooks
    start from k-means of h over tokens of training batches. Phase 2 trains experts and routers alone, at fusion weights
    1/2 and 1/2; embedding, head and its BatchNorm statistics do not move. Phase 3 trains everything at the final weights.
    Each phase reloads its best checkpoint (``<checkpoint>.phase1`` ...); the final model is phase 3's best.

    Args:
        phase1_epochs: at most; None = ``epochs``.
        phase2_epochs: epochs of expert warm-up.
        phase3_epochs: at most; None = ``epochs``.
        phase_lrs: learning rate per phase; None = ``learning_rate`` for all three.
        phase_patience: early-stopping patience per phase; None = ``early_stop_patience`` for all three.
        kmeans_tokens: tokens per router that k-means sees; 0 leaves the codebook at its random start.
        kmeans_seed: of k-means and its token sample.
        kmeans_data: ``occurrences`` weighs tokens by how often they occur (EMA's fixed point), ``unique_items`` does not.
        kmeans_space: cluster h(x), where the codes live, or ``input``: cluster x and take h of the centroids.
        expert_init: ``random``, or ``copy_global``: experts start phase 2 as copies of the trained global expert.
    """

    #: groups that the phase entered last does not train
    _frozen: AbstractSet[str] = frozenset()

    def __init__(
        self,
        *args: Any,
        phase1_epochs: int | None = None,
        phase2_epochs: int = 1,
        phase3_epochs: int | None = None,
        phase_lrs: list[float] | None = None,
        phase_patience: list[int] | None = None,
        kmeans_tokens: int = 131_072,
        kmeans_seed: int = 0,
        kmeans_data: Literal["occurrences", "unique_items"] = "occurrences",
        kmeans_space: Literal["hidden", "input"] = "hidden",
        expert_init: Literal["random", "copy_global"] = "random",
        **params: Any,
    ) -> None:
        if phase_lrs is not None and len(phase_lrs) != 3:
            raise ValueError(f"phase_lrs needs three learning rates, one per phase, not {phase_lrs}")
        if phase_patience is not None and (len(phase_patience) != 3 or min(phase_patience) < 1):
            raise ValueError(f"phase_patience needs three numbers of at least 1, one per phase, not {phase_patience}")
        if params.get("save_best_only") is False:
            raise ValueError("save_best_only must be True: each phase goes on from its best weights")
        super().__init__(*args, **params)
        self.phase_epochs = (phase1_epochs, phase2_epochs, phase3_epochs)
        self.phase_lrs = phase_lrs or [self.learning_rate] * 3
        self.phase_patience = phase_patience or [int(params.get("early_stop_patience", 2))] * 3
        self.kmeans_tokens = kmeans_tokens
        self.kmeans_seed = kmeans_seed
        self.kmeans_data = kmeans_data
        self.kmeans_space = kmeans_space
        self.expert_init = expert_init
        if self.mos.taxonomy_feature is not None:
            self._use_taxonomy(self.mos.taxonomy_feature)
        self._always_frozen = {name for name, p in self.named_parameters() if not p.requires_grad}

    @property
    def mos(self) -> MoS:
        """The MoS layer."""
        return self.method_layers()[0]

    def _use_taxonomy(self, name: str) -> None:
        """Read categories from an item feature."""
        specs = self.feature_map.features.items()
        known = [key for key, spec in specs if spec["type"] == "categorical" and spec.get("source") == "item"]
        if name not in known:
            raise ConfigError(f"taxonomy_feature: {name}: no categorical item feature; choose from {', '.join(known)}")
        if self.kmeans_tokens == 0 or self.kmeans_data != "occurrences" or self.kmeans_space != "hidden":
            raise ConfigError("taxonomy_feature needs kmeans_tokens above 0, kmeans_data occurrences, kmeans_space hidden")
        self.category_feature = name
        self.mos.use_taxonomy(self.feature_map.features[name]["vocab_size"])

    def phases(self, epochs: int) -> list[Phase]:
        """The phases of a training of at most ``epochs`` per phase; only the first if there are no experts."""
        first, second, third = self.phase_epochs
        rates, patience = self.phase_lrs, self.phase_patience
        final = self.mos.final_alphas
        everything: tuple[Group, ...] = ("backbone", "experts")
        plan = [
            Phase("phase1", epochs if first is None else first, rates[0], ("backbone",), (0.0, 0.0), False, patience[0]),
            Phase("phase2", second, rates[1], ("experts",), (0.5, 0.5), True, patience[1]),
            Phase("phase3", epochs if third is None else third, rates[2], everything, final, True, patience[2]),
        ]
        return [phase for phase in (plan if sum(final) > 0 else plan[:1]) if phase.epochs > 0]

    def enter(self, phase: Phase) -> None:
        """Freeze, fuse and optimise as ``phase`` says."""
        expert_names = {id(p) for module in self.expert_modules() for p in module.parameters()}
        for name, parameter in self.named_parameters():
            group = "experts" if id(parameter) in expert_names else "backbone"
            parameter.requires_grad_(group in phase.trains and name not in self._always_frozen)
        self.mos.set_fusion(*phase.alphas, update_codebooks=phase.update_codebooks)
        self._frozen = {"backbone", "experts"} - set(phase.trains)
        self.phase_name = phase.name
        self._early_stop_patience = phase.patience
        self.use_optimizer(phase.learning_rate)

    def train(self, mode: bool = True) -> ThreePhaseCTR:
        """Training mode, but BatchNorm layers of a frozen group (Dice has some, too) keep their running statistics."""
        super().train(mode)
        beside = {id(m) for expert in self.expert_modules() for m in expert.modules()}
        for module in self.modules():
            group: Group = "experts" if id(module) in beside else "backbone"
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and group in self._frozen:
                module.eval()
        return self

    def phase_checkpoint(self, name: str) -> str:
        """Where a phase's best weights lie."""
        stem, extension = os.path.splitext(self.final_checkpoint)
        return f"{stem}.{name}{extension}"

    @property
    def final_checkpoint(self) -> str:
        """Where the final model's weights lie."""
        return os.path.join(os.path.dirname(self.checkpoint), f"{self.model_id}.model")

    def fit(
        self,
        data_generator: Any,
        epochs: int = 1,
        validation_data: Any = None,
        max_gradient_norm: float = 10.0,
        **kwargs: Any,
    ) -> None:
        """Run the phases; afterwards the final weights are loaded, and written as the model's checkpoint."""
        plan = self.phases(epochs)
        state = self.resume_from
        first = self._phase_to_resume(plan, state)
        for number, phase in enumerate(plan[first:], start=first):
            within = state is not None and state["stage"] != "start"
            if not within:
                self._begin_phase(number, phase, plan, data_generator)
            state = None
            self.enter(phase)
            logger.info(
                "%s: trains %s, fusion weights item %g window %g, learning rate %g, at most %d epoch(s)",
                phase.name, " and ".join(phase.trains), self.mos.alpha_item, self.mos.alpha_window,
                phase.learning_rate, phase.epochs,
            )  # fmt: skip
            self.fit_phase(phase, data_generator, validation_data, max_gradient_norm)
        copy_whole(self.checkpoint, self.final_checkpoint)
        self.checkpoint = self.final_checkpoint
        self.mos.update_codebooks = False

    def fit_phase(self, phase: Phase, data_generator: Any, validation_data: Any, max_gradient_norm: float) -> None:
        """Train a phase that was entered; afterwards its best weights are loaded."""
        self.checkpoint = self.phase_checkpoint(phase.name)
        super().fit(data_generator, phase.epochs, validation_data, max_gradient_norm)

    @staticmethod
    def _phase_to_resume(plan: list[Phase], state: dict[str, Any] | None) -> int:
        """Place of the phase that a saved training was in."""
        if state is None:
            return 0
        names = [phase.name for phase in plan]
        if state["phase"] not in names:
            raise ConfigError(
                f"the saved training is in {state['phase']}, which this config does not have; start without --resume"
            )
        return names.index(state["phase"])

    def _begin_phase(self, number: int, phase: Phase, plan: list[Phase], data_generator: Any) -> None:
        """What comes before a phase's first step: its state is kept, experts and codebooks start if it is their first."""
        self.phase_name = phase.name
        if self.resume_from is not None:
            restore(self, self.resume_from)
            self.resume_from = None
        elif self.saver is not None and number:
            with held():
                self.saver.write(self, "start")
        if "experts" in phase.trains and phase is next(p for p in plan if "experts" in p.trains):
            self.start_experts(data_generator)

    def start_experts(self, data_generator: Any) -> None:
        """Between phases 1 and 2: copy the global expert if asked, and start the codebooks by k-means."""
        mos = self.mos
        if self.expert_init == "copy_global":
            state = mos.global_expert.state_dict()
            for branch in (mos.item_experts, mos.window_experts):
                for expert in branch.experts if branch is not None else []:
                    expert.load_state_dict(state)
        if self.kmeans_tokens == 0:
            return
        started = time.perf_counter()
        for name, router, tokens, category in self._sample_tokens(data_generator):
            if len(tokens) == 0:
                logger.warning("the %s codebook keeps its random start: no training row gives its router a token", name)
                continue
            points = torch.unique(tokens, dim=0) if self.kmeans_data == "unique_items" else tokens
            weight = points.new_ones(len(points))
            with torch.no_grad():
                if self.kmeans_space == "hidden":
                    points = router.encode(points)
                if router.taxonomy is not None and mos.codebook_init == "taxonomy":
                    how = f"categories ({self.category_feature}) as the start"
                    sizes = router.taxonomy.start(router.codebook, points, weight, category, self.kmeans_seed)
                    if len(sizes) == 0:
                        logger.warning("the %s codebook keeps its random start: no token has a category", name)
                        continue
                else:
                    how = "k-means"
                    centroids, sizes = cosine_kmeans(points, weight, router.codebook.num_themes, self.kmeans_seed)
                    if self.kmeans_space == "input":
                        centroids = router.encode(centroids)
                    router.codebook.start_from(centroids, sizes)
                    if router.taxonomy is not None:
                        router.taxonomy.follow(router.codebook, points, weight, category)
            shares = ", ".join(f"{share:.2f}" for share in (sizes / sizes.sum()).tolist())
            logger.info("%s of the %s codebook: %d tokens, shares %s", how, name, int(weight.sum()), shares)
        logger.info("codebooks started in %.1f s", time.perf_counter() - started)

    @torch.no_grad()
    def _sample_tokens(self, batches: Any) -> list[tuple[str, ThemeRouter, Tensor, Tensor]]:
        """About ``kmeans_tokens`` router inputs per router, drawn by occurrence from training batches, in a fixed order.

        Returns:
            Of each router its name, tokens ``[N, input_dim]`` and their categories ``[N]`` (``[0]`` without a taxonomy).
        """
        mos = self.mos
        generator = torch.Generator().manual_seed(self.kmeans_seed)
        wanted = [(n, r) for n, r in (("item", mos.item_router), ("window", mos.window_router)) if r is not None]
        drawn: dict[str, list[Tensor]] = {name: [] for name, _ in wanted}
        kinds: dict[str, list[Tensor]] = {name: [] for name, _ in wanted}
        count = {name: 0 for name, _ in wanted}
        quota = max(self.kmeans_tokens // max(min(len(batches), 16), 1), 1)
        if hasattr(batches, "set_epoch"):
            batches.set_epoch(self.epochs_trained)
        was_training = self.training
        self.eval()
        for batch in batches:
            for name, tokens in self.router_tokens(batch).items():
                if name not in count or count[name] >= self.kmeans_tokens:
                    continue
                index = tokens.index[tokens.mask]
                take = torch.randperm(len(index), generator=generator)[: min(quota, self.kmeans_tokens - count[name])]
                rows = index[take.to(index.device)]
                drawn[name].append(tokens.items[rows].float().cpu())
                if CATEGORY in tokens.memo:
                    kinds[name].append(tokens.memo[CATEGORY][rows].cpu())
                count[name] += len(take)
            if min(count.values()) >= self.kmeans_tokens:
                break
        self.train(was_training)
        none = torch.empty(0)
        return [
            (
                name,
                router,
                torch.cat(drawn[name] or [none]).to(self.device),
                torch.cat(kinds[name] or [none.long()]).to(self.device),
            )
            for name, router in wanted
        ]

    def router_tokens(self, batch: AnyBatch) -> dict[str, Sequence]:
        """Each router's input sequence for a batch: ``item``, ``window``."""
        _, target, sequence = self._read(batch)
        if sequence.index.shape[1] == 0:
            return {}
        tokens: dict[str, Sequence] = {}
        if self.mos.item_router is not None:
            tokens["item"] = self.mos.router_inputs(target, sequence)
        if self.mos.window_router is not None:
            tokens["window"] = self.mos.router_inputs(target, self.mos.window_tokens(sequence))
        return tokens

    def codebook_usage(self, batches: Any, max_batches: int = 16) -> dict[str, dict[str, Any]]:
        """`usage_report` of each router over the first batches of a split."""
        self.eval()
        tokens = (self.router_tokens(batch) for batch in islice(batches, max_batches))
        routers = {"item": self.mos.item_router, "window": self.mos.window_router}
        return usage_report({name: router for name, router in routers.items() if router is not None}, tokens)
