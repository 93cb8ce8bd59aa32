"""``benchmark/figures.py`` and what it computes from runs: dispatch, branches of phase 3, points, their pictures."""

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SPEC

from model_zoo.analysis.alpha import branching, triangle
from model_zoo.analysis.dispatch import Dispatch, dispatch, token_scores, winners
from model_zoo.analysis.trained_run import load_trained
from model_zoo.errors import ConfigError
from model_zoo.experiment.config import load_config
from model_zoo.experiment.run import run
from model_zoo.experiment.schema import validate
from model_zoo.layers.dselect_k_router import DSelectKRouter
from model_zoo.layers.expert_choice_router import ExpertChoiceRouter
from model_zoo.layers.gshard_router import GShardRouter
from model_zoo.layers.routers import Routing
from model_zoo.layers.sequence import Sequence
from model_zoo.pipeline.synthetic import generate
from model_zoo.pipeline.synthetic_files import dataset_config, write

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def runs(tiny_config: Path, root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Run folders of three tiny models."""
    place = tmp_path_factory.mktemp("runs")
    found = {}
    for model, expid in (("TWIN", "TWIN_tiny"), ("MoS_TWIN", "MoS_TWIN_tiny"), ("GShard_TWIN", "TWIN_tiny")):
        config = load_config(str(tiny_config), expid, [f"model={model}", f"model_root={place}", "trackers=[]"])
        config.set("model_id", model, "test")
        config.expid = model
        run(config, validate(config), str(root), str(tiny_config))
        found[model] = str(next((place / "tiny" / model).iterdir()))
    return found


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch, root: Path) -> ModuleType:
    """``benchmark/figures.py``."""
    monkeypatch.syspath_prepend(str(root / "benchmark"))
    import figures
    import figures_style

    monkeypatch.setattr(figures_style, "DPI", 30)
    return figures


# ---- dispatch ------------------------------------------------------------------------------------------------------------


def test_the_winner_is_the_best_of_the_experts_that_read() -> None:
    scores = torch.tensor([[[0.9, 0.5, 0.1], [0.9, 0.5, 0.1], [0.9, 0.5, 0.1]]])
    members = torch.tensor([[[True, True, False], [False, True, True], [False, False, False]]])
    assert winners(scores, Routing(members, torch.zeros(1, 3))).tolist() == [[0, 1, 3]]


@pytest.mark.parametrize("router", [GShardRouter, ExpertChoiceRouter, DSelectKRouter])
def test_the_newest_tokens_winner_has_the_largest_gate(router: type[torch.nn.Module]) -> None:
    torch.manual_seed(2)
    items = torch.randn(30, 6, dtype=torch.float64)
    tokens = Sequence(items, torch.randint(30, (40, 7)), torch.ones(40, 7, dtype=torch.bool))
    made = router(6, 5, topk_experts=2).double().eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)  # far from even, so that gates differ
    with torch.no_grad():
        routing = made(tokens)
        found = winners(token_scores(made, tokens)[tokens.index], routing)[:, -1]
    served = routing.gates.any(1)
    assert served.any() and torch.equal(found[served], routing.gates.argmax(1)[served])


def test_mos_gives_every_occurrence_of_an_item_to_its_nearest_theme(runs: dict[str, str]) -> None:
    trained = load_trained(runs["MoS_TWIN"])
    found = dispatch(trained)
    histories, kept = trained.dataset.histories, trained.params["max_len"]
    counts = np.zeros_like(found.counts)
    router = trained.model.mos.item_router
    with torch.no_grad():
        vectors = trained.model.embedding_layer(
            trained.model.item_features.rows(torch.arange(trained.dataset.num_items)), flatten_emb=True
        )
        hidden = router.encode(vectors)
        kept_themes = router.codebook.nearest(hidden, router.topk).sort(1).values  # of equal cosines, these two are kept
        place = router.codebook.cosine(hidden).gather(1, kept_themes).argmax(1, keepdim=True)
        theme = kept_themes.gather(1, place).squeeze(1).tolist()
    for user in range(len(histories.lengths)):
        for item in histories.items[histories.offsets[user] : histories.offsets[user + 1]][-kept:].tolist():
            counts[item, theme[item]] += 1
    np.testing.assert_array_equal(found.counts, counts)
    assert found.consistency(8) == 1.0 and found.router_input == "item"
    most, fewest = found.extremes(8)
    assert found.occurrences[most] == found.occurrences.max() and found.occurrences[fewest] >= 8


def test_a_rivals_occurrences_are_counted_once_each(runs: dict[str, str]) -> None:
    trained = load_trained(runs["GShard_TWIN"])
    found = dispatch(trained)
    lengths = np.minimum(trained.dataset.histories.lengths, trained.params["max_len"])
    assert found.counts.sum() == lengths.sum() and found.counts.shape[1] == 6
    trained.model.method_layers()[0].router.capacity_factors = (0.2, 0.2)  # one place of 25 tokens and expert
    assert dispatch(trained).counts[:, -1].sum() > 0.5 * lengths.sum()
    assert dispatch(trained).consistency(8) < found.consistency(8)


def test_without_a_router_or_enough_occurrences_there_is_no_histogram(runs: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="TWIN: has no router of items"):
        dispatch(load_trained(runs["TWIN"]))
    with pytest.raises(ConfigError, match=r"--least 8: 1 item\(s\) occur"):
        Dispatch(np.array([[0, 0], [9, 0], [3, 0]]), "item").extremes(8)


# ---- alpha ---------------------------------------------------------------------------------------------------------------


def test_the_triangle_has_21_cells() -> None:
    cells = triangle()
    assert len(set(cells)) == 21 and all(i + w <= 1 + 1e-12 for i, w in cells)
    assert {(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.4, 0.6)} <= set(cells)


def test_a_branch_at_the_runs_own_weights_is_its_phase_3(runs: dict[str, str]) -> None:
    branch = branching(runs["MoS_TWIN"])
    record = json.loads(Path(runs["MoS_TWIN"], "metrics.json").read_text())
    branch.score((1.0, 0.0))  # leaves nothing behind
    assert branch.score((0.25, 0.25)) == record["scores"]["final"]
    before = {name: value.clone() for name, value in branch.model.mos.window_experts.state_dict().items()}
    again = branch.score((0.4, 0.0))
    assert branch.score((0.4, 0.0)) == again != record["scores"]["final"]
    branch.model.load_weights(branch.checkpoint)
    kept = branch.model.mos.window_experts.state_dict()
    assert any(not torch.equal(kept[name], before[name]) for name in kept)
    branch.score((0.0, 0.0))
    assert all(torch.equal(branch.model.mos.window_experts.state_dict()[name], kept[name]) for name in kept)


def test_runs_that_cannot_be_branched_are_refused(runs: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="TWIN is not trained in phases; give a run of a MoS model"):
        branching(runs["TWIN"])
    copy = tmp_path / "run"
    shutil.copytree(runs["MoS_TWIN"], copy)
    (copy / "MoS_TWIN.phase2.model").unlink()
    with pytest.raises(ConfigError, match="no phase 2 to branch from"):
        branching(str(copy))


# ---- the commands --------------------------------------------------------------------------------------------------------


def test_each_figure_is_a_picture_with_its_numbers(
    figures: ModuleType, runs: dict[str, str], tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    more = ["--out", str(tmp_path), "--config", str(tiny_config)]
    few = ["--shuffles", "19", "--sample", "20"]
    assert figures.main(["hopping", "--dataset", "tiny", "--categories", "cate_id", "--users", "3", *few, *more]) == 0
    assert figures.main(["hopping", "--run", runs["MoS_TWIN"], "--users", "3", "--centre", *few, *more]) == 0
    assert figures.main(["dispatch", runs["MoS_TWIN"], runs["GShard_TWIN"], *more]) == 0
    everything = str(Path(runs["TWIN"]).parents[2])
    assert figures.main(["utility", everything, "--count", "paper", *more]) == 0
    assert figures.main(["alpha", runs["MoS_TWIN"], "--steps", "1", "--epochs", "1", *more]) == 0
    said = capsys.readouterr().out
    assert "true sessions" in said and "its router looks at: item" in said and "[3/3] item 1 window 0" in said
    names = {path.name for path in tmp_path.iterdir()}
    for stem in ("hopping-tiny", "dispatch-tiny", "utility-tiny-24-paper"):
        assert {f"{stem}.png", f"{stem}.json", f"{stem}.csv"} <= names
    pictures = list(tmp_path.glob("*.png"))
    assert len(pictures) == 4 and all(path.read_bytes().startswith(PNG) for path in pictures)
    rows = {row["model"]: row for row in json.loads((tmp_path / "utility-tiny-24-paper.json").read_text())["rows"]}
    assert rows["MoS_TWIN"]["setting"] == "n 4+4, k 2+2, s 2" and rows["GShard_TWIN"]["setting"] == "n 5, k 2"
    assert rows["TWIN"]["operations"] < rows["MoS_TWIN"]["operations"]
    assert figures.main(["alpha", runs["MoS_TWIN"], "--steps", "1", "--epochs", "1", *more]) == 0
    assert "[1/3]" not in capsys.readouterr().out  # kept


def test_mistakes_are_answered_in_one_sentence(
    figures: ModuleType, runs: dict[str, str], tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / "gone"
    shutil.copytree(runs["MoS_TWIN"], gone)
    for path in gone.glob("*.model"):
        path.unlink()
    lonely = tmp_path / "config"
    lonely.mkdir()
    write(generate(replace(SPEC, users=1, rows=(20, 5, 5))), tmp_path / "lonely")
    (lonely / "dataset_config.yaml").write_text(dataset_config(SPEC, tmp_path / "lonely"))
    mistakes = {
        "kuairand_sample: has no item vectors": ["hopping", "--dataset", "kuairand_sample"],
        "--dataset 'tinny' is not in": ["hopping", "--dataset", "tinny"],
        "--vectors cate_id: not an item feature with vectors; tiny has image_emb_dim16":
            ["hopping", "--dataset", "tiny", "--vectors", "cate_id"],
        "--categories x: not a categorical item feature": ["hopping", "--dataset", "tiny", "--categories", "x"],
        "no history has 900 items (at most 120); lower --least": ["hopping", "--dataset", "tiny", "--least", "900"],
        "--users 999: users are numbered from 0 to 199": ["hopping", "--dataset", "tiny", "--users", "999"],
        "--phase phase9": ["hopping", "--run", runs["TWIN"], "--phase", "phase9"],
        "no such checkpoint": ["dispatch", str(gone)],
        "is not the folder of one run": ["dispatch", str(Path(runs["TWIN"]).parent)],
        "no such folder; give a run's": ["alpha", str(tmp_path / "nowhere")],
        "no finished run below": ["utility", str(lonely)],
        "--items 0: items are numbered from 1 to 300": ["dispatch", runs["MoS_TWIN"], "--items", "0"],
        "--run needs --lengths or --experts": ["scaling", str(tmp_path), "--run", "TWIN_tiny"],
    }  # fmt: skip
    for sentence, call in mistakes.items():
        config = [] if "kuairand_sample" in call else ["--config", str(tiny_config)]
        assert figures.main([*call, *config, "--out", str(tmp_path / "out")]) == 2, call
        error = capsys.readouterr().err
        assert sentence in error and error.startswith("error: ") and len(error.splitlines()) == 1, error
    call = ["hopping", "--dataset", "lonely", "--config", str(lonely), "--shuffles", "9", "--least", "5"]
    assert figures.main([*call, "--out", str(tmp_path / "out")]) == 0
    assert "sessions of one user cannot be dealt anew" in capsys.readouterr().out


def test_without_matplotlib_the_numbers_are_written(
    figures: ModuleType, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    call = ["hopping", "--dataset", "tiny", "--shuffles", "5", "--sample", "5", "--config", str(tiny_config)]
    assert figures.main([*call, "--out", str(tmp_path)]) == 2
    assert "matplotlib is missing; pip install 'longctr-mos[plots]'" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"hopping-tiny.json", "hopping-tiny.csv"}


def variant(
    source: str, target: Path, name: str, seed: int, gain: float, finished: str = "20260102-000000", **config: Any
) -> None:
    """A finished run's record, changed."""
    record = json.loads(Path(source, "metrics.json").read_text())
    record["config"] |= {**config, "seed": seed}
    record |= {"seed": seed, "finished": finished}
    for split in record["scores"]["final"].values():
        split["AUC"] = 0.6 + gain
    (target / name).mkdir(parents=True)
    (target / name / "metrics.json").write_text(json.dumps(record))


def test_scaling_has_a_line_for_each_setting_and_means_over_seeds(
    figures: ModuleType, runs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    place = tmp_path / "all"
    for seed in (1, 2):
        for length in (20, 40):
            variant(runs["TWIN"], place, f"t{seed}{length}", seed, 0.0, max_len=length)
            variant(runs["MoS_TWIN"], place, f"m{seed}{length}", seed, seed / 100, max_len=length)
        variant(runs["MoS_TWIN"], place, f"n{seed}", seed, 0, max_len=40, n_item_experts=1, n_window_experts=1, topk_item=1)
    variant(runs["TWIN"], place, "old", 1, 0.3, finished="20260101-000000", max_len=20)
    call = ["scaling", str(place), "--out", str(tmp_path / "out")]
    assert figures.main(call) == 0
    assert "t120: taken; 1 earlier run(s)" in capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / "scaling-tiny.json").read_text())["rows"]
    points = {(row["model"], row["length"], row["experts"]): row for row in rows}
    assert set(points) == {("TWIN", 20, 0), ("TWIN", 40, 0), *(("MoS_TWIN", *p) for p in ((20, 4), (40, 4), (40, 1)))}
    assert points["MoS_TWIN", 20, 4]["AUC"] == pytest.approx(0.615) and points["TWIN", 20, 0]["AUC"] == pytest.approx(0.6)
    assert points["MoS_TWIN", 20, 4]["AUC sd"] == pytest.approx(np.std([0.61, 0.62], ddof=1))
    assert (tmp_path / "out" / "scaling-tiny.png").read_bytes().startswith(PNG)
    variant(runs["MoS_TWIN"], place, "other", 1, 0.1, max_len=40, topk_item=1)
    capsys.readouterr()
    assert figures.main(call) == 2
    assert "MoS_TWIN of 40 items and 4 experts has several settings" in capsys.readouterr().err


def test_scaling_trains_what_is_asked_for_and_goes_on_after_a_failure(
    figures: ModuleType, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import figures_train

    called: list[list[str]] = []

    def fake(command: list[str], **kwargs: Any) -> SimpleNamespace:
        called.append(command[2:])
        return SimpleNamespace(returncode=2 if len(called) == 1 else 0)

    monkeypatch.setattr(figures_train.subprocess, "run", fake)
    call = ["scaling", str(tmp_path), "--run", "TWIN_tiny", "MoS_TWIN_tiny", "--lengths", "9", "--experts", "0", "1"]
    assert figures.main([*call, "--seeds", "3", "--config", str(tiny_config), "--out", str(tmp_path)]) == 2
    assert "1 run(s) failed: TWIN_tiny seed 3 in L9" in capsys.readouterr().err
    sets = [[command[i + 1] for i, word in enumerate(command) if word == "--set"] for command in called]
    assert sets == [
        ["max_len=9", f"model_root={tmp_path}/L9"], ["max_len=9", f"model_root={tmp_path}/L9"],
        ["n_item_experts=0", "n_window_experts=0", f"model_root={tmp_path}/n0"],
        ["n_item_experts=1", "topk_item=1", "n_window_experts=1", "topk_window=1", f"model_root={tmp_path}/n1"],
    ]  # fmt: skip
    assert all("--resume" in command and command[command.index("--seed") + 1] == "3" for command in called)


def test_labels_cover_neither_each_other_nor_a_point(figures: ModuleType) -> None:
    pytest.importorskip("matplotlib")
    import figures_style as style

    rng = np.random.default_rng(1)
    points = [(float(x), float(y)) for x, y in rng.random((16, 2))]
    figure = style.new_figure(6, 5)
    axes = figure.subplots()
    axes.plot(*zip(*points), "o")
    axes.margins(0.3)
    style.place_labels(figure, axes, points, [0.0] * 16, [f"MoS_TransAct\nn {i}+5, k 1+1, s 4" for i in range(16)])
    boxes = [text.get_window_extent(figure.canvas.get_renderer()) for text in axes.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert not any(box.contains(*axes.transData.transform(point)) for box in boxes for point in points)


def test_a_table_of_rows_with_other_keys_is_sound_csv(figures: ModuleType) -> None:
    import figures_style as style

    assert style.as_csv([{"a": 1, "b": "x,y"}, {"c": None, "a": 2}]) == 'a,b,c\n1,"x,y",\n2,,\n'


def test_every_command_has_its_help(figures: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    parse: Callable[[list[str]], argparse.Namespace] = figures.parser().parse_args
    for name in figures.FIGURES:
        with pytest.raises(SystemExit):
            parse([name, "--help"])
        assert "--out DIR" in capsys.readouterr().out
