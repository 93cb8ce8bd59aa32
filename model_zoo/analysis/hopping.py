"""Session hopping in numbers: stability, discontinuity and reappearance of histories, against shuffled ones.

Write x_i for the unit vector of a history's i-th item, cos_ij = x_i . x_j, and cut the history into sessions 1 .. m.

- **Stability** ``mean of cos_ij over pairs i < j of one session``: within a session items are alike.
- **Discontinuity** ``mean of cos_{i,i+1} where i and i+1 share a session - mean of cos_{i,i+1} across a border``: at a
  border likeness breaks off.
- **Reappearance** ``mean over sessions s >= 3 of max over r <= s - 2 of cos(c_s, c_r)``, c_s the sum of session s's
  vectors: a session is like an earlier one that is not the one just before it.

Each is taken for every user and averaged over the users that have it. A figure alone says little, as any items of one
user are somewhat alike; each has a baseline in which only what it is about is destroyed:

- stability, discontinuity: every history's items in random order, sessions as long as before; where sessions are
  estimated, they are estimated anew in the random order;
- reappearance: whole sessions dealt anew among the users, each user getting as many as before. Shuffled *items* would be
  no baseline here: sessions of shuffled items are all alike, and would seem to return all the time.

``p = (1 + shuffles that reach the figure) / (1 + shuffles)``, one-sided.

Source: the three properties are those of MoS: Mixture of Sequence (WWW 2026), which shows them in pictures; the formulae
are ours.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from collections.abc import Sequence as ListOf
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from model_zoo.analysis.sessions import Bools, Floats, change_points, usual_contrast

#: numbers of a batch of shuffled histories, few enough for a core's cache
BATCH = 2**21
#: figures that differ by less are equal: they are sums of float32 cosines, in another order
TIE = 1e-6


@dataclass(frozen=True)
class Vectors:
    """Item vectors: float32 ``[N, d]``, row = item_index; shown as ``name``."""

    name: str
    table: Floats

    def of(self, items: npt.NDArray[np.integer]) -> tuple[Floats, npt.NDArray[np.int64]]:
        """Unit vectors ``[T, c]`` of items, and which columns of all they are; a vector of zeros stays so."""
        rows = self.table[items].astype(np.float32)
        norm = np.linalg.norm(rows, axis=1, keepdims=True)
        return np.where(norm > 0, rows / np.maximum(norm, 1e-30), 0).astype(np.float32), np.arange(rows.shape[1])


@dataclass(frozen=True)
class Categories:
    """A category of each item, int ``[N]``, as vectors: cos is 1 within a category, else 0; category 0 is like nothing."""

    name: str
    codes: npt.NDArray[np.integer]

    def of(self, items: npt.NDArray[np.integer]) -> tuple[Floats, npt.NDArray[np.int64]]:
        """As `Vectors.of`, with the columns of the categories that these items have."""
        found, place = np.unique(self.codes[items], return_inverse=True)
        return (np.eye(len(found), dtype=np.float32) * (found != 0))[place], found.astype(np.int64)


View = Vectors | Categories


@dataclass(frozen=True)
class UserHistory:
    """One user's items, oldest first, in one view.

    Attributes:
        unit: float32 ``[T, c]``.
        columns: which columns of the view's these are.
        known: bool ``[T]``, session starts that the data tell; None: they are change points.
        threshold: of the change points.
    """

    user: int
    unit: Floats
    columns: npt.NDArray[np.int64]
    known: Bools | None
    window: int
    threshold: float

    def starts(self, orders: npt.NDArray[np.int64]) -> Bools:
        """Session starts ``[B, T]`` when the items stand in these orders ``[B, T]``."""
        if self.known is not None:
            return np.broadcast_to(self.known, orders.shape)
        return change_points(self.unit[orders], self.window, self.threshold)

    @property
    def own_starts(self) -> Bools:
        """Session starts ``[T]`` of the history as it is."""
        return self.starts(np.arange(len(self.unit))[None])[0]


def user_history(
    view: View, user: int, items: npt.NDArray[np.integer], known: Bools | None, window: int, threshold: float | None
) -> UserHistory:
    """A user's items in a view.

    Args:
        threshold: of change points; None: `usual_contrast` of this history.
    """
    unit, found = view.of(items)
    if known is None and threshold is None:
        threshold = usual_contrast(unit, window, np.random.default_rng([user, 0]))
    return UserHistory(user, unit, found, known, window, -np.inf if threshold is None else threshold)


@dataclass(frozen=True)
class Measure:
    """One figure and its baseline.

    Attributes:
        value: mean over users; None if no user has it.
        shuffled: mean over the shuffles.
        low, high: their 2.5 % and 97.5 % quantiles.
        users: that have it.
        missing: why there is no value or no baseline; empty if there are both.
    """

    name: str
    value: float | None
    shuffled: float | None
    low: float | None
    high: float | None
    p_value: float | None
    users: int
    missing: str = ""


def stability(unit: Floats, starts: Bools) -> npt.NDArray[np.float64]:
    """Mean cosine of pairs of one session, ``[B, T, c]``, ``[B, T]`` -> ``[B]``; nan where no session has two items."""
    batch, length = starts.shape
    first = np.flatnonzero(starts)
    sums = np.add.reduceat(unit.reshape(batch * length, -1), first, axis=0)
    owner, size = first // length, np.diff(np.append(first, batch * length))
    alike = np.bincount(owner, (sums.astype(np.float64) ** 2).sum(1), batch) - (unit**2).sum((1, 2))
    pairs = np.bincount(owner, size * (size - 1), batch)
    return np.where(pairs > 0, alike / np.maximum(pairs, 1), np.nan)


def discontinuity(unit: Floats, starts: Bools) -> npt.NDArray[np.float64]:
    """Mean cosine of neighbours within sessions less that across borders, -> ``[B]``; nan where there are not both."""
    near = (unit[:, 1:] * unit[:, :-1]).sum(-1)
    border = starts[:, 1:]
    across, within = border.sum(1), (~border).sum(1)
    both = (across > 0) & (within > 0)
    found = (near * ~border).sum(1) / np.maximum(within, 1) - (near * border).sum(1) / np.maximum(across, 1)
    return np.where(both, found, np.nan)


def reappearance(centroids: Floats) -> float:
    """Mean over sessions s >= 3 of the largest cosine to a session r <= s - 2, of unit ``[m, d]``, m >= 3."""
    cosine = centroids @ centroids.T
    earlier = np.tri(len(centroids), k=-2, dtype=bool)
    return float(np.where(earlier, cosine, -np.inf).max(1)[2:].mean())


def session_centroids(history: UserHistory) -> Floats:
    """Unit sums ``[m, c]`` of the sessions' vectors."""
    sums = np.add.reduceat(history.unit, np.flatnonzero(history.own_starts), axis=0)
    return sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)


def measures(histories: ListOf[UserHistory], shuffles: int = 199, seed: int = 0) -> list[Measure]:
    """The three figures of some users, who are all in one view."""
    rng = np.random.default_rng(seed)
    histories = [history for history in histories if len(history.unit) > 1]
    own, null = [], []
    for history in histories:
        length = len(history.unit)
        orders = np.stack([np.arange(length), *(rng.permutation(length) for _ in range(shuffles))])
        step = max(1, BATCH // max(history.unit.size, 1))
        parts = [_item_figures(history, orders[i : i + step]) for i in range(0, len(orders), step)]
        figures = np.concatenate(parts, axis=1)  # [2, 1 + shuffles]
        own.append(figures[:, 0])
        null.append(figures[:, 1:])
    found = []
    for number, name in enumerate(("stability", "discontinuity")):
        values = np.array([figures[number] for figures in own])
        shuffled = _mean_over_users([figures[number] for figures in null], shuffles)
        reason = "no session of two items" if name == "stability" else "no user has a border between sessions of two items"
        found.append(_measure(name, values, shuffled, reason))
    return [*found, _reappearance(histories, shuffles, rng)]


def _item_figures(history: UserHistory, orders: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    unit, starts = history.unit[orders], history.starts(orders)
    return np.stack([stability(unit, starts), discontinuity(unit, starts)])


def _reappearance(histories: ListOf[UserHistory], shuffles: int, rng: np.random.Generator) -> Measure:
    centroids, widths = [], []
    place = {column: i for i, column in enumerate(sorted({int(c) for history in histories for c in history.columns}))}
    for history in histories:
        own = session_centroids(history)
        if len(own) >= 3:
            wide = np.zeros((len(own), len(place)), np.float32)
            wide[:, [place[int(column)] for column in history.columns]] = own
            centroids.append(wide)
            widths.append(len(own))
    if not centroids:
        return Measure("reappearance", None, None, None, None, None, 0, "no user has three sessions")
    values = np.array([reappearance(part) for part in centroids])
    if len(centroids) < 2:
        value = float(values[0])
        return Measure("reappearance", value, None, None, None, None, 1, "sessions of one user cannot be dealt anew")
    every, ends = np.concatenate(centroids), np.cumsum(widths)[:-1]
    dealt = [
        np.mean([reappearance(part) for part in np.split(every[rng.permutation(len(every))], ends)])
        for _ in range(shuffles)
    ]
    return _measure("reappearance", values, np.array(dealt), "")


def _mean_over_users(figures: Iterable[npt.NDArray[np.float64]], shuffles: int) -> npt.NDArray[np.float64]:
    table = np.array([*figures]).reshape(-1, shuffles)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a shuffle in which no user has the figure
        return np.nanmean(table, axis=0) if len(table) else np.full(shuffles, np.nan)


def _measure(name: str, values: npt.NDArray[np.float64], shuffled: npt.NDArray[np.float64], missing: str) -> Measure:
    values, shuffled = values[np.isfinite(values)], shuffled[np.isfinite(shuffled)]
    if not len(values):
        return Measure(name, None, None, None, None, None, 0, missing)
    value = float(values.mean())
    if not len(shuffled):
        return Measure(name, value, None, None, None, None, len(values), "no shuffled history has it")
    low, high = (float(q) for q in np.quantile(shuffled, (0.025, 0.975)))
    p_value = (1 + int((shuffled >= value - TIE).sum())) / (1 + len(shuffled))
    return Measure(name, value, float(shuffled.mean()), low, high, p_value, len(values))
