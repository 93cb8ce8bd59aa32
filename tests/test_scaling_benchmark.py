"""``benchmark/scaling.py`` at its smallest: counted memory, fitted exponents, what it writes, where it goes on."""

import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture
def scaling(monkeypatch: pytest.MonkeyPatch, root: Path) -> ModuleType:
    """``benchmark/scaling.py`` with small axes."""
    monkeypatch.syspath_prepend(str(root / "benchmark"))
    import scaling

    monkeypatch.setattr(scaling, "POINTS", {"length": [8, 16], "experts": [1, 2], "items": [300, 4_000]})
    monkeypatch.setattr(scaling, "BASE", {"length": 8, "experts": 2, "items": 300})
    return scaling


def test_every_axis_is_measured_once_and_written(
    scaling: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    call = ["--models", "TWIN", "MoS_TWIN", "--batch", "4", "--repeats", "1", "--out", str(tmp_path)]
    scaling.main(call)
    assert "MoS_TWIN: mib ~ experts^" in capsys.readouterr().out
    rows = json.loads((tmp_path / "scaling.json").read_text())["rows"]
    points = [(row["model"], row["axis"], row["value"]) for row in rows]
    assert len(points) == len(set(points)) == 2 * 4 + 2  # a plain backbone has no experts
    assert all(row["seconds"] > 0 and row["step_mib"] > 0 for row in rows)
    standing = {point: row["standing_mib"] for point, row in zip(points, rows, strict=True)}
    # a row of the embedding and two of Adam's, and the item table's image vector, of 64 numbers each; two ids
    grown = standing["TWIN", "items", 4_000] - standing["TWIN", "items", 300]
    assert grown * 2**20 == pytest.approx(3_700 * (4 * 64 * 4 + 2 * 8), rel=1e-3)
    few, many = (standing["MoS_TWIN", "experts", n] for n in (1, 2))
    assert many > few > standing["TWIN", "length", 8]
    text = (tmp_path / "SCALING.md").read_text()
    assert "![" in text and "| model | others | 8 | 16 |" in text and "| TWIN | B 4, L 8 | " in text
    assert "| MoS_TWIN | B 4, n 2, items 300 | " in text
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")

    measured: list[str] = []

    def fake(model: str, batch: int, repeats: int, clock: str, **sizes: int) -> dict[str, float]:
        measured.append(f"{model} {batch}")
        return {"seconds": 1.0, "standing_mib": 2.0, "step_mib": 3.0}

    monkeypatch.setattr(scaling, "measure", fake)
    scaling.main(call)
    assert measured == []
    scaling.main([*call, "--batch", "5", "--axes", "length", "--models", "TWIN", "SDIM"])
    assert measured == ["TWIN 5"] * 2 + ["SDIM 5"] * 2
    assert len(json.loads((tmp_path / "scaling.json").read_text())["rows"]) == len(rows) + 2


def test_a_rival_has_twice_as_many_experts_and_choices(scaling: ModuleType) -> None:
    import scaling_point

    batch = scaling_point.draw(3, 8, 50)
    for experts, chosen in ((1, 2), (3, 4)):
        layer = scaling_point.build(scaling_point.settings("GShard_TWIN", experts), 50, batch).method_layers()[0]
        assert (len(layer.experts.experts), layer.router.topk) == (2 * experts, chosen)


def test_without_matplotlib_the_tables_are_written(
    scaling: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"seconds": 1.0, "standing_mib": 2.0, "step_mib": 3.0}
    monkeypatch.setattr(scaling, "measure", lambda *args, **sizes: {**row, "seconds": sizes["length"] ** 1.5})
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    scaling.main(["--models", "TWIN", "--axes", "length", "--out", str(tmp_path)])
    said = capsys.readouterr()
    assert "matplotlib is missing; pip install 'longctr-mos[plots]'" in said.err
    assert "TWIN: seconds ~ length^1.50, at the end 1.50, worst point 0% off worse than linear" in said.out
    text = (tmp_path / "SCALING.md").read_text()
    assert "(exponent above 1.1, or 1.3 at the end): TWIN's time (1.50, 1.50 at the end)." in text
    assert "| TWIN | 1.50 | 1 x^1.50 | 0% | 1.50 | 0.00 | 5 x^0.00 | 0% | 0.00 |" in text and "![" not in text
    assert not (tmp_path / "scaling.png").exists()


def test_an_exponent_is_the_slope_of_the_larger_half(scaling: ModuleType) -> None:
    import scaling_report

    flat = [(x, 100.0) for x in (1.0, 2.0, 4.0)]
    found = scaling_report.fit([*flat, *((x, 3 * x**1.2) for x in (64.0, 8.0, 16.0, 32.0))])
    assert (found.exponent, found.factor) == (pytest.approx(1.2), pytest.approx(3)) and found.deviation < 1e-9
    bent = scaling_report.fit([(1.0, 1.0), (2.0, 1.0), (4.0, 8.0), (8.0, 8.0)])
    assert bent.exponent == 0 and bent.factor == pytest.approx(8) and not bent.steep
    late = scaling_report.fit([(1.0, 1.0), (2.0, 1.0), (4.0, 1.0), (8.0, 1.0), (16.0, 1.0), (32.0, 3.0)])
    assert late.exponent < 1.1 and late.end == pytest.approx(math.log2(3)) and late.steep
    off = scaling_report.fit([(0.25, 1.0), (0.5, 1.0), (1.0, 1.0), (2.0, 2.0), (4.0, 1.0)])
    # 1, 2, 1 at equal steps: flat at the cube root of two, the middle point 2^(2/3) times that
    assert off.exponent == pytest.approx(0) and off.deviation == pytest.approx(2 ** (2 / 3) - 1)
    assert scaling_report.fit([(1.0, 1.0)]) is None


def test_memory_is_what_is_held_at_the_worst_moment(scaling: ModuleType) -> None:
    import scaling_point

    before = torch.zeros(1_000)

    def step() -> None:
        first = torch.empty(1_000) + before  # two at a time
        second = torch.cat([first, first])
        del first
        torch.empty(500)
        del second

    assert scaling_point.peak_bytes(step) == 4 * 3_000
