"""Scores of parts of a split: for whom, and for which items, a model is better or worse than on the whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from model_zoo.pipeline.dataset import CTRDataset
from model_zoo.pipeline.group_ranks import GROUP_SHIFT, Groups, score_codes
from model_zoo.pipeline.histories import Histories
from model_zoo.pipeline.item_counts import training_counts

Integers = npt.NDArray[np.int64]

#: bins of about as many rows each
BINS = 5
#: seconds without an event that end a session, where nothing else is said
SESSION_GAP = 1800
#: events of histories that are looked at together
EVENTS = 2**22


@dataclass(frozen=True)
class Slicer:
    """What the rows of a data set's splits are sliced by, found once for all splits and models.

    Attributes:
        dataset: with times (`Histories.times`) or an item category if sessions are to be counted.
        category: the item feature that says what a session is about; None = there is none.
        session_gap: seconds.
        clicks: of each item in the training split.
        known: what was counted already, by split.
    """

    dataset: CTRDataset
    category: str | None
    session_gap: int
    clicks: npt.NDArray[np.float64]
    known: dict[str, dict[str, Integers]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, dataset: CTRDataset, category: str | None = None, session_gap: int | None = None) -> Slicer:
        """The slicer of a data set.

        Args:
            category: default: `category_feature`.
            session_gap: default: `SESSION_GAP`.
        """
        gap = SESSION_GAP if session_gap is None else session_gap
        return cls(dataset, category or category_feature(dataset), gap, training_counts(dataset)[0])

    @property
    def definitions(self) -> dict[str, str]:
        """What each slice counts, in words."""
        if self.dataset.histories.times is not None:
            sessions = f"sessions in the history: more than {self.session_gap} s without an event end one"
        elif self.category is not None:
            sessions = f"runs of one {self.category} in the history (there are no event times to tell sessions by)"
        else:
            sessions = "not available: no event times, and no item feature that groups items"
        return {
            "history length": "events in the user's history before the impression, max_len not applied",
            "sessions": sessions,
            "item popularity": "clicks of the target item in the training split",
        }

    def values(self, split: str) -> dict[str, Integers]:
        """What each row of a split counts, ``[N]`` a slice, in the split's order; without a slice that is not available."""
        if split not in self.known:
            self.known[split] = self._counted(split)
        return self.known[split]

    def _counted(self, split: str) -> dict[str, Integers]:
        parts = [(part.user_index, part.item_index, part.seq_len) for part in self.dataset.splits[split].parts()]
        user, item, seq_len = (np.concatenate([columns[side] for columns in parts]).astype(np.int64) for side in range(3))
        found = {"history length": seq_len}
        histories = self.dataset.histories
        if histories.times is not None:
            found["sessions"] = sessions(histories, user, seq_len, gap=self.session_gap)
        elif self.category is not None:
            column = self.dataset.item_columns[self.category]
            found["sessions"] = sessions(histories, user, seq_len, category=column)
        return {**found, "item popularity": self.clicks[item].astype(np.int64)}

    def scores(
        self, split: str, prediction: npt.NDArray[Any], label: npt.NDArray[Any], group: npt.NDArray[Any] | None
    ) -> dict[str, list[dict[str, Any]]]:
        """The bins of every slice of a split, for a record.

        Args:
            prediction, label, group: of all rows, from `TrainingLoop.predict_split`.

        Returns:
            By slice its bins, see `binned`.
        """
        rows = Scored.of(prediction, label, group)
        return {name: binned(values, rows) for name, values in self.values(split).items()}


@dataclass(frozen=True)
class Scored:
    """Predictions of N rows, as the metrics read them.

    Attributes:
        keys: uint64, order as the predictions do, the label in the lowest bit.
        group: int64 in [0, groups), or None.
    """

    keys: npt.NDArray[np.uint64]
    group: Integers | None

    @classmethod
    def of(cls, prediction: npt.NDArray[Any], label: npt.NDArray[Any], group: npt.NDArray[Any] | None) -> Scored:
        """Of predictions, labels and group ids ``[N]``."""
        keys = score_codes(prediction) << np.uint64(1) | (label == 1)
        return cls(keys, None if group is None else np.unique(group, return_inverse=True)[1].astype(np.int64))


def binned(values: Integers, rows: Scored, bins: int = BINS) -> list[dict[str, Any]]:
    """Scores of the rows between quantiles of ``values [N]``, N >= 1; equal values are in one bin, so bins may be fewer.

    Returns:
        For each bin its lowest and highest value ``from`` and ``to``, ``rows``, ``clicks``, ``AUC`` and, if there are
        groups, ``gAUC`` of its rows alone; None where no group (for AUC: the bin) has both classes.
    """
    inner = np.quantile(values, np.arange(1, bins) / bins, method="inverted_cdf")
    highest = np.unique(np.append(inner, values.max()))
    place = np.searchsorted(highest, values)
    whole = Groups.count(place.astype(np.uint64) << GROUP_SHIFT | rows.keys)
    clicks = np.bincount(place, weights=(rows.keys & np.uint64(1)).astype(np.float64))
    lowest = np.full(len(highest), values.max())
    np.minimum.at(lowest, place, values)
    answer: list[dict[str, Any]] = [
        {"from": int(low), "to": int(high), "rows": int(count), "clicks": int(clicked), "AUC": _number(area)}
        for low, high, count, clicked, area in zip(lowest, highest, whole.rows, clicks, whole.auc, strict=True)
    ]
    if rows.group is not None:
        width = int(rows.group.max()) + 1
        pairs, code = np.unique(place * width + rows.group, return_inverse=True)
        inside = Groups.count(code.astype(np.uint64) << GROUP_SHIFT | rows.keys)
        both = ~np.isnan(inside.auc)
        owner, weight = pairs[both] // width, inside.rows[both].astype(np.float64)
        total = np.bincount(owner, weight, len(highest))
        with np.errstate(invalid="ignore"):
            means = np.bincount(owner, weight * inside.auc[both], len(highest)) / total
        for entry, mean in zip(answer, means, strict=True):
            entry["gAUC"] = _number(mean)
    return answer


def sessions(
    histories: Histories,
    user: Integers,
    seq_len: Integers,
    *,
    gap: int = SESSION_GAP,
    category: npt.NDArray[Any] | None = None,
) -> Integers:
    """How many sessions the first ``seq_len [N]`` events of each row's user hold.

    An event begins a session if it is the user's first, if it is more than ``gap`` seconds after the one before, or, with
    ``category`` ``[items]`` in place of times, if its item's category is another one. A few users are looked at at a time.
    """
    count = np.zeros(len(user), np.int64)
    order = np.argsort(user, kind="stable")
    order = order[seq_len[order] > 0]
    for rows in _together(order, histories.offsets[user[order]] // EVENTS):
        first, last = user[rows[0]], user[rows[-1]]
        start, end = histories.offsets[first], histories.offsets[last + 1]
        begins = np.zeros(end - start, bool)
        if category is not None:
            values = category[histories.items[start:end]]
            begins[1:] = values[1:] != values[:-1]
        else:
            assert histories.times is not None
            begins[1:] = np.diff(histories.times[start:end]) > gap
        reached = np.cumsum(begins)
        oldest = histories.offsets[user[rows]] - start
        count[rows] = reached[oldest + seq_len[rows] - 1] - reached[oldest] + 1
    return count


def category_feature(dataset: CTRDataset) -> str | None:
    """The item feature that groups items: the first categorical one with two values or more, and two items a value."""
    for name, column in dataset.item_columns.items():
        if dataset.feature_map.features[name]["type"] == "categorical":
            values = len(np.unique(column[1:]))
            if 2 <= values <= (len(column) - 1) / 2:
                return name
    return None


def slice_rows(slices: dict[str, Any], split: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table that shows a split's slices, beside phase 1's AUC where there was one.

    Args:
        slices: ``final`` (and ``phase1``), by split the bins of `Slicer.scores`.
    """
    final, before = slices["final"][split], slices.get("phase1", {}).get(split)
    grouped = any("gAUC" in entry for bins in final.values() for entry in bins)
    names = ["AUC", "gAUC"] if grouped else ["AUC"]
    header = [split, "from", "to", "rows", "clicks", *names, *(f"phase 1 {name}" for name in names if before)]
    rows = []
    for name, bins in final.items():
        for number, entry in enumerate(bins):
            shown = [str(entry[key]) for key in ("from", "to", "rows", "clicks")]
            known = [entry, *([before[name][number]] if before else [])]
            rows.append(["" if number else name, *shown, *(_shown(one[metric]) for one in known for metric in names)])
    return header, rows


def _together(order: Integers, block: Integers) -> Iterator[Integers]:
    """``order [N]`` cut where ``block [N]`` changes."""
    if len(order):
        yield from np.split(order, np.flatnonzero(np.diff(block)) + 1)


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _shown(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.6f}"
