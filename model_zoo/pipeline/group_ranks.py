"""Ranks of predictions within groups from one sort of 64-bit keys: what AUC, gAUC, MRR and NDCG are counted from.

A key holds a group code (31 bits), a code that orders as the predictions do (32) and the label (1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from model_zoo.errors import DataError

Codes = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Values = npt.NDArray[np.generic]

GROUP_SHIFT = np.uint64(33)
_MOST_GROUP_CODES = 2**31


@dataclass(frozen=True)
class Groups:
    """Per group ``[G]``: how many rows, and the AUC (nan where a class is missing)."""

    rows: Ints
    auc: Floats

    @classmethod
    def count(cls, keys: Codes) -> Groups:
        """Groups of unsorted keys ``[N]``."""
        keys = np.sort(keys)
        # Keys that differ in no more than the label bit are a tie block; all counts below are up to the end of a block.
        end = _last_of_runs(keys >> np.uint64(1))
        positives = np.cumsum(keys & np.uint64(1), dtype=np.int64)[end]
        negatives = end + 1 - positives
        below = negatives + np.concatenate(([0], negatives[:-1]))  # twice the rank of the block among the negatives
        wins = np.cumsum(np.diff(positives, prepend=0) * below)

        last = _last_of_runs(keys[end] >> GROUP_SHIFT)
        before = np.concatenate(([0], negatives[last][:-1]))
        positive, negative = np.diff(positives[last], prepend=0), np.diff(negatives[last], prepend=0)
        doubled = np.diff(wins[last], prepend=0) - 2 * positive * before
        pairs = positive * negative
        area = np.full(len(last), np.nan)
        np.divide(doubled, 2 * pairs, out=area, where=pairs > 0)
        return cls(positive + negative, area)


@dataclass(frozen=True)
class Ranking:
    """Group (0 .. G-1) and rank in it of every positive row, both ``[P]``, and the positives per group ``[G]``."""

    group: Ints
    rank: Ints
    positives: Ints

    @classmethod
    def of(cls, keys: Codes) -> Ranking:
        """Ranking of unsorted keys ``[N]``; of equal predictions the later row ranks first."""
        keys = keys[np.argsort(keys >> np.uint64(1), kind="stable")]
        last = _last_of_runs(keys >> GROUP_SHIFT)
        place = np.flatnonzero(keys & np.uint64(1))
        group = np.searchsorted(last, place)
        return cls(group, last[group] - place + 1, np.bincount(group, minlength=len(last)))

    def mrr(self) -> float:
        """Mean over groups of the mean of 1 / rank over the group's positives."""
        return self._mean_share(1.0 / self.rank, self.positives)

    def ndcg(self, k: int) -> float:
        """Mean over groups of gain / best possible gain, where a positive at rank r <= k gains 1 / log2(r + 1)."""
        k = min(k, int(self.rank.max(initial=1)))
        best = np.concatenate(([0.0], np.cumsum(1.0 / np.log2(np.arange(2.0, k + 2.0)))))
        gain = np.where(self.rank <= k, 1.0 / np.log2(self.rank + 1.0), 0.0)
        return self._mean_share(gain, best[np.minimum(self.positives, k)])

    def _mean_share(self, gain: Floats, best: Floats | Ints) -> float:
        """Mean over groups of the positives' gains ``[P]`` as a share of ``best`` ``[G]``."""
        gained = np.bincount(self.group, weights=gain, minlength=len(best))
        # FuxiCTR's 1e-12, which makes a group without a positive 0.
        return math.fsum(gained / (best + 1e-12)) / len(best)


def _last_of_runs(values: Codes) -> Ints:
    """Index of the last element of each run of equal neighbours."""
    return np.append(np.flatnonzero(values[1:] != values[:-1]), len(values) - 1)


def score_codes(prediction: Values) -> Codes:
    """Whole numbers below 2**32 that are ordered, and equal, exactly as the predictions ``[N]`` are."""
    with np.errstate(over="ignore", under="ignore"):
        single = prediction.astype(np.float32)
    # 8-byte integers would themselves be rounded by the comparison.
    wide = prediction.dtype.kind in "iu" and prediction.dtype.itemsize == 8
    if wide or (prediction.dtype != np.float32 and not np.array_equal(single, prediction)):
        return np.unique(prediction, return_inverse=True)[1].astype(np.uint64)
    bits = (single + np.float32(0)).view(np.uint32)  # + 0 turns -0.0, which has other bits, into 0.0
    # IEEE 754: positive floats are ordered as their bits; negative ones the other way round and below.
    flip = np.where(bits >> np.uint32(31), np.uint32(0xFFFFFFFF), np.uint32(0x80000000))
    return (bits ^ flip).astype(np.uint64)


def group_codes(ids: Values) -> Codes:
    """Whole numbers below 2**31, one for each distinct id of ``[N]``; they need not be dense."""
    if ids.dtype.kind in "iu":
        low = ids.min()
        if int(ids.max()) - int(low) < _MOST_GROUP_CODES:
            # Modulo 2**64 the difference is right even where the ids' own dtype would overflow.
            return ids.astype(np.uint64) - np.asarray(low).astype(np.uint64)
    try:
        return np.unique(ids, return_inverse=True)[1].astype(np.uint64)
    except TypeError:
        raise DataError("group_id: mixes types that have no order; make every id a string or an integer") from None
