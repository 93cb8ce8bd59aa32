"""Sessions of a history as windows: cut where time passes without an event, instead of every few items."""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from model_zoo.layers.sequence import Sequence
from model_zoo.layers.timed_sequence import times_of
from model_zoo.layers.windows import WindowMeans

#: the setting that needs times, and the one that does not
SESSIONS = "windows: session", "windows: fixed"


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

    def times(self) -> Tensor:
        found = torch.zeros_like(self.mask, dtype=torch.long)
        newest = self._starts.roll(-1)  # [E], the last token of each session: the next one, or none, starts another
        return found.masked_scatter_(self.mask, times_of(self.source, *SESSIONS)[self.source.mask][newest])

    @cached_property
    def _rows(self) -> Tensor:
        """``[E]`` item rows of the real tokens."""
        return self.source.index[self.source.mask]
