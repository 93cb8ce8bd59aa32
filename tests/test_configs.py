"""Every experiment and data set in config/ is sound: it loads, validates, and its model predicts."""

from pathlib import Path
from typing import Any

import pytest
import torch

from model_zoo.batch import Batch, ItemFeatures
from model_zoo.experiment.config import Config, experiment_ids, load_config, read_sections
from model_zoo.experiment.run import build_model
from model_zoo.experiment.schema import DATA_KEYS, validate
from model_zoo.pipeline.feature_map import ROW_COLUMNS, build_feature_map

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "config"
#: config/ itself and every folder below it in LongCTR's layout (two flat files)
CONFIG_DIRS = [CONFIG, *sorted(path.parent for path in CONFIG.rglob("model_config.yaml") if path.parent != CONFIG)]
EXPERIMENTS = [(folder, expid) for folder in CONFIG_DIRS for expid in experiment_ids(str(folder))]
DATASETS = [(folder, name) for folder in CONFIG_DIRS for name, _ in read_sections(str(folder), "dataset_config")]
ITEMS, ROWS, LENGTH = 12, 4, 9


def name_of(value: Any) -> str:
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else str(value)


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


@pytest.mark.parametrize(("folder", "expid"), EXPERIMENTS, ids=name_of)
def test_an_experiment_loads_and_its_model_predicts(folder: Path, expid: str) -> None:
    config = load_config(str(folder), expid)
    config.set("model_id", expid, "test")
    params = validate(config)
    feature_map = build_feature_map(params)
    torch.manual_seed(0)
    model: Any = build_model(params, feature_map, None)
    model.item_features, batch = made_up_batch(params, feature_map)
    with torch.no_grad():
        found = model.eval()(batch)["y_pred"]
    assert found.shape == (ROWS, 1) and bool(((found > 0) & (found < 1)).all())


@pytest.mark.parametrize(("folder", "name"), DATASETS, ids=name_of)
def test_a_data_set_gives_a_feature_map(folder: Path, name: str) -> None:
    section = dict(read_sections(str(folder), "dataset_config"))[name]
    assert section.values.keys() <= DATA_KEYS.keys(), "keys that the schema would refuse"
    feature_map = build_feature_map({**section.values, "dataset_id": name, "embedding_dim": 8})
    specs = feature_map.features
    assert set(ROW_COLUMNS) <= {feature for feature, spec in specs.items() if spec["type"] == "meta"}
    assert any(spec.get("source") == "item" for spec in specs.values())
    assert len(feature_map.labels) == 1 and feature_map.labels[0] not in specs
    for key in ("train_data", "valid_data", "test_data", "user_info", "item_info"):
        assert section.values[key].startswith("./data/"), f"{key}: data sets lie under data/"


def test_every_backbone_experiment_has_its_mixture_with_the_same_settings() -> None:
    ids = experiment_ids(str(CONFIG))
    for expid in (e for e in ids if not e.startswith("MoS_")):
        if f"MoS_{expid}" not in ids:
            continue
        plain, mixture = (load_config(str(CONFIG), name).values for name in (expid, f"MoS_{expid}"))
        assert mixture["model"] == f"MoS_{plain['model']}"
        differing = {key for key in plain if mixture[key] != plain[key]}
        assert differing <= {"model"}, f"MoS_{expid}: {differing} differ from {expid}"


def test_the_default_experiment_is_there_and_its_data_too() -> None:
    from model_zoo.experiment.cli import DEFAULT_EXPID

    config: Config = load_config(str(CONFIG), DEFAULT_EXPID)
    for key in ("train_data", "valid_data", "test_data", "user_info", "item_info"):
        assert (ROOT / config.values[key]).is_file()
