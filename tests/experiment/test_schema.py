"""Validation: defaults, types, numbers that yaml read as text, and all problems in one message."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from model_zoo.compat import get_activation, get_loss, get_optimizer
from model_zoo.errors import ConfigError
from model_zoo.experiment.config import Config
from model_zoo.experiment.config_checks import ACTIVATIONS, FUXICTR_ACTIVATIONS, LOSSES, OPTIMIZERS
from model_zoo.experiment.paths import ADVICE
from model_zoo.experiment.schema import DATA_KEYS, IGNORED_KEYS, RUN_KEYS, allowed_keys, validate
from model_zoo.experiment.value_checks import LOWER_BOUNDS
from model_zoo.registry import BACKBONES, METHODS, model_keys, model_names

GOOD: dict[str, Any] = {
    "model": "TWIN",
    "dataset_id": "shop",
    "train_data": "a",
    "valid_data": "b",
    "user_info": "c",
    "item_info": "d",
    "feature_cols": [{"name": "item_id", "type": "categorical", "source": "item", "vocab_size": 9}],
    "label_col": {"name": "is_click"},
    "group_id": "user_index",
}


def config_of(**changes: Any) -> Config:
    config = Config("A")
    for line, (key, value) in enumerate({**GOOD, **changes}.items(), start=1):
        config.set(key, value, f"m.yaml:{line}")
    return config


def refusal(**changes: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        validate(config_of(**changes))
    lines = str(refused.value).split("\n")
    assert lines[0] == f"A: {len(lines) - 1} mistakes:" if len(lines) > 1 else lines[0].startswith("A: ")
    return str(refused.value)


def test_defaults_fill_what_is_not_said() -> None:
    values = validate(config_of())
    assert (values["seed"], values["batch_size"], values["gpu"], values["max_len"]) == (2024, 8192, -1, 50)
    assert values["model"] == "TWIN" and values["group_id"] == "user_index"


@pytest.mark.parametrize(
    ("key", "text", "number"),
    [
        ("learning_rate", "1e-3", 1e-3),
        ("embedding_regularizer", "1e-5", 1e-5),
        ("net_regularizer", "1E-5", 1e-5),
        ("net_dropout", "1e-1", 0.1),
        ("batch_size", "1e3", 1000),
        ("batch_size", 1000.0, 1000),
    ],
)
def test_numbers_without_a_dot_are_numbers(key: str, text: Any, number: float) -> None:
    found = validate(config_of(**{key: text}))[key]
    assert found == number and not isinstance(found, str)


def test_numbers_without_a_dot_in_lists() -> None:
    assert validate(config_of(model="MoS_TWIN", phase_lrs=["1e-3", 1e-3, "2e-4"]))["phase_lrs"] == [1e-3, 1e-3, 2e-4]


@pytest.mark.parametrize(
    "settings",
    [{"monitor": {"AUC": 1, "logloss": -1}}, {"monitor": "logloss", "monitor_mode": "min"},
     {"monitor": {"AUC": 1, "logloss": 0}}, {"monitor": {"AUC": -1, "logloss": 1}, "monitor_mode": "min"}],
)  # fmt: skip
def test_monitors_that_keep_the_best_are_fine(settings: dict[str, Any]) -> None:
    validate(config_of(**settings))


def test_text_stays_text() -> None:
    values = validate(config_of(model_root="1e5", group_id="12", embedding_regularizer="l2(1e-5)"))
    assert (values["model_root"], values["group_id"]) == ("1e5", "12")
    assert values["embedding_regularizer"] == "l2(1e-5)"


def test_keys_that_only_longctr_reads_are_dropped() -> None:
    values = validate(config_of(num_workers=3, pickle_feature_encoder=True, debug_mode=False))
    assert not IGNORED_KEYS & values.keys()


def test_all_problems_are_listed_at_once_with_where_and_the_nearest_key() -> None:
    message = refusal(max_lenn=3, epochs="many", topk=0, zzz=1)
    assert message.split("\n  ") == [
        "A: 4 mistakes:",
        "m.yaml:10: unknown key 'max_lenn' for model TWIN; did you mean 'max_len'?",
        "m.yaml:11: epochs: 'many': input should be a valid integer; write for example `epochs: 100`",
        "m.yaml:12: topk must be at least 1, not 0",
        "m.yaml:13: unknown key 'zzz' for model TWIN",
    ]


def test_missing_keys_are_listed() -> None:
    config = Config("A")
    config.set("model", "TWIN", "m.yaml:1")
    with pytest.raises(ConfigError) as refused:
        validate(config)
    for key in ("dataset_id", "train_data", "valid_data", "user_info", "item_info", "feature_cols", "label_col"):
        assert f"no '{key}'; add it" in str(refused.value)


def test_a_key_of_one_model_is_unknown_to_another() -> None:
    assert "unknown key 'n_item_experts' for model TWIN" in refusal(n_item_experts=3)
    assert validate(config_of(model="MoS_TWIN", n_item_experts=3))["n_item_experts"] == 3


def test_an_unknown_or_missing_model() -> None:
    assert refusal(model="TWINN").startswith("A: m.yaml:1: no model 'TWINN'; nearest: TWIN")
    with pytest.raises(ConfigError, match="no 'model'; name one, for example `model: MoS_TWIN`"):
        validate(Config("A"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 1.5}, "epochs: 1.5: input should be a valid integer"),
        ({"epochs": True}, "epochs: True: input should be a valid integer; write for example `epochs: 100`"),
        ({"shuffle": 1}, "shuffle: 1: input should be a valid boolean; write for example `shuffle: True`"),
        (
            {"learning_rate": True},
            "learning_rate: True: input should be a valid number; write for example `learning_rate: 0.001`",
        ),
        ({"learning_rate": float("inf")}, "learning_rate: inf: must be a finite number"),
        ({"learning_rate": 0}, "learning_rate: 0: must be above 0"),
        ({"model": "MoS_TWIN", "phase_lrs": [1e-3, 0, 1e-3]}, "phase_lrs: [0.001, 0, 0.001]: must be above 0"),
        ({"net_dropout": 1}, "net_dropout: 1: must be at least 0 and below 1"),
        (
            {"monitor": "logloss"},
            "monitor: logloss: falls as a model gets better, so this keeps the worst epoch; set `monitor_",
        ),
        ({"monitor_mode": "min"}, "gets better, so this keeps the worst epoch; set `AUC: -1`"),
        (
            {"monitor": {"AUC": 1, "logloss": 1}},
            "monitor: logloss: falls as a model gets better, so this keeps the worst epoch",
        ),
        ({"model": 3}, "model: 3: must be the name of a model, for example MoS_TWIN"),
        ({"dnn_hidden_units": [64, "x"]}, "dnn_hidden_units: [64, 'x']: input should be a valid integer"),
        ({"epochs": "x" * 900}, "x...x"),
        ({"epochs": 0}, "epochs: 0: must be at least 1"),
        ({"batch_size": None}, "batch_size: null: input should be"),
        ({"shuffle": "maybe"}, "shuffle: 'maybe': input should be a valid boolean"),
        ({"metrics": "AUC"}, "metrics: 'AUC': input should be a valid list"),
        ({"metrics": ["AUV"]}, "metrics: 'AUV' is not known, the nearest is 'AUC'"),
        ({"monitor": "foo"}, "monitor: 'foo' is not known, the nearest is"),
        ({"monitor": {}}, "monitor: names no metric; write for example `monitor: AUC`"),
        ({"monitor_mode": "up"}, "monitor_mode: 'up': input should be 'max' or 'min'"),
        ({"group_id": None}, "'gAUC' is computed group by group and there is no group id; set group_id"),
        ({"learning_rate": float("nan")}, "learning_rate: nan: must be a finite number"),
        ({"learning_rate": "fast"}, "learning_rate: 'fast': input should be a valid number"),
        ({"learning_rate": -1}, "learning_rate: -1: must be above 0"),
        ({"net_dropout": 1.5}, "net_dropout: 1.5: must be at least 0 and below 1"),
        ({"net_dropout": [0.1, -0.1]}, "net_dropout: [0.1, -0.1]: must be at least 0"),
        ({"dnn_hidden_units": [64, 0]}, "dnn_hidden_units: [64, 0]: must be at least 1"),
        ({"dnn_hidden_units": 64}, "dnn_hidden_units: 64: input should be a valid list"),
        ({"seed": -1}, "seed: -1: must be at least 0"),
        ({"seed": 2**32}, "seed: 4294967296: must be below 4294967296"),
        ({"task": "regression"}, "task: 'regression': input should be 'binary_classification'"),
        ({"data_format": "csv"}, "data_format: 'csv': input should be 'parquet'"),
        ({"rebuild_dataset": True}, "rebuild_dataset: True: input should be False"),
        ({"feature_cols": {"name": "a"}}, "feature_cols: {'name': 'a'}: input should be a valid list"),
        ({"block_scope": "half"}, "block_scope: 'half': input should be 'full' or 'long'"),
    ],
)
def test_wrong_values_are_refused_by_key(changes: dict[str, Any], message: str) -> None:
    assert message in refusal(**changes)


@pytest.mark.parametrize("model", model_names())
def test_every_models_keys_have_a_type_and_defaults_that_fit_it(model: str) -> None:
    keys = allowed_keys(model)
    assert {*RUN_KEYS, *DATA_KEYS} <= keys.keys()
    for name, parameter in model_keys(model).items():
        assert parameter.annotation is not parameter.empty, name
        if parameter.default is not parameter.empty:
            assert TypeAdapter(keys[name]).validate_python(parameter.default) == parameter.default, name


def test_every_bound_is_of_a_known_key() -> None:
    known = {key for model in model_names() for key in allowed_keys(model)}
    assert LOWER_BOUNDS.keys() <= known


def test_missing_files_are_in_the_same_list_and_those_of_a_missing_folder_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.parquet").touch()
    changes: dict[str, Any] = {key: f"absent/{key}" for key in ("valid_data", "user_info", "item_info")}
    changes |= {"train_data": "data/train", "test_data": "data/test.parquet", "epochs": 0}
    validate(config_of(**{**changes, "epochs": 1}))
    with pytest.raises(ConfigError) as refused:
        validate(config_of(**changes), str(tmp_path))
    assert str(refused.value).split("\n  ")[1:] == [
        f"m.yaml:4: valid_data, user_info, item_info: {tmp_path / 'absent'}: no such folder; {ADVICE}",
        f"m.yaml:10: test_data: {tmp_path / 'data' / 'test.parquet'}: no such file; {ADVICE}",
        "m.yaml:11: epochs: 0: must be at least 1",
    ]


@pytest.mark.parametrize("name", ["", " ", "..", "../up", "a/b", "a\\b", "a\0b", "a\nb", "/abs"])
@pytest.mark.parametrize("key", ["dataset_id", "model_id"])
def test_a_name_that_would_lead_out_of_the_results_is_refused(key: str, name: str) -> None:
    assert f"m.yaml:{2 if key == 'dataset_id' else 10}: {key}: " in refusal(**{key: name})


@pytest.mark.parametrize("name", ["MicroVideo1.7M_x2", "a b", "día-1", "x.y"])
def test_other_names_are_fine(name: str) -> None:
    assert validate(config_of(dataset_id=name, model_id=name))["dataset_id"] == name


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        (
            {"model": "MoS_TWIN", "topk_item": 9, "window_size": 0, "alpha_item": 2.0, "phase_lrs": [0.1], "num_heads": 3},
            ["alpha_item (2.0)", "topk_item (9)", "window_size (0)", "phase_lrs needs three", "multiple of num_heads (3)"],
        ),
        ({"model": "GShard_TWIN", "topk_experts": 7, "topk": 0}, ["topk_experts (7)", "topk must be at least 1, not 0"]),
        ({"model": "AttenMixer", "embedding_dim": 60, "num_heads": 8, "last_k": 0}, ["num_heads (8)", "last_k must be"]),
        ({"model": "AttenMixer", "embedding_dim": 60}, ["num_heads (8) must divide the width of an item vector (60)"]),
        (
            {"sparse_embedding_updates": True, "optimizer": "SGD"},
            ["sparse_embedding_updates needs optimizer adam, not SGD"],
        ),
        ({"model": "MoS_TWIN", "longctr_compat": True}, ["longctr_compat: LongCTR has no MoS_TWIN"]),
        ({"dnn_hidden_units": [10**12, 10**12]}, ["TWIN cannot be built ("]),
        (
            {"model": "TransAct", "hidden_activations": ["relu"] * 2, "dcn_hidden_units": [4, 4]},
            ["TransAct cannot be built:"],
        ),
        (
            {"embedding_regularizer": "l2(-1)", "net_regularizer": -0.1},
            ["embedding_regularizer: 'l2(-1)': write", "net_reg"],
        ),
        (
            {"use_features": ["item_idd"]},
            ["use_features: item_idd not among feature_cols of shop; did you mean 'item_id'?"],
        ),
    ],
)
def test_what_constructors_refuse_is_all_said(changes: dict[str, Any], lines: list[str]) -> None:
    found = refusal(**changes).split("\n  ")
    found = found[1:] if len(found) > 1 else found
    assert len(found) == len(lines)
    for words in lines:
        assert sum(words in line for line in found) == 1, words


def test_rules_about_the_items_width_wait_for_sound_features() -> None:
    """Without features the width is not known: 8 heads may divide it or not."""
    config = config_of(model="AttenMixer", embedding_dim=60, num_heads=8, last_k=0)
    del config.values["feature_cols"]
    with pytest.raises(ConfigError) as refused:
        validate(config)
    lines = str(refused.value).split("\n  ")[1:]
    assert len(lines) == 2 and "no 'feature_cols'" in lines[0] and "last_k must be at least 1" in lines[1]


def test_validation_leaves_the_random_stream_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    validate(config_of(model="MoS_TWIN"))
    assert torch.rand(1) == expected


@pytest.mark.parametrize("model", [*BACKBONES, *(f"{method}_TWIN" for method in METHODS)])
def test_a_model_with_its_defaults_is_not_refused(model: str) -> None:
    validate(config_of(model=model, embedding_dim=16))


@pytest.mark.parametrize("name", [*ACTIVATIONS, *FUXICTR_ACTIVATIONS])
def test_every_activation_that_is_allowed_acts_on_each_number(name: str) -> None:
    assert get_activation(name, 3)(torch.ones(2, 3)).shape == (2, 3)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_that_is_allowed_is_least_at_the_label(name: str) -> None:
    loss, label = get_loss(name), torch.tensor([[1.0], [0.0]])
    right, wrong = (float(loss(torch.tensor([[p], [1 - p]]), label, reduction="mean")) for p in (0.9, 0.6))
    assert right < wrong


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_that_is_allowed_steps(name: str) -> None:
    weight = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = get_optimizer(name, [weight], 0.1)
    weight.square().sum().backward()
    optimizer.step()
    assert bool((weight < 1).all())


#: accepted, as nothing reads it: LongCTR's window of time, which use_time_window_mask would need
UNREAD = {"time_window_ms"}


def fits(value: Any, annotation: Any) -> bool:
    try:
        TypeAdapter(annotation).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


@pytest.mark.parametrize("model", [*BACKBONES, *(f"{method}_TWIN" for method in METHODS)])
def test_no_number_of_a_model_may_be_below_its_range(model: str) -> None:
    own = model_keys(model).keys() - UNREAD - ({*model_keys("TWIN")} - {"num_heads", "topk"} if model != "TWIN" else set())
    checked = 0
    for key in own:
        below = next((value for value in (-1, -1.0, [-1], [-1.0]) if fits(value, allowed_keys(model)[key])), None)
        if below is not None:
            assert re.search(rf"\b{key}\b", refusal(**{"model": model, "embedding_dim": 16, key: below}))
            checked += 1
    assert checked >= 1


@pytest.mark.parametrize(
    "model, key",
    [("TransAct", "hidden_activations"), ("FinalMLP", "mlp2_hidden_activations"), ("DIN", "attention_hidden_activations"),
     ("MoS_DIEN", "attention_activation"), ("TWIN", "dnn_activations")],
)  # fmt: skip
def test_an_activation_that_torch_lacks_is_refused_whatever_part_it_is_for(model: str, key: str) -> None:
    validate(config_of(model=model, **{key: "Dice"}))
    message = refusal(model=model, **{key: ["relu", "rulu"]})
    assert f"{key}: 'rulu': write relu, or the name of a layer in torch.nn; did you mean 'ReLU'?" in message
