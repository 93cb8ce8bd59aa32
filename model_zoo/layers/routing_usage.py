"""How routers spread tokens over experts: shares, margins, routed lengths, and how far codes lag behind their members."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model_zoo.layers.routers import ThemeRouter, occurrences
from model_zoo.layers.sequence import Sequence


@torch.no_grad()
def usage_report(
    routers: Mapping[str, ThemeRouter], batches: Iterable[Mapping[str, Sequence]]
) -> dict[str, dict[str, Any]]:
    """Figures per router over batches of its tokens; none of a router whose sequences have no column in any batch.

    Returns:
        ``tokens``, the count behind the means; ``share`` of them per theme, ``read`` = share of them that each theme's
        expert reads (more than ``share`` where a token has several), ``gating_share`` of rows per theme of their newest
        token, ``entropy`` of share over log n, ``margin`` = mean top-1 minus top-2 cosine, ``routed`` = mean share of a
        row's tokens that its first expert reads and ``routed_length`` = their mean number, ``drift`` = cosine of each
        code to its members' mean (1 = the code keeps up; 0 = no members), ``effective_rank`` of the codes' directions.
    """
    totals: dict[str, dict[str, Tensor]] = {}
    for batch in batches:
        for name, tokens in batch.items():
            if not tokens.index.shape[1]:
                continue
            found = _routing_sums(routers[name], tokens)
            total = totals.setdefault(name, {key: torch.zeros_like(value) for key, value in found.items()})
            for key, value in found.items():
                total[key] += value
    report = {}
    for name, total in totals.items():
        count = total["tokens"].sum().clamp(min=1)
        share = total["tokens"] / count
        rows = total["rows"].clamp(min=1)
        codes = routers[name].codebook.codes
        mean = total["hidden"] / total["members"].clamp(min=1).unsqueeze(1)
        report[name] = {
            "tokens": int(total["tokens"].sum()),
            "share": share.tolist(),
            "read": (total["members"] / count).tolist(),
            "gating_share": (total["gating"] / total["gating"].sum().clamp(min=1)).tolist(),
            "entropy": relative_entropy(share),
            "margin": float(total["margin"] / count),
            "routed": float(total["routed"] / rows),
            "routed_length": float(total["routed_length"] / rows),
            "drift": F.cosine_similarity(codes, mean, dim=1).tolist(),
            "effective_rank": effective_rank(F.normalize(codes, dim=1)),
        }
    return report


def _routing_sums(router: ThemeRouter, tokens: Sequence) -> dict[str, Tensor]:
    """Sums over one batch from which `codebook_usage` forms its figures."""
    themes = router.codebook.num_themes
    hidden = router.encode(tokens.items).float()
    scores = router.codebook.cosine(hidden)
    best = scores.topk(router.topk, dim=-1).indices
    top = scores.topk(min(2, themes), dim=-1).values
    weight = occurrences(tokens).float()
    real = tokens.mask.any(1)
    experts = best[tokens.index]
    gating = experts[:, -1][real]
    read = ((experts == experts[:, -1:, :1]).any(-1) & tokens.mask).sum(1).float()
    members = torch.zeros(themes, device=weight.device)
    total = torch.zeros(themes, hidden.shape[1], device=weight.device)
    for choice in best.unbind(1):
        members.index_add_(0, choice, weight)
        total.index_add_(0, choice, hidden * weight.unsqueeze(1))
    return {
        "tokens": torch.zeros(themes, device=weight.device).index_add_(0, best[:, 0], weight),
        "members": members,
        "hidden": total,
        "gating": torch.bincount(gating[:, 0], minlength=themes).float(),
        "margin": ((top[:, 0] - top[:, -1]) * weight).sum(),
        "routed": (read / tokens.lengths.clamp(min=1))[real].sum(),
        "routed_length": read[real].sum(),
        "rows": real.sum().float(),
    }


def relative_entropy(share: Tensor) -> float:
    """Entropy of shares ``[n]`` that sum to 1, over log n: 1 = even, 0 = all in one place."""
    return float(-(share * share.clamp(min=1e-12).log()).sum() / math.log(max(len(share), 2)))


@torch.no_grad()
def effective_rank(matrix: Tensor) -> float:
    """The number of directions that a matrix ``[n, d]`` spreads over: exp of the entropy of its normalised singular values.

    1 where all rows are multiples of one, min(n, d) where no direction has more than another; 0 for zeros, nan where a
    number is not finite.

    Source: Roy & Vetterli, The effective rank, EUSIPCO 2007.
    """
    if not bool(torch.isfinite(matrix).all()):
        return math.nan
    wide = matrix.double()
    gram = wide.T @ wide if wide.shape[0] > wide.shape[1] else wide @ wide.T
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    if float(singular.sum()) == 0:
        return 0.0
    share = singular / singular.sum()
    return math.exp(float(torch.special.entr(share).sum()))


def mean_routing_stats(batches: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """`SharedExpertMoE.routing_stats` of several batches as if they were one: counts added up, means weighed by counts."""
    found = [{name: torch.tensor(value, dtype=torch.double) for name, value in stats.items()} for stats in batches if stats]
    if not found:
        return {}
    counts = ("rows", "tokens", "served_rows")
    by = {"unread_rate": "tokens", "experts_per_token": "tokens", "served_length": "served_rows"}  # the rest by rows
    readings = [stats["experts_per_token"] * stats["tokens"] for stats in found]
    report: dict[str, Any] = {}
    for name in found[0]:
        if name in counts:
            mean = torch.stack([stats[name] for stats in found]).sum(0).long()
        else:
            weights = readings if name == "share" else [stats[by.get(name, "rows")] for stats in found]
            total = torch.stack([weight * stats[name] for weight, stats in zip(weights, found, strict=True)]).sum(0)
            mean = total / torch.stack(weights).sum(0).clamp(min=1)
        report[name] = mean.tolist()
    return report
