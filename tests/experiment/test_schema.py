"""Validation: defaults, types, numbers that yaml read as text, and all problems in one message."""

from typing import Any

import pytest

from model_zoo.errors import ConfigError
from model_zoo.experiment.config import Config
from model_zoo.experiment.run import check_names
from model_zoo.experiment.schema import DATA_KEYS, IGNORED_KEYS, LOWER_BOUNDS, RUN_KEYS, allowed_keys, validate
from model_zoo.registry import model_names

GOOD: dict[str, Any] = {
    "model": "TWIN",
    "dataset_id": "shop",
    "train_data": "a",
    "valid_data": "b",
    "user_info": "c",
    "item_info": "d",
    "feature_cols": [{"name": "item_id"}],
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
    assert "\n" not in str(refused.value)
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
    ],
)
def test_numbers_without_a_dot_are_numbers(key: str, text: str, number: float) -> None:
    found = validate(config_of(**{key: text}))[key]
    assert found == number and not isinstance(found, str)


def test_numbers_without_a_dot_in_lists() -> None:
    assert validate(config_of(model="MoS_TWIN", phase_lrs=["1e-3", 1e-3, "2e-4"]))["phase_lrs"] == [1e-3, 1e-3, 2e-4]


def test_text_stays_text() -> None:
    values = validate(config_of(model_root="1e5", group_id="12", embedding_regularizer="l2(1e-5)"))
    assert (values["model_root"], values["group_id"]) == ("1e5", "12")
    assert values["embedding_regularizer"] == "l2(1e-5)"


def test_keys_that_only_longctr_reads_are_dropped() -> None:
    values = validate(config_of(num_workers=3, pickle_feature_encoder=True, debug_mode=False))
    assert not IGNORED_KEYS & values.keys()


def test_all_problems_are_listed_at_once_with_where_and_the_nearest_key() -> None:
    message = refusal(max_lenn=3, epochs="many", topk=0, zzz=1)
    assert message.startswith("A: ")
    assert "m.yaml:10: unknown key 'max_lenn' for model TWIN; did you mean 'max_len'?" in message
    assert "m.yaml:11: epochs: 'many': input should be a valid integer" in message
    assert "m.yaml:12: topk: 0: must be at least 1" in message
    assert "m.yaml:13: unknown key 'zzz' for model TWIN" in message


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
    assert refusal(model="TWINN").startswith("m.yaml:1: no model 'TWINN'; nearest: TWIN")
    with pytest.raises(ConfigError, match="A: no 'model'; name one, for example `model: MoS_TWIN`"):
        validate(Config("A"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 1.5}, "epochs: 1.5: input should be a valid integer"),
        ({"epochs": 0}, "epochs: 0: must be at least 1"),
        ({"batch_size": None}, "batch_size: None: input should be"),
        ({"shuffle": "maybe"}, "shuffle: 'maybe': input should be a valid boolean"),
        ({"metrics": "AUC"}, "metrics: 'AUC': input should be a valid list"),
        ({"metrics": ["AUV"]}, "metrics: 'AUV' is not known, the nearest is 'AUC'"),
        ({"monitor": "foo"}, "metrics: 'foo' is not known"),
        ({"monitor": {}}, "monitor: names no metric; write for example `monitor: AUC`"),
        ({"monitor_mode": "up"}, "monitor_mode: 'up': input should be 'max' or 'min'"),
        ({"group_id": None}, "'gAUC' is computed group by group and there is no group id; set group_id"),
        ({"learning_rate": float("nan")}, "learning_rate: nan: must be a number"),
        ({"learning_rate": "fast"}, "learning_rate: 'fast': input should be a valid number"),
        ({"learning_rate": -1}, "learning_rate: -1: must be at least 0"),
        ({"net_dropout": 1.5}, "net_dropout: 1.5: must be at most 1"),
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
    from pydantic import TypeAdapter

    from model_zoo.registry import model_keys

    keys = allowed_keys(model)
    assert {*RUN_KEYS, *DATA_KEYS} <= keys.keys()
    for name, parameter in model_keys(model).items():
        assert parameter.annotation is not parameter.empty, name
        if parameter.default is not parameter.empty:
            assert TypeAdapter(keys[name]).validate_python(parameter.default) == parameter.default, name


def test_every_bound_is_of_a_known_key() -> None:
    known = {key for model in model_names() for key in allowed_keys(model)}
    assert LOWER_BOUNDS.keys() <= known


@pytest.mark.parametrize(
    "model, key",
    [("TransAct", "hidden_activations"), ("FinalMLP", "mlp2_hidden_activations"), ("DIN", "attention_hidden_activations"),
     ("MoS_DIEN", "attention_activation"), ("TWIN", "dnn_activations")],
)  # fmt: skip
def test_an_activation_that_torch_lacks_is_refused_whatever_part_it_is_for(model: str, key: str) -> None:
    check_names({"model": model, key: ["relu", "Dice"]})
    check_names({"model": model, key: None})
    with pytest.raises(ConfigError, match=f"{key}: 'rulu': write relu, or the name of a layer in torch.nn"):
        check_names({"model": model, key: ["relu", "rulu"]})
