"""Which themes, or experts, the routers of a trained model give to the items of real histories."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from model_zoo.batch import Batch
from model_zoo.layers.routers import Routing, ThemeRouter
from model_zoo.layers.sequence import Sequence, SharedSequence, distinct_items
from model_zoo.sequential_ctr import SequentialCTR

Integers = npt.NDArray[np.int64]


@dataclass
class Readings:
    """What one router's experts read.

    Attributes:
        counts: ``[items, n]`` how often each item was in a token that each expert reads; a window counts for each of its
            items.
        tokens: tokens routed.
        unread: of them, those that no expert reads.
    """

    counts: Integers
    tokens: int = 0
    unread: int = 0


@dataclass(frozen=True)
class Example:
    """One user's history.

    Attributes:
        items: ``[T]`` item indices, oldest first.
        themes: router to ``[tokens, k]`` themes of each token, the best first, -1 where it has fewer.
    """

    items: Integers
    themes: dict[str, Integers] = field(default_factory=dict)


@torch.no_grad()
def observe(
    model: SequentialCTR, batches: Iterable[Batch], num_items: int
) -> tuple[dict[str, Readings], list[Example]]:
    """What the routers that have a part in the predictions do with the histories of some batches.

    Args:
        model: over a method, in evaluation mode.
        num_items: rows of the item table.

    Returns:
        Readings by router, ``item`` and ``window`` of MoS or ``experts`` of its rivals, and the first batch's histories,
        one of each user.
    """
    layer = model.method_layers()[0]
    readings: dict[str, Readings] = {}
    examples: list[Example] = []
    for number, batch in enumerate(batches):
        with _listening(layer) as heard:
            model(batch)
        if "sequence" not in heard:
            continue
        sequence: Sequence = heard["sequence"]
        rows, _ = distinct_items(torch.cat([batch.history.flatten(), batch.target]), num_items)
        if len(rows) != len(sequence.items):  # a block that made other vectors of its items
            continue
        for name, (routing, themes) in heard["routed"].items():
            entry = readings.setdefault(name, Readings(np.zeros((num_items, routing.members.shape[2]), np.int64)))
            item, chosen = _tokens(layer, name, sequence, themes)
            _count(entry, rows[item].numpy(), chosen.numpy())
            mask = _token_mask(layer, name, sequence)
            entry.tokens += int(mask.sum())
            entry.unread += int((mask & (themes < 0).all(2)).sum())
        if number == 0:
            examples = _examples(layer, sequence, rows, heard, batch)
    return readings, examples


@contextmanager
def _listening(layer: nn.Module) -> Iterator[dict[str, Any]]:
    """What the layer is given and its routers answer, while a batch runs."""
    heard: dict[str, Any] = {"routed": {}}

    def given(module: nn.Module, args: tuple[Any, ...]) -> None:
        shared = isinstance(args[1], SharedSequence)
        heard["sequence"] = args[1].histories if shared else args[1]
        heard["owner"] = args[1].owner if shared else None

    def answered(name: str) -> Callable[..., None]:
        def hook(router: nn.Module, args: tuple[Any, ...], routing: Routing) -> None:
            heard["routed"][name] = routing, _themes(router, args[0], routing)

        return hook

    routers = [(name, child) for name, child in layer.named_children() if name.endswith("router")]
    handles = [layer.register_forward_pre_hook(given)]
    for name, router in routers:
        handles.append(router.register_forward_hook(answered(name.removesuffix("_router").replace("router", "experts"))))
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def _themes(router: nn.Module, tokens: Any, routing: Routing) -> Tensor:
    """``[P, T, k]`` the experts that read each token, of a theme router the nearest first; -1 where there are fewer."""
    if isinstance(router, ThemeRouter):
        best = router.codebook.nearest(router.encode_tokens(tokens), router.topk)
        return best[tokens.index] if len(best) else best.new_full((*tokens.index.shape, router.topk), -1)
    found, expert = routing.members.to(torch.uint8).sort(dim=2, descending=True, stable=True)
    most = max(int(routing.members.sum(2).max()), 1) if routing.members.numel() else 1
    return torch.where(found[:, :, :most].bool(), expert[:, :, :most], -1)


def _token_mask(layer: Any, name: str, sequence: Sequence) -> Tensor:
    """``[P, T]`` which of a router's tokens exist."""
    return layer.windows(sequence).mask if name == "window" else sequence.mask


def _tokens(layer: Any, name: str, sequence: Sequence, themes: Tensor) -> tuple[Tensor, Tensor]:
    """Item row ``[E]`` and themes ``[E, k]`` of every reading."""
    if name != "window":
        return sequence.index[sequence.mask], themes[sequence.mask]
    windows = layer.windows(sequence)
    owner, item = windows.members()
    return item, themes[windows.mask][owner]


def _count(entry: Readings, item: Integers, chosen: Integers) -> None:
    """Add readings, item by item and theme by theme."""
    items, themes = entry.counts.shape
    for choice in chosen.T:
        read = choice >= 0
        cell = item[read] * themes + choice[read]
        entry.counts += np.bincount(cell, minlength=items * themes).reshape(items, themes)


def _examples(layer: Any, sequence: Sequence, rows: Tensor, heard: dict[str, Any], batch: Batch) -> list[Example]:
    """The first history of each user in a batch."""
    owner = heard["owner"].numpy() if heard["owner"] is not None else np.arange(len(sequence.index))
    history, first = np.unique(owner, return_index=True)
    users = batch.group.numpy()[first] if batch.group is not None else history
    chosen = history[np.sort(np.unique(users, return_index=True)[1])]
    masks = {name: _token_mask(layer, name, sequence) for name in heard["routed"]}
    found = []
    for row in chosen.tolist():
        items = rows[sequence.index[row][sequence.mask[row]]].numpy()
        parts = {name: themes[row][masks[name][row]].numpy() for name, (_, themes) in heard["routed"].items()}
        found.append(Example(items, parts))
    return found
