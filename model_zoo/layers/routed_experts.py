"""Sparse dispatch: each expert runs only for the rows that chose it, each on its own compacted subsequence."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as ListOf
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model_zoo.layers.attention_branches import AttentionBlock, Reading, attend_branches
from model_zoo.layers.blocks import call_block
from model_zoo.layers.item_rows import sparse_rows
from model_zoo.layers.routers import Routing
from model_zoo.layers.sequence import Sequence, SharedSequence, own_tables
from model_zoo.layers.window_attention import attend_windows
from model_zoo.layers.windows import Windows


class RoutedExperts(nn.Module):
    """n independent blocks; a row's answer is the gate-weighted sum of the blocks that serve it (MoS eq. 6-7).

    An expert whose gate is zero for a row has no part in its answer, so leaving it out is exact, for the output and for
    every gradient.

    Args:
        block_factory: makes one expert, a block ``(query [B, d], Sequence) -> [B, out_dim]``.
        num_experts: n >= 1.
    """

    def __init__(self, block_factory: Callable[[], nn.Module], num_experts: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(block_factory() for _ in range(num_experts))
        self.out_dim: int = self.experts[0].out_dim  # type: ignore[assignment]

    def forward(
        self, query: Tensor, sequence: Sequence | SharedSequence, routing: Routing, active: Tensor
    ) -> Tensor:
        """Weighted expert answers.

        Args:
            query: ``[B, d]`` targets.
            sequence: the tokens that were routed.
            routing: gates of the same rows, members over the sequence's positions (of shared histories, over those).
            active: ``[B]`` bool; rows to serve, the others get zeros.

        Returns:
            ``[B, out_dim]``.
        """
        return run_experts(list(self.experts), query, sequence, routing, active)


def run_experts(
    experts: ListOf[nn.Module], query: Tensor, sequence: Sequence | SharedSequence, routing: Routing, active: Tensor
) -> Tensor:
    """`RoutedExperts.forward` of any blocks, one expert at a time."""
    output = query.new_zeros(query.shape[0], int(experts[0].out_dim))  # type: ignore[arg-type]
    serves = (routing.gates != 0) & active.unsqueeze(1)
    serving = [number for number, rows in enumerate(serves.T.any(1).tolist()) if rows]
    rows = [serves[:, number].nonzero().squeeze(1) for number in serving]
    read: list[Any] = [
        sequence.select_kept(mine, routing.members[:, :, number]) for number, mine in zip(serving, rows, strict=True)
    ]
    if isinstance(sequence, Sequence):
        read = own_tables(read)
    for number, mine, tokens in zip(serving, rows, read, strict=True):
        answer = call_block(experts[number], query.index_select(0, mine), tokens)
        gate = routing.gates[:, number].index_select(0, mine).unsqueeze(1)
        output = output.index_add(0, mine, (answer * gate).to(output.dtype))
    return output


@dataclass(frozen=True)
class RoutedTokens:
    """Tokens, their routing, and the experts that read them.

    Attributes:
        experts: blocks of one architecture.
        tokens: items or windows of the same histories.
        routing: over them.
        active: ``[B]`` bool rows to serve.
    """

    experts: ListOf[nn.Module]
    tokens: Sequence | Windows
    routing: Routing
    active: Tensor


def fusable(blocks: ListOf[nn.Module], sequence: Sequence | SharedSequence) -> bool:
    """Whether `run_fused` can run the blocks: all they do with tokens is attention.

    Shared histories are read by one expert at a time: each reads only its own tokens, once for all their rows.
    """
    return isinstance(sequence, Sequence) and all(getattr(block, "attends", False) for block in blocks)


def run_fused(
    query: Tensor, sequence: Sequence, whole: AttentionBlock | None, routed: ListOf[RoutedTokens]
) -> tuple[Tensor | None, list[Tensor]]:
    """Answers of a block on the whole history and of routed experts, their attention over one table done together.

    The same as ``whole(query, sequence)`` and `run_experts` for each of ``routed``; blocks of one architecture.

    Returns:
        ``[B, out]`` of ``whole`` (None without it) and of each of ``routed``.
    """
    tables: dict[int, tuple[list[Reading], list[int]]] = {}  # what is read of each item table, and for whom
    dispatches = [_Dispatch(r) for r in routed]

    def read(asker: int, reading: Reading) -> None:
        readings, askers = tables.setdefault(id(reading.tokens.items), ([], []))
        readings.append(reading)
        askers.append(asker)

    if whole is not None and sequence.index.numel():
        read(-1, Reading(whole.absorb(query), sequence, aligned=True))
    first = whole if whole is not None else routed[0].experts[0]
    branches = first.reads()  # type: ignore[union-attr, operator]
    found: dict[int, list[Tensor]] = {}
    for number, (r, dispatch) in enumerate(zip(routed, dispatches, strict=True)):
        if len(dispatch.row) == 0:
            continue
        absorbed, members = dispatch.absorb(query), dispatch.members(r)
        if isinstance(r.tokens, Windows) and r.tokens.align == "right" and sparse_rows(r.tokens.source.items):
            found[number] = attend_windows(absorbed, r.tokens, dispatch.row, members, branches)
        else:
            tokens = r.tokens.sequence() if isinstance(r.tokens, Windows) else r.tokens
            chosen = Sequence(tokens.items, tokens.index[dispatch.row], members, memo=tokens.memo)
            read(number, Reading(absorbed, chosen, aligned=False))
    for readings, askers in tables.values():
        found |= zip(askers, attend_branches(readings, branches), strict=True)
    overall = None if whole is None else whole.finish(query, found.get(-1))
    answers = [
        dispatch.finish(query, found.get(number), r.routing.gates)
        for number, (r, dispatch) in enumerate(zip(routed, dispatches, strict=True))
    ]
    return overall, answers


class _Dispatch:
    """The (row, expert) pairs to serve, M of them, expert by expert."""

    def __init__(self, routed: RoutedTokens) -> None:
        serves = (routed.routing.gates != 0) & routed.active.unsqueeze(1)  # [B, n]
        self.experts = routed.experts
        self.expert, self.row = serves.T.nonzero(as_tuple=True)
        self.counts: list[int] = serves.sum(0).tolist()

    def parts(self, query: Tensor) -> list[tuple[nn.Module, Tensor]]:
        """Each serving expert with its rows' targets."""
        split = query.index_select(0, self.row).split(self.counts)
        return [(expert, rows) for expert, rows in zip(self.experts, split, strict=True) if len(rows)]

    def absorb(self, query: Tensor) -> Tensor:
        """``[M, H, d]`` targets as their experts' queries in the item space."""
        return torch.cat([expert.absorb(rows) for expert, rows in self.parts(query)])  # type: ignore[operator]

    def members(self, routed: RoutedTokens) -> Tensor:
        """``[M, T]`` bool, the tokens that each pair reads: each expert the tokens routed to it."""
        return routed.routing.members[self.row, :, self.expert] & routed.tokens.mask[self.row]

    def finish(self, query: Tensor, pooled: list[Tensor] | None, gates: Tensor) -> Tensor:
        """``[B, out]`` gate-weighted answers from the pooled tokens of each branch, ``[M, h, d]``."""
        output = query.new_zeros(query.shape[0], int(self.experts[0].out_dim))  # type: ignore[arg-type]
        if pooled is None:
            return output
        served = zip(*(branch.split([c for c in self.counts if c]) for branch in pooled), strict=True)
        answers = [
            expert.finish(rows, list(mine))  # type: ignore[operator]
            for (expert, rows), mine in zip(self.parts(query), served, strict=True)
        ]
        gate = gates[self.row, self.expert].unsqueeze(1)
        return output.index_add(0, self.row, (torch.cat(answers) * gate).to(output.dtype))
