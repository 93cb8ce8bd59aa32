"""Blocks that only attend to items: what their branches read, and all their attention over one table done together."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as ListOf
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from model_zoo.layers.attend_rows import RowReads, attend_rows, row_scores
from model_zoo.layers.dropout import dropout_factors
from model_zoo.layers.sequence import Sequence


@dataclass(frozen=True)
class BranchRead:
    """What one branch of an attention block reads of its tokens.

    Attributes:
        heads: number of heads.
        newest: only so many of the newest tokens; None = all.
        topk: only so many of the best-scored tokens per head; None = all.
        dropout: probability on the attention weights, in force now.
        attend_padding: a row without a real token attends evenly to its padding, instead of giving zeros.
        weigh: weights given without a softmax, ``(query [N, d], tokens) -> [N, T]``, constants to the gradient; such a
            branch has one head and reads all its tokens.
    """

    heads: int
    newest: int | None = None
    topk: int | None = None
    dropout: float = 0.0
    attend_padding: bool = False
    weigh: Callable[[Tensor, Sequence], Tensor] | None = None


@dataclass(frozen=True)
class Reading:
    """N rows that attend to their tokens.

    Attributes:
        query: ``[N, H, d]`` in the item space, already scaled; H heads over all branches.
        tokens: of each row; those that its mask leaves out may stand anywhere.
        aligned: each row's real tokens stand together at its right end.
    """

    query: Tensor
    tokens: Sequence
    aligned: bool


class AttentionBlock(Protocol):
    """A block whose only work on items is attention: `finish` of the attention that `absorb` and `reads` ask for."""

    @property
    def attends(self) -> bool:
        """Whether that holds as the block is configured."""

    def reads(self) -> list[BranchRead]:
        """Its branches."""

    def absorb(self, query: Tensor) -> Tensor:
        """``[B, H, d]`` queries in the item space."""

    def finish(self, query: Tensor, pooled: list[Tensor] | None) -> Tensor:
        """Its answer from the pooled items of each branch, ``[B, h, d]``; None if the rows hold nothing."""


def attend_branches(readings: ListOf[Reading], branches: ListOf[BranchRead]) -> list[list[Tensor]]:
    """``sum_t softmax_t(query . x_t) x_t`` for every reading and branch, ``[N, h, d]`` each; nothing to read gives zeros.

    The tokens that ``topk`` keeps are chosen without a gradient: none reaches a token that is not kept.

    Args:
        readings: rows with their queries and tokens, all of one item table.
        branches: how the heads, in order, restrict the tokens.
    """
    items = readings[0].tokens.items
    queries, reads = [], []
    heads = [branch.heads for branch in branches]
    for reading in readings:
        for query, branch in zip(reading.query.to(items.dtype).split(heads, 1), branches, strict=True):
            flat = query.reshape(-1, query.shape[-1])  # [N h, d]
            queries.append(flat)
            reads.append(rows_read(flat, reading, branch))
    pooled = iter(attend_rows(queries, reads, items))
    return [[next(pooled).unflatten(0, (-1, count)) for count in heads] for _ in readings]


def rows_read(query: Tensor, reading: Reading, branch: BranchRead) -> RowReads:
    """What each head of a branch reads, whose queries are ``query [N h, d]``."""
    items, index, mask = reading.tokens.items, reading.tokens.index, reading.tokens.mask
    if branch.weigh is not None:
        return RowReads(index, mask, weight=branch.weigh(query.detach(), reading.tokens))
    if branch.newest is not None and branch.newest < index.shape[1]:
        index, mask = _newest(reading, branch.newest)
    if branch.heads > 1:
        index, mask = index.repeat_interleave(branch.heads, 0), mask.repeat_interleave(branch.heads, 0)
    scores = None
    if branch.topk is not None and branch.topk < index.shape[1]:
        scores, column = row_scores(query, items, index, mask).topk(branch.topk, dim=1, sorted=False)
        index, mask = index.gather(1, column), mask.gather(1, column)
    keep = dropout_factors(index.shape, branch.dropout, query) if branch.dropout else None
    return RowReads(index, mask, keep, branch.attend_padding, scores)


def _newest(reading: Reading, count: int) -> tuple[Tensor, Tensor]:
    """Index and mask ``[N, count]`` of each row's newest tokens, at the right end."""
    index, mask = reading.tokens.index, reading.tokens.mask
    if reading.aligned:
        return index[:, -count:], mask[:, -count:]
    seen = mask.cumsum(1, dtype=torch.int32)
    age = seen[:, -1:] - seen  # real tokens that are newer
    kept = mask & (age < count)
    row, column = kept.nonzero(as_tuple=True)
    place = count - 1 - age[kept].long()
    chosen = index.new_zeros(len(index), count)
    chosen[row, place] = index[row, column]
    real = torch.zeros_like(chosen, dtype=torch.bool)
    real[row, place] = True
    return chosen, real


def run_block(block: AttentionBlock, query: Tensor, sequence: Sequence) -> Tensor:
    """The block's answer ``[B, out]`` for the targets ``query [B, d]``."""
    if sequence.index.numel() == 0:
        return block.finish(query, None)
    [pooled] = attend_branches([Reading(block.absorb(query), sequence, aligned=True)], block.reads())
    return block.finish(query, pooled)
