"""Attention over window means, formed of those windows alone that some query reads, for a bounded number at a time.

A batch has tens of thousands of windows, and a query reads those of one theme. Means, and in the backward their gradients,
are formed of what is read, and given back before the next rows' are formed.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as ListOf
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from model_zoo.layers.attend_rows import Attended
from model_zoo.layers.attention_branches import BranchRead, Reading, rows_read
from model_zoo.layers.item_rows import Entries, spread
from model_zoo.layers.sequence import OWN_TABLE_SHARE, Sequence, distinct_items
from model_zoo.layers.windows import Windows

#: elements of a table of window means
MEANS_FLOATS = 2**24


def attend_windows(
    query: Tensor, windows: Windows, row: Tensor, members: Tensor, branches: ListOf[BranchRead]
) -> list[Tensor]:
    """`attend_branches` over the windows of rows, one ``[N, h, d]`` per branch.

    Args:
        query: ``[N, H, d]`` in the item space, already scaled.
        windows: right-aligned ones.
        row: ``[N]`` int64, the row whose windows each query reads.
        members: ``[N, W]`` bool, which of them; only existing ones.
        branches: how the heads, in order, restrict the windows.
    """
    items = windows.source.items
    answers = _AttendWindows.apply(items, query.to(items.dtype), windows, row, members, tuple(branches))
    return list(answers.split([branch.heads for branch in branches], 1))


class _AttendWindows(torch.autograd.Function):
    """By groups of queries; the backward forms again the means that have a weight, unless one group holds them all."""

    @staticmethod
    def forward(ctx: Any, items: Tensor, query: Tensor, windows: Windows, row: Tensor, members: Tensor,
                branches: tuple[BranchRead, ...]) -> Tensor:  # fmt: skip
        ctx.heads, ctx.read = [branch.heads for branch in branches], []
        pooled = torch.zeros_like(query)
        with torch.autocast(items.device.type, enabled=False):
            for group in _groups(windows, row, members, items.shape[1]):
                means, mine = group.means(items), group.queries
                reading = Reading(query[mine], Sequence(means, group.index, members[mine]), aligned=False)
                answers, attended = [], []
                for asked, branch in zip(reading.query.split(ctx.heads, 1), branches, strict=True):
                    flat = asked.reshape(-1, asked.shape[-1])
                    done = Attended.of(flat, rows_read(flat, reading, branch), means)
                    attended.append(done)
                    answers.append(done.entries.pool(means, done.used).view(asked.shape))
                pooled[mine] = torch.cat(answers, 1)
                ctx.read.append(group.kept(attended, means))
        ctx.save_for_backward(items, query)
        return pooled

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        items, query = ctx.saved_tensors
        d_query = torch.zeros_like(query)
        d_items = None
        with torch.autocast(items.device.type, enabled=False):
            for group, attended, table in ctx.read:
                means, mine = group.means(items) if table is None else table, group.queries
                parts, d_asked = [], []
                split = (values[mine].split(ctx.heads, 1) for values in (query, grad))
                for asked, given, done in zip(*split, attended, strict=True):
                    flat = given.reshape(-1, given.shape[-1])
                    found, part = done.backward(asked.reshape(flat.shape), flat, means)
                    d_asked.append(torch.zeros_like(asked) if found is None else found.view(asked.shape))
                    parts.append(part)
                d_query[mine] = torch.cat(d_asked, 1)
                if ctx.needs_input_grad[0]:
                    d_items = group.to_items(spread(parts, len(means)), items, d_items)
        if d_items is None and ctx.needs_input_grad[0]:
            d_items = torch.zeros_like(items)
        return d_items, d_query, None, None, None, None


@dataclass(frozen=True)
class _Group:
    """Queries and the m windows that they read.

    Attributes:
        queries: ``[n]`` int64, or all of them.
        index: ``[n, W]`` the place of each window among the m (anything where a query does not read it).
        bag: ``[m, size]`` item rows of the windows.
        weight: ``[m, size]`` their weights.
    """

    queries: Tensor | slice
    index: Tensor
    bag: Tensor
    weight: Tensor

    def means(self, items: Tensor) -> Tensor:
        """``[m, d]``."""
        return Entries(self.bag, None).pool(items, self.weight.view(-1).to(items.dtype))

    def to_items(self, gradient: Tensor, items: Tensor, total: Tensor | None) -> Tensor:
        """``total`` (``[U, d]``, None = 0) and the gradient of the items from that of the means, ``[m, d]``."""
        found = spread([(Entries(self.bag, None), [(gradient, self.weight.view(-1).to(items.dtype))])], len(items))
        return found if total is None else total.add_(found)

    def kept(self, attended: list[Attended], means: Tensor) -> tuple[_Group, list[Attended], Tensor | None]:
        """What the backward needs: the windows that an entry names, the entries, and the means of a group that is alone."""
        alone = isinstance(self.queries, slice)
        named, place = distinct_items(torch.cat([done.entries.columns for done in attended]), len(self.bag))
        if len(named) > OWN_TABLE_SHARE * len(self.bag):
            return self, attended, means if alone else None
        places = place.split([len(done.entries.columns) for done in attended])
        moved = [replace(done, entries=done.entries.over(new)) for done, new in zip(attended, places, strict=True)]
        fewer = replace(self, bag=self.bag[named], weight=self.weight[named])
        return fewer, moved, means.index_select(0, named) if alone else None


def _groups(windows: Windows, row: Tensor, members: Tensor, dim: int) -> Iterator[_Group]:
    """Groups of queries whose windows' means are of a bounded size; a row's queries are of one group."""
    read = torch.zeros(windows.mask.shape, dtype=torch.int32, device=row.device).index_add_(0, row, members.int()) > 0
    number = read.flatten().cumsum(0).view(read.shape)  # of each window that is read, from 1
    known, weights = windows.bags
    chosen = read[windows.mask]
    bag, weight = known[chosen], weights[chosen]
    limit = max(MEANS_FLOATS // dim, 1)
    if len(bag) <= limit:
        if len(bag):
            yield _Group(slice(None), (number - 1).clamp_(min=0)[row], bag, weight)
        return
    ends = number[:, -1]  # [B]
    part = (ends - 1).clamp_(min=0) // limit  # of each row
    rows = torch.bincount(part)
    last = ends[rows.cumsum(0)[rows > 0] - 1].tolist()
    for which, (start, end) in zip(rows.nonzero().squeeze(1).tolist(), pairwise([0, *last]), strict=True):
        queries = (part[row] == which).nonzero().squeeze(1)
        if end > start:
            index = (number[row[queries]] - 1 - start).clamp_(0, end - start - 1)
            yield _Group(queries, index, bag[start:end], weight[start:end])
