"""A small shop in LongCTR's layout: read as it stands, and read right or refused where its files are unusual."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

import model_zoo
from model_zoo.errors import ConfigError, DataError
from model_zoo.pipeline.dataset import CTRDataset, check_labels, load_dataset
from model_zoo.pipeline.feature_map import build_feature_map
from model_zoo.pipeline.loader import SequenceLoader, longctr_batch

ITEM_FEATURES: list[dict[str, Any]] = [
    {"name": "item_id", "type": "categorical", "source": "item", "vocab_size": 6},
    {"name": "tags", "type": "sequence", "source": "item", "vocab_size": 4, "max_len": 2},
    {"name": "price", "type": "numeric", "source": "item"},
    {"name": "image", "type": "embedding", "source": "item", "embedding_dim": 3, "feature_encoder": "nn.Identity()"},
    {"name": "text", "type": "embedding", "source": "item", "pretrain_dim": 2},
]
CONTEXT_FEATURES: list[dict[str, Any]] = [
    {"name": "hour", "type": "categorical", "vocab_size": 25},
    {"name": "age", "type": "numeric"},
    {"name": "topics", "type": "sequence", "vocab_size": 9, "max_len": 3},
    {"name": "query", "type": "embedding", "embedding_dim": 4},
]
META = [{"name": name, "type": "meta"} for name in ("user_index", "item_index", "seq_len")]
Frames = dict[str, pl.DataFrame]


def items() -> pl.DataFrame:
    return pl.DataFrame(
        {
            "item_index": [0, 1, 2, 3, 4, 5],
            "item_id": [0, 1, 2, 3, 4, 5],
            "tags": [[], [1], [2, 3], [3, 2, 1], [1], [2]],
            "price": [0.0, 1.5, 2.5, 3.5, 4.5, 5.5],
            "image": [[0.0, 0.0, 0.0], *[[float(i), 1.0, -1.0] for i in range(1, 6)]],
            "text": [[0.0, 0.0], *[[float(i), 0.5] for i in range(1, 6)]],
        }
    )


def users() -> pl.DataFrame:
    return pl.DataFrame({"user_index": [0, 1, 2], "full_item_seq": [[1, 2, 3], [4], []]}, strict=False).cast(
        {"full_item_seq": pl.List(pl.Int64)}
    )


def rows() -> pl.DataFrame:
    return pl.DataFrame(
        {
            "user_index": [0, 0, 1, 1, 2, 2],
            "item_index": [4, 5, 1, 2, 3, 1],
            "seq_len": [3, 1, 1, 0, 0, 0],
            "is_click": [1, 0, 1, 0, 0, 1],
            "hour": [1, 2, 3, 4, 5, 24],
            "age": [0.5, 1.5, 2.5, 3.5, 4.5, 5.5],
            "topics": [[], [8], [1, 2], [1, 2, 3], [1, 2, 3, 4], [5]],
            "query": [[float(i), 0.0, 1.0, 2.0] for i in range(6)],
        }
    )


def frames() -> Frames:
    return {"item_info": items(), "user_info": users(), "train": rows(), "valid": rows(), "test": rows()}


@pytest.fixture
def shop(tmp_path: Path) -> Callable[..., CTRDataset]:
    """``shop(frames, columns=..., **params)`` writes the frames and loads them."""

    def load(given: Frames, columns: list[dict[str, Any]] | None = None, **more: Any) -> CTRDataset:
        for name, frame in given.items():
            frame.write_parquet(tmp_path / f"{name}.parquet")
        files = {f"{name}_data": str(tmp_path / f"{name}.parquet") for name in ("train", "valid", "test")}
        files |= {name: str(tmp_path / f"{name}.parquet") for name in ("item_info", "user_info")}
        params: dict[str, Any] = {
            "dataset_id": "shop",
            "feature_cols": META + (ITEM_FEATURES + CONTEXT_FEATURES if columns is None else columns),
            "label_col": {"name": "is_click"},
            "group_id": "user_index",
            "embedding_dim": 4,
            **files,
            **more,
        }
        return load_dataset(build_feature_map(params), params)

    return load


def with_column(frame: pl.DataFrame, name: str, values: Any, dtype: Any = None) -> pl.DataFrame:
    return frame.with_columns(pl.Series(name, values, dtype=dtype, strict=False))


def changed(table: str, name: str, values: Any, dtype: Any = None) -> Frames:
    given = frames()
    return {**given, table: with_column(given[table], name, values, dtype)}


def assert_same(found: CTRDataset, expected: CTRDataset) -> None:
    for name, column in expected.item_columns.items():
        np.testing.assert_array_equal(found.item_columns[name], column, err_msg=name, strict=True)
    np.testing.assert_array_equal(found.histories.items, expected.histories.items, strict=True)
    np.testing.assert_array_equal(found.histories.offsets, expected.histories.offsets, strict=True)
    for name, split in expected.splits.items():
        other = found.splits[name]
        for field in ("user_index", "item_index", "seq_len", "label", "group"):
            np.testing.assert_array_equal(getattr(other, field), getattr(split, field), err_msg=field, strict=True)
        assert other.context.keys() == split.context.keys()
        for feature, column in split.context.items():
            np.testing.assert_array_equal(other.context[feature], column, err_msg=feature, strict=True)


def test_a_data_set_is_read_as_it_stands(shop: Any) -> None:
    found = shop(frames())
    assert found.num_items == 6 and list(found.splits) == ["train", "valid", "test"]
    table = found.item_columns
    assert table["tags"].tolist() == [[0, 0], [1, 0], [2, 3], [3, 2], [1, 0], [2, 0]]
    assert table["price"].dtype == np.float32 and table["image"].shape == (6, 3) and table["text"].shape == (6, 2)
    assert found.histories.items.tolist() == [1, 2, 3, 4] and found.histories.offsets.tolist() == [0, 3, 4, 4]
    assert found.histories.lengths.tolist() == [3, 1, 0]
    train = found.splits["train"]
    assert len(train) == 6 and train.seq_len.dtype == np.int32 and train.label.dtype == np.float32
    assert train.label.tolist() == [1, 0, 1, 0, 0, 1] and train.group.tolist() == [0, 0, 1, 1, 2, 2]
    assert train.context["topics"].tolist() == [[0, 0, 0], [8, 0, 0], [1, 2, 0], [1, 2, 3], [1, 2, 3], [5, 0, 0]]
    assert train.context["query"].shape == (6, 4) and train.context["age"].tolist() == [0.5, 1.5, 2.5, 3.5, 4.5, 5.5]


def test_the_test_split_may_be_absent_and_extensions_left_out(shop: Any, tmp_path: Path) -> None:
    found = shop(frames(), test_data=None, train_data=str(tmp_path / "train"))
    assert list(found.splits) == ["train", "valid"] and found.files["train_data"] == str(tmp_path / "train.parquet")


def test_the_fingerprint_changes_with_a_files_bytes_only(shop: Any) -> None:
    first, again = shop(frames()).fingerprint(), shop(frames()).fingerprint()
    other = shop(changed("valid", "hour", [1, 2, 3, 4, 5, 6])).fingerprint()
    assert first == again and all(len(digest) == 32 for digest in first.values())
    assert [name for name in first if first[name] != other[name]] == ["valid_data"]


# ---- unusual input that is read right --------------------------------------------------------------------------------

EVERY = ("train", "valid", "test")
ID_TYPES = [pl.Int8, pl.UInt8, pl.UInt32, pl.UInt64, pl.Int32, pl.Float32, pl.Float64]


@pytest.mark.parametrize("dtype", [pl.Float32, pl.Float64, pl.UInt8, pl.Boolean])
def test_labels_of_any_numeric_type(shop: Any, dtype: Any) -> None:
    expected = shop(frames())
    given = frames()
    for name in EVERY:
        given[name] = given[name].with_columns(pl.col("is_click").cast(dtype))
    assert_same(shop(given), expected)


@pytest.mark.parametrize("dtype", ID_TYPES)
@pytest.mark.parametrize("column", ["user_index", "item_index", "seq_len", "hour"])
def test_ids_of_any_numeric_type_beside_int64(shop: Any, dtype: Any, column: str) -> None:
    expected = shop(frames())
    given = frames()
    for name in EVERY:
        given[name] = given[name].with_columns(pl.col(column).cast(dtype))
    assert_same(shop(given), expected)


@pytest.mark.parametrize("dtype", ID_TYPES)
def test_item_and_history_ids_of_any_numeric_type(shop: Any, dtype: Any) -> None:
    expected = shop(frames())
    given = frames()
    given["item_info"] = given["item_info"].with_columns(
        pl.col("item_index", "item_id").cast(dtype), pl.col("tags").cast(pl.List(dtype))
    )
    given["user_info"] = given["user_info"].with_columns(
        pl.col("user_index").cast(dtype), pl.col("full_item_seq").cast(pl.List(dtype))
    )
    assert_same(shop(given), expected)


def test_one_float_column_does_not_turn_ids_into_floats(shop: Any) -> None:
    found = shop(changed("train", "age", [16777217.0] * 6))
    assert found.splits["train"].user_index.dtype == np.int32


def test_unused_columns_of_any_type_are_not_read(shop: Any) -> None:
    expected = shop(frames())
    given = frames()
    for name in given:
        height = given[name].height
        given[name] = given[name].with_columns(
            pl.Series("title", ["text"] * height),
            pl.Series("time", [0] * height).cast(pl.Datetime),
            pl.Series("extra", [[1] * (i % 3) for i in range(height)], dtype=pl.List(pl.Int64)),
            pl.Series("nothing", [None] * height, dtype=pl.Int64),
        )
    assert_same(shop(given), expected)


def test_nullable_columns_without_nulls(shop: Any, tmp_path: Path) -> None:
    import pandas as pd

    expected = shop(frames())
    given = frames()
    train = given.pop("train")
    table = pd.DataFrame(train.to_dict(as_series=False)).astype(
        {"user_index": "Int64", "is_click": "Int8", "age": "Float32"}
    )
    table.to_parquet(tmp_path / "train.parquet")
    assert_same(shop(given), expected)


@pytest.mark.parametrize("table", ["item_info", "user_info"])
def test_rows_of_the_tables_in_another_order(shop: Any, table: str) -> None:
    expected = shop(frames())
    given = frames()
    given[table] = given[table].reverse()
    assert_same(shop(given), expected)
    given[table] = given[table].sample(fraction=1.0, shuffle=True, seed=3)
    assert_same(shop(given), expected)


def test_users_without_an_index_column_are_numbered_by_row(shop: Any) -> None:
    expected = shop(frames())
    assert_same(shop({**frames(), "user_info": users().drop("user_index")}), expected)


def test_histories_that_are_all_empty(shop: Any) -> None:
    given = frames()
    given["user_info"] = with_column(users(), "full_item_seq", [[], [], []])
    for name in EVERY:
        given[name] = with_column(given[name], "seq_len", [0] * 6)
    found = shop(given)
    batch = next(iter(SequenceLoader(found, "train", 6, 10)))
    assert batch.history.shape == (6, 0)
    _, item_columns, mask = longctr_batch(found, "train", np.arange(6), 10)
    assert mask.shape == (6, 0) and item_columns["item_id"].tolist() == [4, 5, 1, 2, 3, 1]


# ---- unusual input that is refused, in one sentence ------------------------------------------------------------------

NAN = float("nan")
INF = float("inf")
REFUSED: dict[str, tuple[Frames, str]] = {
    "no padding row": (
        {**frames(), "item_info": items()[1:]},
        "item_info.parquet: column 'item_index' has no 0; add the padding row, item_index 0, all features 0",
    ),
    "an item twice": (
        changed("item_info", "item_index", [0, 1, 2, 3, 4, 4]),
        "item_info.parquet: column 'item_index' has 4 twice; every index must stand there once",
    ),
    "an item left out": (
        changed("item_info", "item_index", [0, 1, 2, 3, 4, 6]),
        "item_info.parquet: column 'item_index' has 4 but no 5; every index must stand there once",
    ),
    "a user left out": (
        changed("user_info", "user_index", [0, 1, 3]),
        "user_info.parquet: column 'user_index' has 1 but no 2",
    ),
    "users from 1": (
        changed("user_info", "user_index", [1, 2, 3]),
        "user_info.parquet: column 'user_index' starts at 1; number the users from 0",
    ),
    "item outside the table": (
        changed("train", "item_index", [4, 5, 1, 6, 7, 1]),
        "train.parquet: column 'item_index', row 3: 6: item_info holds items 1..5 (2 such rows)",
    ),
    "the padding item as target": (
        changed("test", "item_index", [4, 5, 1, 0, 2, 1]),
        "test.parquet: column 'item_index', row 3: 0: item_info holds items 1..5 (1 such rows)",
    ),
    "user outside the table": (
        changed("valid", "user_index", [0, 0, 1, 1, 2, 3]),
        "valid.parquet: column 'user_index', row 5: 3: user_info holds users 0..2 (1 such rows)",
    ),
    "seq_len beyond the history": (
        changed("train", "seq_len", [3, 1, 2, 0, 0, 0]),
        "train.parquet: column 'seq_len', row 2: 2: beyond the user's history in user_info; rebuild the split (1",
    ),
    "negative seq_len": (
        changed("train", "seq_len", [3, -1, 1, 0, 0, 0]),
        "train.parquet: column 'seq_len', row 1: -1: a length cannot be negative (1 such rows)",
    ),
    "padding inside a history": (
        changed("user_info", "full_item_seq", [[1, 2, 3], [0], []]),
        "user_info.parquet: column 'full_item_seq', user_index 1, position 0: item 0 is the padding item; "
        "take it out of the history (1 such events)",
    ),
    "unknown item in a history": (
        changed("user_info", "full_item_seq", [[1, 6, 3], [4], []]),
        "user_info.parquet: column 'full_item_seq', user_index 0, position 1: item 6 is not in item_info, "
        "whose last item_index is 5 (1 such events)",
    ),
    "negative item in a history": (
        changed("user_info", "full_item_seq", [[1, 2, -3], [4], []]),
        "user_info.parquet: column 'full_item_seq', user_index 0, position 2: item -3 is negative (1 such events)",
    ),
    "null history": (
        changed("user_info", "full_item_seq", [[1, 2, 3], None, []]),
        "user_info.parquet: column 'full_item_seq', row 1: None is null (write an empty list) (1 such rows)",
    ),
    "null inside a history": (
        changed("user_info", "full_item_seq", [[1, 2, 3], [None], []]),
        "user_info.parquet: column 'full_item_seq', row 1, position 0: None is null; fill it or drop the row",
    ),
    "histories that are no lists": (
        changed("user_info", "full_item_seq", [1, 2, 3]),
        "user_info.parquet: column 'full_item_seq' must hold lists, not Int64",
    ),
    "a label of 2": (
        changed("train", "is_click", [1, 0, 2, 0, 0, 1]),
        "train.parquet: column 'is_click', row 2: 2.0: labels must be 0 or 1 (1 such rows)",
    ),
    "a label of 0.5": (
        changed("train", "is_click", [1, 0, 0.5, 0, 0, 1]),
        "train.parquet: column 'is_click', row 2: 0.5 is not a whole number (1 such rows)",
    ),
    "a label of NaN": (
        changed("train", "is_click", [1, 0, 1, NAN, 0, 1]),
        "train.parquet: column 'is_click', row 3: nan is not a whole number (1 such rows)",
    ),
    "a null label": (
        changed("valid", "is_click", [1, 0, 1, 0, 0, None]),
        "valid.parquet: column 'is_click', row 5: None is null; fill it or drop the row (1 such rows)",
    ),
    "NaN": (
        changed("train", "age", [1, 2, NAN, 4, 5, 6]),
        "train.parquet: column 'age', row 2: nan is NaN, infinite or",
    ),
    "infinity": (
        changed("train", "age", [1, 2, 3, 4, INF, 6]),
        "train.parquet: column 'age', row 4: inf is NaN, infinite or",
    ),
    "NaN in a vector": (
        changed("item_info", "image", [[0, 0, 0], *[[1, 2, NAN]] * 5], pl.List(pl.Float64)),
        "item_info.parquet: column 'image', row 1: [1.0, 2.0, nan] holds a value that is NaN, infinite",
    ),
    "a short vector": (
        changed("item_info", "image", [[0, 0, 0], *[[1.0, 2.0, 3.0]] * 4, [1.0]], pl.List(pl.Float64)),
        "item_info.parquet: column 'image', row 5: [1.0] is not a vector of 3 numbers; build the column again",
    ),
    "vectors of another width": (
        changed("item_info", "text", [[0.0] * 5] * 6),
        "item_info.parquet: column 'text', row 0: [0.0, 0.0, 0.0, 0.0, 0.0] is not a vector of 2 numbers; most rows "
        "hold 5: set embedding_dim or pretrain_dim (6 such rows)",
    ),
    "id beyond the vocabulary": (
        changed("train", "hour", [1, 2, 3, 4, 25, 25]),
        "train.parquet: column 'hour', row 4: 25 is outside 0..24; raise the column's vocab_size (2 such rows)",
    ),
    "list id beyond the vocabulary": (
        changed("train", "topics", [[], [8], [1, 9], [1], [1], [5]]),
        "train.parquet: column 'topics', row 2, position 1: 9 is outside 0..8; raise the column's vocab_size",
    ),
    "text in an id column": (
        changed("train", "hour", list("abcdef")),
        "train.parquet: column 'hour' holds String, not numbers; encode it as numbers",
    ),
    "numbers in a list column": (
        changed("train", "topics", [1, 2, 3, 4, 5, 6]),
        "train.parquet: column 'topics' must hold lists, not Int64",
    ),
    "an empty split": (
        {**frames(), "valid": rows()[:0]},
        "valid.parquet: no rows; the valid split needs at least one impression",
    ),
    "a missing column": (
        {**frames(), "train": rows().rename({"seq_len": "seqlen"})},
        "train.parquet: no column 'seq_len' (did you mean 'seqlen'?); it has",
    ),
    "a missing label": (
        {**frames(), "test": rows().rename({"is_click": "click"})},
        "test.parquet: no column 'is_click' (did you mean 'click'?); it has",
    ),
    "a missing item column": (
        {**frames(), "item_info": items().drop("image")},
        "item_info.parquet: no column 'image'; it has item_index, item_id, tags, price, text",
    ),
    "no histories": (
        {**frames(), "user_info": users().drop("full_item_seq")},
        "user_info.parquet: no column 'full_item_seq'; it has user_index",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_data_is_refused_with_file_column_and_row(shop: Any, case: str, tmp_path: Path) -> None:
    given, message = REFUSED[case]
    with pytest.raises(DataError) as refusal:
        shop(given)
    assert f"{tmp_path}/{message}" in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("table", ["item_info", "user_info", "train", "valid", "test"])
@pytest.mark.parametrize("content", [None, b"user_index,item_index\n", b"PAR1 cut"])
def test_a_missing_or_unreadable_file_is_named(shop: Any, tmp_path: Path, table: str, content: bytes | None) -> None:
    shop(frames())
    path = tmp_path / f"{table}.parquet"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(DataError) as refusal:
        shop({})
    fault = "no such file; see data/README.md" if content is None else "not a readable parquet file ("
    assert f"{path}: {fault}" in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_path_that_is_not_configured_is_named(shop: Any) -> None:
    with pytest.raises(ConfigError, match="dataset shop: no path under 'user_info'"):
        shop(frames(), user_info=None)


def test_a_data_set_without_item_features_is_refused(shop: Any) -> None:
    with pytest.raises(ConfigError, match="dataset shop: no feature has `source: item`"):
        shop(frames(), columns=CONTEXT_FEATURES)


# ---- labels and groups -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("split", "label"), [("train", 0), ("valid", 1), ("test", 0)])
def test_a_split_of_one_class_is_refused(shop: Any, split: str, label: int, tmp_path: Path) -> None:
    dataset = shop(changed(split, "is_click", [label] * 6))
    with pytest.raises(DataError) as refusal:
        check_labels(dataset, ["AUC"])
    assert str(refusal.value) == f"{tmp_path}/{split}.parquet: every label is {label}; AUC needs clicks and non-clicks"


def test_groups_of_one_class_each_are_refused_when_a_grouped_metric_is_wanted(shop: Any, tmp_path: Path) -> None:
    dataset = shop(changed("valid", "is_click", [1, 1, 0, 0, 1, 1]))
    check_labels(dataset, ["AUC"])
    for metric in ("gAUC", "avgAUC"):
        with pytest.raises(DataError) as refusal:
            check_labels(dataset, ["AUC", metric])
        expected = "every group of 'user_index' has labels of one class, so gAUC is undefined; set another group_id, or"
        assert str(refusal.value).startswith(f"{tmp_path}/valid.parquet: {expected}")


def test_some_groups_of_one_class_are_counted_in_the_log(shop: Any, caplog: pytest.LogCaptureFixture) -> None:
    dataset = shop(changed("valid", "is_click", [1, 0, 0, 0, 1, 1]))
    with caplog.at_level("INFO"):
        check_labels(dataset, ["gAUC"])
    assert "valid: gAUC leaves out 2 of 3 groups of 'user_index', which have one class" in caplog.text


def test_a_group_column_need_not_be_a_feature_nor_a_number(shop: Any) -> None:
    given = frames()
    for name in EVERY:
        given[name] = with_column(given[name], "session", ["a", "b", "a", "b", "c", "c"])
    group = shop(given, group_id="session").splits["train"].group
    assert group[0] == group[2] != group[1] == group[3] != group[4] == group[5] and len(set(group.tolist())) == 3


def test_without_a_group_there_is_none(shop: Any) -> None:
    dataset = shop(frames(), group_id=None)
    assert dataset.splits["train"].group is None
    assert next(iter(SequenceLoader(dataset, "train", 6, 10))).group is None


# ---- every kind of feature reaches a model ---------------------------------------------------------------------------

SMALL = {"attention_dim": 4, "topk": 2, "short_seq_len": 2, "dnn_hidden_units": [8]}


@pytest.mark.parametrize("item_kind", [f["name"] for f in ITEM_FEATURES])
@pytest.mark.parametrize("context_kind", [None, *(f["name"] for f in CONTEXT_FEATURES)])
def test_every_kind_of_feature_is_embedded_and_learns(shop: Any, item_kind: str, context_kind: str | None) -> None:
    columns = [f for f in ITEM_FEATURES + CONTEXT_FEATURES if f["name"] in (item_kind, context_kind)]
    dataset = shop(frames(), columns=columns)
    torch.manual_seed(0)
    model: Any = model_zoo.TWIN(
        dataset.feature_map, item_features=dataset.item_features(), embedding_dim=4, metrics=["AUC"], **SMALL
    )
    batch = next(iter(SequenceLoader(dataset, "train", 6, 10)))
    found = model(batch)["y_pred"]
    assert found.shape == (6, 1) and bool(torch.isfinite(found).all())
    found.sum().backward()
    learned = {n.split(".")[2] for n, p in model.embedding_layer.named_parameters() if p.grad is not None}
    wanted = {item_kind, context_kind} - {None, "image"}  # image goes in as it is: nothing to learn
    assert learned == wanted
    theirs = model(longctr_batch(dataset, "train", np.arange(6), 10))["y_pred"]
    torch.testing.assert_close(theirs, found, rtol=0, atol=1e-6)  # float32 sums in another order


def test_an_embedding_without_width_has_the_experiments(shop: Any) -> None:
    column = {"name": "query", "type": "embedding"}
    assert shop(frames(), columns=[ITEM_FEATURES[0], column]).splits["train"].context["query"].shape == (6, 4)
    with pytest.raises(
        DataError, match=r"column 'query', row 0: .* is not a vector of 5 numbers; most rows hold 4: set"
    ):
        shop(frames(), columns=[ITEM_FEATURES[0], column], embedding_dim=5)
