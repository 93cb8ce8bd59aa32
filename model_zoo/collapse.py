"""What an evaluation says besides its metrics: how routers spread tokens, how many directions embeddings use, warnings."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from model_zoo.batch import AnyBatch
from model_zoo.layers.mos import MoS
from model_zoo.layers.routing_usage import effective_rank, mean_routing_stats, relative_entropy
from model_zoo.layers.shared_expert_moe import SharedExpertMoE

if TYPE_CHECKING:
    from model_zoo.training import TrainingLoop

logger = logging.getLogger("model_zoo")

#: batches of the validation split that the routing figures of one evaluation are of
BATCHES = 4
#: a theme that reads a smaller share of the tokens is as good as lost: one of 1,000
LOST_SHARE = 1e-3
#: with fewer tokens, chance alone leaves a theme of this share without any (of 5,000, in one of 148 cases)
ENOUGH_TOKENS = 5_000
#: relative entropy of the shares below which routing is as good as none: of 5 themes one has about 97 % of the tokens
LOW_ENTROPY = 0.1
#: (rank - 1) / (size - 1) of a matrix whose rows are nearly one: codes with cosines of 0.985 among them, or a table of
#: width 16 that uses fewer than 5 directions. On the sample in data/ trained codes have 0.8, trained tables 0.94 and more.
LOW_RANK = 0.25
#: rows of a table that its rank is taken of
SAMPLED_ROWS = 4096
#: a table with fewer rows for each column may have a low rank because it has few values
ROWS_PER_COLUMN = 4


def evaluation_figures(model: TrainingLoop, batches: Iterable[AnyBatch] | None) -> dict[str, Any]:
    """Figures of one evaluation, for its record; new warnings are logged, each cause once a phase.

    The random streams that training draws from do not move.

    Args:
        model: in its present phase; its ``history`` tells which warnings were given.
        batches: of the validation split, of which the first few are read; None: no routing figures.

    Returns:
        ``gradient_norm`` (``mean`` and ``max`` since the evaluation before, if there were steps); ``routing``, figures
        by router (`routing_figures`); ``effective_rank`` by embedding table; ``warnings``, cause to sentence.
    """
    figures: dict[str, Any] = {"gradient_norm": model.gradient_norms(), "routing": routing_figures(model, batches)}
    ranks = {name: (effective_rank(rows), rows.shape[1]) for name, rows in _tables(model)}
    figures["effective_rank"] = {name: rank for name, (rank, _) in ranks.items()}
    figures["warnings"] = dict([*_routing_warnings(figures["routing"]), *_rank_warnings(ranks)])
    given = {cause for r in model.history if r["phase"] == model.phase_name for cause in r.get("warnings", {})}
    for cause, sentence in figures["warnings"].items():
        if cause not in given:
            logger.warning("%s: %s", model.phase_name, sentence)
    return figures


@torch.no_grad()
def routing_figures(
    model: TrainingLoop, batches: Iterable[AnyBatch] | None, max_batches: int = BATCHES
) -> dict[str, dict[str, Any]]:
    """How the routers that take part in the model's predictions, in evaluation, treat the first batches of a split.

    Returns:
        For MoS ``item`` and ``window``, as in `routing_usage.usage_report`; for its rivals ``experts``: the figures of
        `SharedExpertMoE.routing_stats` with ``read`` and ``entropy``. Empty for a plain backbone, and before
        experts have a weight.
    """
    layers = model.method_layers()
    layer = layers[0] if layers and batches is not None else None
    training = model.training
    try:
        if isinstance(layer, MoS):
            weights = {"item": layer.alpha_item, "window": layer.alpha_window}
            if not any(weights.values()):
                return {}
            usage = model.codebook_usage(batches, max_batches)  # type: ignore[attr-defined]
            return {name: report for name, report in usage.items() if weights[name]}
        if isinstance(layer, SharedExpertMoE) and layer.alpha_routed:
            stats = routing_report(model, batches, max_batches)  # type: ignore[arg-type]
            if stats:
                stats["read"] = [share * stats["experts_per_token"] for share in stats["share"]]
                stats["entropy"] = relative_entropy(torch.tensor(stats["share"]))
                return {"experts": stats}
        return {}
    finally:
        model.train(training)


@torch.no_grad()
def routing_report(model: TrainingLoop, batches: Iterable[AnyBatch], max_batches: int = 16) -> dict[str, Any]:
    """How a rival method's routers, in evaluation, treat the first batches of a split; empty without such a router."""
    layers = [layer for layer in model.method_layers() if isinstance(layer, SharedExpertMoE)]
    if not layers:
        return {}
    model.eval()
    return mean_routing_stats(layers[0].routing_stats(model._read(batch)[2]) for batch in islice(batches, max_batches))


def _routing_warnings(routing: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str]]:
    for router, figures in routing.items():
        if figures["tokens"] < ENOUGH_TOKENS:
            continue
        of = f"of {figures['tokens']:,} validation tokens"
        for theme, share in enumerate(figures["read"]):
            if share < LOST_SHARE:
                yield (
                    f"routing/{router}/share/{theme}",
                    f"theme {theme} of the {router} router reads {share:.3%} {of} (under {LOST_SHARE:.1%}): its expert is "
                    "as good as absent; see revive_dead, or take fewer experts",
                )
        if len(figures["share"]) > 1 and figures["entropy"] < LOW_ENTROPY:
            yield (
                f"routing/{router}/entropy",
                f"the {router} router sends {max(figures['share']):.1%} {of} to one expert (entropy "
                f"{figures['entropy']:.3f} of 1): routing is as good as absent",
            )
        size = len(figures["share"])
        if _low(figures.get("effective_rank", math.nan), size):
            yield (
                f"routing/{router}/effective_rank",
                f"the {size} codes of the {router} router point to nearly one direction (effective rank "
                f"{figures['effective_rank']:.2f}): which theme a token gets hangs on tiny differences",
            )


def _rank_warnings(ranks: dict[str, tuple[float, int]]) -> Iterator[tuple[str, str]]:
    for name, (rank, width) in ranks.items():
        if _low(rank, width):
            yield (
                f"effective_rank/{name}",
                f"the embedding of {name} uses few of its {width} dimensions (effective rank {rank:.2f}): lower "
                "embedding_regularizer or learning_rate, or embedding_dim, which would cost no accuracy then",
            )


def _low(rank: float, size: int) -> bool:
    return size > 1 and (rank - 1) / (size - 1) < LOW_RANK


def _tables(model: TrainingLoop) -> Iterator[tuple[str, Tensor]]:
    """Name and up to `SAMPLED_ROWS` rows of each embedding table that has rows enough; the padding row left out."""
    generator = torch.Generator().manual_seed(0)  # training's random stream must not move
    for name, table in model.embedding_layer.named_modules():
        if not isinstance(table, nn.Embedding) or name.endswith("pretrain_embedding"):  # the data's, not training's
            continue
        rows, width = table.weight.shape
        if width < 2 or rows < ROWS_PER_COLUMN * width:
            continue
        drawn = torch.randint(rows, (SAMPLED_ROWS,), generator=generator) if rows > SAMPLED_ROWS else torch.arange(rows)
        if table.padding_idx is not None:
            drawn = drawn[drawn != table.padding_idx]
        yield name.rpartition("embedding_layers.")[2], table.weight.detach()[drawn.to(table.weight.device)]
