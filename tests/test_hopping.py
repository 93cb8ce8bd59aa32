"""Session hopping: its three figures against literal ones, change points, where sessions come from."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import SPEC

from model_zoo.analysis import hopping, sessions
from model_zoo.errors import DataError
from model_zoo.pipeline.histories import Histories
from model_zoo.pipeline.synthetic import generate


def slow_figures(vectors: np.ndarray, starts: np.ndarray) -> tuple[float, float, float]:
    """Stability, discontinuity and reappearance, pair by pair."""
    unit = [v / np.linalg.norm(v) for v in vectors.astype(np.float64)]
    session = np.cumsum(starts)
    inside = [unit[i] @ unit[j] for i in range(len(unit)) for j in range(i) if session[i] == session[j]]
    near = [(session[i] == session[i - 1], unit[i] @ unit[i - 1]) for i in range(1, len(unit))]
    apart = np.mean([c for same, c in near if same]) - np.mean([c for same, c in near if not same])
    sums = [sum(u for u, s in zip(unit, session) if s == number) for number in range(1, session[-1] + 1)]
    sums = [s / np.linalg.norm(s) for s in sums]
    back = [max(sums[s] @ sums[r] for r in range(s - 1)) for s in range(2, len(sums))]
    return float(np.mean(inside)), float(apart), float(np.mean(back))


def test_the_three_figures_equal_the_literal_ones() -> None:
    rng = np.random.default_rng(3)
    table = rng.normal(size=(20, 5)).astype(np.float32)
    items = rng.integers(1, 20, size=14)
    starts = np.zeros(14, bool)
    starts[[0, 3, 4, 9]] = True
    history = hopping.user_history(hopping.Vectors("v", table), 0, items, starts, 4, None)
    found = [
        hopping.stability(history.unit[None], starts[None])[0], hopping.discontinuity(history.unit[None], starts[None])[0],
        hopping.reappearance(hopping.session_centroids(history)),
    ]  # fmt: skip
    assert found == pytest.approx(slow_figures(table[items], starts), abs=1e-6)  # float32 sums of 14 unit vectors


def test_categories_are_alike_or_not_and_category_0_is_like_nothing() -> None:
    view = hopping.Categories("c", np.array([0, 7, 7, 2, 0]))
    unit, columns = view.of(np.array([1, 3, 2, 4, 4]))
    alike = np.zeros((5, 5))
    alike[[0, 0, 2, 2, 1], [0, 2, 0, 2, 1]] = 1
    np.testing.assert_array_equal(unit @ unit.T, alike)
    assert columns.tolist() == [0, 2, 7]


def test_change_points_are_the_borders_of_pure_sessions() -> None:
    themes = np.repeat([0, 1, 0, 2], [6, 5, 7, 6])
    unit = np.eye(3, dtype=np.float32)[themes]
    threshold = sessions.usual_contrast(unit, 4, np.random.default_rng(0))
    assert np.flatnonzero(sessions.change_points(unit[None], 4, threshold)[0]).tolist() == [0, 6, 11, 18]
    contrast = sessions.contrasts(unit[None], 4)[0]
    assert contrast[5] == 0 and contrast[1] == 1 and np.isinf(contrast[[0, -1]]).all()
    # p = 7: items 3-6 are 0 0 0 1, items 7-10 are 1 1 1 1
    assert contrast[6] == pytest.approx(1 / np.sqrt(10))
    for length in (0, 1, 2, 3):
        assert sessions.change_points(unit[None, :length], 4, 1.0).sum() <= 2
    assert sessions.usual_contrast(unit[:2], 4, np.random.default_rng(0)) == -np.inf


def hoppers(shuffle: bool, users: int = 12) -> list[hopping.UserHistory]:
    """Users who hop between two of four themes of their own, or their items in random order."""
    rng = np.random.default_rng(5)
    table = (np.eye(4, 8)[np.arange(40) % 4] + 0.2 * rng.normal(size=(40, 8))).astype(np.float32)
    found = []
    for user in range(users):
        liked = rng.choice(4, 2, replace=False)
        items = np.concatenate([4 * rng.integers(10, size=5) + liked[number % 2] for number in range(6)])
        starts = np.arange(30) % 5 == 0
        items = rng.permutation(items) if shuffle else items
        found.append(hopping.user_history(hopping.Vectors("v", table), user, items, starts, 3, None))
    return found


def test_hopping_shows_and_its_absence_does_not() -> None:
    found = hopping.measures(hoppers(shuffle=False), shuffles=99)
    assert [m.name for m in found] == ["stability", "discontinuity", "reappearance"]
    assert all(m.p_value == 0.01 and m.users == 12 for m in found)
    assert all(m.low <= m.shuffled <= m.high < m.value for m in found)
    assert abs(found[1].shuffled) < 0.1 < found[1].value
    without = hopping.measures(hoppers(shuffle=True), shuffles=99)
    assert min(m.p_value for m in without[:2]) > 0.05
    estimated = [replace(h, known=None, threshold=0.5) for h in hoppers(shuffle=False)]
    assert [m.p_value for m in hopping.measures(estimated, shuffles=99)[:2]] == [0.01, 0.01]
    assert hopping.measures(hoppers(shuffle=False), shuffles=99) == found


def test_what_a_single_user_or_a_single_session_cannot_tell_is_said() -> None:
    one = hopping.measures(hoppers(shuffle=False, users=1), shuffles=9)
    assert one[0].p_value == 0.1 and one[2].p_value is None and one[2].value is not None
    assert one[2].missing == "sessions of one user cannot be dealt anew"
    whole = [replace(h, known=np.arange(30) == 0) for h in hoppers(shuffle=False)]
    stable, border, back = hopping.measures(whole, shuffles=9)
    assert stable.p_value == 1.0  # one session: any order has the same pairs
    assert (border.value, border.missing) == (None, "no user has a border between sessions of two items")
    assert (back.value, back.missing) == (None, "no user has three sessions")
    assert [m.users for m in hopping.measures([], shuffles=9)] == [0, 0, 0]


def test_sessions_come_from_truth_then_times_then_nowhere(tiny_folder: Path, tmp_path: Path) -> None:
    data = generate(SPEC)
    histories = Histories(data.history, data.offsets)
    path = str(tiny_folder / "user_info.parquet")
    known = sessions.known_sessions(path, histories)
    expected = np.append(True, np.diff(data.session_id) > 0)
    assert known.described == "true sessions"
    np.testing.assert_array_equal(known.starts, expected)
    elsewhere = str(tmp_path / "user_info.parquet")
    assert sessions.known_sessions(elsewhere, histories).starts is None
    times = Histories(np.arange(1, 7, dtype=np.int32), np.array([0, 0, 4, 6]), None, np.array([0, 10, 40, 50, 51, 52]))
    timed = sessions.known_sessions(elsewhere, times, gap=20)
    assert timed.starts is not None and timed.starts.tolist() == [True, False, True, False, True, False]
    with pytest.raises(DataError, match=r"has no time_col.*--sessions change"):
        sessions.known_sessions(elsewhere, histories, "time")
    with pytest.raises(DataError, match="cannot be read as true sessions"):
        sessions.known_sessions(elsewhere, histories, "truth")
    with pytest.raises(DataError, match="is of other histories"):
        sessions.known_sessions(path, times)
