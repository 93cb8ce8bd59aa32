"""Gated recurrent units over packed histories, their input projections given."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo.layers.sequence import Sequence


@dataclass(frozen=True)
class Steps:
    """The N real positions of right-aligned histories in the order a recurrence visits them: column by column.

    Rows are sorted by length, longest first, so those that have an item in a column are the first ones, and all rows end
    in the last column.

    Attributes:
        order: ``[B]`` int64, the batch row at each sorted place.
        mask: ``[T, R]`` bool, real positions of the R rows that are not empty, in sorted order.
        row: ``[N]`` int64, the batch row of each position.
        item: ``[N]`` int64, its row of the item table.
        counts: rows that have an item, for each column that any row has.
    """

    order: Tensor
    mask: Tensor
    row: Tensor
    item: Tensor
    counts: list[int]

    @staticmethod
    def of(sequence: Sequence) -> Steps:
        """The steps of a right-aligned sequence."""
        order = sequence.lengths.argsort(descending=True, stable=True)
        mask = sequence.mask[order]
        mask = mask[mask.any(1)].T  # [T, R]
        counts = [count for count in mask.sum(1).tolist() if count]
        kept = order[: mask.shape[1]]
        row = kept.expand(mask.shape)[mask]
        return Steps(order, mask, row, sequence.index[kept].T[mask], counts)

    def by_row(self, values: Tensor) -> Tensor:
        """``values [R, ...]`` of the sorted rows in batch order, zeros for empty rows, ``[B, ...]``."""
        missing = len(self.order) - len(values)
        padded = F.pad(values, (0, 0) * (values.dim() - 1) + (0, missing))
        return padded.index_select(0, self.order.argsort())


def gru(inputs: Tensor, weight: Tensor, bias: Tensor, counts: list[int]) -> list[Tensor]:
    """States of ``nn.GRU`` (gates r, z, n) after each column.

    Args:
        inputs: ``[N, 3 d]`` ``W_ih x + b_ih`` of the positions in the order of `Steps`.
        weight: ``[3 d, d]`` ``W_hh``.
        bias: ``[3 d]`` ``b_hh``.
        counts: rows in each column, rising.

    Returns:
        One ``[count, d]`` per column.
    """
    dim = weight.shape[1]
    state, states = inputs.new_zeros(0, dim), []
    for gate in inputs.split(counts):
        state = _grown(state, len(gate))
        hidden = F.linear(state, weight, bias)
        reset, keep = torch.sigmoid(gate[:, : 2 * dim] + hidden[:, : 2 * dim]).chunk(2, 1)
        new = torch.tanh(gate[:, 2 * dim :] + reset * hidden[:, 2 * dim :])
        state = torch.lerp(new, state, keep)
        states.append(state)
    return states


class AttentionalGRU(nn.Module):
    """A GRU whose attention weight scales the update gate (AUGRU) or takes its place (AGRU).

    ``h' = h + a u (n - h)`` or ``h' = h + a (n - h)``, with gates u, r, n. AGRU has no use for the weights of its update
    gate; it keeps them, unread, so that checkpoints have one shape.

    Args:
        input_dim: width of inputs.
        dim: d, width of states.
        update_gate: AUGRU; otherwise AGRU.

    Source: Zhou et al., DIEN, AAAI 2019 (arXiv 1809.03672), section 4.3.2.
    """

    def __init__(self, input_dim: int, dim: int, update_gate: bool = True) -> None:
        super().__init__()
        self.x2h = nn.Linear(input_dim, 3 * dim)
        self.h2h = nn.Linear(dim, 3 * dim)
        self.update_gate = update_gate

    def forward(self, inputs: Tensor, attention: Tensor, counts: list[int]) -> Tensor:
        """The last states ``[R, d]``.

        Args:
            inputs: ``[N, input_dim]`` in the order of `Steps`.
            attention: ``[N]``.
            counts: rows in each column, rising.
        """
        dim = self.h2h.in_features
        skipped = 0 if self.update_gate else dim
        gates = F.linear(inputs, self.x2h.weight[skipped:], self.x2h.bias[skipped:])
        attention = attention.to(gates.dtype)  # autocast lowers only one of them
        weight, bias = self.h2h.weight[skipped:], self.h2h.bias[skipped:]
        state = gates.new_zeros(0, dim)
        for gate, strength in zip(gates.split(counts), attention.unsqueeze(1).split(counts), strict=True):
            state = _grown(state, len(gate))
            hidden = F.linear(state, weight, bias)
            sigmoid = torch.sigmoid(gate[:, :-dim] + hidden[:, :-dim])
            new = torch.tanh(gate[:, -dim:] + sigmoid[:, -dim:] * hidden[:, -dim:])
            state = torch.lerp(state, new, strength * sigmoid[:, :dim] if self.update_gate else strength)
        return state


def _grown(state: Tensor, rows: int) -> Tensor:
    """``state`` with zeros for the rows that begin at this column."""
    return state if len(state) == rows else F.pad(state, (0, 0, 0, rows - len(state)))
