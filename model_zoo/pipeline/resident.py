"""Splits that lie on the model's device whole, batches of which are gathered there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from model_zoo.batch import Batch
from model_zoo.errors import ConfigError
from model_zoo.pipeline.dataset import CTRDataset
from model_zoo.pipeline.histories import Histories
from model_zoo.pipeline.loader import SequenceLoader
from model_zoo.pipeline.splits import Split
from model_zoo.pipeline.streaming import in_memory

#: share of a device's free memory that data may take under ``data_on_device: auto``
DATA_SHARE = 0.25

OnDevice = bool | Literal["auto"]


@dataclass(frozen=True)
class ResidentHistories:
    """`Histories` as tensors: ``items`` int32, ``offsets`` int64 ``[users + 1]``, ``times`` int64 or None."""

    items: Tensor
    offsets: Tensor
    times: Tensor | None = None

    @classmethod
    def of(cls, histories: Histories, device: torch.device) -> ResidentHistories:
        """A copy on ``device``."""
        times = None if histories.times is None else torch.tensor(histories.times, device=device)
        return cls(torch.tensor(histories.items, device=device), torch.tensor(histories.offsets, device=device), times)

    def newest(self, users: Tensor, seq_len: Tensor, length: int, times: bool = False) -> Tensor:
        """`loader.gather_histories` where the tensors are.

        Args:
            users, seq_len: int32 ``[B]``.
            length: L, which the caller knows without waiting for the device.
            times: the events' times in place of their items.

        Returns:
            int32 (times: int64) ``[B, L]``.
        """
        values = self.times if times else self.items
        assert values is not None
        if not length:
            return values.new_zeros(len(users), 0)
        age = torch.arange(length, 0, -1, device=self.items.device)  # 1 = newest
        place = (self.offsets[users.long()] + seq_len).unsqueeze(1) - age
        return values[place.clamp_min_(0)] * (age <= seq_len.unsqueeze(1))


class ResidentLoader(SequenceLoader):
    """A `SequenceLoader` whose split and histories lie on ``device``; it yields the same batches, in the same order.

    Args:
        device: the model's.
        histories: on that device; default: a copy of its own (loaders of one data set may share one).
        more: as for `SequenceLoader`.

    Raises:
        ConfigError: the split is streamed.
    """

    def __init__(
        self,
        dataset: CTRDataset,
        split: str,
        batch_size: int,
        max_len: int,
        *,
        device: torch.device | str,
        histories: ResidentHistories | None = None,
        **more: Any,
    ) -> None:
        super().__init__(dataset, split, batch_size, max_len, device=device, prefetch=0, **more)
        self.rows = in_memory(self.split)
        self.on_device = histories or ResidentHistories.of(dataset.histories, self.device)
        names = ("user_index", "item_index", "seq_len", "label")
        self.columns = {name: torch.tensor(getattr(self.rows, name), device=self.device) for name in names}
        self.context = {name: torch.tensor(column, device=self.device) for name, column in self.rows.context.items()}

    def iterate_from(self, first: int) -> Iterator[Batch]:
        return self.batches(first)

    def batches(self, first: int = 0) -> Iterator[Batch]:
        """This epoch's batches from number ``first`` on, on the device."""
        order = self.order()
        there = torch.tensor(order, device=self.device)
        for start, end in pairwise(self._bounds[first:]):
            yield self._gathered(order[start:end], there[start:end])

    def batch(self, rows: np.ndarray) -> Batch:
        """The given rows as a batch."""
        return self._gathered(rows, torch.tensor(rows, device=self.device))

    def _gathered(self, rows: np.ndarray, there: Tensor) -> Batch:
        chosen = {name: column[there] for name, column in self.columns.items()}
        length = min(int(self.rows.seq_len.take(rows).max(initial=0)), self.max_len)
        wanted = (chosen["user_index"], chosen["seq_len"], length)
        return Batch(
            history=self.on_device.newest(*wanted),
            target=chosen["item_index"],
            context={name: column[there] for name, column in self.context.items()},
            label=chosen["label"],
            group=None if self.rows.group is None else torch.from_numpy(self.rows.group.take(rows)),
            rows=torch.from_numpy(rows),
            history_time=None if self.on_device.times is None else self.on_device.newest(*wanted, times=True),
        )


def resident_splits(dataset: CTRDataset, device: torch.device, wanted: OnDevice) -> list[str]:
    """The splits to keep on ``device``: all or none if so ``wanted``, else those that fit beside the histories.

    Raises:
        ConfigError: wanted for streamed data.
    """
    streamed = [name for name, split in dataset.splits.items() if not isinstance(split, Split)]
    if wanted is True and streamed:
        raise ConfigError("data_on_device: True needs whole splits in memory; leave memory_limit_mib out, or write auto")
    if wanted is True:
        return list(dataset.splits)
    if wanted is False or device.type != "cuda":
        return []
    histories = dataset.histories
    held = histories.items.nbytes + (0 if histories.times is None else histories.times.nbytes)
    room = DATA_SHARE * torch.cuda.mem_get_info(device)[0] - held
    chosen = []
    for name, split in dataset.splits.items():
        if isinstance(split, Split) and split.nbytes <= room:
            room -= split.nbytes
            chosen.append(name)
    return chosen
