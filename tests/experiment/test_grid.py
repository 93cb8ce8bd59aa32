"""Tuner files: which runs they mean, what these are called, and what is refused before any of them."""

import json
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from fuxictr import autotuner

import model_zoo.experiment.grid as grid_module
from model_zoo.errors import ConfigError
from model_zoo.experiment.grid import Grid, points_in, points_of, write_config
from model_zoo.experiment.grid_file import read_space
from model_zoo.experiment.grid_ids import canonical, digest
from model_zoo.registry import model_keys

Make = Callable[..., Path]
Params = Callable[..., dict[str, Any]]


@pytest.fixture
def make(tiny_config: Path, tmp_path: Path) -> Make:
    """``make(space, **top)``: a tuner file over ``TWIN_tiny``."""

    def write(space: Any, **top: Any) -> Path:
        path = tmp_path / "g.yaml"
        content = {"base_config": str(tiny_config), "base_expid": "TWIN_tiny", **top, "tuner_space": space}
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return write


def read(path: Path, seeds: list[int] | None = None) -> Grid:
    return points_of(read_space(str(path), str(ROOT)), seeds)


def refused(path: Path) -> str:
    with pytest.raises(ConfigError) as error:
        read(path)
    return str(error.value)


def test_set_takes_the_place_of_values_of_the_space(make: Make) -> None:
    path = make({"topk": [8, 4], "num_heads": [1, 2]})
    for given, same in (
        (["topk=2"], {"topk": [2], "num_heads": [1, 2]}),
        (["topk=[2, 1]", "learning_rate=0.1"], {"topk": [2, 1], "num_heads": [1, 2], "learning_rate": [0.1]}),
    ):
        points = points_of(read_space(str(path), str(ROOT), given)).points
        assert [point.expid for point in points] == [point.expid for point in read(make(same)).points]
        make({"topk": [8, 4], "num_heads": [1, 2]})


def test_set_chooses_data_sets_wherever_the_file_names_them(make: Make) -> None:
    for top, space in (({"dataset_id": ["nowhere", "tiny"]}, {"topk": 8}), ({}, {"topk": 8, "dataset_id": ["nowhere"]})):
        points = points_of(read_space(str(make(space, **top)), str(ROOT), ["dataset_id=tiny"])).points
        assert [point.params["dataset_id"] for point in points] == ["tiny"]


def test_what_is_wrong_with_set_is_said_of_set(make: Make) -> None:
    path = str(make({"topk": [8]}))
    for given, said in (
        ("topk=[]", "--set: topk: [] holds no value"),
        ("topk={low: 9, high: 2}", "--set: topk: {'high': 2, 'low': 9}: low must be below high"),
        ("topkk=3", "--set: unknown key 'topkk' for model TWIN; did you mean 'topk'?"),
        ("topk", "--set topk: write it as key=value"),
    ):
        with pytest.raises(ConfigError, match=re.escape(said)):
            points_of(read_space(path, str(ROOT), [given]))
    with pytest.raises(ConfigError) as error:
        read_space(path, str(ROOT), ["topk", "num_heads=[]"])
    assert "--set topk: write it" in str(error.value) and "num_heads: [] holds no value" in str(error.value), "both at once"


# ---- ids -------------------------------------------------------------------------------------------------------------


def test_an_id_does_not_depend_on_the_order_of_keys(make: Make) -> None:
    one = read(make({"topk": [8, 4], "num_heads": [1, 2], "learning_rate": 0.1}))
    other = read(make({"learning_rate": [0.1], "num_heads": [2, 1], "topk": [4, 8]}))
    assert {point.expid for point in one.points} == {point.expid for point in other.points}
    assert len({point.expid for point in one.points}) == 4


def test_an_id_does_not_depend_on_what_changes_no_result(make: Make) -> None:
    plain = read(make({"topk": [8]})).points[0]
    assert read(make({"topk": [8], "verbose": 0, "prefetch": 1, "model_root": "elsewhere", "seed": 5})).points[0].expid == (
        plain.expid
    )
    constructors = model_keys("TWIN")["accumulation_steps"].default
    for key, default in (("max_gradient_norm", 10), ("accumulation_steps", constructors)):
        assert read(make({"topk": [8], key: default})).points[0].expid == plain.expid, "a default, given"
        assert read(make({"topk": [8], key: default + 1})).points[0].expid != plain.expid


def test_values_of_different_types_are_different_and_of_one_type_once_validated_the_same(tiny_params: Params) -> None:
    assert digest(tiny_params(learning_rate="1e-3")) == digest(tiny_params(learning_rate=0.001))
    assert digest(tiny_params(net_dropout=0)) == digest(tiny_params(net_dropout=0.0))
    params = tiny_params()
    columns = params["feature_cols"]
    changed = [{**columns[0], "active": 1}, *columns[1:]]
    assert columns[0]["active"] is True and digest({**params, "feature_cols": changed}) != digest(params)
    texts = [canonical({**params, "group_id": value})["group_id"] for value in ("1", 1, 1.0, True)]
    assert len(set(texts)) == 4
    assert digest({**params, "feature_cols": columns[::-1]}) != digest(params), "an order of a list has a meaning"


def test_an_id_is_this_one_in_every_version(tiny_params: Params) -> None:
    """Records of earlier versions are found by it."""
    params = {"model": "TWIN", "dataset_id": "x", "topk": 8, "dnn_hidden_units": [4, 2], "seed": 1, "metrics": ["AUC"]}
    assert canonical(params) == {
        "dataset_id": '"x"', "dnn_hidden_units": "[4, 2]", "metrics": '["AUC"]', "model": '"TWIN"', "topk": "8",
    }  # fmt: skip
    assert digest(params) == "be126c69e0"


def test_ids_that_clash_are_refused(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid_module, "digest", lambda params: "0" * 10)
    said = refused(make({"topk": [8, 4]}))
    assert "g: TWIN_tiny_001_0000000000 and TWIN_tiny_002_0000000000 share the id TWIN_tiny_0000000000" in said
    assert "but differ in topk" in said


def test_points_with_the_same_values_run_once(make: Make) -> None:
    grid = read(make({"topk": [8, 4, 8.0], "learning_rate": [1e-3, "1e-3"], "verbose": [0, 1]}))
    assert len(grid.points) == 2 and grid.repeated == 10


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["DCNv2_Ebnerd_small_x1_100", "TransAct_KuaiVideo_x2_100"])
def test_numbers_and_values_are_fuxictrs(name: str, tmp_path: Path) -> None:
    """FuxiCTR's own enumerator, given the data set in the file, as LongCTR's files have it."""
    text = yaml.safe_load((ROOT / "benchmark" / "grids" / f"{name}.yaml").read_text())
    text["base_config"] = str(ROOT / text["base_config"])
    grid = read(ROOT / "benchmark" / "grids" / f"{name}.yaml")
    text["dataset_config"] = {text["dataset_id"]: {"data_format": "parquet", "rebuild_dataset": False}}
    (tmp_path / "g.yaml").write_text(yaml.safe_dump(text, sort_keys=False))
    autotuner.enumerate_params(str(tmp_path / "g.yaml"))
    wanted = yaml.safe_load((tmp_path / "g" / "model_config.yaml").read_text())
    assert len(wanted) == len(grid.points)
    for (expid, params), point in zip(sorted(wanted.items()), grid.points):
        assert point.label.rsplit("_", 1)[0] == expid.rsplit("_", 1)[0]
        assert point.tuned == {key: params[key] for key in point.tuned}


def test_longctrs_files_with_the_data_set_in_them_are_read(make: Make, tiny_config: Path) -> None:
    described = yaml.safe_load((tiny_config / "dataset_config.yaml").read_text())["tiny"]
    path = make({"topk": [8, 4]}, dataset_id="Other_x1", dataset_config={"Other_x1": described})
    grid = read(path)
    assert [point.label.rsplit("_", 1)[0] for point in grid.points] == ["TWIN_Other_x1_001", "TWIN_Other_x1_002"]
    assert grid.points[0].params["train_data"] == described["train_data"]
    assert "dataset_id 'Othr_x1' is not in the file's dataset_config; did you mean 'Other_x1'?" in refused(
        make({"topk": 8}, dataset_id="Othr_x1", dataset_config={"Other_x1": described})
    )


def test_a_data_set_in_the_file_stands_for_the_one_of_that_name_elsewhere(make: Make, tiny_config: Path) -> None:
    described = yaml.safe_load((tiny_config / "dataset_config.yaml").read_text())["tiny"]
    del described["test_data"]
    grid = read(make({"topk": [8]}, dataset_id="tiny", dataset_config={"tiny": described}))
    assert "test_data" not in grid.points[0].params
    assert "test_data" in read(make({"topk": [8]}, dataset_id="tiny")).points[0].params


def test_several_data_sets_and_settings_of_data_are_enumerated(make: Make, tiny_config: Path) -> None:
    described = yaml.safe_load((tiny_config / "dataset_config.yaml").read_text())["tiny"]
    top = {"dataset_id": ["A", "B"], "dataset_config": {"A": described, "B": {**described, "prefetch": 1}}}
    grid = read(make({"topk": [8, 4], "memory_limit_mib": [None, 4096]}, **top))
    found = [(p.params["dataset_id"], p.params["topk"], p.params["memory_limit_mib"]) for p in grid.points]
    assert sorted(found, key=str) == sorted(product("AB", [8, 4], [None, 4096]), key=str)
    inside = make({"topk": 8, "dataset_id": ["A", "B"]}, dataset_config=top["dataset_config"])
    assert [point.params["dataset_id"] for point in read(inside).points] == ["A", "B"]


def test_seeds_are_runs_of_one_id(make: Make) -> None:
    in_file = read(make({"topk": [8, 4], "seed": [1, 2]}))
    given = read(make({"topk": [8, 4], "seed": 9}), seeds=[2, 1, 2])
    assert {point.key for point in in_file.points} == {point.key for point in given.points}
    assert [point.seed for point in given.points] == [2, 1, 2, 1]


def test_a_tag_picks_by_number_and_by_hash(make: Make) -> None:
    grid = read(make({"topk": [8, 4, 2]}))
    second = grid.points[1]
    for tag in ("002", second.expid[-4:], second.expid):
        assert grid.tagged(tag).points == [second]
    with pytest.raises(ConfigError, match=r"--tag 004: is in none of the 3 ids, as TWIN_tiny_001_"):
        grid.tagged("004")


def test_what_a_point_runs_with_is_written_and_read_back(make: Make, tmp_path: Path) -> None:
    point = read(make({"topk": [8, 4], "model": ["TWIN", "SDIM"][:1], "memory_limit_mib": [64]})).points[1]
    folder = write_config(point, str(tmp_path / "made"))
    back = points_in(folder, str(ROOT / "config"))
    assert [p.expid for p in back.points] == [point.expid]
    assert canonical(back.points[0].params) == canonical(point.params) and back.points[0].seed == point.seed
    assert write_config(back.points[0], "not used") == folder


def test_a_folder_of_experiments_runs_under_their_own_ids(tiny_config: Path) -> None:
    grid = points_in(str(tiny_config), str(ROOT / "config"), "TWIN", [1, 2])
    assert [point.key for point in grid.points] == [(x, s) for x in ("TWIN_tiny", "MoS_TWIN_tiny") for s in (1, 2)]
    with pytest.raises(ConfigError, match="--tag DIN: is in none of the 2 ids of"):
        points_in(str(tiny_config), str(ROOT / "config"), "DIN")


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_all_that_is_wrong_with_any_point_is_said_at_once_with_its_line(make: Make) -> None:
    path = make({"topkk": [1, 2], "num_heads": [2, 3], "epochs": [1, 0], "learning_rate": ["fast"]})
    lines = path.read_text().splitlines()

    def line(text: str) -> int:
        return next(number for number, each in enumerate(lines, 1) if each.strip() == text)

    said = refused(path)
    for wanted in (
        f"{path}:{line('topkk:') + 1}: unknown key 'topkk' for model TWIN; did you mean 'topk'?",
        "attention_dim (16) must be a multiple of num_heads (3)",
        f"{path}:{line('epochs:') + 2}: epochs: 0: must be at least 1",
        f"{path}:{line('learning_rate:') + 1}: learning_rate: 'fast'",
    ):
        assert said.count(wanted) == 1, said
    assert said.startswith("g: 4 mistakes:")


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "an empty space": ({}, {}, "tuner_space: {}: is empty; give at least one key and its values"),
    "no space": (None, {}, "tuner_space: null: is empty"),
    "a key without a value": ({"topk": []}, {}, "topk: [] holds no value, so the space is empty"),
    "another key": ({"topk": 8}, {"dataset": "x"}, "unknown key 'dataset' of a tuner file; did you mean 'dataset_id'?"),
    "no folder": ({"topk": 8}, {"base_config": "no/such"}, "base_config: 'no/such': no such folder"),
    "no experiment": ({"topk": 8}, {"base_expid": "TWIN_tinny"}, "expid 'TWIN_tinny' is not in"),
    "no text": ({"topk": 8}, {"base_expid": 3}, "base_expid: 3: must name an experiment"),
    "no data set": ({"topk": 8}, {"dataset_id": "tinny"}, "dataset_id 'tinny' is not in"),
    "no data sets": ({"topk": 8}, {"dataset_id": []}, "must be the name of a data set, or a list of such"),
    "one twice": ({"topk": 8}, {"dataset_id": ["tiny", "tiny"]}, "dataset_id: tiny twice"),
    "in two places": ({"dataset_id": ["tiny"]}, {"dataset_id": "tiny"}, "dataset_id is in tuner_space, too"),
    "a range": ({"topk": {"low": 1, "high": 4}}, {}, "topk: a range of numbers needs --search optuna"),
    "a range upside down": ({"topk": {"low": 4, "high": 1}}, {}, "low must be below high"),
    "a range of text": ({"learning_rate": {"low": "1e-4", "high": 1}}, {}, "write 1.e-4, with a dot"),
    "a logarithm of 0": ({"learning_rate": {"low": 0, "high": 1, "log": True}}, {}, "low must be above 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_file_is_refused(case: str, make: Make) -> None:
    space, top, wanted = REFUSED[case]
    said = refused(make(space, **top))
    assert wanted in said and "g.yaml" in said + wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("- 1", "must map base_config"),
        ("a: [", "g.yaml:1: not valid yaml"),
        ("topk: 1\ntopk: 2", "sets 'topk' twice"),
        (None, "No such"),
    ],
)
def test_a_file_that_is_no_tuner_file_is_refused(text: str | None, wanted: str, tmp_path: Path) -> None:
    path = tmp_path / "g.yaml"
    if text is not None:
        path.write_text(text)
    assert wanted in refused(path)


def test_missing_data_are_refused_before_any_run(make: Make, tmp_path: Path) -> None:
    space = read_space(str(make({"topk": [8, 4], "train_data": str(tmp_path / "absent.parquet")})), str(ROOT))
    assert len(points_of(space).points) == 2
    with pytest.raises(ConfigError) as error:
        points_of(space, root=str(ROOT))
    assert str(error.value).count(f"train_data: {tmp_path / 'absent.parquet'}: no such file") == 1
    assert json.dumps(str(error.value)).count("\\n") == 0
