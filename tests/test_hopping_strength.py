"""``benchmark/figures.py hopping-strength``: its sets, its runs, what it says of themes found."""

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_EXPERIMENTS

from model_zoo.analysis import themes
from model_zoo.analysis.trained_run import TrainedRun
from model_zoo.errors import ConfigError, DataError
from model_zoo.pipeline.synthetic import PRESETS, TINY

CALL = ["--switches", "20", "0", "--preset", "few", "--max-len", "24", "--expids", "TWIN_tiny", "MoS_TWIN_tiny"]


@pytest.fixture(scope="module")
def figures(root: Path) -> Iterator[ModuleType]:
    """``benchmark/figures.py``, with a smaller preset, and runs in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root / "benchmark"))
        import figures
        import figures_style
        import figures_train

        from model_zoo.experiment.cli import main

        def here(command: list[str], **_: Any) -> SimpleNamespace:
            logger = logging.getLogger()
            handlers, level = logger.handlers[:], logger.level
            code = main(str(root), command[2:])
            logger.handlers[:], logger.level = handlers, level
            return SimpleNamespace(returncode=code)

        patch.setattr(figures_style, "DPI", 30)
        patch.setattr(figures_train, "subprocess", SimpleNamespace(run=here, DEVNULL=None))
        patch.setitem(PRESETS, "few", replace(TINY, users=120, rows=(800, 300, 300)))
        yield figures


@pytest.fixture(scope="module")
def study(figures: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study with one seed, made by the command; its experiments lie in ``data/config``."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("study")
    (folder / "data" / "config").mkdir(parents=True)
    (folder / "data" / "config" / "model_config.yaml").write_text(TINY_EXPERIMENTS)
    assert call(figures, folder, "--run", "--seeds", "1", "--set", "trackers=[]") == 0
    return folder


def call(figures: ModuleType, study: Path, *more: str, out: str = "out", runs: str = "runs") -> int:
    places = [str(study / runs), "--data", str(study / "data"), "--out", str(study / out)]
    return figures.main(["hopping-strength", *places, *CALL, *more])


def test_the_picture_has_its_numbers(study: Path) -> None:
    assert (study / "out" / "hopping-strength.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((study / "out" / "hopping-strength.json").read_text())
    rows = {(row["line"], row["switches"]): row for row in written["rows"]}
    assert list(rows) == [(name, s) for s in (0, 20) for name in ("TWIN_tiny", "MoS_TWIN_tiny")]
    for s in (0, 20):
        plain, mixture = rows["TWIN_tiny", s], rows["MoS_TWIN_tiny", s]
        assert mixture["gain gAUC"] == pytest.approx(mixture["gAUC"] - plain["gAUC"])
        assert plain["AUC"] < plain["ceiling AUC"] == mixture["ceiling AUC"] < 1 and "themes" not in plain
        assert mixture["themes by chance"] < 0.05 < mixture["themes by k-means"] <= 1 and 0 < mixture["themes"] <= 1
        assert mixture["k-means of"] == "the data's item vectors" and mixture["AUC sd"] is None
        assert mixture["note"] == "1 seed: no interval can be drawn"
    assert rows["TWIN_tiny", 0]["ceiling AUC"] > rows["TWIN_tiny", 20]["ceiling AUC"]
    truths = [np.load(study / "data" / f"hopping_{s}" / "truth.npz") for s in (0, 20)]
    sessions = [truth["session_id"][-1] + 1 for truth in truths]
    assert sessions[0] == 120 and sessions[1] > 800


def test_called_again_it_trains_only_what_is_missing_and_draws_intervals(
    figures: ModuleType, study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(study / "runs", study / "more", symlinks=True)
    before = {path: path.stat().st_mtime_ns for path in study.glob("more/*/*/*/metrics.json")}
    assert len(before) == 4
    seeds = ["--seeds", "1", "2", "--set", "trackers=[]"]
    assert call(figures, study, "--run", "--switches", "20", *seeds, out="again", runs="more") == 0
    assert ": made" not in capsys.readouterr().out
    after = {path: path.stat().st_mtime_ns for path in study.glob("more/*/*/*/metrics.json")}
    assert len(after) == 6 and before.items() <= after.items()
    rows = json.loads((study / "again" / "hopping-strength.json").read_text())["rows"]
    assert [row["runs"] for row in rows] == [2, 2] and "2 seeds: unreliable" in rows[1]["note"]
    assert rows[1]["gain AUC low"] <= rows[1]["gain AUC"] <= rows[1]["gain AUC high"]


def test_what_is_not_trained_yet_is_said_and_left_out(
    figures: ModuleType, study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(figures, study, "--switches", "20", "0", "50", "--expids", "TWIN_tiny", "SDIM_x", out="part") == 0
    said = capsys.readouterr().out
    assert "SDIM_x: no finished run of length 24 on hopping_0; --run trains it" in said
    assert "TWIN_tiny: no finished run of length 24 on hopping_50" in said
    rows = json.loads((study / "part" / "hopping-strength.json").read_text())["rows"]
    assert [(row["line"], row["switches"]) for row in rows] == [("TWIN_tiny", 0), ("TWIN_tiny", 20)]


def test_mistakes_are_answered_in_one_sentence(
    figures: ModuleType, study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, data, torn = tmp_path / "config", tmp_path / "data", tmp_path / "torn"
    config.mkdir()
    (config / "dataset_config.yaml").write_text("")
    shutil.copytree(study / "data", data)
    (data / "hopping_0" / "spec.json").unlink()
    spec = data / "hopping_20" / "spec.json"
    spec.write_text(spec.read_text().replace('"seed": 2024', '"seed": 2025'))
    shutil.copytree(study / "runs", torn)
    for path in torn.glob("hopping_20/TWIN_tiny/*/metrics.json"):
        path.write_text(path.read_text().replace('"train_data": "', '"train_data": "0'))
    mistakes = {
        "--switches 101: of 100 events, from 0 to 100": ["--switches", "101"],
        "hopping_0: was made with users 120, not 200; rows [800, 300, 300], not [3000, 600, 600]; choose":
            ["--preset", "tiny", "--switches", "0"],
        "hopping_20: was made with seed 2025, not 2024; choose": ["--data", str(data), "--switches", "20"],
        "hopping_0: holds item_info.parquet, but no spec.json": ["--data", str(data), "--switches", "0"],
        "dataset_config.yaml would hide the sets' file; move it": ["--config", str(config)],
        "no finished run of TWIN_tiny or MoS_TWIN_tiny, length 9, on these sets": ["--max-len", "9"],
        "expid 'TWIN_tinny'": ["--run", "--expids", "TWIN_tinny"],
    }  # fmt: skip
    for sentence, options in mistakes.items():
        assert call(figures, study, *options, out="no") == 2, options
        error = capsys.readouterr().err
        assert sentence in error and error.startswith("error: ") and len(error.splitlines()) == 1, error
    for sentence, runs in (("was trained on other files than those in", torn),
                           ("no such folder of runs; the sets are made, --run trains on", tmp_path / "none")):  # fmt: skip
        more = ["--data", str(study / "data"), "--out", str(tmp_path), *CALL]
        assert figures.main(["hopping-strength", str(runs), *more]) == 2
        assert sentence in capsys.readouterr().err


def test_a_lost_file_of_a_set_is_drawn_again(figures: ModuleType, tmp_path: Path) -> None:
    from hopping_sets import make_sets

    first = make_sets(str(tmp_path), [8], "few")[0]
    truth = first.folder / "truth.npz"
    before = dict(np.load(truth))
    truth.unlink()
    again = make_sets(str(tmp_path), [8], "few")[0]
    assert again.fingerprint == first.fingerprint
    assert all(np.array_equal(before[name], value) for name, value in np.load(truth).items())


# ---- themes --------------------------------------------------------------------------------------------------------------


def test_a_perfect_router_agrees_fully_and_a_random_one_by_chance() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(5, size=2000)
    assert themes.agreement(truth, (truth + 3) % 5) == pytest.approx(1)
    limit = themes.chance(truth, rng.integers(5, size=2000))
    assert 0 < limit < 0.01
    others = [themes.agreement(truth, rng.integers(5, size=2000)) for _ in range(40)]
    assert abs(np.mean(others)) < 0.001 and np.mean(np.array(others) > limit) < 0.2
    vectors = np.eye(5, dtype=np.float32)[truth] + rng.normal(scale=0.05, size=(2000, 5)).astype(np.float32)
    assert themes.agreement(truth, themes.clusters(vectors, truth)) == pytest.approx(1)


def test_the_routers_nearest_theme_is_what_is_compared(tiny_params: Any, tiny_dataset: Any, tiny_folder: Path) -> None:
    from model_zoo.experiment.run import build_model

    params = tiny_params("MoS_TWIN_tiny")
    torch.manual_seed(0)
    run = TrainedRun(params, tiny_dataset, build_model(params, tiny_dataset.feature_map, tiny_dataset))
    router, truth = run.model.mos.item_router, np.load(tiny_folder / "truth.npz")["item_theme"][1:]
    vectors = torch.from_numpy(themes.item_vectors(run))
    with torch.no_grad():
        hidden = router.encode(vectors)
        centres = torch.stack([hidden[torch.from_numpy(truth == t)].mean(0) for t in (2, 0, 3, 1)])
        router.codebook.codes.copy_(torch.nn.functional.normalize(centres, dim=1))
        wanted = router.codebook.cosine(hidden).argmax(1).numpy()
    np.testing.assert_array_equal(themes.item_themes(run), wanted)
    found = themes.recovery(run)
    assert found.router == themes.agreement(truth, wanted) > 10 * found.chance
    assert found.kmeans > found.chance and found.vectors == "the data's item vectors"


def test_runs_without_themes_of_items_and_data_without_truth_are_refused(
    tiny_params: Any, tiny_dataset: Any, tmp_path: Path
) -> None:
    from model_zoo.experiment.run import build_model

    for changes, said in (({"model": "TWIN"}, "has no router of items"), ({"model": "GShard_TWIN"}, "no theme of its own"),
                          ({"model": "MoS_TWIN", "router_input": "item_target"}, "no theme of its own")):  # fmt: skip
        params = tiny_params("TWIN_tiny", **changes)
        model = build_model(params, tiny_dataset.feature_map, tiny_dataset)
        with pytest.raises(ConfigError, match=said):
            themes.item_themes(TrainedRun(params, tiny_dataset, model))
    user_info = str(tmp_path / "user_info.parquet")
    with pytest.raises(DataError, match=r"truth\.npz: no such file; the true themes stand in it"):
        themes.true_themes(user_info, 3)
    (tmp_path / "truth.npz").write_text("torn")
    with pytest.raises(DataError, match="cannot be read as the true themes"):
        themes.true_themes(user_info, 3)
    np.savez(tmp_path / "truth.npz", item_theme=np.array([-1, 0]))
    with pytest.raises(DataError, match="is of 2 items, item_info of 3"):
        themes.true_themes(user_info, 3)
