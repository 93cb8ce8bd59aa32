"""Histories whose events have times."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from model_zoo.errors import ConfigError
from model_zoo.layers.sequence import Sequence


@dataclass(frozen=True)
class TimedSequence(Sequence):
    """Histories whose events have times.

    Attributes:
        times: ``[B, T]`` int64 seconds, not falling along a row; anything where ``mask`` is False.
    """

    times: Tensor = field(kw_only=True)

    def last(self, count: int) -> Sequence:
        """The newest ``count`` columns."""
        found = super().last(count)
        if found is self:
            return self
        start = self.times.shape[1] - found.index.shape[1]
        return TimedSequence(self.items, found.index, found.mask, memo=self.memo, times=self.times[:, start:])

    def select(self, rows: Tensor) -> Sequence:
        """The given batch rows (int64 ``[R]``)."""
        return TimedSequence(self.items, self.index[rows], self.mask[rows], memo=self.memo, times=self.times[rows])

    def compact(self, keep: Tensor) -> Sequence:
        """Only the kept real tokens (``keep [B, T]`` bool) of each row, as for `Sequence`."""
        columns = torch.arange(self.index.shape[1], device=self.index.device).expand_as(self.index)
        kept = Sequence(self.items, columns, self.mask).compact(keep)
        index, times = (values.gather(1, kept.index) for values in (self.index, self.times))
        return TimedSequence(self.items, index, kept.mask, memo=self.memo, times=times)


def times_of(sequence: Sequence, wanted_by: str, instead: str) -> Tensor:
    """``[B, T]`` times of a sequence's events.

    Args:
        wanted_by: the setting that needs them.
        instead: the setting that does not.

    Raises:
        ConfigError: it has none.
    """
    if not isinstance(sequence, TimedSequence):
        raise ConfigError(
            f"{wanted_by} needs the time of every event of a history, and these have none: name the list column of "
            f"user_info.parquet that holds them with time_col in the dataset config, or set {instead}"
        )
    return sequence.times


def timed(sequence: Sequence, times: Tensor | None) -> Sequence:
    """The sequence with the times ``[B, T]`` of its events, if they are known."""
    if times is None:
        return sequence
    return TimedSequence(sequence.items, sequence.index, sequence.mask, memo=sequence.memo, times=times)
