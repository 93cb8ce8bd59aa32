"""Runs repeat bit for bit: with one seed, whatever the loader's threads, torch's threads and python's hashes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_files import TINY_MAX_LEN, small_model
from golden_files import tiny_dataset as golden_dataset
from torch import Tensor

from model_zoo.compat import seed_everything
from model_zoo.determinism import WORKSPACE_VARIABLE, deterministic_errors, use_deterministic_kernels
from model_zoo.errors import ConfigError
from model_zoo.experiment.run import build_model, make_loaders
from model_zoo.layers.item_rows import Entries, pool_rows
from model_zoo.pipeline.dataset import CTRDataset
from model_zoo.pipeline.loader import SequenceLoader
from model_zoo.registry import BACKBONES, METHODS, model_keys

#: every backbone, and every method over attention and over hashing
NAMES = [*BACKBONES, *(f"{method}_{name}" for method in METHODS for name in ("TWIN", "SDIM"))]
OVER_TWIN = ["TWIN", *(f"{method}_TWIN" for method in METHODS)]

State = dict[str, Tensor]


def trained(name: str, folder: Path, seed: int = 3, prefetch: int = 0) -> tuple[State, list[Any]]:
    """Weights, and each evaluation's loss and metrics, of a small model after an epoch a phase, with dropout."""
    dropout = {key: 0.2 for key in model_keys(name) if key.endswith("dropout")}
    model = small_model(name, folder, seed=seed, **dropout)

    def batches(split: str) -> SequenceLoader:
        train = split == "train"
        return SequenceLoader(golden_dataset(), split, 10, TINY_MAX_LEN, train, seed, training=train, prefetch=prefetch)

    seed_everything(seed)
    model.fit(batches("train"), epochs=1, validation_data=batches("valid"))
    history = [(entry["phase"], entry["step"], entry["train_loss"], entry["valid"]) for entry in model.history]
    return model.state_dict(), history


def differing(found: State, wanted: State) -> list[str]:
    """Names of the tensors that are not the same bit for bit."""
    assert found.keys() == wanted.keys()
    return [name for name, value in wanted.items() if not torch.equal(found[name], value)]


@pytest.mark.parametrize("name", NAMES)
def test_a_training_repeats(name: str, tmp_path: Path) -> None:
    once, history = trained(name, tmp_path)
    torch.rand(7)  # what was drawn before must not matter
    again, again_history = trained(name, tmp_path)
    assert differing(again, once) == [] and again_history == history


@pytest.mark.parametrize("name", OVER_TWIN)
def test_another_seed_gives_another_training_and_batches_made_ahead_do_not(name: str, tmp_path: Path) -> None:
    once, history = trained(name, tmp_path)
    for prefetch in (1, 4):
        again, again_history = trained(name, tmp_path, prefetch=prefetch)
        assert differing(again, once) == [] and again_history == history
    other, other_history = trained(name, tmp_path, seed=4)
    assert differing(other, once) and other_history != history


# ---- compute threads -------------------------------------------------------------------------------------------------


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Chooses the number of compute threads; it is as it was afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_sums_over_item_rows_do_not_depend_on_the_number_of_threads(threads: Callable[[int], None]) -> None:
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(0, 2_000, (256, 200), generator=generator)
    items = torch.randn(2_000, 32, generator=generator, requires_grad=True)
    left, weight = torch.randn(256, 32, generator=generator), torch.rand(256, 200, generator=generator)
    weight = torch.where(weight > 0.5, weight, 0)
    found = []
    for number in (1, 2, 3):
        threads(number)
        pooled = pool_rows(items, index, weight)
        dots = Entries(index, weight > 0).dots(left, items.detach())
        found.append([dots, pooled, *torch.autograd.grad(pooled, items, left)])
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, found[0]))


def test_gradients_on_two_threads_repeat(
    threads: Callable[[int], None], tiny_params: Callable[..., Any], tiny_dataset: CTRDataset
) -> None:
    threads(2)  # with another number whole sums, as those of a loss or of BatchNorm, end in other bits
    params = tiny_params("MoS_TWIN_tiny", batch_size=1_000, net_dropout=0.2, attention_dropout=0.2)
    batch = next(iter(make_loaders(tiny_dataset, params)["train"]))
    found = []
    for _ in range(2):
        seed_everything(7)
        model = build_model(params, tiny_dataset.feature_map, tiny_dataset).train()
        model.compute_loss(model(batch), model.get_labels(batch)).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None} | model.state_dict())
    assert len(found[0]) > 40 and differing(found[1], found[0]) == []


# ---- a run of its own process ----------------------------------------------------------------------------------------


def test_pythons_hash_seed_does_not_matter(
    run_expid: Callable[..., Any], tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ("max_len=8", "kmeans_tokens=200", "batch_size=500", "prefetch=2")
    arguments = [part for setting in small for part in ("--set", setting)]
    found = []
    for number in ("0", "1"):
        monkeypatch.setenv("PYTHONHASHSEED", number)
        runs = tmp_path / number
        answer = run_expid("--config", tiny_config, "--expid", "MoS_TWIN_tiny", *arguments, "--set", f"model_root={runs}")
        assert answer.code == 0, answer.err
        [path] = runs.glob("tiny/*/*/metrics.json")
        metrics = json.loads(path.read_text())
        losses = [entry["train_loss"] for entry in metrics["history"]]
        found.append((metrics["scores"], losses, metrics["codebook_usage"]))
    assert found[0] == found[1]


# ---- --deterministic -------------------------------------------------------------------------------------------------


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """torch's choice of kernels as it was, afterwards."""
    monkeypatch.setenv(WORKSPACE_VARIABLE, "")  # so that it is put back if it is set meanwhile
    monkeypatch.delenv(WORKSPACE_VARIABLE)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    yield monkeypatch
    torch.use_deterministic_algorithms(False)


def test_on_the_cpu_nothing_is_switched(kernels: pytest.MonkeyPatch) -> None:
    before = torch.backends.cudnn.benchmark
    said = use_deterministic_kernels(torch.device("cpu"))
    assert "on the CPU results repeat bit for bit" in said and "costs nothing" in said
    assert not torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.benchmark == before


def test_on_cuda_torch_is_told_and_the_cost_is_said(kernels: pytest.MonkeyPatch) -> None:
    said = use_deterministic_kernels(torch.device("cuda", 0))
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    assert said.startswith("deterministic: cuda:0") and "costs speed" in said


@pytest.mark.parametrize("workspace, wanted", [(None, ":4096:8"), (":16:8", ":16:8"), (":0:0", None)])
def test_cublass_workspace_is_set_kept_or_refused(
    kernels: pytest.MonkeyPatch, workspace: str | None, wanted: str | None
) -> None:
    if workspace is not None:
        kernels.setenv(WORKSPACE_VARIABLE, workspace)
    if wanted is None:
        with pytest.raises(ConfigError, match=r"CUBLAS_WORKSPACE_CONFIG is ':0:0'.*unset it, or set :4096:8 or :16:8"):
            use_deterministic_kernels(torch.device("cuda"))
        assert not torch.are_deterministic_algorithms_enabled()
    else:
        use_deterministic_kernels(torch.device("cuda"))
        assert os.environ[WORKSPACE_VARIABLE] == wanted


def test_an_operation_without_a_deterministic_kernel_is_named(kernels: pytest.MonkeyPatch) -> None:
    use_deterministic_kernels(torch.device("cuda"))
    values = torch.zeros(3)
    wanted = r"--deterministic: torch \S+ has no deterministic kernel for put_; .* or run on the CPU \(--gpu -1\)"
    with pytest.raises(ConfigError, match=wanted), deterministic_errors():
        values.put_(torch.tensor([0]), torch.ones(1))


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), deterministic_errors():
        torch.ones(2, 3) @ torch.ones(2, 3)
