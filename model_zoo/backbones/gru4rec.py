"""GRU4Rec: a gated recurrent unit reads the history; the interest is its last state."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from model_zoo.layers.sequence import Sequence


class GRU4RecBlock(nn.Module):
    """``W h`` of the state h after the newest item; packed, so that only real positions are computed.

    The interest does not depend on the target, which meets it in the head.

    Args:
        item_dim: d.
        hidden_dim: width of states; None = d. Another width is mapped back to d.
        num_layers: recurrent layers.
        hidden_dropout: on item vectors, and between layers.
        head: ``dnn`` gives the vector, ``dot`` its inner product with the target as ``[B, 1]`` logits, the paper's scoring.

    Raises:
        ValueError: a size below 1 or a dropout outside 0..1.

    Source: Hidasi et al., GRU4Rec (arXiv 1511.06939), section 3.
    """

    def __init__(
        self,
        item_dim: int,
        *,
        hidden_dim: int | None = None,
        num_layers: int = 1,
        hidden_dropout: float = 0.2,
        head: Literal["dnn", "dot"] = "dnn",
    ) -> None:
        super().__init__()
        width = item_dim if hidden_dim is None else hidden_dim
        for key, value in (("hidden_dim", width), ("num_layers", num_layers)):
            if value < 1:
                raise ValueError(f"{key} must be at least 1, not {value}")
        if not 0 <= hidden_dropout <= 1:
            raise ValueError(f"hidden_dropout must lie in 0..1, not {hidden_dropout}")
        self.head = head
        self.out_dim = 1 if head == "dot" else item_dim
        self.dropout = nn.Dropout(hidden_dropout)
        between = hidden_dropout if num_layers > 1 else 0.0
        self.gru = nn.GRU(item_dim, width, num_layers, dropout=between)
        self.output = nn.Identity() if width == item_dim else nn.Linear(width, item_dim)

    def forward(self, query: Tensor, sequence: Sequence) -> Tensor:
        """Interest of each row.

        Args:
            query: ``[B, d]`` target items; read by ``head: dot`` only.
            sequence: histories.

        Returns:
            ``[B, out_dim]``; zeros for empty rows.
        """
        batch, length = sequence.index.shape
        order = sequence.lengths.argsort(descending=True, stable=True)
        lengths = sequence.lengths[order].unsqueeze(1)
        steps = torch.arange(length, device=order.device)
        running = (steps < lengths).T  # [T, B]: sorted rows that have an item at each step from their own oldest
        counts = running.sum(1).cpu()
        if batch == 0 or length == 0 or counts[0] == 0:
            return query.new_zeros(batch, self.out_dim)
        column = (steps + length - lengths).clamp(max=length - 1)
        index = sequence.index[order].gather(1, column).T[running]
        inputs = self.dropout(F.embedding(index, sequence.items))
        _, states = self.gru(PackedSequence(inputs, counts[counts > 0]))
        answer = self.output(states[-1])  # [R, d], the rows that are not empty in sorted order
        interest = F.pad(answer, (0, 0, 0, batch - len(answer))).index_select(0, order.argsort())
        return (interest * query).sum(-1, keepdim=True) if self.head == "dot" else interest
