"""Where a history's sessions begin: as the data say, or estimated from its items."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from model_zoo.errors import DataError
from model_zoo.experiment.slices import SESSION_GAP
from model_zoo.pipeline.histories import Histories
from model_zoo.pipeline.synthetic_files import TRUTH_FILE

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]

Source = Literal["auto", "truth", "time", "change"]
#: quantile of the contrasts of randomly ordered histories up to which a contrast is called a change
QUANTILE = 0.1
#: random orders that the quantile is taken over
ORDERS = 20


@dataclass(frozen=True)
class KnownSessions:
    """Sessions of all histories, if the data tell them.

    Attributes:
        starts: bool ``[E]``, events that begin a session; None: they have to be estimated (`change_points`).
        described: in words, for a picture.
    """

    starts: Bools | None
    described: str


def known_sessions(
    user_info: str, histories: Histories, source: Source = "auto", gap: float = SESSION_GAP
) -> KnownSessions:
    """Sessions from ``truth.npz`` beside ``user_info`` (synthetic data), else from gaps in time, else unknown.

    Args:
        source: ``auto`` takes the first of these that the data have.
        gap: seconds without an event after which a session begins.

    Raises:
        DataError: the source asked for is not there, or does not fit the histories.
    """
    truth = os.path.join(os.path.dirname(user_info), TRUTH_FILE)
    if source == "truth" or (source == "auto" and os.path.exists(truth)):
        return KnownSessions(_true_starts(truth, histories), "true sessions")
    if source == "time" and histories.times is None:
        raise DataError(f"{user_info}: the data set has no time_col, so no times to cut at; use --sessions change")
    if source in ("auto", "time") and histories.times is not None:
        return KnownSessions(_starts(np.diff(histories.times) > gap, histories), f"sessions cut at gaps of over {gap:g} s")
    return KnownSessions(None, "sessions estimated: change points")


def _true_starts(path: str, histories: Histories) -> Bools:
    try:
        with np.load(path, allow_pickle=False) as truth:
            offsets, session = truth["offsets"], truth["session_id"]
    except (OSError, KeyError, ValueError):
        raise DataError(f"{path}: cannot be read as true sessions; use --sessions change, or make the data again") from None
    if not np.array_equal(offsets, histories.offsets) or len(session) != len(histories.items):
        raise DataError(f"{path}: is of other histories than user_info; generate the data again")
    return _starts(np.diff(session) != 0, histories)


def _starts(changes: Bools, histories: Histories) -> Bools:
    """Session starts from the changes ``[E - 1]`` between neighbouring events; a history begins one, too."""
    starts = np.append(True, changes)[: len(histories.items)]
    starts[histories.offsets[:-1][histories.lengths > 0]] = True
    return starts


# ---- change points -------------------------------------------------------------------------------------------------------


def contrasts(unit: Floats, window: int) -> Floats:
    """``c_p = cos(mean of the up to w items before p, mean of the up to w items from p on)`` for p = 1 .. T - 1.

    Where fewer than two items (one, if w is 1) stand on a side, c is infinite: too little to tell a change from.

    Args:
        unit: ``[B, T, c]`` unit vectors (or zeros) of B histories or orders of one.
        window: w.

    Returns:
        float32 ``[B, max(T - 1, 0)]``.
    """
    length = unit.shape[1]
    if length < 2:
        return np.zeros((len(unit), 0), np.float32)
    total = np.concatenate([np.zeros_like(unit[:, :1]), unit.cumsum(1)], axis=1)
    place = np.arange(1, length)
    before = total[:, place] - total[:, np.maximum(place - window, 0)]
    after = total[:, np.minimum(place + window, length)] - total[:, place]
    norms = np.sqrt((before**2).sum(-1) * (after**2).sum(-1))
    cosine = (before * after).sum(-1) / np.maximum(norms, 1e-12)
    least = min(2, window)
    return np.where((place >= least) & (place <= length - least), cosine, np.inf).astype(np.float32)


def change_points(unit: Floats, window: int, threshold: float) -> Bools:
    """Events that begin a session: where c is at most ``threshold`` and the least within w - 1 places, the first of equals.

    The MoS paper marks borders in its pictures and does not say how it found them; this is one way.

    Returns:
        bool ``[B, T]``, the first column True.
    """
    contrast = contrasts(unit, window)
    starts = np.zeros(unit.shape[:2], bool)
    starts[:, :1] = True
    if contrast.shape[1]:
        reach = window - 1
        padded = np.pad(contrast, ((0, 0), (reach, reach)), constant_values=np.inf)
        around = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1, axis=1)
        starts[:, 1:] = (around.argmin(-1) == reach) & (contrast <= threshold)
    return starts


def usual_contrast(unit: Floats, window: int, rng: np.random.Generator) -> float:
    """The `QUANTILE` of c when the items of a history ``[T, c]`` stand in random order: a threshold free of scale."""
    orders = np.stack([rng.permutation(len(unit)) for _ in range(ORDERS)])
    contrast = contrasts(unit[orders], window)
    finite = contrast[np.isfinite(contrast)]
    return float(np.quantile(finite, QUANTILE)) if len(finite) else -np.inf
