"""Which expert a model's router gives each occurrence of an item to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from model_zoo.analysis.trained_run import TrainedRun
from model_zoo.batch import Batch
from model_zoo.errors import ConfigError
from model_zoo.layers.dselect_k_router import DSelectKRouter
from model_zoo.layers.expert_choice_router import ExpertChoiceRouter
from model_zoo.layers.gshard_router import GShardRouter
from model_zoo.layers.mos import MoS
from model_zoo.layers.routers import Routing, ThemeRouter
from model_zoo.layers.sequence import Sequence
from model_zoo.layers.shared_expert_moe import SharedExpertMoE
from model_zoo.pipeline.loader import gather_histories
from model_zoo.sequential_ctr import SequentialCTR

Counts = npt.NDArray[np.int64]

#: histories routed at a time
BATCH = 256


@dataclass(frozen=True)
class Dispatch:
    """Occurrences by expert.

    Attributes:
        counts: int64 ``[items, n + 1]``, the last column those that no expert reads.
        router_input: what the router looks at, in words.
    """

    counts: Counts
    router_input: str

    @property
    def occurrences(self) -> Counts:
        """``[items]``."""
        return self.counts.sum(1)

    def extremes(self, least: int) -> tuple[int, int]:
        """The items with the most and with the fewest occurrences, of those with at least ``least``; of equals the first.

        Raises:
            ConfigError: fewer than two items have as many.
        """
        times = self.occurrences
        enough = np.flatnonzero(times >= least)
        if len(enough) < 2:
            raise ConfigError(f"--least {least}: {len(enough)} item(s) occur as often in the histories read; lower it")
        return int(enough[times[enough].argmax()]), int(enough[times[enough].argmin()])

    def consistency(self, least: int) -> float:
        """Mean over items with at least ``least`` occurrences of the share that goes to the item's commonest expert."""
        times = self.occurrences
        enough = times >= least
        return float((self.counts[enough, :-1].max(1) / times[enough]).mean()) if enough.any() else float("nan")


@torch.no_grad()
def dispatch(run: TrainedRun) -> Dispatch:
    """Route the newest ``max_len`` items of every user's history in evaluation mode, each history once.

    An occurrence counts for the expert with the largest gate (of MoS: the largest cosine) among those that read it. MoS's
    router, and any that looks at the item alone, chooses the same expert for an item every time; what spreads a rival's
    choices is capacity, or that experts choose.

    Raises:
        ConfigError: the model has no router of items.
    """
    model, histories = run.model, run.dataset.histories
    router, described = item_router(model)
    model.eval()
    users = np.flatnonzero(histories.lengths)
    n = int(router.codebook.num_themes if isinstance(router, ThemeRouter) else router.num_experts)  # type: ignore[arg-type]
    counts: Counts = np.zeros((run.dataset.num_items, n + 1), np.int64)
    for first in range(0, len(users), BATCH):
        part = users[first : first + BATCH].astype(np.int32)
        items = gather_histories(histories, part, histories.lengths[part].astype(np.int32), run.params["max_len"])
        history = torch.from_numpy(items)
        nothing = torch.zeros(len(part))
        batch = Batch(history, history[:, -1], {}, nothing, None, torch.from_numpy(part).long())
        _, target, sequence = model._read(batch)
        layer = model.method_layers()[0]
        tokens = layer.router_inputs(target, sequence) if isinstance(layer, MoS) else sequence
        expert = winners(token_scores(router, tokens)[tokens.index], router(tokens)).cpu().numpy()
        np.add.at(counts, (items[items > 0], expert[items > 0]), 1)
    if not len(users):
        raise ConfigError(f"{run.dataset.files['user_info']}: every history is empty; there is nothing to route")
    return Dispatch(counts, described)


def item_router(model: SequentialCTR) -> tuple[nn.Module, str]:
    """The router of items, and what it looks at.

    Raises:
        ConfigError: there is none.
    """
    for layer in model.method_layers():
        if isinstance(layer, MoS) and layer.item_router is not None:
            return layer.item_router, "item" if layer.router_input == "item" else "item and target (the newest item here)"
        if isinstance(layer, SharedExpertMoE) and layer.router is not None:
            choosing = isinstance(layer.router, ExpertChoiceRouter)
            return layer.router, "item, beside the others of its history" if choosing else "item, then places left"
    raise ConfigError(f"{type(model).__name__}: has no router of items in this run; give a run of a mixture of experts")


def token_scores(router: nn.Module, tokens: Sequence) -> Tensor:
    """How much each item row is drawn to each expert, ``[U, n]``, before any capacity.

    Raises:
        ConfigError: a router that is not known here.
    """
    if isinstance(router, ThemeRouter):
        return router.codebook.cosine(router.encode(tokens.items))
    if isinstance(router, GShardRouter | ExpertChoiceRouter):
        return router.linear(tokens.items)
    if isinstance(router, DSelectKRouter):
        return (router.w(tokens.items).softmax(-1).unsqueeze(-1) * router.selectors(tokens.items)).sum(1)
    raise ConfigError(f"{type(router).__name__}: its gates of single tokens are not known; add it to analysis/dispatch.py")


def winners(scores: Tensor, routing: Routing) -> Tensor:
    """``[B, T]`` the expert of the largest score among those that read each token; n where none does.

    Args:
        scores: ``[B, T, n]``.
    """
    best = scores.masked_fill(~routing.members, -torch.inf).argmax(-1)
    return torch.where(routing.members.any(-1), best, scores.shape[-1])
