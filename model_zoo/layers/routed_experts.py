"""Sparse dispatch: each expert runs only for the rows that chose it, each on its own compacted subsequence."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as ListOf
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo.layers.fused_attention import BranchRead, SlotReads, attend_slots
from model_zoo.layers.routers import Routing
from model_zoo.layers.sequence import Sequence
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

    def forward(self, query: Tensor, sequence: Sequence, routing: Routing, active: Tensor) -> Tensor:
        """Weighted expert answers.

        Args:
            query: ``[B, d]`` targets.
            sequence: the tokens that were routed.
            routing: over the same rows and positions.
            active: ``[B]`` bool; rows to serve, the others get zeros.

        Returns:
            ``[B, out_dim]``.
        """
        return run_experts(list(self.experts), query, sequence, routing, active)


def run_experts(
    experts: ListOf[nn.Module], query: Tensor, sequence: Sequence, routing: Routing, active: Tensor
) -> Tensor:
    """`RoutedExperts.forward` of any blocks, one expert at a time."""
    output = query.new_zeros(query.shape[0], int(experts[0].out_dim))  # type: ignore[arg-type]
    serves = (routing.gates != 0) & active.unsqueeze(1)
    for number, expert in enumerate(experts):
        rows = serves[:, number].nonzero().squeeze(1)
        if rows.numel():
            mine = sequence.select(rows).compact(routing.members[rows, :, number])
            answer = expert(query.index_select(0, rows), mine)
            gate = routing.gates[:, number].index_select(0, rows).unsqueeze(1)
            output = output.index_add(0, rows, (answer * gate).to(output.dtype))
    return output


class AttentionBlock(Protocol):
    """A block that only attends to items: experts of this kind are run together (`run_fused`)."""

    attends: bool

    def reads(self) -> list[BranchRead]:
        """Its branches."""

    def absorb(self, query: Tensor) -> Tensor:
        """``[B, H, d]`` queries in the item space."""

    def finish(self, query: Tensor, pooled: list[Tensor] | None) -> Tensor:
        """Its answer from the pooled items of each branch, ``[B, h, d]``."""


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


def fusable(blocks: ListOf[nn.Module], sequence: Sequence, tokens: ListOf[Sequence | Windows]) -> bool:
    """Whether `run_fused` can run the blocks on these tokens: the histories' own items, or windows over them."""
    return (
        sequence.index.shape[1] > 0
        and all(getattr(block, "attends", False) for block in blocks)
        and all(t is sequence or (isinstance(t, Windows) and t.align == "right") for t in tokens)
    )


def run_fused(
    query: Tensor, sequence: Sequence, whole: AttentionBlock | None, routed: ListOf[RoutedTokens]
) -> tuple[Tensor | None, list[Tensor]]:
    """Answers of a block on the whole history and of routed experts, each history's items gathered once for all.

    The same as ``whole(query, sequence)`` and `RoutedExperts.forward` for each of ``routed``.

    Returns:
        ``[B, out]`` of ``whole`` (None without it) and of each of ``routed``.
    """
    batch = query.shape[0]
    queries, reads = [], []
    if whole is not None:
        queries.append(whole.absorb(query).unsqueeze(1))
        reads.append(SlotReads(sequence.mask.unsqueeze(1)))
    dispatches = [_Dispatch(r.routing.slots(r.active), r.experts) for r in routed]
    for r, dispatch in zip(routed, dispatches, strict=True):
        if dispatch.slots == 0:
            continue
        wanted = dispatch.expert.clamp(min=0).unsqueeze(1).expand(-1, r.tokens.mask.shape[1], -1)
        members = r.routing.members.gather(2, wanted).transpose(1, 2)  # [B, S, T]
        members = members & r.tokens.mask.unsqueeze(1) & (dispatch.expert >= 0).unsqueeze(2)
        queries.append(dispatch.absorb(query))
        reads.append(SlotReads(members, r.tokens.pooling() if isinstance(r.tokens, Windows) else None))
    first = whole if whole is not None else routed[0].experts[0]
    branches = first.reads()  # type: ignore[union-attr, operator]
    found = attend_slots(queries, reads, branches, sequence.items, sequence.index, sequence.mask) if queries else []
    pooled = iter(found)
    heads = [branch.heads for branch in branches]
    overall = None
    if whole is not None:
        overall = whole.finish(query, list(next(pooled).squeeze(1).split(heads, 1)))
    answers = []
    for r, dispatch in zip(routed, dispatches, strict=True):
        if dispatch.slots == 0:
            answers.append(query.new_zeros(batch, int(r.experts[0].out_dim)))  # type: ignore[arg-type]
        else:
            answers.append(dispatch.finish(query, next(pooled), heads, r.routing.gates))
    return overall, answers


class _Dispatch:
    """Rows in the order of their experts.

    Args:
        expert: ``[B, S]`` int64 the expert in each slot, -1 = none.
        experts: blocks.
    """

    def __init__(self, expert: Tensor, experts: ListOf[nn.Module]) -> None:
        self.expert, self.experts = expert, experts
        self.slots = expert.shape[1]
        flat = expert.reshape(-1)
        order = flat.argsort(stable=True)  # empty slots first
        counts = torch.bincount(flat + 1, minlength=len(experts) + 1).tolist()
        self.empty, self.counts = counts[0], counts[1:]
        self.order = order[self.empty :]  # served slots, by expert
        self.inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        self.rows = self.order // max(self.slots, 1)

    def absorb(self, query: Tensor) -> Tensor:
        """``[B, S, H, d]`` queries of each slot's expert; zeros in empty slots."""
        parts = query.index_select(0, self.rows).split(self.counts)
        absorbed = [block.absorb(part) for block, part in zip(self.experts, parts, strict=True) if len(part)]  # type: ignore[operator]
        empty = absorbed[0].new_zeros(self.empty, *absorbed[0].shape[1:])
        by_slot = torch.cat([empty, *absorbed]).index_select(0, self.inverse)
        return by_slot.view(-1, self.slots, *by_slot.shape[1:])

    def finish(self, query: Tensor, pooled: Tensor, heads: list[int], gates: Tensor) -> Tensor:
        """``[B, out]`` gate-weighted answers from the pooled items ``[B, S, H, d]``."""
        queries = query.index_select(0, self.rows).split(self.counts)
        served = pooled.flatten(0, 1).index_select(0, self.order).split(self.counts)
        answers = torch.cat([
            block.finish(rows, list(mine.split(heads, 1)))  # type: ignore[operator]
            for block, rows, mine in zip(self.experts, queries, served, strict=True)
            if len(rows)
        ])  # fmt: skip
        gate = gates.gather(1, self.expert.clamp(min=0)).view(-1, 1).index_select(0, self.order)
        width = answers.shape[1]
        slots = F.pad(answers * gate, (0, 0, self.empty, 0)).index_select(0, self.inverse)
        return slots.view(-1, self.slots, width).sum(1).to(query.dtype)
