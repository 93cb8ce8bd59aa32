"""Batches: LongCTR's tensors exactly, our own by position, and an order that is a function of seed and epoch."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import model_zoo
from model_zoo.batch import Batch
from model_zoo.pipeline.dataset import CTRDataset, Histories, load_dataset
from model_zoo.pipeline.feature_map import build_feature_map
from model_zoo.pipeline.loader import SequenceLoader, gather_histories, longctr_batch

Params = Callable[..., dict[str, Any]]
KINDS = {"pre20": "B", "pre8": "A", "post20": "B"}


@pytest.mark.parametrize("group", KINDS)
def test_longctr_batch_gives_longctrs_tensors(
    group: str, golden_params: Params, golden_arrays: dict[str, np.ndarray]
) -> None:
    spec = json.loads(str(golden_arrays[f"{group}/spec"]))
    assert spec["feature_kind"] == KINDS[group]
    params = golden_params(KINDS[group])
    dataset = load_dataset(build_feature_map(params), params)
    padding: Literal["pre", "post"] = spec["padding"]
    for number in range(3):
        rows = np.arange(number * spec["batch_size"], (number + 1) * spec["batch_size"])
        columns, items, mask = longctr_batch(dataset, "train", rows, spec["max_len"], padding)
        assert [list(columns), list(items)] == spec["key_order"]
        found = {f"batch/{name}": value for name, value in columns.items()}
        found |= {f"item/{name}": value for name, value in items.items()} | {"mask": mask}
        prefix = f"{group}/{number}/"
        recorded = {name[len(prefix) :]: golden_arrays[name] for name in golden_arrays if name.startswith(prefix)}
        assert found.keys() == recorded.keys()
        for name, value in recorded.items():
            assert found[name].numpy().dtype == value.dtype, name
            np.testing.assert_array_equal(found[name].numpy(), value, err_msg=name)


def test_the_loader_has_as_many_batches_as_longctrs(
    golden_tiny: CTRDataset, golden_arrays: dict[str, np.ndarray]
) -> None:
    spec = json.loads(str(golden_arrays["pre20/spec"]))
    assert len(SequenceLoader(golden_tiny, "train", spec["batch_size"], 20)) == spec["len_loader"]


@pytest.mark.parametrize("max_len", [1, 8, 20, 100])
@pytest.mark.parametrize("batch_size", [1, 7, 30])
def test_batches_agree_with_longctrs_position_by_position(
    golden_tiny: CTRDataset, batch_size: int, max_len: int
) -> None:
    table = golden_tiny.item_features()
    for batch in SequenceLoader(golden_tiny, "train", batch_size, max_len):
        columns, items, mask = longctr_batch(golden_tiny, "train", batch.rows.numpy(), max_len)
        assert torch.equal(batch.history > 0, mask > 0)
        assert torch.equal(batch.target, columns["item_index"].int())
        assert torch.equal(batch.label, columns["is_click"].float())
        assert torch.equal(batch.context["user_id"].long(), columns["user_id"])
        assert torch.equal(batch.context["tags"].long(), columns["tags"])
        index = torch.cat([batch.history, batch.target.unsqueeze(1)], dim=1).reshape(-1).long()
        for name, column in table.rows(index).items():
            assert torch.equal(column.to(items[name].dtype), items[name])


def test_types_and_shapes_of_a_batch(golden_tiny: CTRDataset) -> None:
    batch = next(iter(SequenceLoader(golden_tiny, "train", 7, 20)))
    assert (batch.history.dtype, batch.target.dtype, batch.label.dtype) == (torch.int32, torch.int32, torch.float32)
    assert batch.group is not None and batch.group.dtype == torch.int64 and batch.rows.tolist() == list(range(7))
    assert batch.history.shape == (7, 20) and batch.context["tags"].shape == (7, 3)


# ---- histories -------------------------------------------------------------------------------------------------------

sequences = st.lists(st.lists(st.integers(1, 99), max_size=9), min_size=1, max_size=6)


def histories_of(rows: list[list[int]]) -> Histories:
    items = np.array([item for row in rows for item in row], dtype=np.int32)
    return Histories(items, np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64))


@given(sequences, st.integers(1, 12), st.data())
@settings(derandomize=True, deadline=None, max_examples=50)
def test_a_history_is_the_newest_of_the_first_seq_len_items(
    rows: list[list[int]], max_len: int, data: st.DataObject
) -> None:
    users = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=8))
    seq_len = [data.draw(st.integers(0, len(rows[user]))) for user in users]
    found = gather_histories(histories_of(rows), np.array(users, "i4"), np.array(seq_len, "i4"), max_len)
    kept = [rows[user][:length][-max_len:] for user, length in zip(users, seq_len, strict=True)]
    width = max(len(row) for row in kept)
    assert found.dtype == np.int32 and found.tolist() == [[0] * (width - len(row)) + row for row in kept]


def test_a_batch_of_empty_histories_has_no_columns() -> None:
    histories = histories_of([[], [5, 6]])
    assert gather_histories(histories, np.array([0, 1], "i4"), np.array([0, 0], "i4"), 10).shape == (2, 0)
    no_items = histories_of([[]])
    assert gather_histories(no_items, np.array([0], "i4"), np.array([0], "i4"), 10).shape == (1, 0)


def test_a_neighbours_history_is_never_read() -> None:
    histories = histories_of([[1, 2], [3], [4, 5]])
    found = gather_histories(histories, np.array([0, 1, 2], "i4"), np.array([1, 1, 2], "i4"), 10)
    assert found.tolist() == [[0, 1], [0, 3], [4, 5]]


def literal_histories(histories: Histories, users: Any, seq_len: Any, max_len: int) -> np.ndarray:
    """One Python slice per row."""
    length = min(int(seq_len.max(initial=0)), max_len)
    found = np.zeros((len(users), length), np.int32)
    for row, (user, kept) in enumerate(zip(users, seq_len)):
        start = histories.offsets[user]
        newest = histories.items[start : start + kept][-length:] if kept and length else []
        found[row, length - len(newest) :] = newest
    return found


@pytest.mark.parametrize("max_len", [1, 7, 300, 5000])
@pytest.mark.parametrize("mapped", [False, True])
def test_long_batches_agree_with_slices(tmp_path: Path, max_len: int, mapped: bool) -> None:
    """More rows than are copied at a time, users from both ends of the array, lengths below and above ``max_len``."""
    random = np.random.default_rng(0)
    lengths = np.concatenate([[0, 3], random.integers(0, 900, 200), [0, 2]])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    histories = Histories(random.integers(1, 99, offsets[-1]).astype(np.int32), offsets)
    if mapped:
        np.save(tmp_path / "items.npy", histories.items)
        np.save(tmp_path / "offsets.npy", offsets)
        histories = Histories.mapped(str(tmp_path))
    users = np.concatenate([[0, 1, 2, 202, 203], random.integers(0, 204, 2000)]).astype(np.int32)
    seq_len = np.where(random.random(2005) < 0.5, lengths[users], random.random(2005) * (lengths[users] + 1)).astype("i4")
    found = gather_histories(histories, users, seq_len, max_len)
    np.testing.assert_array_equal(found, literal_histories(histories, users, seq_len, max_len), strict=True)


# ---- order -----------------------------------------------------------------------------------------------------------


def epoch_order(dataset: CTRDataset, seed: int, epoch: int, batch_size: int = 7) -> list[int]:
    loader = SequenceLoader(dataset, "train", batch_size, 20, shuffle=True, seed=seed)
    loader.set_epoch(epoch)
    return [row for batch in loader for row in batch.rows.tolist()]


def test_the_order_is_a_function_of_seed_and_epoch(golden_tiny: CTRDataset) -> None:
    first = epoch_order(golden_tiny, 1, 0)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    assert epoch_order(golden_tiny, 1, 0) == first
    assert epoch_order(golden_tiny, 1, 0, batch_size=30) == first
    others = [epoch_order(golden_tiny, 1, 1), epoch_order(golden_tiny, 2, 0), list(range(30))]
    assert all(other != first for other in others)
    assert all(sorted(other) == list(range(30)) for other in [first, *others])


def test_iterating_twice_without_set_epoch_repeats_the_order(golden_tiny: CTRDataset) -> None:
    loader = SequenceLoader(golden_tiny, "train", 7, 20, shuffle=True, seed=3)
    assert [b.rows.tolist() for b in loader] == [b.rows.tolist() for b in loader]


def test_without_shuffling_rows_keep_the_files_order(golden_tiny: CTRDataset) -> None:
    loader = SequenceLoader(golden_tiny, "valid", 7, 20)
    loader.set_epoch(5)
    assert [row for batch in loader for row in batch.rows.tolist()] == list(range(30))


@pytest.mark.parametrize(
    ("batch_size", "shuffle", "sizes"),
    [
        (29, True, [30]),  # a last batch of one row joins the batch before it
        (29, False, [29, 1]),
        (7, True, [7, 7, 7, 7, 2]),
        (1, True, [1] * 28 + [2]),
        (1, False, [1] * 30),
        (30, True, [30]),
        (100, True, [30]),
    ],
)
def test_a_last_training_batch_of_one_row_is_folded(
    golden_tiny: CTRDataset, batch_size: int, shuffle: bool, sizes: list[int]
) -> None:
    loader = SequenceLoader(golden_tiny, "train", batch_size, 20, shuffle=shuffle)
    found = [len(batch) for batch in loader]
    assert found == sizes and len(loader) == len(found)


# ---- what a model makes of it ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def twin(golden_tiny: CTRDataset) -> Any:
    torch.manual_seed(0)
    params = {"embedding_dim": 8, "attention_dim": 8, "topk": 4, "short_seq_len": 6, "dnn_hidden_units": [16]}
    table = golden_tiny.item_features()
    model = model_zoo.TWIN(golden_tiny.feature_map, item_features=table, batch_norm=True, **params)
    with torch.no_grad():  # FuxiCTR's start (std 1e-4) would hide differences
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.5)
        for table in (m for m in model.modules() if isinstance(m, torch.nn.Embedding)):
            table.weight[0] = 0
    return model.eval()


def by_row(model: Any, batches: list[Any], rows: list[Any]) -> np.ndarray:
    found = np.full(30, np.nan, dtype=np.float32)
    with torch.no_grad():
        for batch, places in zip(batches, rows, strict=True):
            found[places] = model(batch)["y_pred"].view(-1).numpy()
    return found


def predictions(model: Any, batches: list[Batch]) -> np.ndarray:
    return by_row(model, list(batches), [batch.rows.numpy() for batch in batches])


def test_order_batch_size_and_padding_do_not_change_predictions(golden_tiny: CTRDataset, twin: Any) -> None:
    whole = predictions(twin, list(SequenceLoader(golden_tiny, "train", 30, 20)))
    assert np.isfinite(whole).all() and whole.std() > 0.01
    for batch_size, shuffle in [(1, False), (7, False), (7, True), (30, True)]:
        found = predictions(twin, list(SequenceLoader(golden_tiny, "train", batch_size, 20, shuffle=shuffle, seed=5)))
        # float32 sums in another order: a few units in the last place of values of order 1
        np.testing.assert_allclose(found, whole, rtol=0, atol=1e-6)


@given(st.integers(1, 9))
@settings(derandomize=True, deadline=None, max_examples=5)
def test_more_padding_does_not_change_predictions(golden_tiny: CTRDataset, twin: Any, extra: int) -> None:
    batches = list(SequenceLoader(golden_tiny, "train", 30, 20))
    padded = []
    for batch in batches:
        history = torch.cat([batch.history.new_zeros(len(batch), extra), batch.history], dim=1)
        padded.append(Batch(history, batch.target, batch.context, batch.label, batch.group, batch.rows))
    np.testing.assert_allclose(predictions(twin, padded), predictions(twin, batches), rtol=0, atol=1e-6)  # as above


def test_longctrs_tuples_are_predicted_as_our_batches_are(golden_tiny: CTRDataset, twin: Any) -> None:
    ours = predictions(twin, list(SequenceLoader(golden_tiny, "train", 30, 20)))
    rows = np.arange(30)
    for padding in ("pre", "post"):
        theirs = by_row(twin, [longctr_batch(golden_tiny, "train", rows, 100, padding)], [rows])  # type: ignore[arg-type]
        reference = predictions(twin, list(SequenceLoader(golden_tiny, "train", 30, 100)))
        np.testing.assert_allclose(theirs, reference, rtol=0, atol=1e-6)  # as above
    theirs = by_row(twin, [longctr_batch(golden_tiny, "train", rows, 20)], [rows])
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-6)  # as above


@pytest.mark.parametrize("name", ["TWIN", "MoS_TWIN"])
def test_gradients_repeat_bit_for_bit_on_several_threads(tiny_dataset: CTRDataset, name: str) -> None:
    torch.manual_seed(0)
    table = tiny_dataset.item_features()
    model = getattr(model_zoo, name)(tiny_dataset.feature_map, item_features=table, embedding_dim=16, attention_dim=8)
    batch = next(iter(SequenceLoader(tiny_dataset, "train", 1500, 24)))
    found = []
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        for _ in range(4):
            model.zero_grad()
            model(batch)["y_pred"].square().sum().backward()
            found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    finally:
        torch.set_num_threads(threads)
    assert found[0]
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_a_lone_last_training_row_is_folded_without_shuffling_too(golden_tiny: CTRDataset) -> None:
    """BatchNorm cannot train on one row; evaluation keeps every batch as it is."""
    rows = len(golden_tiny.splits["train"])
    training = SequenceLoader(golden_tiny, "train", rows - 1, 20, training=True)
    assert [len(batch) for batch in training] == [rows]
    assert [len(batch) for batch in SequenceLoader(golden_tiny, "train", rows - 1, 20)] == [rows - 1, 1]
