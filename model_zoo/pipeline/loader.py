"""Batches of item indices from ragged histories, by one vectorised gather each; no worker processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from model_zoo.batch import Batch, LongCTRBatch
from model_zoo.pipeline.dataset import CTRDataset, Histories, Split
from model_zoo.pipeline.device_data import pinned, transferred
from model_zoo.pipeline.prefetch import in_background
from model_zoo.pipeline.streaming import StreamedSplit, batches_of, in_memory, without

#: batches made ahead for a CUDA device by default
PREFETCHED = 2
#: bytes of history that are copied and masked at a time, few enough to stay in a core's cache
CACHED_BYTES = 2**18


class SequenceLoader:
    """Iterates over a split.

    The order of an epoch is a function of ``(seed, epoch)`` alone (of a streamed split, of its ``block_rows`` too). A
    training epoch whose last batch would hold one row gives that row to the batch before it, so that BatchNorm never
    sees a single row.

    Args:
        dataset: where the histories and the split are.
        split: ``train``, ``valid`` or ``test``.
        batch_size: rows per batch.
        max_len: newest history items kept.
        shuffle: new order each epoch (`set_epoch`).
        seed: of the order.
        training: the batches are trained on (implied by ``shuffle``).
        prefetch: batches that a thread makes ahead of the one in use; 0: none, and no thread. Default: 2 for a CUDA
            device, which computes meanwhile; 0 for the CPU, whose cores the model has use for.
        device: where the batches are wanted. For a CUDA device they are made in pinned memory and copied there on a
            stream of their own, each while the one before it is in use.
    """

    def __init__(
        self,
        dataset: CTRDataset,
        split: str,
        batch_size: int,
        max_len: int,
        shuffle: bool = False,
        seed: int = 0,
        training: bool = False,
        prefetch: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.split: Split | StreamedSplit = dataset.splits[split]
        self.histories = dataset.histories
        self.batch_size = batch_size
        self.max_len = max_len
        self.shuffle = shuffle
        self.seed = seed
        self.device = torch.device(device)
        self.prefetch = prefetch if prefetch is not None else PREFETCHED if self.device.type == "cuda" else 0
        self.epoch = 0
        rows = len(self.split)
        self._bounds = [*range(0, rows, batch_size), rows]
        if (shuffle or training) and len(self._bounds) > 2 and rows - self._bounds[-2] == 1:
            del self._bounds[-2]

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration."""
        self.epoch = epoch

    def order(self) -> npt.NDArray[np.int64]:
        """Row numbers in this epoch's order (of a split in memory)."""
        rows = np.arange(len(in_memory(self.split)))
        return self._generator().permutation(rows) if self.shuffle else rows

    def __iter__(self) -> Iterator[Batch]:
        return self.iterate_from(0)

    def iterate_from(self, first: int) -> Iterator[Batch]:
        """This epoch's batches from number ``first`` on, as if those before had been iterated over."""
        batches = self.batches(first)
        if self.prefetch:
            batches = in_background(batches, self.prefetch)
        return batches if self.device.type == "cpu" else transferred(batches, self.device)

    def batches(self, first: int = 0) -> Iterator[Batch]:
        """This epoch's batches from number ``first`` on, on the CPU, made as they are asked for."""
        if isinstance(self.split, Split):
            blocks = iter([(self.split, self.order())])
        else:
            blocks = self.split.blocks(self._generator() if self.shuffle else None)
        sizes = np.diff(self._bounds).tolist()
        for part in batches_of(without(blocks, self._bounds[first]), sizes[first:]):
            yield self._batch(part)

    def batch(self, rows: npt.NDArray[np.int64]) -> Batch:
        """The given rows as a batch (of a split in memory)."""
        return self._batch(in_memory(self.split).take(rows))

    def _batch(self, part: Split) -> Batch:
        allocate = pinned if self.device.type == "cuda" else np.empty
        wanted = (self.histories, part.user_index, part.seq_len, self.max_len, allocate)
        history = gather_histories(*wanted)
        times = None if self.histories.times is None else gather_histories(*wanted, times=True)
        assert part.rows is not None
        return Batch(
            history=torch.from_numpy(history),
            target=torch.from_numpy(part.item_index),
            context={name: torch.from_numpy(column) for name, column in part.context.items()},
            label=torch.from_numpy(part.label),
            group=None if part.group is None else torch.from_numpy(part.group),
            rows=torch.from_numpy(part.rows),
            history_time=None if times is None else torch.from_numpy(times),
        )

    def _generator(self) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.epoch])


def gather_histories(
    histories: Histories,
    users: npt.NDArray[np.int32],
    seq_len: npt.NDArray[np.int32],
    max_len: int,
    allocate: Callable[..., npt.NDArray[Any]] = np.empty,
    times: bool = False,
) -> npt.NDArray[Any]:
    """The newest ``max_len`` of each user's first ``seq_len`` items, oldest first, left-padded with 0.

    A row is one copy of ``L`` neighbours out of the flat array; what stands before the user's own items is masked.

    Args:
        allocate: makes the result from its shape and dtype.
        times: the events' times in place of their items.

    Returns:
        int32 (times: int64) ``[B, L]``, L = min(longest seq_len of the batch, max_len).
    """
    items: npt.NDArray[Any] | None = histories.times if times else histories.items
    assert items is not None
    length = min(int(seq_len.max(initial=0)), max_len)
    found = allocate((len(users), length), items.dtype)
    if not length:
        return found
    end = histories.offsets.take(users) + seq_len  # one past the newest item
    kept = np.minimum(seq_len, length)
    last_ones = sliding_window_view(np.repeat(np.array([0, -1], items.dtype), length), length)  # row n keeps the last n
    early = np.flatnonzero(end < length)  # their windows would begin before the array
    if len(items) >= length:
        windows = sliding_window_view(items, length)
        start = np.maximum(end - length, 0)
        step = max(1, CACHED_BYTES // (items.itemsize * length))
        for first in range(0, len(users), step):
            rows = slice(first, first + step)
            np.bitwise_and(windows[start[rows]], last_ones[kept[rows]], out=found[rows])
    if len(early):
        beginning = sliding_window_view(np.concatenate([np.zeros(length, items.dtype), items[:length]]), length)
        found[early] = beginning[end[early]] & last_ones[kept[early]]
    return found


def longctr_batch(
    dataset: CTRDataset,
    split: str,
    rows: npt.NDArray[np.int64],
    max_len: int,
    padding: Literal["pre", "post"] = "pre",
) -> LongCTRBatch:
    """The given rows as LongCTR's collator makes them: every feature by position, history then target.

    ``padding="post"`` pads at the right end and, as LongCTR does, keeps the *oldest* ``max_len`` items.

    Returns:
        ``(batch_dict, item_dict, mask)``; item columns flat ``[B * (L + 1), ...]``, mask float32 ``[B, L]``.
    """
    part = in_memory(dataset.splits[split])
    users, seq_len = part.user_index[rows], part.seq_len[rows]
    if padding == "pre":
        history = gather_histories(dataset.histories, users, seq_len, max_len)
    else:
        length = min(int(seq_len.max(initial=0)), max_len)
        place = dataset.histories.offsets[users][:, None] + np.arange(length)
        inside = np.arange(length) < seq_len[:, None]
        history = np.where(inside, dataset.histories.items[np.where(inside, place, 0)], 0)
    index = np.concatenate([history, part.item_index[rows][:, None]], axis=1).reshape(-1)
    meta = {"user_index": users, "item_index": part.item_index[rows], "seq_len": seq_len}
    label = dataset.feature_map.labels[0]
    columns: dict[str, Tensor] = {}
    for name, spec in dataset.feature_map.features.items():
        if spec["type"] == "meta" and name in meta:
            columns[name] = torch.from_numpy(meta[name].astype(np.int64))
        elif spec["type"] == "meta" and name == dataset.feature_map.group_id and part.group is not None:
            columns[name] = torch.from_numpy(part.group[rows])
        elif name in part.context:
            values = torch.from_numpy(part.context[name][rows])
            columns[name] = values if values.is_floating_point() else values.long()
    columns[label] = torch.from_numpy(part.label[rows].astype(np.int64))
    items = {}
    for name, column in dataset.item_columns.items():
        values = torch.from_numpy(column[index])
        items[name] = values if values.is_floating_point() else values.long()
    return columns, items, torch.from_numpy((history > 0).astype(np.float32))
