"""Merging of base, experiment, data set and ``--set``, where each key came from, and what is refused."""

from pathlib import Path

import pytest

from model_zoo.errors import ConfigError
from model_zoo.experiment.config import experiment_ids, load_config, parse_override, read_sections

MODELS = """\
Base:
  seed: 1
  epochs: 5
  shuffle: True

TWIN_shop: &shop
  model: TWIN
  dataset_id: shop
  epochs: 6
  max_len: 20

TWIN_shop_long:
  <<: *shop
  max_len: 200

Both:
  <<: [{max_len: 1, topk: 2}, *shop]
  dataset_id: other
"""
DATASETS = """\
shop:
  train_data: shop/train.parquet
  epochs: 7
other:
  train_data: other/train.parquet
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """LongCTR's layout: two flat files."""
    (tmp_path / "model_config.yaml").write_text(MODELS)
    (tmp_path / "dataset_config.yaml").write_text(DATASETS)
    return tmp_path


def refusal(folder: Path, expid: str = "TWIN_shop", *overrides: str) -> str:
    with pytest.raises(ConfigError) as refused:
        load_config(str(folder), expid, overrides)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_later_ones_win_base_then_experiment_then_data_set_then_set(folder: Path) -> None:
    config = load_config(str(folder), "TWIN_shop", ["max_len=30", "topk=4"])
    assert config.values == {
        "seed": 1, "epochs": 7, "shuffle": True, "model": "TWIN", "dataset_id": "shop", "max_len": 30, "topk": 4,
        "train_data": "shop/train.parquet",
    }  # fmt: skip


def test_every_key_knows_its_file_and_line(folder: Path) -> None:
    origin = load_config(str(folder), "TWIN_shop_long", ["topk=4"]).origin
    models, datasets = folder / "model_config.yaml", folder / "dataset_config.yaml"
    assert origin["seed"] == f"{models}:2" and origin["model"] == f"{models}:7"
    assert origin["max_len"] == f"{models}:14" and origin["epochs"] == f"{datasets}:3" and origin["topk"] == "--set"


def test_merge_keys_the_section_wins_then_the_first_merged(folder: Path) -> None:
    values = load_config(str(folder), "Both").values
    assert (values["max_len"], values["topk"], values["epochs"], values["dataset_id"]) == (1, 2, 6, "other")
    assert values["train_data"] == "other/train.parquet"


def test_merged_keys_are_those_of_yaml_at_any_depth(folder: Path) -> None:
    text = "A: &a {x: 1, y: {z: 2}}\nB: &b\n  <<: *a\n  x: 3\nC:\n  d: {<<: [*b, {w: 5, x: 6}], v: 4}\n  e: [{<<: *b}]\n"
    (folder / "model_config.yaml").write_text(text)
    sections = {name: section for name, section in read_sections(str(folder), "model_config")}
    assert sections["B"].values == {"x": 3, "y": {"z": 2}} and list(sections["B"].values) == ["x", "y"]
    assert sections["C"].values == {"d": {"x": 3, "y": {"z": 2}, "w": 5, "v": 4}, "e": [{"x": 3, "y": {"z": 2}}]}
    assert sections["B"].lines[("x",)] == 4 and sections["B"].lines[("y",)] == 1


def test_aliases_of_aliases_cost_what_they_take_to_write(folder: Path) -> None:
    lines = ["A: {x0: &x0 [1]}"] + [f"B{n}: {{x: &x{n} [*x{n - 1}, *x{n - 1}]}}" for n in range(1, 40)]
    (folder / "model_config.yaml").write_text("\n".join(lines))
    assert len(read_sections(str(folder), "model_config")) == 40


def test_the_data_set_may_be_set_on_the_command_line(folder: Path) -> None:
    config = load_config(str(folder), "TWIN_shop", ["dataset_id=other"])
    assert config.values["train_data"] == "other/train.parquet" and config.values["epochs"] == 6
    assert config.origin["dataset_id"] == "--set"


def test_files_in_folders_are_read_together_each_with_its_own_base(tmp_path: Path) -> None:
    for kind in ("model_config", "dataset_config"):
        (tmp_path / kind).mkdir()
    (tmp_path / "model_config" / "a.yaml").write_text("Base: {seed: 1}\nA: {model: TWIN, dataset_id: shop}\n")
    (tmp_path / "model_config" / "b.yaml").write_text("Base: {seed: 2}\nB: {model: TWIN, dataset_id: shop}\n")
    (tmp_path / "model_config" / "c.yaml").write_text("C: {model: TWIN, dataset_id: shop}\n")
    (tmp_path / "dataset_config" / "shop.yaml").write_text("shop: {train_data: x}\n")
    (tmp_path / "dataset_config" / "empty.yaml").write_text("# nothing yet\n")
    assert experiment_ids(str(tmp_path)) == ["A", "B", "C"]
    assert [load_config(str(tmp_path), expid).values["seed"] for expid in "AB"] == [1, 2]


def test_a_config_without_a_base_is_complete(tmp_path: Path) -> None:
    (tmp_path / "model_config.yaml").write_text("A: {model: TWIN, dataset_id: shop}\n")
    (tmp_path / "dataset_config.yaml").write_text(DATASETS)
    assert load_config(str(tmp_path), "A").values["model"] == "TWIN"


def test_two_experiments_may_be_the_same_by_an_alias(folder: Path) -> None:
    (folder / "model_config.yaml").write_text(MODELS + "Copy: &copy\n  <<: *shop\n  epochs: 1\nAgain: *copy\n")
    assert load_config(str(folder), "Again").values == load_config(str(folder), "Copy").values


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed=3", ("seed", 3)),
        ("learning_rate=1.e-3", ("learning_rate", 1e-3)),
        ("embedding_regularizer=1e-5", ("embedding_regularizer", "1e-5")),  # yaml's text; the schema makes it a number
        ("metrics=[AUC, logloss]", ("metrics", ["AUC", "logloss"])),
        ("monitor={AUC: 1}", ("monitor", {"AUC": 1})),
        ("group_id=null", ("group_id", None)),
        ("train_data=a=b.parquet", ("train_data", "a=b.parquet")),
        (" seed = 3", ("seed", 3)),
        ("group_id=", ("group_id", None)),
    ],
)
def test_overrides_are_yaml(text: str, expected: tuple[str, object]) -> None:
    assert parse_override(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed", "--set seed: write it as key=value"),
        ("=3", "--set =3: write it as key=value"),
        ("x=[", "is not a yaml value"),
    ],
)
def test_malformed_overrides_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_override(text)
    assert message in str(refused.value)


def test_an_unknown_expid_names_the_nearest(folder: Path) -> None:
    message = refusal(folder, "TWIN_shp")
    assert message == f"expid 'TWIN_shp' is not in {folder}; nearest: TWIN_shop, TWIN_shop_long"
    assert "known: Both, TWIN_shop, TWIN_shop_long" in refusal(folder, "zzzz")


def test_base_is_no_experiment(folder: Path) -> None:
    assert "expid 'Base' is not in" in refusal(folder, "Base")


def test_an_unknown_data_set_names_the_nearest(folder: Path) -> None:
    config = load_config(str(folder), "TWIN_shop", ["dataset_id=sjop"])
    assert config.problems == [f"--set: dataset_id 'sjop' is not in {folder}; nearest: shop"]
    assert config.dataset is None and "dataset_id" not in config.values


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("A:\n  model: TWIN\n", ":1: A has no dataset_id; add `dataset_id: <name in dataset_config>`"),
        ("A:\n  model: TWIN\n  dataset_id: 7\n", ":3: dataset_id: 7: must be text; put it in quotes"),
        ("A:\n  model: TWIN\n  dataset_id:\n", ":3: A has no dataset_id; add"),
    ],
)
def test_an_experiment_without_a_data_set_has_a_problem(folder: Path, text: str, problem: str) -> None:
    (folder / "model_config.yaml").write_text(text)
    [found] = load_config(str(folder), "A").problems
    assert found.startswith(f"{folder / 'model_config.yaml'}{problem}")


def test_every_malformed_override_is_a_problem_and_the_others_count(folder: Path) -> None:
    config = load_config(str(folder), "TWIN_shop", ["seed", "topk=4", "x=["])
    assert config.problems == ["--set seed: write it as key=value", "--set x=[: '[' is not a yaml value"]
    assert config.values["topk"] == 4 and "x" not in config.values


def test_entries_of_lists_and_keys_in_them_have_lines(folder: Path) -> None:
    path = folder / "dataset_config.yaml"
    path.write_text("shop:\n  cols:\n    - {name: a}\n    - name: b\n      size: 3\n  epochs: 7\n")
    config = load_config(str(folder), "TWIN_shop")
    places = [("cols",), ("cols", 0), ("cols", 1), ("cols", 1, "size"), ("cols", 1, "none"), ("cols", 9), ("epochs",)]
    assert [config.where(place) for place in places] == [f"{path}:{line}" for line in (2, 3, 4, 5, 4, 2, 6)]
    assert config.where(("nothing",)) is None and config.dataset == f"{path}:1"
    config.set("cols", [], "--set")
    assert config.where(("cols", 1, "size")) == "--set"


def test_all_bad_keys_of_a_file_are_said_at_once(folder: Path) -> None:
    path = folder / "model_config.yaml"
    path.write_text("A:\n  seed: 1\n  seed: 2\n  on: 3\nB: 4\n")
    with pytest.raises(ConfigError) as refused:
        load_config(str(folder), "A")
    assert str(refused.value).split("\n  ") == [
        "3 mistakes:",
        f"{path}:3: 'A' sets 'seed' twice (also on line 2); take one of them out",
        f"{path}:4: 'A' has 'on' for a key, which is not text; put it in quotes",
        f"{path}:5: 'B' must map keys to values",
    ]


BROKEN = {
    "twice": ("A:\n  seed: 1\n  seed: 2\n", "model_config.yaml:3: 'A' sets 'seed' twice (also on line 2)"),
    "twice inside": ("A:\n  monitor: {AUC: 1,\n    AUC: 2}\n", "model_config.yaml:3: 'A: monitor' sets 'AUC' twice"),
    "twice in a list": ("A:\n  x: [{a: 1, a: 2}]\n", "model_config.yaml:2: 'A: x' sets 'a' twice (also on line 2)"),
    "section twice": ("A: {x: 1}\nA: {x: 2}\n", "model_config.yaml:2: 'A' is defined in"),
    "base twice": ("Base: {x: 1}\nBase: {x: 2}\n", "model_config.yaml:2: 'Base' is defined in"),
    "no mapping": ("A: 3\n", "model_config.yaml:1: 'A' must map keys to values"),
    "a list": ("- A\n- B\n", "model_config.yaml: must map names to settings"),
    "not yaml": ("A: {x: 1\n", "model_config.yaml:2: not valid yaml: expected ',' or '}'"),
    "a bracket left open": ("A:\n  x: [1,\nB:\n  y: 1\n", "while parsing a flow sequence, which begins on line 2"),
    "a tab": ("A:\n\tx: 1\n", "model_config.yaml:2: not valid yaml: found character '\\t' that cannot start any token"),
    "the tab's fix": ("A:\n\tx: 1\n", "; indent with spaces, not with tabs"),
    "no such date": ("A: {x: 2024-13-45}\n", "model_config.yaml: not valid yaml: month must be in 1..12"),
    "brackets without end": ("A: " + "[" * 1_200, "model_config.yaml: not valid yaml: "),
    "a value in itself": ("A: &a {x: *a}\n", "model_config.yaml:1: not valid yaml: found unconstructable recursive node"),
    "a list in itself": ("A: &a {x: [*a]}\n", "model_config.yaml:1: not valid yaml: found unconstructable recursive node"),
    "a mapping merged into itself": (
        "A: &a\n  x: 1\n  <<: *a\n", "model_config.yaml:1: not valid yaml: << must name a mapping, or a list of them"
    ),
    "a text merged": ("A:\n  <<: shop\n", "model_config.yaml:2: not valid yaml: << must name a mapping"),
    "a text merged among mappings": ("A:\n  <<: [{x: 1}, shop]\n", "model_config.yaml:2: not valid yaml: << must name"),
    "a list for a key of what is merged": (
        "A:\n  <<: {[1]: 2}\n", "model_config.yaml:2: 'A: <<' has a list or mapping for a key, which is not text"
    ),
    "a number for a key of what is merged": (
        "A:\n  <<: [{x: 1}, {1: 2}]\n", "model_config.yaml:2: 'A: <<' has '1' for a key, which is not text"
    ),
    "a key twice in what is merged": (
        "A:\n  <<: {x: 1, x: 2}\n", "model_config.yaml:2: 'A: <<' sets 'x' twice (also on line 2); take one of them out"
    ),
    "unknown alias": ("A:\n  <<: *nothing\n", "model_config.yaml:2: not valid yaml: found undefined alias 'nothing'"),
    "a tag": ("A: {x: !!python/object:os.system 1}\n", "model_config.yaml:1: not valid yaml: could not determine a con"),
    "a number for a key": ("A:\n  1: x\n", "model_config.yaml:2: 'A' has '1' for a key, which is not text; put it in"),
    "a truth value for a key": ("A:\n  on: x\n", "model_config.yaml:2: 'A' has 'on' for a key, which is not text"),
    "a list for a key": ("A:\n  ? [1, 2]\n  : x\n", "'A' has a list or mapping for a key"),
    "control characters": ("A: 1\nB: \x01\n", "model_config.yaml:2: not valid yaml: the character '\\x01'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_by_file_and_line(folder: Path, case: str) -> None:
    text, message = BROKEN[case]
    (folder / "model_config.yaml").write_text(text)
    assert message in refusal(folder, "A")


def test_a_file_in_another_encoding_is_refused(folder: Path) -> None:
    (folder / "model_config.yaml").write_bytes("A: {x: é}\n".encode("latin-1"))
    assert "model_config.yaml: not a readable text file" in refusal(folder)


def test_a_name_in_two_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dataset_config").mkdir()
    for name in "ab":
        (tmp_path / "dataset_config" / f"{name}.yaml").write_text("shop: {train_data: x}\n")
    with pytest.raises(ConfigError, match=r"b\.yaml:1: 'shop' is defined in .*a\.yaml already; rename one of them"):
        read_sections(str(tmp_path), "dataset_config")


def test_a_folder_without_configs_is_refused(tmp_path: Path, folder: Path) -> None:
    expected = "holds neither model_config.yaml nor model_config/*.yaml; give its folder with --config"
    assert expected in refusal(tmp_path / "absent")
    (folder / "dataset_config.yaml").unlink()
    assert "holds neither dataset_config.yaml nor dataset_config/*.yaml" in refusal(folder)


def test_a_folder_of_data_sets_alone_takes_its_experiments_from_the_usual_one(tmp_path: Path, folder: Path) -> None:
    usual, empty = str(folder), tmp_path / "empty"
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "dataset_config.yaml").write_text("shop: {train_data: other}\n")
    expid = experiment_ids(usual)[0]
    config = load_config(str(alone), expid, ["dataset_id=shop"], usual)
    assert config.values["train_data"] == "other" and config.experiment.startswith(usual)
    with pytest.raises(ConfigError, match=f"expid 'x'.*{usual}"):
        load_config(str(alone), "x", (), usual)
    empty.mkdir()
    for nothing, other in ((alone, None), (empty, usual)):
        with pytest.raises(ConfigError, match=r"holds neither model_config\.yaml"):
            load_config(str(nothing), expid, (), other)
