"""Sessions of a history as windows: cut where time passes without an event, instead of every few items."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from model_zoo.errors import ConfigError
from model_zoo.layers.sequence import Sequence
from model_zoo.layers.windows import WindowMeans

#: the setting that needs times, and the one that does not
SESSIONS = "windows: session", "windows: fixed"


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


class SessionWindows(WindowMeans):
    """The mean of each session's item vectors; sessions lie in time order, at the right end of their row.

    A session begins with a row's oldest event, and with every event more than ``gap`` after the one before it. Its mean
    depends on the session's own items alone. Where the history was cut to its newest items, the oldest session is what is
    left of it.

    Args:
        source: the histories, real tokens at the right end of each row.
        gap: seconds.

    Raises:
        ConfigError: the histories have no times.
    """

    def __init__(self, source: Sequence, gap: int) -> None:
        times, mask = times_of(source, *SESSIONS), source.mask
        self.source = source
        starts = mask.clone()
        starts[:, 1:] &= ~mask[:, :-1] | (times[:, 1:] - times[:, :-1] > gap)
        counts = starts.sum(1)
        width = int(counts.max()) if counts.numel() else 0
        #: ``[B, W]`` bool
        self.mask = torch.arange(width, device=mask.device) >= (width - counts).unsqueeze(1)
        self._starts = starts[mask]  # [E] of the real tokens, in row-major order

    def members(self) -> tuple[Tensor, Tensor]:
        return self._starts.cumsum(0) - 1, self._rows

    def means(self, table: Tensor) -> Tensor:
        if len(self._rows) == 0:
            return table.new_zeros(0, table.shape[1])
        return F.embedding_bag(self._rows, table, self._starts.nonzero().squeeze(1), mode="mean")

    @cached_property
    def _rows(self) -> Tensor:
        """``[E]`` item rows of the real tokens."""
        return self.source.index[self.source.mask]


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
