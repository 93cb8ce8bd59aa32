"""`score` and evaluation with shared histories against one row per impression."""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from golden_files import small_model, tiny_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model_zoo import scoring
from model_zoo.batch import MEAN_ROWS, Batch, neighbours_histories
from model_zoo.errors import DataError
from model_zoo.layers.sequence import Sequence, SharedSequence

MODELS = {"TWIN": {}, "MoS_TWIN": {}, "SDIM": {}, "MoS_SDIM": {}, "TransAct": {"concat_max_pool": False}, "ETA": {},
          "MoS_SASRec": {}, "GShard_TWIN": {}}  # fmt: skip
# single precision: other shapes reorder sums of at most 100 terms, at values of order 1
ROUNDING: dict[str, Any] = {"rtol": 1e-5, "atol": 2e-6}
CONTEXT = {"user_id": 7, "tags": [2, 5, 0]}
SETTINGS = settings(derandomize=True, deadline=None, max_examples=25)


@cache
def lively(name: str) -> Any:
    """A model in evaluation mode with weights large enough that every input matters to the prediction."""
    model = small_model(name, **MODELS[name])
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.6)
    return model.eval()


def batch_of(histories: list[list[int]], targets: list[int], context: dict[str, Tensor] | None = None) -> Batch:
    """One history per impression."""
    rows, length = len(targets), max(map(len, histories), default=0)
    padded = torch.zeros(rows, length, dtype=torch.int32)
    for row, items in zip(padded, histories, strict=True):
        row[length - len(items) :] = torch.tensor(items, dtype=torch.int32)
    if context is None:
        context = {"user_id": torch.full((rows,), 7), "tags": torch.tensor([[2, 5, 0]]).expand(rows, -1)}
    return Batch(padded, torch.tensor(targets, dtype=torch.int32), context, torch.ones(rows), None, torch.arange(rows))


def predict(model: Any, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model(batch)["y_pred"].view(-1)


def one_by_one(model: Any, batch: Batch) -> Tensor:
    """Predictions row by row: nothing to share."""
    rows = torch.arange(len(batch)).split(1)
    return torch.cat([predict(model, replace(batch.select(row), owner=None)) for row in rows])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("length", [0, 1, 5, 18])
def test_scores_are_the_predictions_of_one_impression_per_candidate(
    name: str, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lively(name)
    monkeypatch.setattr(model.block, "rows_to_share", 1, raising=False)
    rng = np.random.default_rng(length)
    history, candidates = rng.integers(1, 60, length).tolist(), rng.integers(1, 60, 11).tolist()
    wanted = one_by_one(model, batch_of([history] * 11, candidates))
    assert wanted.std() > 1e-3
    torch.testing.assert_close(model.score(history, candidates, CONTEXT), wanted, **ROUNDING)
    monkeypatch.setattr(scoring, "CANDIDATES_AT_A_TIME", 4)
    monkeypatch.setattr(model.block, "rows_to_share", 100)
    found = model.score(torch.tensor(history), np.array(candidates), CONTEXT)
    torch.testing.assert_close(found, wanted, **ROUNDING)


def test_context_is_of_the_user_or_of_each_candidate_and_the_newest_items_are_kept() -> None:
    model = lively("TWIN")
    history, candidates = list(range(1, 20)), [4, 9, 33]
    context = {"user_id": torch.tensor([3, 41, 8]), "tags": torch.tensor([[1, 0, 0], [5, 2, 0], [0, 0, 0]])}
    wanted = one_by_one(model, batch_of([history] * 3, candidates, context))
    torch.testing.assert_close(model.score(history, candidates, context), wanted, **ROUNDING)
    assert torch.equal(model.score(history, candidates, CONTEXT, max_len=6), model.score(history[-6:], candidates, CONTEXT))
    assert torch.equal(model.score(history, candidates, CONTEXT, max_len=0), model.score([], candidates, CONTEXT))
    assert not torch.allclose(model.score(history, candidates, CONTEXT), model.score([], candidates, CONTEXT))


def test_no_candidates_no_scores() -> None:
    found = lively("TWIN").score([3, 4], [], CONTEXT)
    assert found.shape == (0,) and found.dtype == torch.float32


def test_the_mode_of_every_module_is_restored_even_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("MoS_TWIN").train()
    model.head.eval()
    modes = [module.training for module in model.modules()]
    first, again = (model.score([5, 6], [7, 8], CONTEXT) for _ in range(2))
    assert torch.equal(first, again) and not first.requires_grad
    assert [module.training for module in model.modules()] == modes
    monkeypatch.setattr(model.block, "forward", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.score([5, 6], [7, 8], CONTEXT)
    assert [module.training for module in model.modules()] == modes and torch.is_grad_enabled()


@pytest.mark.parametrize(("change", "message"), [
    ({"history": [1, 60]}, "history: no item 60; the item table knows 1 to 59"),
    ({"candidates": [0]}, "candidates: no item 0"),
    ({"candidates": [[1, 2]]}, r"candidates: must be a list of item indices, not \(1, 2\)"),
    ({"history": [1.5]}, "history: must be a list of item indices"),
    ({"history": ["a"]}, "history: must hold numbers"),
    ({"context": {"user_id": 7}}, "context: tags is missing; the model reads user_id, tags"),
    ({"context": {**CONTEXT, "hour": 3}}, "context: the model reads no hour, only user_id, tags"),
    ({"context": {**CONTEXT, "user_id": [1, 2, 3]}}, r"context: user_id must be of shape \(\) or \(2,\), not \(3,\)"),
    ({"context": {**CONTEXT, "user_id": 42}}, "context: user_id must hold ids from 0 to 41"),
    ({"context": {**CONTEXT, "tags": [1, 2]}}, r"context: tags must be of shape \(3,\) or \(2, 3\), not \(2,\)"),
])  # fmt: skip
def test_faults_are_named(change: dict[str, Any], message: str) -> None:
    given = {"history": [1, 2], "candidates": [3, 4], "context": CONTEXT, **change}
    with pytest.raises(DataError, match=message):
        lively("TWIN").score(**given)


def test_an_item_table_and_a_real_length_are_needed() -> None:
    with pytest.raises(ValueError, match="max_len"):
        lively("TWIN").score([1], [2], CONTEXT, max_len=-1)
    model = small_model("TWIN")
    model.item_features = None
    with pytest.raises(DataError, match="item table"):
        model.score([1], [2], CONTEXT)


def test_a_model_without_context_needs_none() -> None:
    model = small_model("TWIN", dataset=tiny_dataset(context=False))
    assert model.score([1, 2], [3, 4, 5]).shape == (3,)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rows_to_share", [1, 100])
def test_neighbours_of_one_history_are_predicted_as_alone(
    name: str, rows_to_share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lively(name)
    rng = np.random.default_rng(1)
    histories = [rng.integers(1, 60, length).tolist() for length in (7, 0, 14, 2)]
    rows = [histories[user] for user in sorted(rng.integers(0, 4, 40))]
    batch = batch_of(rows, rng.integers(1, 60, 40).tolist())
    with torch.no_grad():
        monkeypatch.setattr(model.block, "rows_to_share", rows_to_share, raising=False)
        assert isinstance(model._read(batch, share=True)[2], SharedSequence) == (rows_to_share == 1)
    torch.testing.assert_close(predict(model, batch), one_by_one(model, batch), **ROUNDING)


@SETTINGS
@given(
    runs=st.lists(st.tuples(st.sampled_from([[], [1], [2], [2, 1], [1, 2, 1]]), st.integers(1, 9)), max_size=6),
    columns=st.integers(3, 4),
)
def test_neighbouring_copies_are_found_where_there_are_enough(runs: list[tuple[list[int], int]], columns: int) -> None:
    rows = [items for items, count in runs for _ in range(count)]
    history = torch.tensor([[0] * (columns - len(items)) + items for items in rows]).view(len(rows), columns)
    distinct = sum(1 for i, row in enumerate(rows) if i == 0 or row != rows[i - 1])
    found = neighbours_histories(history)
    assert (found is not None) == (0 < distinct * MEAN_ROWS <= len(rows))
    if found is not None:
        assert torch.equal(found[0][found[1]], history) and len(found[0]) == distinct
    assert neighbours_histories(history[:, :0]) is None


def test_a_batch_may_name_the_owners_of_its_histories() -> None:
    model = small_model("MoS_TWIN")
    plain = batch_of([[3, 4, 5], [9], [3, 4, 5], [9], []], [7, 8, 9, 10, 11])
    owner = torch.tensor([1, 0, 1, 0, 3])
    shared = replace(plain, history=torch.tensor([[0, 0, 9], [3, 4, 5], [8, 8, 8], [0, 0, 0]]), owner=owner)
    model.block.rows_to_share = 1
    model.eval()
    torch.testing.assert_close(predict(model, shared), predict(model, plain), **ROUNDING)
    rows = torch.tensor([4, 0])
    assert torch.equal(shared.select(rows).owner, owner[rows])
    torch.testing.assert_close(predict(model, shared.select(rows)), predict(model, plain.select(rows)), **ROUNDING)
    gradients = []
    for batch in (plain, shared):
        model.train().zero_grad(set_to_none=True)
        assert isinstance(model._read(batch)[2], Sequence)
        model.compute_loss(model(batch), model.get_labels(batch)).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-6)
