"""A batch of histories as item rows and an index into them.

Anything that depends on an item alone is computed once per distinct item and then gathered, so a batch keeps its distinct
items' vectors (``items``) and where each stands (``index``). A batch that carries a vector per position is the special
case of as many items as positions.
"""

from __future__ import annotations

from collections.abc import Sequence as ListOf
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: the share of a table's rows up to which sequences get tables of their own
OWN_TABLE_SHARE = 0.8


@dataclass(frozen=True)
class Sequence:
    """Histories, oldest first, real tokens at the right end of each row.

    Attributes:
        items: ``[U, d]`` vectors of the distinct items, U >= 1.
        index: ``[B, T]`` int64, the row of ``items`` at each position; any valid row where ``mask`` is False.
        mask: ``[B, T]`` bool, True = real.
        memo: what blocks computed of ``items`` alone, for the next block that reads a part of the same batch.
    """

    items: Tensor
    index: Tensor
    mask: Tensor
    memo: dict[str, Any] = field(default_factory=dict, compare=False, repr=False, kw_only=True)

    @staticmethod
    def from_vectors(vectors: Tensor, mask: Tensor) -> Sequence:
        """A sequence of given vectors ``[B, T, d]`` and mask ``[B, T]``: one item per position."""
        batch, length, dim = vectors.shape
        if length == 0:
            return Sequence(vectors.new_zeros(1, dim), mask.new_zeros(batch, 0, dtype=torch.long), mask.bool())
        index = torch.arange(batch * length, device=vectors.device).view(batch, length)
        return Sequence(vectors.reshape(-1, dim), index, mask.bool())

    @property
    def vectors(self) -> Tensor:
        """``[B, T, d]`` vectors by position (padding positions hold some item's vector: use ``mask``)."""
        return F.embedding(self.index, self.items)

    @property
    def lengths(self) -> Tensor:
        """``[B]`` number of real tokens."""
        return self.mask.sum(1)

    @property
    def last_vectors(self) -> Tensor:
        """``[B, d]`` vectors of the newest position (meaningless for an empty row). Needs T >= 1."""
        return F.embedding(self.index[:, -1], self.items)

    def project(self, linear: nn.Module) -> Tensor:
        """``linear`` of every position, ``[B, T, a]``, computed once per distinct item."""
        return F.embedding(self.index, linear(self.items))

    def last(self, count: int) -> Sequence:
        """The newest ``count`` columns."""
        start = self.index.shape[1] - count
        if start <= 0:
            return self
        return Sequence(self.items, self.index[:, start:], self.mask[:, start:], memo=self.memo)

    def per_row(self, values: Tensor) -> Tensor:
        """Values by history as values by row: the same. See `SharedSequence`."""
        return values

    def select(self, rows: Tensor) -> Sequence:
        """The given batch rows (int64 ``[R]``)."""
        return Sequence(self.items, self.index[rows], self.mask[rows], memo=self.memo)

    def select_kept(self, rows: Tensor, keep: Tensor) -> Sequence:
        """The given batch rows (int64 ``[R]``), each compacted to its tokens in ``keep [B, T]``."""
        return self.select(rows).compact(keep[rows])

    def compact(self, keep: Tensor) -> Sequence:
        """Only the kept real tokens of each row, order unchanged, moved to the right end; T becomes the longest row's.

        Args:
            keep: ``[B, T]`` bool.
        """
        keep = keep & self.mask
        counts = keep.sum(1)
        length = int(counts.max()) if counts.numel() else 0
        first = (length - counts - 1).unsqueeze(1)  # the column before the oldest kept token's
        slot = torch.where(keep, first + keep.cumsum(1), length)  # dropped tokens share a spare column
        index = self.index.new_zeros(self.index.shape[0], length + 1).scatter_(1, slot, self.index)[:, :length]
        columns = torch.arange(length, device=index.device)
        return Sequence(self.items, index, columns >= (length - counts).unsqueeze(1), memo=self.memo)

    def right_aligned(self) -> Sequence:
        """This sequence, or its compaction if padding stands anywhere but before the first real token of a row."""
        gaps = self.mask[:, :-1] & ~self.mask[:, 1:]
        return self.compact(self.mask) if bool(gaps.any()) else self


def own_tables(sequences: ListOf[Sequence]) -> list[Sequence]:
    """The same sequences, each over a table of the items that it holds.

    What a block computes of every row of its table it then computes of its own items alone. Where that is most of the
    table, the sequences are left as they are.

    Args:
        sequences: over one table.
    """
    if not sequences:
        return []
    items = sequences[0].items
    found = [distinct_items(s.index[s.mask], len(items)) for s in sequences]
    sizes = [max(len(rows), 1) for rows, _ in found]
    if sum(sizes) > OWN_TABLE_SHARE * len(items) * len(sequences):
        return list(sequences)
    chosen = torch.cat([rows if len(rows) else rows.new_zeros(1) for rows, _ in found])
    tables = F.embedding(chosen, items).split(sizes)
    trimmed = []
    for sequence, table, (_, place) in zip(sequences, tables, found, strict=True):
        index = torch.zeros_like(sequence.index).masked_scatter_(sequence.mask, place)
        trimmed.append(replace(sequence, items=table, index=index, memo={}))
    return trimmed


@dataclass(frozen=True)
class SharedSequence:
    """A batch in which rows share histories: P histories, each held once, and which of them each row reads.

    It is no `Sequence`, so that a block which takes a row for a history fails: `call_block` gives such a block the
    `expanded` sequence. For prediction only.

    Attributes:
        histories: the P histories.
        owner: ``[B]`` int64 in [0, P), the history of each row, in any order; a history may have no row.
    """

    histories: Sequence
    owner: Tensor

    @property
    def lengths(self) -> Tensor:
        """``[B]`` number of real tokens."""
        return self.per_row(self.histories.lengths)

    def expanded(self) -> Sequence:
        """The same batch as one history per row."""
        return self.histories.select(self.owner)

    def per_row(self, values: Tensor) -> Tensor:
        """Values by history ``[P, ...]`` as values by row ``[B, ...]``."""
        return values.index_select(0, self.owner)

    def last(self, count: int) -> SharedSequence:
        """The newest ``count`` columns."""
        return SharedSequence(self.histories.last(count), self.owner)

    def select(self, rows: Tensor) -> SharedSequence:
        """The given batch rows (int64 ``[R]``) and the histories that they read."""
        kept, owner = distinct_items(self.owner[rows], self.histories.index.shape[0])
        return SharedSequence(self.histories.select(kept), owner)

    def select_kept(self, rows: Tensor, keep: Tensor) -> SharedSequence:
        """The given batch rows (int64 ``[R]``), their histories compacted to the tokens in ``keep [P, T]``."""
        kept, owner = distinct_items(self.owner[rows], self.histories.index.shape[0])
        return SharedSequence(self.histories.select_kept(kept, keep), owner)


def distinct_items(index: Tensor, num_items: int) -> tuple[Tensor, Tensor]:
    """The distinct values of ``index`` in rising order, and each value's place among them.

    A bitmap over the vocabulary: linear in ``num_items`` and several times faster than a sort.

    Args:
        index: integer tensor of any shape, values in [0, num_items).

    Returns:
        ``(rows [U] int64, place)`` with ``rows[place] == index`` and ``place`` int64 of ``index``'s shape.
    """
    seen = torch.zeros(num_items, dtype=torch.bool, device=index.device)
    flat = index.reshape(-1).long()
    seen[flat] = True
    place = seen.cumsum(0) - 1
    return seen.nonzero().squeeze(1), place[flat].view(index.shape)
