"""Batches of item indices from ragged histories, by one vectorised gather each; no worker processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model_zoo.batch import Batch, LongCTRBatch
from model_zoo.pipeline.dataset import CTRDataset, Histories, Split


class SequenceLoader:
    """Iterates over a split.

    The order of an epoch is a function of ``(seed, epoch)`` alone. A training epoch whose last batch would hold one row
    gives that row to the batch before it, so that BatchNorm never sees a single row.

    Args:
        dataset: where the histories and the split are.
        split: ``train``, ``valid`` or ``test``.
        batch_size: rows per batch.
        max_len: newest history items kept.
        shuffle: new order each epoch (`set_epoch`).
        seed: of the order.
        training: the batches are trained on (implied by ``shuffle``).
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
    ) -> None:
        self.split: Split = dataset.splits[split]
        self.histories = dataset.histories
        self.batch_size = batch_size
        self.max_len = max_len
        self.shuffle = shuffle
        self.seed = seed
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
        """Row numbers in this epoch's order."""
        rows = np.arange(len(self.split))
        return np.random.default_rng([self.seed, self.epoch]).permutation(rows) if self.shuffle else rows

    def __iter__(self) -> Iterator[Batch]:
        order = self.order()
        for start, end in zip(self._bounds[:-1], self._bounds[1:], strict=True):
            yield self.batch(order[start:end])

    def batch(self, rows: npt.NDArray[np.int64]) -> Batch:
        """The given rows as a batch."""
        split = self.split
        history = gather_histories(self.histories, split.user_index[rows], split.seq_len[rows], self.max_len)
        return Batch(
            history=torch.from_numpy(history),
            target=torch.from_numpy(split.item_index[rows]),
            context={name: torch.from_numpy(column[rows]) for name, column in split.context.items()},
            label=torch.from_numpy(split.label[rows]),
            group=None if split.group is None else torch.from_numpy(split.group[rows]),
            rows=torch.from_numpy(rows),
        )


def gather_histories(
    histories: Histories, users: npt.NDArray[np.int32], seq_len: npt.NDArray[np.int32], max_len: int
) -> npt.NDArray[np.int32]:
    """The newest ``max_len`` of each user's first ``seq_len`` items, oldest first, left-padded with 0.

    Returns:
        int32 ``[B, L]``, L = min(longest seq_len of the batch, max_len).
    """
    length = min(int(seq_len.max(initial=0)), max_len)
    end = histories.offsets[users] + seq_len  # one past the newest item
    place = end[:, None] - np.arange(length, 0, -1)
    inside = place >= histories.offsets[users][:, None]
    return np.where(inside, histories.items[np.where(inside, place, 0)], 0) if length else np.zeros((len(users), 0), "i4")


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
    part = dataset.splits[split]
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
