"""Which categories of items MoS's themes are read for: does a theme serve only the most frequent ones?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model_zoo.batch import Batch
from model_zoo.layers.mos import MoS
from model_zoo.layers.routed_experts import RoutedTokens
from model_zoo.layers.windows import CATEGORY, Windows
from model_zoo.pipeline.dataset import CTRDataset
from model_zoo.scoring import predicting
from model_zoo.sequential_ctr import SequentialCTR

#: share of history tokens that the head categories hold together, at least
HEAD = 0.5
#: a theme serves the head alone if the tail has less than this part of the share that it has of all tokens
MUCH_LESS = 0.1
#: categories that are named of each theme
TOP = 5


def exposure(
    model: SequentialCTR, batches: Iterable[Any], dataset: CTRDataset, category: str | None, max_batches: int = 16
) -> dict[str, Any]:
    """How the tokens that each theme's expert reads spread over categories, in the first batches of a split.

    A reading is a token of theme i in a row whose answer expert i has a part in. A window's category is the one that most
    of its items have. The head is the fewest categories, most frequent ones first, that hold half of all history tokens.
    With ``p_i(c)`` the share of theme i's readings that are of category c, ``p(c)`` that of all tokens (all windows):

    - ``head_share`` = sum of ``p_i(c)`` over the head, and ``tail_ratio`` = ``sum_tail p_i(c) / sum_tail p(c)``: 1 = the
      theme reads tail categories as often as they occur; ``head_only``: it is below 0.1;
    - ``categories`` = exp of the entropy of ``p_i``: over how many categories, evenly read, it would spread as much;
    - ``target_head_share``: of the rows that the expert serves, those whose target's category is of the head.

    Args:
        category: the item feature that holds categories; None = every item is a category of its own.

    Returns:
        ``by``, ``categories`` and ``head`` (their numbers), and for each router ``head_share`` of all tokens and
        ``themes``, a list with those figures, ``readings``, ``rows`` and ``top``, the categories read most, with shares.
        Empty without a MoS layer, or without a token.
    """
    layers = [layer for layer in model.method_layers() if isinstance(layer, MoS)]
    if not layers or not layers[0].expert_modules():
        return {}
    column = np.arange(dataset.num_items) if category is None else dataset.item_columns[category].astype(np.int64)
    table = torch.from_numpy(column).to(model.device)
    count = int(table.max()) + 1
    frequency = torch.zeros(count, dtype=torch.long)
    sums: dict[str, dict[str, Tensor]] = {}
    with predicting(model):
        for batch in islice(batches, max_batches):
            for name, found in _readings(model, layers[0], batch, table, count, frequency).items():
                total = sums.setdefault(name, {key: torch.zeros_like(value) for key, value in found.items()})
                for key, value in found.items():
                    total[key] += value
    frequency[0] = 0
    if not sums or not int(frequency.sum()):
        return {}
    head = head_of(frequency)
    known = int((frequency > 0).sum())
    report: dict[str, Any] = {"by": category or "item", "categories": known, "head": len(head)}
    return {**report, **{name: _figures(total, head) for name, total in sums.items()}}


def head_of(frequency: Tensor) -> Tensor:
    """The fewest categories, most frequent first, that hold the share `HEAD` of all tokens, ``frequency [C]``."""
    order = frequency.argsort(descending=True, stable=True)
    reached = frequency[order].cumsum(0)
    return order[: int((reached < HEAD * reached[-1]).sum()) + 1]


def _readings(
    model: SequentialCTR, layer: MoS, batch: Batch, table: Tensor, count: int, frequency: Tensor
) -> dict[str, dict[str, Tensor]]:
    """Of each router: tokens ``[C]``, readings and targets ``[n, C]``, rows ``[n]``; ``frequency [C]`` counts on."""
    batch = batch.to(model.device)
    _, target, sequence = model._read(batch)
    if not bool(sequence.mask.any()):
        return {}
    of_item = torch.zeros(len(sequence.items), dtype=torch.long, device=table.device)
    of_item[sequence.index[sequence.mask]] = table[batch.history[sequence.mask].long()]
    frequency += torch.bincount(of_item[sequence.index[sequence.mask]], minlength=count).cpu()
    aimed = table[batch.target.long()]
    named = replace(sequence, memo={**sequence.memo, CATEGORY: of_item})
    found = {}
    for name, routed in layer.route(target, named).items():
        category = _categories(routed)
        serves = (routed.routing.gates != 0) & routed.active.unsqueeze(1)  # [B, n]
        reads = routed.routing.members & routed.tokens.mask.unsqueeze(2) & serves.unsqueeze(1)  # [B, T, n]
        tokens = category[routed.tokens.index]
        themes = range(serves.shape[1])
        by_theme = [torch.bincount(tokens[reads[:, :, i]], minlength=count) for i in themes]
        by_target = [torch.bincount(aimed[serves[:, i]], minlength=count) for i in themes]
        found[name] = {
            "tokens": torch.bincount(tokens[routed.tokens.mask], minlength=count).cpu(),
            "readings": torch.stack(by_theme).cpu(),
            "targets": torch.stack(by_target).cpu(),
            "rows": serves.sum(0).cpu(),
        }
    return found


def _categories(routed: RoutedTokens) -> Tensor:
    """The category of each row that a token's index points at."""
    tokens = routed.tokens
    found = tokens.category if isinstance(tokens, Windows) else tokens.memo[CATEGORY]
    assert found is not None
    return found if len(found) else routed.tokens.index.new_zeros(1)


def _figures(total: dict[str, Tensor], head: Tensor) -> dict[str, Any]:
    """A router's figures from its sums."""
    everything = _shares(total["tokens"][None])[0]
    tail = float(1 - everything[head].sum())
    themes = []
    for readings, targets, rows in zip(total["readings"], total["targets"], total["rows"], strict=True):
        share, aimed = _shares(torch.stack([readings, targets]))
        read = int(readings[1:].sum())
        head_share = float(share[head].sum())
        ratio = (1 - head_share) / tail if read and tail > 0 else None
        best = share.argsort(descending=True, stable=True)[:TOP]
        themes.append({
            "rows": int(rows),
            "readings": read,
            "head_share": head_share if read else None,
            "tail_ratio": ratio,
            "head_only": None if ratio is None else ratio < MUCH_LESS,
            "categories": float(torch.special.entr(share).sum().exp()) if read else None,
            "target_head_share": float(aimed[head].sum()) if int(targets[1:].sum()) else None,
            "top": [[int(number), float(share[number])] for number in best if share[number] > 0],
        })  # fmt: skip
    return {"head_share": float(everything[head].sum()), "themes": themes}


def _shares(counts: Tensor) -> Tensor:
    """Counts ``[R, C]`` as shares of their row, without category 0, float64."""
    counts = counts.double()
    counts[:, 0] = 0
    return counts / counts.sum(1, keepdim=True).clamp(min=1)


def exposure_rows(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table that shows an `exposure` report."""
    header = ["theme", "rows", "readings", "head share", "tail ratio", "categories", "targets of the head", "serves"]
    rows = []
    for router in ("item", "window"):
        for number, theme in enumerate(report.get(router, {}).get("themes", [])):
            shown = [theme[key] for key in ("head_share", "tail_ratio", "categories", "target_head_share")]
            verdict = {None: "n/a", True: "head only", False: "head and tail"}[theme["head_only"]]
            numbers = [str(theme["rows"]), str(theme["readings"])]
            numbers += ["n/a" if value is None else f"{value:.3f}" for value in shown]
            rows.append([f"{router} {number}", *numbers, verdict])
    return header, rows
