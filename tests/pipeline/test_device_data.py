"""Batches for an accelerator: gathered where the split lies, or copied there ahead, equal to those made on the CPU."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_zoo.batch import Batch
from model_zoo.errors import ConfigError
from model_zoo.experiment.run import build_model, make_loaders
from model_zoo.pipeline import resident
from model_zoo.pipeline.dataset import CTRDataset, Histories, load_dataset
from model_zoo.pipeline.device_data import transferred
from model_zoo.pipeline.feature_map import build_feature_map
from model_zoo.pipeline.loader import SequenceLoader, gather_histories
from model_zoo.pipeline.resident import ResidentHistories, ResidentLoader, resident_splits

CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
Params = Callable[..., dict[str, Any]]


def assert_same(found: Batch, expected: Batch) -> None:
    for name in ("history", "target", "label", "group", "rows"):
        ours, theirs = getattr(found, name).cpu(), getattr(expected, name)
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name
    assert found.context.keys() == expected.context.keys()
    assert all(torch.equal(found.context[name].cpu(), column) for name, column in expected.context.items())


@given(st.lists(st.lists(st.integers(1, 99), max_size=9), min_size=1, max_size=6), st.integers(1, 12), st.data())
@settings(derandomize=True, deadline=None, max_examples=50)
def test_histories_are_gathered_on_a_device_as_on_the_cpu(
    rows: list[list[int]], max_len: int, data: st.DataObject
) -> None:
    items = np.array([item for row in rows for item in row], dtype=np.int32)
    histories = Histories(items, np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64))
    users = np.array(data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=8)), np.int32)
    seq_len = np.array([data.draw(st.integers(0, len(rows[user]))) for user in users], np.int32)
    expected = torch.from_numpy(gather_histories(histories, users, seq_len, max_len))
    there = ResidentHistories.of(histories, CPU)
    found = there.newest(torch.from_numpy(users), torch.from_numpy(seq_len), expected.shape[1])
    assert found.dtype == torch.int32 and torch.equal(found, expected)


def assert_resident(dataset: CTRDataset, device: torch.device) -> None:
    for shuffle, batch_size in ((True, 128), (False, 1), (True, len(dataset.splits["train"]) - 1)):
        arguments: Any = {"shuffle": shuffle, "seed": 3, "training": shuffle}
        plain = SequenceLoader(dataset, "train", batch_size, 20, **arguments)
        there = ResidentLoader(dataset, "train", batch_size, 20, device=device, **arguments)
        assert len(there) == len(plain)
        for epoch in (0, 2):
            plain.set_epoch(epoch)
            there.set_epoch(epoch)
            for ours, theirs in zip(there, plain, strict=True):
                assert ours.target.device == ours.history.device == device == ours.label.device
                assert ours.rows.device == CPU and ours.group is not None and ours.group.device == CPU
                assert_same(ours, theirs)
    chosen = np.array([5, 1, 5])
    assert_same(there.batch(chosen), plain.batch(chosen))


def test_a_split_on_its_device_yields_the_loaders_batches(golden_tiny: CTRDataset) -> None:
    assert_resident(golden_tiny, CPU)


def test_copies_come_in_order_one_ahead(golden_tiny: CTRDataset) -> None:
    made: list[int] = []

    def batches() -> Iterator[Batch]:
        for number, batch in enumerate(SequenceLoader(golden_tiny, "train", 7, 20)):
            made.append(number)
            yield batch

    used = []
    for number, batch in enumerate(transferred(batches(), CPU)):
        assert made[-1] == min(number + 1, 4)  # the next is under way
        used.append(batch)
    for ours, theirs in zip(used, SequenceLoader(golden_tiny, "train", 7, 20), strict=True):
        assert_same(ours, theirs)
    assert list(transferred(iter([]), CPU)) == []


def test_what_is_kept_on_the_device(golden_tiny: CTRDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resident_splits(golden_tiny, CPU, "auto") == [] == resident_splits(golden_tiny, CPU, False)
    assert resident_splits(golden_tiny, CPU, True) == ["train", "valid", "test"]
    gpu = torch.device("cuda", 0)
    histories, split = golden_tiny.histories.items.nbytes, golden_tiny.splits["train"].nbytes  # type: ignore[union-attr]
    for room, expected in (
        (0, []),
        (histories + split - 1, []),
        (histories + split, ["train"]),
        (histories + 3 * split - 1, ["train", "valid"]),
        (histories + 3 * split, ["train", "valid", "test"]),
    ):
        free = int(room / resident.DATA_SHARE)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10 * free))
        assert resident_splits(golden_tiny, gpu, "auto") == expected
        assert resident_splits(golden_tiny, gpu, False) == []


def test_an_experiments_loaders_follow_the_setting(tiny_params: Params, tiny_dataset: CTRDataset) -> None:
    for setting, kind in ((True, ResidentLoader), (False, SequenceLoader), ("auto", SequenceLoader)):
        loaders = make_loaders(tiny_dataset, tiny_params(data_on_device=setting))
        assert {type(loader) for loader in loaders.values()} == {kind}
        assert loaders["train"].shuffle and not loaders["valid"].shuffle
    assert {loader.prefetch for loader in loaders.values()} == {0}
    assert {loader.prefetch for loader in make_loaders(tiny_dataset, tiny_params(prefetch=3)).values()} == {3}
    kept = make_loaders(tiny_dataset, tiny_params(data_on_device=True))
    assert len({id(loader.on_device) for loader in kept.values()}) == 1  # type: ignore[attr-defined]


def test_training_ends_at_the_same_weights_whichever_way_the_data_come(tiny_params: Params, tmp_path: Path) -> None:
    ends = []
    for ways in ({}, {"prefetch": 2}, {"data_on_device": True}, {"memory_limit_mib": 64, "prefetch": 1}):
        params = tiny_params(batch_size=300, shuffle=False, verbose=0, **ways)
        dataset = load_dataset(build_feature_map(params), params)
        torch.manual_seed(0)
        model = build_model(params, dataset.feature_map, dataset)
        model.place_checkpoints(str(tmp_path))
        loaders = make_loaders(dataset, params)
        model.fit(loaders["train"], epochs=1, validation_data=loaders["valid"])
        ends.append((model.state_dict(), model.history[-1]["valid"]))
    for weights, scores in ends[1:]:
        assert scores == ends[0][1]
        assert all(torch.equal(weights[name], value) for name, value in ends[0][0].items())


def test_streamed_data_on_the_device_whole_are_refused(tiny_params: Params) -> None:
    params = tiny_params(memory_limit_mib=64, data_on_device=True)
    dataset = load_dataset(build_feature_map(params), params)
    with pytest.raises(ConfigError, match="data_on_device: True needs whole splits in memory"):
        make_loaders(dataset, params)


@pytest.mark.parametrize(
    ("key", "value"), [("memory_limit_mib", 0), ("prefetch", -1), ("prefetch", 1.5), ("data_on_device", "some")]
)
def test_wrong_settings_are_refused(tiny_params: Params, key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=key):
        tiny_params(**{key: value})


@needs_cuda
def test_a_split_on_cuda_yields_the_loaders_batches(golden_tiny: CTRDataset) -> None:
    assert_resident(golden_tiny, torch.device("cuda", 0))


@needs_cuda
@pytest.mark.parametrize("prefetch", [0, 2])
def test_batches_copied_to_cuda_are_the_loaders(tiny_dataset: CTRDataset, prefetch: int) -> None:
    device = torch.device("cuda", 0)
    plain = SequenceLoader(tiny_dataset, "train", 200, 20, shuffle=True)
    there = SequenceLoader(tiny_dataset, "train", 200, 20, shuffle=True, device=device, prefetch=prefetch)
    kept = list(there)
    busy = torch.randn(2000, 2000, device=device)
    for batch in there:  # work that a copy into memory in use would disturb
        busy = busy @ busy.softmax(1)
        assert batch.target.device == device
    for ours, theirs in zip(kept, plain, strict=True):
        assert_same(ours, theirs)
