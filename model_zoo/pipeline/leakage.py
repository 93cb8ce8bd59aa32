"""What an impression must not know: its own event, the same row in another split, an earlier row with a later history.

What each test can show, and cannot:

- *Own events.* In LongCTR's data a click is an event of ``full_item_seq``, and ``seq_len`` counts the events before it:
  the event at ``seq_len`` is the click itself. Where ``seq_len`` is one too large, the newest event of the history is the
  target instead. One row proves nothing, as users come back to items; the share over all clicks does, unless most clicks
  repeat the item just before (then it is said that nothing can be told). A click whose item stands in the user's events
  before ``seq_len`` only is suspect too: an error if nearly all clicks are so (``seq_len`` is far too large), a warning if
  some are, where most clicks are events. Nothing can be said of rows without a click, or where clicks are no events.
- *Rows twice.* With a time column an equal row is the same impression. Without one it may be an item shown again before
  the user's next event, so that it is a warning only.
- *Time order.* With a time column, a user's later row must not have a shorter history. That finds histories that are wrong
  relative to each other, not ones that are all too long by as much.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from model_zoo.pipeline.histories import Histories
from model_zoo.pipeline.splits import Split
from model_zoo.pipeline.validation_report import Level

#: clicks below which shares say nothing
FEWEST_CLICKS = 50
#: share of clicks from which "the newest event is the target" is no chance
MOST = 0.5
#: share of clicks that stand in the past only, from which it is worth a warning; and from which it is no chance
SOME, NEARLY_ALL = 0.02, 0.9

Integers = npt.NDArray[np.int64]


@dataclass
class OwnEvents:
    """Where the items of clicks stand among their users' events.

    Attributes:
        clicks: rows with label 1.
        following: of them, those whose item is the event right behind the history: the click itself.
        newest: those whose item is the history's last event.
        later: those whose item is the event behind the history or a later one (counted by `add_places`, as ``past``).
        past: those whose item stands in the history, and in no event behind it.
    """

    clicks: int = 0
    following: int = 0
    newest: int = 0
    later: int = 0
    past: int = 0

    def add(self, histories: Histories, user: Integers, item: Integers, seq_len: Integers) -> None:
        """Count clicks: int ``[n]`` each."""
        items, place = histories.items, histories.offsets[user] + seq_len
        self.clicks += len(user)
        if not len(items):
            return
        behind = (place < histories.offsets[user + 1]) & (items[np.minimum(place, len(items) - 1)] == item)
        self.following += int(behind.sum())
        self.newest += int(((seq_len > 0) & (items[np.maximum(place - 1, 0)] == item)).sum())

    def add_places(self, histories: Histories, users: tuple[int, int], clicks: pl.DataFrame) -> None:
        """Count where a range of users' clicks stand.

        Args:
            clicks: columns ``user``, ``item``, ``seq_len``; counted by `add` too.
        """
        start, end = (int(histories.offsets[user]) for user in users)
        lengths = np.diff(histories.offsets[users[0] : users[1] + 1])
        owner = np.repeat(np.arange(*users), lengths)
        position = np.arange(start, end) - np.repeat(histories.offsets[users[0] : users[1]], lengths)
        events = pl.DataFrame({"user": owner, "item": histories.items[start:end].astype(np.int64), "last": position})
        last = events.join(clicks, on=["user", "item"], how="semi").group_by("user", "item").agg(pl.col("last").max())
        known = clicks.join(last, on=["user", "item"])
        past = known.filter(pl.col("last") < pl.col("seq_len")).height
        self.past += past
        self.later += known.height - past

    @property
    def shares(self) -> tuple[float, float, float]:
        """Of ``following``, ``newest`` and ``past``."""
        clicks = max(self.clicks, 1)
        return self.following / clicks, self.newest / clicks, self.past / clicks

    def fault(self) -> str | None:
        """What shows that histories hold the click itself, or None."""
        following, newest, _ = self.shares
        if self.clicks < FEWEST_CLICKS or newest < MOST or following >= newest / 2:
            return None
        return (
            f"the history's newest event is the target of {newest:.0%} of the clicks, the event behind the history of "
            f"{following:.0%}: seq_len seems to count the click itself; count only what was before it"
        )

    def finding(self) -> tuple[Level, str]:
        """All that the counts show."""
        following, newest, past = self.shares
        if self.clicks < FEWEST_CLICKS:
            return "not checked", f"{self.clicks} clicks are too few to tell"
        if (fault := self.fault()) is not None:
            return "error", fault
        figures = (
            f"the target of {following:.1%} of {self.clicks:,} clicks is the event behind the history, "
            f"of {newest:.1%} the newest event in it, of {past:.1%} an event in it and none behind it"
        )
        if newest >= MOST:
            return "not checked", f"cannot be told where users repeat items: {figures}"
        if past > NEARLY_ALL:
            return "error", f"{figures}: seq_len counts later events, the click itself among them; count only earlier ones"
        if past > SOME and self.later < MOST * self.clicks:
            return "not checked", f"cannot be told where clicks are no events of full_item_seq: {figures}"
        if past > SOME:
            return "warning", f"{figures}: the last are sound only if full_item_seq ends before those clicks"
        return "ok", figures


def first_clicks(histories: Histories, split: Split, most: int = 50_000) -> OwnEvents:
    """`OwnEvents` of a split's first clicks, quick enough for every run."""
    rows = np.flatnonzero(split.label[: 4 * most] == 1)[:most]
    found = OwnEvents()
    user, item, seq_len = split.user_index[rows], split.item_index[rows], split.seq_len[rows]
    found.add(histories, user.astype(np.int64), item.astype(np.int64), seq_len.astype(np.int64))
    return found
