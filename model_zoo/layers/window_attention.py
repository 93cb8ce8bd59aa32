"""Attention over window means that are formed for a few rows at a time, and whose gradient goes straight to the items.

A batch has tens of thousands of windows; a table of their means would be the largest tensor of a train step, and its
gradient another. The gradient of a row's windows is a sum of the row's few queries and answers' gradients, so it is not
formed either: each item of the history receives those vectors with weights that its windows pass on (`Windows.by_item`).
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as ListOf
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model_zoo.layers.attend_rows import Attended
from model_zoo.layers.attention_branches import BranchRead, Reading, rows_read
from model_zoo.layers.sequence import Sequence
from model_zoo.layers.windows import Windows

#: elements of a table of window means
MEANS_FLOATS = 2**21


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
    """Groups of queries in the order of their rows, so that a row's means are formed once."""

    @staticmethod
    def forward(ctx: Any, items: Tensor, query: Tensor, windows: Windows, row: Tensor, members: Tensor,
                branches: tuple[BranchRead, ...]) -> Tensor:  # fmt: skip
        ctx.order = row.argsort(stable=True)
        ctx.windows, ctx.row, ctx.heads = windows, row, [branch.heads for branch in branches]
        pooled, ctx.attended = torch.empty_like(query), []
        with torch.autocast(items.device.type, enabled=False):
            for chosen, means, first in _groups(windows, items, row, ctx.order):
                index = (windows.index[row[chosen]] - first).clamp_(min=0)  # what stands for no window is not read
                tokens = Sequence(means, index, members[chosen])
                reading = Reading(query[chosen], tokens, aligned=False)
                answers = []
                for mine, branch in zip(reading.query.split(ctx.heads, 1), branches, strict=True):
                    flat = mine.reshape(-1, mine.shape[-1])
                    done = Attended.of(flat, rows_read(flat, reading, branch), means)
                    ctx.attended.append(done)
                    answers.append(done.entries.pool(means, done.used).view(mine.shape))
                pooled[chosen] = torch.cat(answers, 1)
        ctx.save_for_backward(items, query)
        return pooled

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        items, query = ctx.saved_tensors
        windows, row = ctx.windows, ctx.row
        d_query = torch.zeros_like(query)
        heads = sum(ctx.heads)
        # of each item of each query's history: shares in the answers' gradients, then in the queries
        shares = query.new_zeros(len(query), 2 * heads, windows.source.index.shape[1])
        attended = iter(ctx.attended)
        with torch.autocast(items.device.type, enabled=False):
            for chosen, means, first in _groups(windows, items, row, ctx.order):
                start = 0
                for count in ctx.heads:
                    mine = slice(start, start + count)
                    start = mine.stop
                    done: Attended = next(attended)
                    flat = grad[chosen, mine].reshape(-1, grad.shape[-1])
                    number = windows.column[done.entries.columns + first]
                    owner = row[chosen].repeat_interleave(count)

                    def by_item(values: Tensor, done: Attended = done, number: Tensor = number,
                                owner: Tensor = owner, count: int = count) -> Tensor:  # fmt: skip
                        table = values.new_zeros(len(owner) * windows.count)
                        table.index_add_(0, done.entries.owner * windows.count + number, values)
                        return windows.by_item(table.view(len(owner), -1), owner).unflatten(0, (-1, count))

                    shares[chosen, mine] = by_item(done.used)
                    if done.scored:
                        d_scores = done.d_scores(flat, means)
                        d_query[chosen, mine] = done.entries.pool(means, d_scores).unflatten(0, (-1, count))
                        shares[chosen, mine.start + heads : mine.stop + heads] = by_item(d_scores)
            left = torch.cat([grad, query], 1)
            d_items = _to_items(shares, left, windows.source, row) if ctx.needs_input_grad[0] else None
        return d_items, d_query, None, None, None, None


def _groups(windows: Windows, items: Tensor, row: Tensor, order: Tensor) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Groups of queries: which ``[n]``, the window means of their rows ``[m, d]``, and the number of the first of these."""
    rows = max(MEANS_FLOATS // max(windows.count * items.shape[1], 1), 1)
    sorted_rows = row[order]
    starts = torch.searchsorted(sorted_rows, torch.arange(0, len(windows.mask) + rows, rows, device=row.device)).tolist()
    for number, (start, end) in enumerate(pairwise(starts)):
        if end > start:
            span = slice(number * rows, min((number + 1) * rows, len(windows.mask)))
            yield order[start:end], windows.means_of(items, span), int(windows.rows_start[span.start])


def _to_items(shares: Tensor, left: Tensor, source: Sequence, row: Tensor) -> Tensor:
    """``[U, d]``: every item of every history receives ``sum_p shares[n, p, t] left[n, p]``.

    Args:
        shares: ``[N, P, T]``.
        left: ``[N, P, d]``.
        source: the histories.
        row: ``[N]`` the history of each n.
    """
    parts = left.shape[1]
    real = source.mask[row]  # [N, T]
    columns = source.index[row][real]
    order = columns.argsort(stable=True)
    owner = real.nonzero()[:, 0][order]
    places = owner.unsqueeze(1) * parts + torch.arange(parts, device=owner.device)
    counts = torch.bincount(columns, minlength=len(source.items))
    return F.embedding_bag(
        places.view(-1),
        left.flatten(0, 1),
        (counts.cumsum(0) - counts) * parts,
        mode="sum",
        per_sample_weights=shares.transpose(1, 2)[real].index_select(0, order).view(-1),
    )
