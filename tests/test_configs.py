"""Every experiment, data set and grid is sound: it loads and validates, and its model predicts."""

from collections import Counter
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import model_zoo.experiment.config as config_module
from model_zoo.batch import Batch, ItemFeatures
from model_zoo.experiment.config import BASE, Config, experiment_ids, load_config, read_sections
from model_zoo.experiment.grid import points_of
from model_zoo.experiment.grid_file import read_space
from model_zoo.experiment.run import build_model
from model_zoo.experiment.schema import DATA_KEYS, validate
from model_zoo.pipeline.feature_map import ROW_COLUMNS, build_feature_map
from model_zoo.registry import BACKBONES, METHODS, model_keys, model_names

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "config"
EXPERIMENTS = experiment_ids(str(CONFIG))
DATASETS = [name for name, _ in read_sections(str(CONFIG), "dataset_config")]
STUDY_GRIDS = sorted((ROOT / "benchmark" / "grids").glob("study_*_[0-9]*.yaml"))
STUDY_DATA = {50: ("kuairand_sample",), 100: ("Ebnerd_demo", "foursquare_nyc"), 200: ("Ebnerd_demo", "foursquare_nyc")}
#: what is beyond the paper, each against the paper's form: data set and length, keys, their values
OPTION_GRIDS = {
    "study_windows": (("Ebnerd_demo_times", 100), ("windows",), {("fixed",), ("session",)}),
    "study_taxonomy": (
        ("kuairand_sample", 50), ("codebook_init", "taxonomy_weight"), set(product(("kmeans", "taxonomy"), (0.0, 0.01))),
    ),
    "study_unrouted": (("Ebnerd_demo", 100), ("n_item_experts", "n_window_experts"), {(1, 0)}),
    "study_phased": (
        ("kuairand_sample", 50), ("model", "training_phases"),
        {(f"{method}_TWIN", "three") for method in ("GShard", "DSelectK", "ExpertChoice")},
    ),
}  # fmt: skip
OPTION_PATHS = {name: ROOT / "benchmark" / "grids" / f"{name}.yaml" for name in OPTION_GRIDS}
GRIDS = sorted({*(ROOT / "benchmark" / "grids").glob("*.yaml")} - {*STUDY_GRIDS, *OPTION_PATHS.values()})
#: LongCTR's three data sets: as expids call them, and their ids
LONGCTR_DATA = {"microvideo": "MicroVideo1.7M_x2", "kuaivideo": "KuaiVideo_x2", "ebnerd": "Ebnerd_small_x1"}
LONGCTR_MODELS = ["DCNv2", "DIEN", "DIN", "ETA", "FinalMLP", "MIRRN", "SDIM", "SIM", "TransAct", "TWIN"]
#: the backbones that every method is compared on; the paper's four also with the paper's expert budget
PAPER_BACKBONES = ["TWIN", "SDIM", "TransAct", "Mamba4Rec"]
COMPARED_BACKBONES = [*PAPER_BACKBONES, "SASRec", "GRU4Rec"]
RIVALS = [name for name in METHODS if name != "MoS"]
ITEMS, ROWS, LENGTH, NARROW = 12, 4, 9, 16


@pytest.fixture(autouse=True)
def work_is_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each experiment's load reads all of config/."""
    monkeypatch.setattr(config_module, "read_sections", sections_of)


@cache
def sections_of(config_dir: str, kind: str) -> list[tuple[str, Any]]:
    return read_sections(config_dir, kind)


def name_of(value: Any) -> str:
    return value.stem if isinstance(value, Path) else str(value)


def column_of(spec: dict[str, Any], rows: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """Made-up values of one feature."""
    kind = spec["type"]
    if kind == "numeric":
        return torch.rand(rows, generator=generator)
    if kind == "embedding":
        return torch.randn(rows, spec.get("pretrain_dim") or spec.get("embedding_dim", width), generator=generator)
    shape = (rows, spec["max_len"]) if kind == "sequence" else (rows,)
    return torch.randint(0, spec["vocab_size"], shape, generator=generator, dtype=torch.int32)


def made_up_batch(params: dict[str, Any], feature_map: Any) -> tuple[ItemFeatures, Batch]:
    """Items and impressions that suit a feature map; the first row's history is empty."""
    generator = torch.Generator().manual_seed(0)
    width = params["embedding_dim"]
    specs = {name: spec for name, spec in feature_map.features.items() if spec["type"] != "meta"}
    columns = {
        name: column_of(spec, ITEMS if spec.get("source") == "item" else ROWS, width, generator)
        for name, spec in specs.items()
    }
    items = {name: columns[name] for name, spec in specs.items() if spec.get("source") == "item"}
    for column in items.values():
        column[0] = 0
    history = torch.randint(1, ITEMS, (ROWS, LENGTH), generator=generator, dtype=torch.int32)
    history[0], history[1, :5] = 0, 0
    return ItemFeatures(items), Batch(
        history=history,
        target=torch.arange(1, ROWS + 1, dtype=torch.int32),
        context={name: columns[name] for name in specs if name not in items},
        label=torch.tensor([0.0, 1.0, 0.0, 1.0]),
        group=torch.arange(ROWS),
        rows=torch.arange(ROWS),
    )


def check_predictions(config: Config) -> None:
    """The experiment validates, and its model, made narrow and for few ids, gives probabilities."""
    config.set("model_id", config.expid, "test")
    params = validate(config)
    params["embedding_dim"] = min(params["embedding_dim"], NARROW)
    for key in params:
        if key.endswith("hidden_units") and params[key]:
            params[key] = [min(width, 4 * NARROW) for width in params[key]]
    for spec in params["feature_cols"]:
        if "vocab_size" in spec:
            spec["vocab_size"] = ITEMS
    feature_map = build_feature_map(params)
    torch.manual_seed(0)
    model: Any = build_model(params, feature_map, None)
    model.item_features, batch = made_up_batch(params, feature_map)
    with torch.no_grad():
        found = model.eval()(batch)["y_pred"]
    assert found.shape == (ROWS, 1) and bool(((found > 0) & (found < 1)).all())


def settings(expid: str) -> dict[str, Any]:
    return load_config(str(CONFIG), expid).values


# ---- experiments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expid", EXPERIMENTS)
def test_an_experiment_loads_and_its_model_predicts(expid: str) -> None:
    check_predictions(load_config(str(CONFIG), expid))


def test_experiments_are_called_after_their_models_heads_data_sets_and_budgets() -> None:
    kinds = ("smoke", "study")
    data_of = {**LONGCTR_DATA, **dict.fromkeys(kinds, "kuairand_sample"), "ebnerd_demo": "Ebnerd_demo"}
    names = {dataset_id: name for name, dataset_id in data_of.items() if name not in kinds}
    for expid in EXPERIMENTS:
        values = settings(expid)
        dot = "dot_" if values.get("head") == "dot" else ""
        budget = "_budget" if values.get("expert_budget") == "budget_matched" else ""
        kind = expid.rpartition("_")[2]
        data = kind if kind in kinds else names.get(values["dataset_id"], values["dataset_id"])
        assert expid == f"{values['model']}_{dot}{data}{budget}"
        assert values["dataset_id"] == data_of.get(data, data)


def test_every_model_has_a_smoke_experiment() -> None:
    smoke = [expid.removesuffix("_smoke") for expid in EXPERIMENTS if expid.endswith("_smoke")]
    assert sorted(smoke) == sorted(model_names())
    for model in smoke:
        values = settings(f"{model}_smoke")
        assert values["epochs"] == 1
        if model.startswith("MoS_"):
            assert [values[f"phase{i}_epochs"] for i in (1, 2, 3)] == [1, 1, 1]


def test_the_grid_of_backbones_methods_and_data_sets_is_complete() -> None:
    wanted = {f"{backbone}_{data}" for backbone in BACKBONES for data in LONGCTR_DATA}
    wanted |= {f"{name}_dot_{data}" for name in ("AttenMixer", "MiasRec", "Mamba4Rec", "FuXiMME") for data in LONGCTR_DATA}
    wanted |= {f"MoS_DIN_{data}" for data in LONGCTR_DATA}
    wanted |= {f"{m}_{b}_{data}" for m in METHODS for b in COMPARED_BACKBONES for data in LONGCTR_DATA}
    wanted |= {f"{m}_{b}_{data}_budget" for m in RIVALS for b in PAPER_BACKBONES for data in LONGCTR_DATA}
    assert wanted <= {*EXPERIMENTS}, sorted(wanted - {*EXPERIMENTS})


def test_a_methods_experiment_has_the_settings_of_its_backbones() -> None:
    compared = 0
    for expid, method in product(EXPERIMENTS, METHODS):
        if f"{method}_{expid}" not in EXPERIMENTS:
            continue
        plain, routed = settings(expid), settings(f"{method}_{expid}")
        assert routed["model"] == f"{method}_{plain['model']}"
        differing = {key for key in plain if routed[key] != plain[key]}
        assert differing <= {"model"}, f"{method}_{expid}: {differing} differ from {expid}"
        compared += 1
    assert compared >= len(METHODS) * len(COMPARED_BACKBONES) * len(LONGCTR_DATA)


def test_a_budget_experiment_has_the_settings_of_the_literal_one() -> None:
    budget = [expid for expid in EXPERIMENTS if expid.endswith("_budget")]
    for expid in budget:
        literal, matched = settings(expid.removesuffix("_budget")), settings(expid)
        assert (literal["n_experts"], literal["topk_experts"], literal["expert_budget"]) == (5, 2, "literal")
        assert matched == {**literal, "expert_budget": "budget_matched"}


def test_the_default_experiment_is_there_and_its_data_too() -> None:
    from model_zoo.experiment.cli import DEFAULT_EXPID

    values = settings(DEFAULT_EXPID)
    for key in ("train_data", "valid_data", "test_data", "user_info", "item_info"):
        assert (ROOT / values[key]).is_file()


# ---- data sets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DATASETS)
def test_a_data_set_gives_a_feature_map(name: str) -> None:
    section = dict(sections_of(str(CONFIG), "dataset_config"))[name]
    assert section.values.keys() <= DATA_KEYS.keys(), "keys that the schema would refuse"
    feature_map = build_feature_map({**section.values, "dataset_id": name, "embedding_dim": 8})
    specs = feature_map.features
    assert set(ROW_COLUMNS) <= {feature for feature, spec in specs.items() if spec["type"] == "meta"}
    assert any(spec.get("source") == "item" for spec in specs.values())
    assert len(feature_map.labels) == 1 and feature_map.labels[0] not in specs
    for key in ("train_data", "valid_data", "test_data", "user_info", "item_info"):
        assert section.values[key].startswith("./data/"), f"{key}: data sets lie under data/"


# ---- LongCTR's folders and grids -------------------------------------------------------------------------------------


def longctr_folder(model: str) -> Path:
    return CONFIG / f"{model.lower()}_config"


@pytest.mark.parametrize("model", LONGCTR_MODELS)
@pytest.mark.parametrize("dataset_id", LONGCTR_DATA.values())
def test_longctrs_defaults_load_and_their_model_predicts(model: str, dataset_id: str) -> None:
    folder = longctr_folder(model)
    assert experiment_ids(str(folder)) == [f"{model}_default"]
    config = load_config(str(folder), f"{model}_default", [f"dataset_id={dataset_id}"], str(CONFIG))
    assert config.values["model"] == model
    unset = model_keys(model).keys() - config.values.keys() - {"block_scope", "longctr_compat"}
    assert unset <= OURS, f"LongCTR's tuner could not set {unset}"
    check_predictions(config)


#: keys of LongCTR's models that LongCTR has not
OURS = {"hash_seed", "mask_retrieved", "filter_dropout", "sparse_embedding_updates", "precision", "compile"}


def test_there_is_a_grid_for_each_model_data_set_and_length() -> None:
    names = {f"{m}_{d}_{length}" for m, d, length in product(LONGCTR_MODELS, LONGCTR_DATA.values(), (100, 200))}
    assert {path.stem for path in GRIDS} == names


@pytest.mark.parametrize("path", STUDY_GRIDS, ids=name_of)
def test_a_study_has_every_method_on_each_data_set_with_as_many_settings_each(path: Path) -> None:
    *_, backbone, length = path.stem.split("_")
    points = points_of(read_space(str(path), str(ROOT))).points
    models = {f"MoS_{backbone}"} if "MoS" in path.stem else {backbone, *(f"{rival}_{backbone}" for rival in RIVALS)}
    found = Counter((point.params["model"], point.params["dataset_id"]) for point in points)
    assert found == dict.fromkeys(product(models, STUDY_DATA[int(length)]), 2)
    assert {point.params["max_len"] for point in points} == {int(length)}


def test_studies_come_for_each_backbone_and_length() -> None:
    names = {f"study_{mos}{b}_{length}" for mos, b, length in product(("", "MoS_"), PAPER_BACKBONES, STUDY_DATA)}
    assert {path.stem for path in STUDY_GRIDS} == names


@pytest.mark.parametrize("name", OPTION_GRIDS)
def test_an_options_study_has_both_forms_at_each_regulariser(name: str) -> None:
    data, keys, forms = OPTION_GRIDS[name]
    points = [point.params for point in points_of(read_space(str(OPTION_PATHS[name]), str(ROOT))).points]
    found = Counter((*(params[key] for key in keys), params["embedding_regularizer"]) for params in points)
    assert found == dict.fromkeys(((*form, weight) for form in forms for weight in (1e-4, 1e-3)), 1)
    fixed = {(params["model"], (params["dataset_id"], params["max_len"])) for params in points}
    models = {form[keys.index("model")] for form in forms} if "model" in keys else {"MoS_TWIN"}
    assert fixed == {(model, data) for model in models}


@pytest.mark.parametrize("path", GRIDS, ids=name_of)
def test_a_grids_corners_are_valid(path: Path) -> None:
    grid = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert list(grid) == ["base_config", "base_expid", "dataset_id", "tuner_space"]
    model, dataset_id = grid["base_expid"].removesuffix("_default"), grid["dataset_id"]
    folder, space = ROOT / grid["base_config"], grid["tuner_space"]
    assert folder == longctr_folder(model)
    assert path.stem == f"{model}_{dataset_id}_{space['max_len']}"
    base = dict(sections_of(str(folder), "model_config"))
    known = {**base[BASE].values, **base[grid["base_expid"]].values}
    assert list(space) == [key for key in known if key in space], "keys that LongCTR's tuner refuses, or numbers otherwise"
    # one value of a setting is a scalar, several are a list without repetition; a value that is a list is in a list
    lists = {key: value for key, value in space.items() if isinstance(value, list)}
    for key, values in lists.items():
        assert len(values) > 1 or isinstance(values[0], list), f"{key}: a list of one value"
        assert all(value not in values[:i] for i, value in enumerate(values)), f"{key}: a value twice"
    corners = {key: [value[0], value[-1]][: len(value)] for key, value in lists.items()}
    for corner in product(*corners.values()):
        config = load_config(str(folder), grid["base_expid"], [f"dataset_id={dataset_id}"], str(CONFIG))
        for key, value in {**space, **dict(zip(corners, corner, strict=True))}.items():
            config.set(key, value, path.name)
        config.set("model_id", path.stem, "test")
        validate(config)
    check_predictions(config)
