"""Pretrained vectors: placed by id from .h5 and .npz files, used as ``pretrain_usage`` says, refused if unfit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

import model_zoo
from model_zoo.errors import ConfigError, DataError
from model_zoo.pipeline.dataset import CTRDataset
from model_zoo.pipeline.feature_map import build_feature_map
from model_zoo.pipeline.loader import SequenceLoader
from model_zoo.pipeline.pretrained_vectors import load_pretrained, read_vectors
from model_zoo.sequential_ctr import build_embedding

KEYS = np.array([3, 1, 59])
VALUES = np.arange(1, 13, dtype=np.float64).reshape(3, 4)


def write(path: Path, key: Any = KEYS, value: Any = VALUES) -> str:
    if path.suffix == ".npz":
        np.savez(path, key=key, value=value)
    else:
        with h5py.File(path, "w") as file:
            file["key"], file["value"] = key, value
    return str(path)


@pytest.mark.parametrize("name", ["v.h5", "v.hdf5", "v.npz"])
@pytest.mark.parametrize("key_type", [np.int64, np.int32, np.float64])
def test_vectors_are_placed_by_id(tmp_path: Path, name: str, key_type: Any) -> None:
    vectors, known = read_vectors(write(tmp_path / name, KEYS.astype(key_type)), "item_id", 60, 4)
    expected = np.zeros((60, 4), np.float32)
    expected[KEYS] = VALUES
    assert vectors.dtype == torch.float32 and vectors.numpy().tolist() == expected.tolist()
    assert known.nonzero().squeeze(1).tolist() == [1, 3, 59]


def test_ids_may_be_text_that_spells_integers(tmp_path: Path) -> None:
    assert read_vectors(write(tmp_path / "v.npz", KEYS.astype(str)), "item_id", 60, 4)[1].sum() == 3
    assert read_vectors(write(tmp_path / "v.h5", KEYS.astype("S")), "item_id", 60, 4)[1].sum() == 3


def test_the_padding_ids_vector_is_zero(tmp_path: Path) -> None:
    vectors, _ = read_vectors(write(tmp_path / "v.npz", np.array([0, 1, 2])), "item_id", 60, 4)
    assert vectors[0].abs().sum() == 0 and vectors[1].tolist() == VALUES[1].tolist()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "width": ({"value": VALUES[:, :3]}, "'value' is (3, 3), feature 'item_id' needs (3, 4); set pretrain_dim"),
    "rows": ({"value": VALUES[:2]}, "'value' is (2, 4), feature 'item_id' needs (3, 4)"),
    "flat": ({"value": VALUES.reshape(-1)}, "'value' is (12,), feature 'item_id' needs (3, 4)"),
    "twice": ({"key": np.array([1, 1, 2])}, "'key' holds an id twice"),
    "beyond": ({"key": np.array([1, 2, 60])}, "'key' holds an id outside 0..59; vocab_size of 'item_id' is too small"),
    "negative": ({"key": np.array([1, 2, -1])}, "'key' holds an id outside 0..59"),
    "words": ({"key": np.array(["a", "b", "c"])}, "'key' must hold the feature's integer ids, not <U1"),
    "NaN": ({"value": np.where(VALUES == 6, np.nan, VALUES)}, "'value' holds a NaN or infinite number"),
    "infinite": ({"value": np.where(VALUES == 6, np.inf, VALUES)}, "'value' holds a NaN or infinite number"),
    "beyond float32": ({"value": np.where(VALUES == 6, 1e300, VALUES)}, "'value' holds a NaN or infinite number"),
    "text values": ({"value": VALUES.astype(str)}, "'value' must hold numbers, not"),
    "fractions": ({"key": np.array([1.5, 2.0, 3.0])}, "'key' must hold the feature's integer ids, not 1.5"),
    "NaN key": ({"key": np.array([1.0, np.nan, 3.0])}, "'key' must hold the feature's integer ids, not nan"),
    "two-dimensional keys": ({"key": KEYS.reshape(3, 1)}, "'key' must be one id per vector, not of shape (3, 1)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str, tmp_path: Path) -> None:
    given, message = REFUSED[case]
    path = write(tmp_path / "v.npz", **given)
    with pytest.raises(DataError) as refusal:
        read_vectors(path, "item_id", 60, 4)
    assert f"{path}: {message}" in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["v.h5", "v.npz"])
def test_a_missing_broken_or_incomplete_file_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    with pytest.raises(DataError, match=r"v\..*: no such file \(pretrained_emb of feature 'item_id'\)"):
        read_vectors(str(path), "item_id", 60, 4)
    whole = Path(write(path)).read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"needs readable arrays 'key' .* and 'value'") as refusal:
            read_vectors(str(path), "item_id", 60, 4)
        assert "\n" not in str(refusal.value)
    path.unlink()
    if name == "v.npz":
        np.savez(path, keys=KEYS, value=VALUES)
    else:
        with h5py.File(path, "w") as file:
            file["keys"], file["value"] = KEYS, VALUES
    with pytest.raises(DataError, match="needs readable arrays 'key'"):
        read_vectors(str(path), "item_id", 60, 4)


def test_pickled_arrays_are_never_loaded(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="needs readable arrays"):
        read_vectors(write(tmp_path / "v.npz", np.array([1, "a", None], dtype=object)), "item_id", 60, 4)


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "v.csv").write_text("1,2\n")
    with pytest.raises(DataError, match=r"v\.csv: pretrained_emb of feature 'item_id' must be an \.h5 or \.npz file"):
        read_vectors(str(tmp_path / "v.csv"), "item_id", 60, 4)


# ---- in a model ------------------------------------------------------------------------------------------------------

Params = Callable[..., dict[str, Any]]
WIDTH = 4


@pytest.fixture
def table(tmp_path: Path) -> tuple[str, np.ndarray]:
    """Vectors for items 1 .. 49 of 59."""
    values = np.random.default_rng(0).normal(size=(49, WIDTH))
    return write(tmp_path / "v.npz", np.arange(1, 50), values), values.astype(np.float32)


def model_of(golden_params: Params, dataset: CTRDataset, path: str, **more: Any) -> Any:
    params = golden_params("B")
    spec = {
        "name": "item_id",
        "type": "categorical",
        "source": "item",
        "vocab_size": 60,
        "pretrained_emb": path,
        **more,
    }
    columns = [spec if column["name"] == "item_id" else column for column in params["feature_cols"]]
    feature_map = build_feature_map({**params, "feature_cols": columns})
    torch.manual_seed(0)
    small = {"embedding_dim": 8, "attention_dim": 4, "topk": 2, "short_seq_len": 2, "dnn_hidden_units": [8]}
    return model_zoo.TWIN(
        feature_map, item_features=dataset.item_features(), pretrained=load_pretrained(feature_map, 8), **small
    )


@pytest.mark.parametrize("usage", ["init", "sum", "concat"])
@pytest.mark.parametrize("width", [None, WIDTH])
@pytest.mark.parametrize("freeze", [True, False])
def test_vectors_are_used_and_frozen_as_configured(
    usage: str, width: int | None, freeze: bool, golden_params: Params, golden_tiny: CTRDataset, tmp_path: Path
) -> None:
    values = np.random.default_rng(0).normal(size=(49, width or 8)).astype(np.float32)
    path = write(tmp_path / "v.npz", np.arange(1, 50), values)
    more = {"pretrain_usage": usage, "freeze_emb": freeze} | ({"pretrain_dim": width} if width else {})
    model = model_of(golden_params, golden_tiny, path, **more)
    layer = model.embedding_layer.embedding_layer.embedding_layers["item_id"]
    vectors = layer.pretrain_embedding.weight
    assert vectors[1:50].detach().numpy().tolist() == values.tolist() and vectors[0].abs().sum() == 0
    unknown = vectors[50:].detach().abs()
    assert float(unknown.max()) < 1e-3 and bool((unknown == 0).all()) == freeze
    ids = torch.tensor([0, 1, 49, 55])
    projected = vectors[ids]
    if usage == "concat":
        projected = torch.cat([projected, layer.id_embedding.weight[ids]], dim=1)
    if width or usage == "concat":
        projected = projected @ layer.proj.weight.T
    if usage == "sum":
        projected = projected + layer.id_embedding.weight[ids]
    assert layer(ids).shape == (4, 8)
    torch.testing.assert_close(layer(ids), projected, rtol=0, atol=1e-6)  # one float32 product of 16 terms
    batch = next(iter(SequenceLoader(golden_tiny, "train", 30, 20)))
    model(batch)["y_pred"].sum().backward()
    assert (vectors.grad is None) == freeze
    assert (layer.id_embedding is None) == (usage == "init")
    assert usage == "init" or float(layer.id_embedding.weight.grad.abs().sum()) > 0


def test_a_relative_path_is_taken_below_the_data_sets_folder(golden_params: Params, tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    write(tmp_path / "tiny" / "v.npz", np.arange(1, 50), np.ones((49, 8)))
    spec = {"name": "a", "type": "categorical", "source": "item", "vocab_size": 60, "pretrained_emb": "v.npz"}
    feature_map = build_feature_map(golden_params("A", feature_cols=[spec], data_root=str(tmp_path)))
    vectors, known = load_pretrained(feature_map, 8)["a"]
    assert vectors.shape == (60, 8) and int(known.sum()) == 49


def test_a_model_without_its_vectors_is_refused(golden_params: Params, table: tuple[str, np.ndarray]) -> None:
    spec = {"name": "a", "type": "categorical", "source": "item", "vocab_size": 60, "pretrained_emb": table[0]}
    feature_map = build_feature_map(golden_params("A", feature_cols=[spec]))
    with pytest.raises(ConfigError, match="a: pretrained_emb is set, but its vectors were not loaded"):
        model_zoo.TWIN(feature_map, embedding_dim=8)


def test_a_feature_that_shares_the_table_shares_the_vectors(
    golden_params: Params, table: tuple[str, np.ndarray]
) -> None:
    spec = {"name": "a", "type": "categorical", "source": "item", "vocab_size": 60, "pretrained_emb": table[0]}
    other = {"name": "b", "type": "categorical", "vocab_size": 60, "share_embedding": "a"}
    spec["pretrain_dim"] = WIDTH
    feature_map = build_feature_map(golden_params("A", feature_cols=[spec, other]))
    layer = build_embedding(feature_map, 8, load_pretrained(feature_map, 8))
    ids = torch.arange(60)
    found = layer({"a": ids, "b": ids}, flatten_emb=False)
    assert torch.equal(found[:, 0], found[:, 1]) and float(found.detach().abs().sum()) > 0


def test_frozen_vectors_do_not_move_in_training_and_free_ones_do(
    golden_params: Params, golden_tiny: CTRDataset, table: tuple[str, np.ndarray], tmp_path: Path
) -> None:
    for freeze in (True, False):
        model = model_of(golden_params, golden_tiny, table[0], pretrain_dim=WIDTH, freeze_emb=freeze)
        model.place_checkpoints(str(tmp_path / str(freeze)))
        vectors = model.embedding_layer.embedding_layer.embedding_layers["item_id"].pretrain_embedding.weight
        before = vectors.detach().clone()
        loader = SequenceLoader(golden_tiny, "train", 10, 20, shuffle=True)
        model.fit(loader, epochs=1, validation_data=SequenceLoader(golden_tiny, "valid", 30, 20))
        assert torch.equal(vectors, before) == freeze
        assert vectors[0].abs().sum() == 0
