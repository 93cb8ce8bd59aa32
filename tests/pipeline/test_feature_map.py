"""A dataset config's ``feature_cols`` become the feature map that FuxiCTR makes of them, or are refused by name."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from model_zoo.compat import FeatureEmbeddingDict
from model_zoo.errors import ConfigError
from model_zoo.pipeline.feature_map import POOLINGS, build_feature_map, draft_feature_map

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
    "unknown key": (item(vocabsize=3), "shop: feature_cols: item_id: unknown key 'vocabsize'; did you mean 'vocab_size'?"),
    "unknown type": (item(type="text"), "item_id: type must be one of meta, categorical, numeric, sequence, embedding"),
    "no type": ({"name": "a"}, "feature_cols: a: type must be one of"),
    "no name": ({"type": "meta"}, "feature_cols: entry 2: name: null: must be a column name"),
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
    "label": (item(name="is_click"), "feature_cols: is_click: is the label; a model that reads it learns nothing else"),
    "switch in words": (item(active="False"), "item_id: active: 'False': must be True or False"),
    "typo in the source": (item(source="Items"), "item_id: source: 'Items': write item for a column of item_info"),
    "shared widths": (item(share_embedding="first", embedding_dim=9), "share_embedding: first has another embedding_dim"),
    "vectors in a list": (item(pretrained_emb=["v.npz"]), "pretrained_emb: ['v.npz']: must be a file's path"),
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
        ({"feature_specs": [{"embedding_dim": 2}]}, "feature_specs: entry 1: name: null: must be a column name"),
        ({"feature_specs": [{"name": "item_id", "dim": 2}]}, "feature_specs: item_id: unknown key 'dim'"),
        ({"label_col": {}}, "label_col: must name one column, for example {name: is_click}"),
        ({"label_col": [{"name": "a"}, {"name": "b"}]}, "label_col: must name one column"),
    ],
)
def test_what_refers_to_nothing_is_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        build_feature_map(params_of(item(), **more))
    assert message in str(refusal.value)


#: texts that FuxiCTR would evaluate, or try to
CODE = [
    "__import__('os').system('true')",
    "nn.Linear(8, 8)",
    "nn.Identity() or 1",
    " nn.Identity()",
    "layers.KMaxPooling(1, 1)",
    ["nn.Identity()"],
    ["layers.MaskedSumPooling()", "exit()"],
    True,
    {"a": 1},
]


@pytest.mark.parametrize("encoder", CODE)
@pytest.mark.parametrize("kind", ["sequence", "embedding", "categorical", "numeric"])
@pytest.mark.parametrize("key", ["feature_cols", "feature_specs"])
def test_no_text_but_the_known_encoders_reaches_fuxictr(kind: str, encoder: Any, key: str) -> None:
    column = {"name": "a", "type": kind, "vocab_size": 6, "max_len": 3}
    given = {"feature_encoder": encoder}
    more = {"feature_specs": [{"name": "a", **given}]} if key == "feature_specs" else {}
    params = params_of(item(), {**column, **({} if more else given)}, **more)
    allowed = "layers.MaskedAveragePooling() or layers.MaskedSumPooling()" if kind == "sequence" else "nn.Identity()"
    with pytest.raises(ConfigError) as refusal:
        build_feature_map(params)
    assert f"{key}: a: feature_encoder: " in str(refusal.value) and f"write {allowed}" in str(refusal.value)
    draft = draft_feature_map(params)[0].features["a"].get("feature_encoder")
    assert draft == ("layers.MaskedAveragePooling()" if kind == "sequence" else None)


@pytest.mark.parametrize("encoder", POOLINGS)
def test_a_pooling_is_what_its_name_says(encoder: str) -> None:
    found = build_feature_map(params_of(item(), {**SEQUENCE, "feature_encoder": encoder}))
    layer = FeatureEmbeddingDict(found, 4).feature_encoders["tags"]
    assert type(layer).__name__ in encoder


def test_all_that_is_wrong_is_said_each_with_its_place() -> None:
    columns = [
        item(),
        item(vocabsize=3),
        {"name": ["b", "b"], "type": "meta"},
        {"type": "meta"},
        item(name="c", vocab_size=0),
    ]
    feature_map, faults = draft_feature_map(params_of(*columns, use_features=["item_id", "x"], label_col={}))
    assert [fault.place for fault in faults] == [
        ("feature_cols", 1, "name"), ("feature_cols", 2, "name"), ("feature_cols", 3, "name"),
        ("feature_cols", 4, "vocab_size"), ("label_col",), ("use_features", 1),
    ]  # fmt: skip
    assert list(feature_map.features) == ["item_id"]
    with pytest.raises(ConfigError, match="dataset shop: 6 mistakes:\n  feature_cols: item_id: listed twice"):
        build_feature_map(params_of(*columns, use_features=["item_id", "x"], label_col={}))


def test_a_feature_specs_entry_is_checked_as_feature_cols_is() -> None:
    specs = [{"name": "item_id", "vocab_size": "many"}]
    _, [fault] = draft_feature_map(params_of(item(), feature_specs=specs))
    assert fault == (
        ("feature_specs", 0, "vocab_size"),
        "feature_specs: item_id: vocab_size: 'many': must be a whole number, 1 or more",
    )


def test_the_label_may_be_a_list_of_one() -> None:
    assert build_feature_map(params_of(item(), label_col=[{"name": "click"}])).labels == ["click"]
