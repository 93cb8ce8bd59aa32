"""MoS's three-phase training: codebooks start by k-means between its first two phases."""

from __future__ import annotations

import logging
import time
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor

from model_zoo.batch import AnyBatch
from model_zoo.errors import ConfigError
from model_zoo.layers.mos import MoS
from model_zoo.layers.routers import ThemeRouter
from model_zoo.layers.routing_usage import usage_report
from model_zoo.layers.sequence import Sequence
from model_zoo.layers.theme_codebook import cosine_kmeans
from model_zoo.layers.windows import CATEGORY
from model_zoo.phased_training import PhasedCTR

logger = logging.getLogger("model_zoo")


class ThreePhaseCTR(PhasedCTR):
    """A model with a MoS layer, trained in three phases.

    As for `PhasedCTR`; before phase 2 the codebooks start from k-means of h over tokens of training batches, and phase 2
    is at fusion weights 1/2 and 1/2.

    Args:
        kmeans_tokens: tokens per router that k-means sees; 0 leaves the codebook at its random start.
        kmeans_seed: of k-means and its token sample.
        kmeans_data: ``occurrences`` weighs tokens by how often they occur (EMA's fixed point), ``unique_items`` does not.
        kmeans_space: cluster h(x), where the codes live, or ``input``: cluster x and take h of the centroids.
        expert_init: ``random``, or ``copy_global``: experts start phase 2 as copies of the trained global expert.
    """

    def __init__(
        self,
        *args: Any,
        kmeans_tokens: int = 131_072,
        kmeans_seed: int = 0,
        kmeans_data: Literal["occurrences", "unique_items"] = "occurrences",
        kmeans_space: Literal["hidden", "input"] = "hidden",
        expert_init: Literal["random", "copy_global"] = "random",
        **params: Any,
    ) -> None:
        super().__init__(*args, **params)
        self.kmeans_tokens = kmeans_tokens
        self.kmeans_seed = kmeans_seed
        self.kmeans_data = kmeans_data
        self.kmeans_space = kmeans_space
        self.expert_init = expert_init
        if self.mos.taxonomy_feature is not None:
            self._use_taxonomy(self.mos.taxonomy_feature)

    @property
    def mos(self) -> MoS:
        """The MoS layer."""
        return self.method_layers()[0]

    @property
    def final_alphas(self) -> tuple[float, ...]:
        return self.mos.final_alphas

    def fuse(self, alphas: tuple[float, ...], update_codebooks: bool = False) -> None:
        item, window = alphas
        self.mos.set_fusion(item, window, update_codebooks=update_codebooks)

    def fusion_text(self) -> str:
        return f"item {self.mos.alpha_item:g} window {self.mos.alpha_window:g}"

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
