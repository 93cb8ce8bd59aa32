"""A split read by row groups gives what the split in memory gives, refuses what it refuses, and keeps to its bound."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from conftest import in_groups
from hypothesis import given, settings
from hypothesis import strategies as st

from model_zoo.batch import Batch
from model_zoo.errors import ConfigError, DataError
from model_zoo.experiment.run import build_model, make_loaders
from model_zoo.pipeline import columns, parquet_files
from model_zoo.pipeline.baselines import popularity_baselines
from model_zoo.pipeline.dataset import CTRDataset, Split, check_labels, load_dataset
from model_zoo.pipeline.feature_map import build_feature_map
from model_zoo.pipeline.loader import SequenceLoader, longctr_batch
from model_zoo.pipeline.streaming import StreamedSplit, batches_of

FILES = ("train_data", "valid_data", "test_data", "user_info")
Params = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def chunked(tiny_params: Params, tmp_path_factory: pytest.TempPathFactory) -> Params:
    """``chunked(**changes)``: parameters of the tiny data set, its files written in row groups of 97 rows."""
    folder = tmp_path_factory.mktemp("chunked")
    files = {}
    for name in FILES:
        path = tiny_params()[name]
        path = path if path.endswith(".parquet") else f"{path}.parquet"
        in_groups(pl.read_parquet(path), folder / f"{name}.parquet", 97)
        files[name] = str(folder / f"{name}.parquet")

    def make(**changes: Any) -> dict[str, Any]:
        return {**tiny_params(**changes), **files, "data_root": str(folder)}

    return make


@pytest.fixture(scope="module")
def streamed(chunked: Params) -> CTRDataset:
    params = chunked(memory_limit_mib=8)
    found = load_dataset(build_feature_map(params), params)
    for name, split in found.splits.items():
        assert isinstance(split, StreamedSplit) and len(split.bounds) > 4, name
    return found


def with_block(dataset: CTRDataset, rows: int) -> CTRDataset:
    """The data set with another number of rows shuffled together."""
    splits = {name: replace(split, block_rows=rows) for name, split in dataset.splits.items()}  # type: ignore[type-var]
    return replace(dataset, splits=splits)


def assert_same(found: Batch, expected: Batch) -> None:
    for name in ("history", "target", "label", "group", "rows"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert found.context.keys() == expected.context.keys()
    assert all(torch.equal(found.context[name], column) for name, column in expected.context.items())


# ---- the same rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [64, 97, 250, 5000])
def test_evaluation_has_the_files_order(streamed: CTRDataset, tiny_dataset: CTRDataset, batch_size: int) -> None:
    found = SequenceLoader(streamed, "valid", batch_size, 20)
    expected = list(SequenceLoader(tiny_dataset, "valid", batch_size, 20))
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("block_rows", [1, 97, 300, 10**6])
def test_training_reads_every_row_once_and_each_as_it_is(
    streamed: CTRDataset, tiny_dataset: CTRDataset, block_rows: int
) -> None:
    loader = SequenceLoader(with_block(streamed, block_rows), "train", 128, 20, shuffle=True, seed=3)
    whole = SequenceLoader(tiny_dataset, "train", 128, 20)
    batches = list(loader)
    assert [len(batch) for batch in batches] == [len(batch) for batch in whole] and len(batches) == len(loader)
    rows = torch.cat([batch.rows for batch in batches])
    assert torch.equal(rows.sort().values, torch.arange(len(rows)))
    for batch in batches:
        assert_same(batch, whole.batch(batch.rows.numpy()))


def rows_of(dataset: CTRDataset, seed: int, epoch: int, batch_size: int = 128) -> list[int]:
    loader = SequenceLoader(dataset, "train", batch_size, 20, shuffle=True, seed=seed)
    loader.set_epoch(epoch)
    return [row for batch in loader for row in batch.rows.tolist()]


def test_the_order_is_a_function_of_seed_and_epoch_and_mixes_row_groups(streamed: CTRDataset) -> None:
    dataset = with_block(streamed, 300)
    first = rows_of(dataset, 1, 0)
    assert rows_of(dataset, 1, 0) == first == rows_of(dataset, 1, 0, batch_size=50)
    assert rows_of(dataset, 1, 1) != first and rows_of(dataset, 2, 0) != first
    block = np.array(first[:291]) // 97  # three row groups
    assert len(set(block.tolist())) == 3 and len(set(block[:97].tolist())) == 3
    assert sorted(set(block.tolist())) != [0, 1, 2]


def test_a_lone_last_row_is_folded(streamed: CTRDataset) -> None:
    rows = len(streamed.splits["train"])
    for shuffle in (True, False):
        loader = SequenceLoader(streamed, "train", rows - 1, 20, shuffle=shuffle, training=True)
        assert [len(batch) for batch in loader] == [rows] and len(loader) == 1
    assert [len(batch) for batch in SequenceLoader(streamed, "train", rows - 1, 20)] == [rows - 1, 1]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 12))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_batches_of_any_size_from_blocks_of_any_size(blocks: list[int], batch_size: int) -> None:
    rows, empty = sum(blocks), np.zeros(0, np.int32)
    whole = Split("train", "", empty, empty, empty, np.zeros(rows, np.float32), {}, None, np.arange(rows))
    whole = replace(whole, **{name: np.arange(rows, dtype=np.int32) for name in ("user_index", "item_index", "seq_len")})
    edges = np.cumsum([0, *blocks])
    parts = [(whole.take(np.arange(a, b)), np.arange(b - a)[::-1].copy()) for a, b in pairwise(edges)]
    sizes = np.diff([*range(0, rows, batch_size), rows]).tolist()
    found = list(batches_of(iter(parts), sizes))
    assert [len(batch) for batch in found] == sizes
    expected = [row for a, b in pairwise(edges) for row in range(b - 1, a - 1, -1)]
    assert [row for batch in found for row in batch.item_index.tolist()] == expected


def test_picking_rows_of_a_streamed_split_is_refused(streamed: CTRDataset) -> None:
    with pytest.raises(ConfigError, match="leave memory_limit_mib out"):
        SequenceLoader(streamed, "train", 10, 20).batch(np.arange(3))
    with pytest.raises(ConfigError, match="leave memory_limit_mib out"):
        longctr_batch(streamed, "train", np.arange(3), 20)


def test_whoever_needs_whole_columns_gets_the_same_answer(
    streamed: CTRDataset, tiny_dataset: CTRDataset, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = ["AUC", "gAUC", "logloss"]
    for name in ("valid", "test"):
        assert popularity_baselines(streamed, name, metrics) == popularity_baselines(tiny_dataset, name, metrics)
    said = []
    for dataset in (streamed, tiny_dataset):
        caplog.clear()
        with caplog.at_level("INFO"):
            check_labels(dataset, metrics)
        said.append(caplog.messages[:])
    assert said[0] == said[1]


def test_a_model_scores_streamed_data_as_data_in_memory(chunked: Params, tiny_dataset: CTRDataset) -> None:
    params = chunked(memory_limit_mib=8)
    dataset = load_dataset(build_feature_map(params), params)
    model = build_model(params, dataset.feature_map, dataset)
    found = model.evaluate(make_loaders(dataset, params)["valid"])
    assert found == model.evaluate(make_loaders(tiny_dataset, params)["valid"])


# ---- the same checks ---------------------------------------------------------------------------------------------------


def spoiled(chunked: Params, folder: Path, name: str, row: int, value: Any) -> dict[str, Any]:
    """Parameters whose training file has another value in one row."""
    table = pl.read_parquet(chunked()["train_data"])
    values = table[name].to_list()
    values[row] = value
    path = folder / "train.parquet"
    in_groups(table.with_columns(pl.Series(name, values, strict=False)), path, 97)
    return {**chunked(memory_limit_mib=8), "train_data": str(path)}


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("item_index", 10**6, "item_info holds items"),
        ("user_index", -1, "user_info holds users"),
        ("seq_len", 10**5, "beyond the user's history"),
        ("user_index", None, "is null"),
    ],
)
def test_rows_are_named_by_their_number_in_the_file(
    chunked: Params, tmp_path: Path, name: str, value: Any, reason: str
) -> None:
    params = spoiled(chunked, tmp_path, name, 200, value)
    with pytest.raises(DataError, match=rf"train.parquet: column '{name}', row 200: .*{reason}.* in its row group\)"):
        load_dataset(build_feature_map(params), params)


GROUPS: dict[str, list[Any]] = {
    "text": ["b", "a", "c", "a", "zz", "b", "a"],
    "fractions": [0.5, 2.0, 0.25, 0.5, 3.0, 2.0, -1.5],
    "whole floats": [3.0, 1.0, 3.0, 2.0, 1.0, 9.0, 3.0],
    "hashes": [2**64 - 1, 5, 2**64 - 1, 2**63, 5, 1, 2**63],
    "small unsigned": [7, 5, 7, 6, 5, 1, 6],
    "booleans": [True, False, True, True, False, False, True],
    "whole numbers": [5, -3, 5, 5, 0, 1, 5],
}


@pytest.mark.parametrize("kind", GROUPS)
def test_groups_have_the_same_numbers_in_parts(tmp_path: Path, kind: str) -> None:
    dtype = pl.UInt64 if kind in ("hashes", "small unsigned") else None
    series = pl.Series("session", GROUPS[kind], dtype=dtype)
    path = str(tmp_path / "file.parquet")
    in_groups(pl.DataFrame([series]), path, 2)
    bounds = parquet_files.row_groups(path)
    assert bounds == [0, 2, 4, 6, 7]
    distinct = columns.distinct_groups(path, "session", bounds)
    assert (distinct is None) == (kind == "whole numbers")
    parts = [columns.groups(series[a:b], path, distinct) for a, b in pairwise(bounds)]
    np.testing.assert_array_equal(np.concatenate(parts), columns.groups(series, path), strict=True)


@pytest.mark.parametrize("value", [None, float("nan")])
def test_a_missing_group_is_named_by_its_row(chunked: Params, tmp_path: Path, value: Any) -> None:
    table = pl.read_parquet(chunked()["train_data"])
    session = [0.5] * 150 + [value] + [1.5] * (table.height - 151)
    path = tmp_path / "train.parquet"
    in_groups(table.with_columns(pl.Series("session", session)), path, 97)
    params = {**chunked(memory_limit_mib=8, group_id="session"), "train_data": str(path)}
    for name in ("valid_data", "test_data"):
        params[name] = str(path)
    with pytest.raises(DataError, match=r"column 'session', row 150: .* give every row a group"):
        load_dataset(build_feature_map(params), params)


def test_a_bound_below_one_row_group_is_refused_with_the_bound_that_does(tmp_path: Path, chunked: Params) -> None:
    table = pl.read_parquet(chunked()["train_data"])
    path = tmp_path / "train.parquet"
    in_groups(pl.concat([table] * 60), path, 10**6)
    params = {**chunked(memory_limit_mib=1), "train_data": str(path)}
    with pytest.raises(ConfigError, match=r"memory_limit_mib: 1: the largest row group of train.parquet") as error:
        load_dataset(build_feature_map(params), params)
    needed = int(str(error.value).split(" needs ")[1].split(";")[0])
    params["memory_limit_mib"] = needed
    assert len(load_dataset(build_feature_map(params), params).splits["train"]) == 60 * table.height
    params["memory_limit_mib"] = needed - 1
    with pytest.raises(ConfigError, match=f"needs {needed}"):
        load_dataset(build_feature_map(params), params)


# ---- other processes -----------------------------------------------------------------------------------------------------


def test_data_sets_and_loaders_go_to_other_processes(streamed: CTRDataset, tiny_dataset: CTRDataset) -> None:
    for dataset in (streamed, tiny_dataset):
        loader = SequenceLoader(dataset, "valid", 500, 20, prefetch=2)
        copy = pickle.loads(pickle.dumps(loader))
        for ours, theirs in zip(copy, loader, strict=True):
            assert_same(ours, theirs)
        assert pickle.loads(pickle.dumps(dataset)).num_items == dataset.num_items
