"""A dataset config's ``feature_cols`` become the feature map that FuxiCTR makes of them, or are refused by name."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from model_zoo.errors import ConfigError
from model_zoo.pipeline.feature_map import build_feature_map

Params = Callable[..., dict[str, Any]]


def params_of(*columns: dict[str, Any], **more: Any) -> dict[str, Any]:
    label = {"name": "is_click", "dtype": "float"}
    return {"dataset_id": "shop", "feature_cols": list(columns), "label_col": label, "embedding_dim": 4, **more}


def item(**more: Any) -> dict[str, Any]:
    return {"name": "item_id", "type": "categorical", "source": "item", "vocab_size": 9, **more}


@pytest.mark.parametrize(("kind", "group"), [("B", "pre20"), ("A", "pre8"), ("B", "post20")])
def test_features_equal_the_recorded_map_in_content_and_order(
    kind: str, group: str, golden_params: Params, golden_arrays: dict[str, np.ndarray]
) -> None:
    recorded = json.loads(str(golden_arrays[f"{group}/feature_map"]))
    found = build_feature_map(golden_params(kind))
    assert [{name: dict(spec)} for name, spec in found.features.items()] == recorded


def test_labels_group_and_sizes(golden_params: Params) -> None:
    found = build_feature_map(golden_params("B"))
    assert (found.dataset_id, found.labels, found.group_id) == ("tiny", ["is_click"], "user_index")
    assert found.default_emb_dim == 8
    assert found.num_fields == 5  # user_id, tags, item_id, cate_id, image_emb_dim8
    assert found.total_features == 42 + 6 + 60 + 6


def test_a_list_of_names_shares_one_specification() -> None:
    found = build_feature_map(params_of(item(name=["a", "b"])))
    assert list(found.features) == ["a", "b"] and found.features["a"] == found.features["b"]


def test_inactive_columns_are_left_out() -> None:
    assert list(build_feature_map(params_of(item(), item(name="b", active=False))).features) == ["item_id"]


def test_use_features_chooses_and_orders() -> None:
    found = build_feature_map(params_of(item(), item(name="b"), item(name="c"), use_features=["c", "item_id"]))
    assert list(found.features) == ["c", "item_id"]


def test_feature_specs_override_single_keys() -> None:
    specs = [{"name": ["item_id", "b"], "embedding_dim": 2}]
    found = build_feature_map(params_of(item(), item(name="b"), item(name="c"), feature_specs=specs))
    assert [spec.get("embedding_dim") for spec in found.features.values()] == [2, 2, None]
    assert found.features["b"]["vocab_size"] == 9


def test_a_shared_vocabulary_is_as_large_as_the_largest() -> None:
    found = build_feature_map(params_of(item(), item(name="trigger", vocab_size=20, share_embedding="item_id")))
    assert found.features["item_id"]["vocab_size"] == found.features["trigger"]["vocab_size"] == 20
    assert found.total_features == 20


@pytest.mark.parametrize("encoder", ["null", "None", None])
def test_an_encoder_may_be_written_as_none(encoder: Any) -> None:
    column = {"name": "image", "type": "embedding", "source": "item", "embedding_dim": 8, "feature_encoder": encoder}
    assert "feature_encoder" not in build_feature_map(params_of(column)).features["image"]


def test_pretrained_vectors_are_frozen_and_the_start_unless_said_otherwise() -> None:
    spec = build_feature_map(params_of(item(pretrained_emb="v.npz"))).features["item_id"]
    assert (spec["pretrained_emb"], spec["freeze_emb"], spec["pretrain_usage"]) == ("v.npz", True, "init")
    more = {"pretrained_emb": "v.npz", "freeze_emb": False, "pretrain_usage": "sum", "pretrain_dim": 3}
    spec = build_feature_map(params_of(item(**more))).features["item_id"]
    assert {key: spec[key] for key in more} == more


SEQUENCE = {"name": "tags", "type": "sequence", "vocab_size": 6, "max_len": 3}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": (item(vocabsize=3), "shop: feature_cols: item_id: unknown key(s) vocabsize; known: active,"),
    "unknown type": (item(type="text"), "item_id: type must be one of meta, categorical, numeric, sequence, embedding"),
    "no type": ({"name": "a"}, "feature_cols: a: type must be one of"),
    "no name": ({"type": "meta"}, "feature_cols: entry 2: name: None: must be a column name"),
    "number for a name": ({"name": 3, "type": "meta"}, "entry 2: name: 3: must be a column name"),
    "dot in a name": (item(name="a.b"), "entry 2: name: 'a.b': must be a column name (text, without a dot)"),
    "twice": (item(name="first"), "feature_cols: first: listed twice; take one of the entries out"),
    "no vocabulary": ({"name": "a", "type": "categorical"}, "a: vocab_size is required (the largest id of the column"),
    "vocabulary in words": (item(vocab_size="many"), "vocab_size: 'many': must be a whole number, 1 or more"),
    "no vocabulary left": (item(vocab_size=0), "vocab_size: 0: must be a whole number, 1 or more"),
    "fractional width": (item(embedding_dim=2.5), "embedding_dim: 2.5: must be a whole number"),
    "no length": ({**SEQUENCE, "max_len": None}, "tags: a sequence feature needs max_len"),
    "no pooling": ({**SEQUENCE, "feature_encoder": None}, "tags: feature_encoder: a sequence feature needs a pooling"),
    "identity": ({**SEQUENCE, "feature_encoder": "nn.Identity()"}, "tags: feature_encoder: a sequence feature needs a"),
    "share later": (item(share_embedding="later"), "share_embedding: later must be an id feature before it"),
    "share a number": (item(share_embedding="price"), "share_embedding: price must be an id feature before it"),
    "processor": (item(category_processor="quantile"), "category_processor is not applied to ready-made parquet files"),
    "usage": (item(pretrained_emb="v.npz", pretrain_usage="add"), "pretrain_usage: 'add': must be one of init, sum"),
    "vectors without ids": ({"name": "a", "type": "numeric", "pretrained_emb": "v.npz"}, "pretrained_emb needs ids"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_entry_is_refused_by_its_name_and_key(case: str) -> None:
    entry, message = REFUSED[case]
    first = [item(name="first"), {"name": "price", "type": "numeric"}]
    if case in ("no name", "number for a name", "dot in a name"):
        first.pop()
    with pytest.raises(ConfigError) as refusal:
        build_feature_map(params_of(*first, entry))
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"use_features": ["item_id", "nope"]}, "use_features: nope not among feature_cols of shop"),
        ({"feature_specs": [{"name": "nope"}]}, "feature_specs: nope is not among feature_cols of shop"),
        ({"feature_specs": [{"embedding_dim": 2}]}, "feature_specs: name: None: must be a column name"),
        ({"feature_specs": [{"name": "item_id", "dim": 2}]}, "feature_specs: item_id: unknown key(s) dim"),
        ({"label_col": {}}, "label_col: must name one column, for example {name: is_click}"),
        ({"label_col": [{"name": "a"}, {"name": "b"}]}, "label_col: must name one column"),
    ],
)
def test_what_refers_to_nothing_is_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        build_feature_map(params_of(item(), **more))
    assert message in str(refusal.value)


def test_the_label_may_be_a_list_of_one() -> None:
    assert build_feature_map(params_of(item(), label_col=[{"name": "click"}])).labels == ["click"]
