"""What a batch is: item indices and row values, and the item table that gives the indices their features."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: LongCTR's batch: context and label columns, flat item feature columns (history then target), history mask
LongCTRBatch = tuple[dict[str, Tensor], dict[str, Tensor], Tensor]
#: rows that a history must serve in the mean, for it to pay to look its items up once for all of them
MEAN_ROWS = 2


@dataclass(frozen=True)
class Batch:
    """B impressions.

    Attributes:
        history: ``[B, L]`` int32 item indices, oldest first, left-padded with 0; ``[P, L]`` if there is an ``owner``.
        target: ``[B]`` int32 item index.
        context: context feature columns, ``[B]`` or ``[B, m]``.
        label: ``[B]`` float32.
        group: ``[B]`` int64 group of the grouped metrics, or None.
        rows: ``[B]`` int64 row numbers in the split's file.
        owner: ``[B]`` int64 in [0, P), the row of ``history`` that each impression reads; None = its own.
        history_time: int64 seconds, when each event of ``history`` was (0 at padding), of its shape; None = not known.
    """

    history: Tensor
    target: Tensor
    context: dict[str, Tensor]
    label: Tensor
    group: Tensor | None
    rows: Tensor
    owner: Tensor | None = None
    history_time: Tensor | None = None

    def __len__(self) -> int:
        return self.target.shape[0]

    def to(self, device: torch.device) -> Batch:
        """This batch with its model inputs and label on ``device`` (groups and row numbers stay)."""
        if self.target.device == device:
            return self
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in ("history", "target", "label")}
        context = {name: column.to(device, non_blocking=True) for name, column in self.context.items()}
        for name in ("owner", "history_time"):
            column = getattr(self, name)
            moved[name] = None if column is None else column.to(device, non_blocking=True)
        return replace(self, context=context, **moved)

    def select(self, rows: Tensor) -> Batch:
        """The given rows (int64 ``[R]``), padded as before; histories with an ``owner`` stay."""
        kept = () if self.owner is None else ("history", "history_time")
        chosen: dict[str, Any] = {
            field.name: value[rows]
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor) and field.name not in kept
        }
        return replace(self, context={name: column[rows] for name, column in self.context.items()}, **chosen)

    def sharing_neighbours(self) -> Batch:
        """This batch with neighbours' histories each held once, if it has no ``owner`` yet and that pays."""
        found = None if self.owner is not None else neighbours_histories(self.history, self.history_time)
        if found is None:
            return self
        history, owner = found
        times = self.history_time
        if times is not None:
            times = times[F.pad(owner.diff() > 0, (1, 0), value=True)]
        return replace(self, history=history, owner=owner, history_time=times)


def neighbours_histories(history: Tensor, times: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
    """Histories of which runs of neighbouring rows are copies, each once, as `Batch.history` and `Batch.owner`.

    Args:
        history: ``[B, L]``.
        times: ``[B, L]``; copies have the same ones.

    Returns:
        ``(history [P, L], owner [B])``, or None if there are not few enough of them for that to pay.
    """
    rows = len(history)
    if history.shape[1] == 0 or rows == 0:
        return None
    changes = history[1:, -1] != history[:-1, -1]
    if (int(changes.sum()) + 1) * MEAN_ROWS > rows:  # already told by the newest item
        return None
    same = (~changes).nonzero().squeeze(1)
    for values in (history, times):
        if values is not None:
            changes[same] |= (values[same] != values[same + 1]).any(1)
    first = F.pad(changes, (1, 0), value=True)
    owner = first.cumsum(0) - 1
    return (history[first], owner) if (int(owner[-1]) + 1) * MEAN_ROWS <= rows else None


class ItemFeatures(nn.Module):
    """Feature columns of every item, row = item index, on the model's device and out of its checkpoints.

    Args:
        columns: name to tensor ``[N]`` (categorical, numeric), ``[N, m]`` (sequence, embedding); row 0 is padding.
    """

    def __init__(self, columns: dict[str, Tensor]) -> None:
        super().__init__()
        self.names = list(columns)
        for name, column in columns.items():
            self.register_buffer(f"column_{name}", column, persistent=False)

    @property
    def num_items(self) -> int:
        """N, padding included."""
        return self.column(self.names[0]).shape[0]

    def column(self, name: str) -> Tensor:
        """The whole column ``name``."""
        return self.get_buffer(f"column_{name}")

    def rows(self, index: Tensor) -> dict[str, Tensor]:
        """The features of the items ``index`` (int64)."""
        return {name: self.column(name)[index] for name in self.names}


#: what every model accepts
AnyBatch = Batch | LongCTRBatch
