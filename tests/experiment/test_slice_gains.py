"""``benchmark/slices.py``: whom a mixture helps."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import pytest
from run_records import result, save

Main = Callable[[list[str]], int]


@pytest.fixture(name="gains")
def gains_fixture(monkeypatch: pytest.MonkeyPatch, root: Path) -> Main:
    """The command."""
    monkeypatch.syspath_prepend(str(root / "benchmark"))
    return cast(Main, import_module("slices").main)


def sliced(model: str, seed: int, short: float | None, long: float, auc: float = 0.7, **config: Any) -> dict[str, Any]:
    """A record with two slices of test rows."""
    parts = [{"from": 0, "to": 9, "rows": 1200, "clicks": 5, "AUC": short, "gAUC": 0.5},
             {"from": 10, "to": 99, "rows": 800, "clicks": 9, "AUC": long, "gAUC": 0.6}]  # fmt: skip
    return {**result(model, seed, auc, **config), "slices": {"final": {"test": {"history length": parts}}}}


def test_gains_are_of_the_same_seed_and_of_the_configuration_that_validation_chose(
    tmp_path: Path, gains: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = save(
        tmp_path / "runs",
        sliced("TWIN", 1, 0.60, 0.70), sliced("TWIN", 2, 0.62, 0.72), sliced("TWIN", 3, 0.1, 0.1),
        sliced("MoS_TWIN", 1, 0.61, 0.73), sliced("MoS_TWIN", 2, 0.61, 0.76),
        sliced("MoS_TWIN", 1, 0.9, 0.9, auc=0.8, alpha_item=0.5),  # validates better, with fewer seeds
    )  # fmt: skip
    assert gains([str(runs)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| history")]
    assert lines == [
        "| history length | 0 to 9 | 1,200 | 44.00 | +0.00 [-1.00, +1.00] |",
        "| history length | 10 to 99 | 800 | 50.67 | +3.50 [+3.00, +4.00] |",
    ]


def test_a_slice_of_one_class_has_no_figure_and_one_seed_no_interval(
    tmp_path: Path, gains: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = save(tmp_path / "runs", sliced("TWIN", 1, None, 0.70), sliced("MoS_TWIN", 1, None, 0.73))
    out = tmp_path / "new" / "slices.md"
    assert gains([str(runs), "--out", str(out)]) == 0
    assert "1 tables in" in capsys.readouterr().out
    assert "| 0 to 9 | 1,200 | - | - |" in out.read_text() and "| 70.00 | +3.00 |" in out.read_text()


def test_without_a_pair_it_says_what_to_train(
    tmp_path: Path, gains: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = save(tmp_path / "runs", sliced("TWIN", 1, 0.6, 0.7), sliced("MoS_TWIN", 2, 0.6, 0.7), result("SDIM", 1, 0.7))
    assert gains([str(runs)]) == 2
    assert "a seed in common; train both with the same --seed" in capsys.readouterr().err
