"""Steps that come to NaN or infinity change nothing and leave a batch to replay; warnings of collapse."""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_files import small_model, tiny_dataset, tiny_loader
from torch import Tensor, nn

from model_zoo import collapse
from model_zoo.bad_batch import StepStart, read_batch, write_batch
from model_zoo.batch import Batch
from model_zoo.errors import DataError, FileError
from model_zoo.guards import NotFiniteError, replay
from model_zoo.layers.routing_usage import effective_rank, relative_entropy
from model_zoo.pipeline.loader import longctr_batch
from model_zoo.replay import Finding, gradient_norm
from model_zoo.sparse_optimizer import clip_gradients

SOME = {"net_dropout": 0.3}


def state(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def ready(name: str, folder: Path, **overrides: Any) -> Any:
    """A model in training mode whose ``train_step`` can be called; all its experts take part."""
    model = small_model(name, folder, **overrides).train()
    model._batch_index, model._max_gradient_norm = 0, 10.0
    if hasattr(model, "mos"):
        model.mos.set_fusion(0.25, 0.25, update_codebooks=True)
    return model


def batch_of(rows: int = 12) -> Batch:
    return tiny_loader().batch(np.arange(rows))


def spoil_weight(model: Any) -> None:
    with torch.no_grad():
        model.head.dnn.mlp[0].weight[0, 0] = torch.nan


def spoil_gradient(model: Any) -> None:
    model.head.dnn.mlp[0].weight.register_hook(lambda gradient: gradient * torch.inf)


def spoil_loss(model: Any) -> None:
    loss = model.data_loss
    model.data_loss = lambda answer, label: loss(answer, label) * torch.inf


def spoil_size(model: Any) -> None:
    """Finite gradients whose norm is beyond float32."""
    for parameter in model.head.parameters():
        parameter.register_hook(lambda gradient: torch.full_like(gradient, 2e19))


def spoil_activation(model: Any) -> None:
    model.head.dnn.mlp[0].register_forward_hook(lambda module, inputs, output: output / 0)


SPOILT: dict[str, tuple[Callable[[Any], None], str, Finding]] = {
    "weight": (
        spoil_weight, r"a prediction is not a finite number; the weight head.dnn.mlp.0.weight was not finite before",
        Finding("weight", "head.dnn.mlp.0.weight"),
    ),
    "activation": (
        spoil_activation, r"a prediction is not .*; it first shows in the output of head.dnn.mlp.0;",
        Finding("output", "head.dnn.mlp.0"),
    ),
    "loss": (spoil_loss, r"the loss is inf; it first shows in the loss;", Finding("loss", "the loss")),
    "gradient": (
        spoil_gradient, r"the gradient's norm is (inf|nan) \(head.dnn.mlp.0.weight\); it first shows in the gradient of",
        Finding("gradient", "head.dnn.mlp.0.weight"),
    ),
    "size": (spoil_size, r"the gradient's norm is inf \(head.dnn.mlp.0.weight, .* and \d+ more\)", Finding("gradient", "")),
}  # fmt: skip


@pytest.mark.parametrize("kind", SPOILT)
@pytest.mark.parametrize("name", ["TWIN", "MoS_TWIN"])
def test_a_bad_step_changes_nothing_and_says_what_is_not_finite(tmp_path: Path, name: str, kind: str) -> None:
    model = ready(name, tmp_path, **SOME)
    model.train_step(batch_of())  # so that there are moments and moved statistics
    spoil, sentence, first = SPOILT[kind]
    spoil(model)
    before, moments, random = state(model), repr(model.optimizer.state_dict()), torch.get_rng_state()
    with pytest.raises(NotFiniteError, match=sentence) as error:
        model.train_step(batch_of())
    said = str(error.value)
    assert said.startswith("train epoch 1, batch 1: ") and "\n" not in said
    assert f"{tmp_path}/bad_batch.npz" in said and "no checkpoint yet" in said and "lower learning_rate (now 0.01)" in said
    for key, value in state(model).items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0, equal_nan=True, msg=key)
    assert repr(model.optimizer.state_dict()) == moments and torch.equal(torch.get_rng_state(), random)
    assert not any(p.grad is not None and p.grad.any() for p in model.parameters())
    found = replay(str(tmp_path / "bad_batch.npz"), model)["first"]
    assert found is not None and found.where == first.where and found.name.startswith(first.name)


def test_running_statistics_and_codebooks_move_in_a_good_step(tmp_path: Path) -> None:
    model = ready("MoS_TWIN", tmp_path)  # else the test above would see nothing of them
    before = state(model)
    model.train_step(batch_of())
    moved = {name for name, value in state(model).items() if not torch.equal(value, before[name])}
    assert any("running_mean" in name for name in moved) and any("codebook" in name for name in moved)


def test_nothing_of_a_bad_step_of_sparse_tables_is_kept(tmp_path: Path) -> None:
    model = ready("TWIN", tmp_path, sparse_embedding_updates=True, embedding_regularizer=1e-3)
    model.embedding_layer.register_forward_hook(
        lambda module, inputs, output: output.register_hook(lambda gradient: gradient * torch.nan) and None
    )
    before = state(model)
    with pytest.raises(NotFiniteError, match=r"the gradient's norm is nan .*embedding"):
        model.train_step(batch_of())
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())


def test_the_batch_of_an_accumulation_group_that_is_bad_is_named(tmp_path: Path) -> None:
    model = small_model("TWIN", tmp_path, accumulation_steps=4)
    step, taken = model.train_step, []

    def third(batch: Any) -> Tensor:
        taken.append(batch)
        if len(taken) == 3:
            spoil_gradient(model)
        return step(batch)

    model.train_step = third
    before = state(model)
    with pytest.raises(NotFiniteError, match="epoch 1, batch 3: "):
        model.fit(tiny_loader(), epochs=1, validation_data=tiny_loader("valid"))
    kept, _ = read_batch(str(tmp_path / "bad_batch.npz"))
    assert isinstance(kept, Batch) and kept.rows.tolist() == taken[2].rows.tolist()
    weights = {name: value for name, value in state(model).items() if "running" not in name and "tracked" not in name}
    assert all(torch.equal(value, before[name]) for name, value in weights.items())


def test_a_later_phase_names_the_checkpoint_that_is_intact_and_the_file_says_where_it_was(tmp_path: Path) -> None:
    model = small_model("MoS_TWIN", tmp_path, phase1_epochs=1, seed=0)
    enter = model.enter
    model.enter = lambda phase: (enter(phase), phase.name == "phase2" and spoil_loss(model))
    with pytest.raises(NotFiniteError, match=r"^phase2 epoch 1, batch 1: ") as error:
        model.fit(tiny_loader(), epochs=1, validation_data=tiny_loader("valid"))
    assert f"the checkpoint {model.phase_checkpoint('phase1')} (phase1's best) is intact" in str(error.value)
    model.load_weights(model.phase_checkpoint("phase1"))
    with np.load(tmp_path / "bad_batch.npz") as file:
        place = {name: file[name].item() for name in ("phase", "epoch", "batch", "step", "epochs_trained")}
    assert place == {"phase": "phase2", "epoch": 1, "batch": 1, "step": 1, "epochs_trained": 1}


def test_replay_with_the_weights_of_the_step_meets_the_same_numbers(tmp_path: Path) -> None:
    model = ready("MoS_TWIN", tmp_path, net_dropout=0.5)
    for rows in (8, 12):
        model.train_step(batch_of(rows))
    loss = model.data_loss
    seen: list[float] = []
    model.data_loss = lambda answer, label: (seen.append(loss(answer, label).item()), loss(answer, label) * torch.nan)[1]
    with pytest.raises(NotFiniteError):
        model.train_step(batch_of())
    fresh = ready("MoS_TWIN", tmp_path, seed=5, net_dropout=0.5)
    fresh.load_weights(str(tmp_path / "bad_batch.model"))
    fresh.mos.update_codebooks = True
    fresh.eval()
    before, random = state(fresh), torch.get_rng_state()
    report = replay(str(tmp_path / "bad_batch.npz"), fresh)
    assert report["first"] is None and report["gradients"] == [] and report["gradient_norm"] > 0
    assert report["loss"] == seen[0]  # dropout included
    assert all(torch.equal(value, before[name]) for name, value in state(fresh).items())
    assert torch.equal(torch.get_rng_state(), random) and not fresh.training
    assert all(p.grad is None for p in fresh.parameters())


def test_a_column_that_holds_the_number_is_named(tmp_path: Path) -> None:
    model = ready("TWIN", tmp_path)
    batch = batch_of()
    column = model.item_features.column("image_emb_dim8").clone()  # the data set's is shared by all tests
    column[int(batch.target[0])] = torch.nan
    model.item_features.register_buffer("column_image_emb_dim8", column, persistent=False)
    with pytest.raises(NotFiniteError, match=r"the batch's column image_emb_dim8 holds it already.*mend these rows"):
        model.train_step(batch)


def test_a_disk_that_is_full_does_not_hide_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise FileError("no space left")

    monkeypatch.setattr("model_zoo.guards.write_batch", full)
    model = ready("TWIN", tmp_path)
    spoil_loss(model)
    with pytest.raises(NotFiniteError, match=r"the loss is inf.*could not be kept \(no space left\)"):
        model.train_step(batch_of())


def batches() -> Iterator[tuple[str, Any]]:
    batch = batch_of()
    yield "indices", batch
    history, owner = batch.history.unique(dim=0, return_inverse=True)
    yield "owner", Batch(history, batch.target, batch.context, batch.label, None, batch.rows, owner)
    yield "LongCTR", longctr_batch(tiny_dataset(), "train", np.arange(12), 20)


@pytest.mark.parametrize("kind", ["indices", "owner", "LongCTR"])
def test_a_batch_comes_back_as_it_was_written(tmp_path: Path, kind: str) -> None:
    model, batch = ready("TWIN", tmp_path), dict(batches())[kind]
    path = str(tmp_path / "batch.npz")
    write_batch(path, batch, StepStart.of(model), {"phase": "train", "epoch": 1})
    found, random = read_batch(path)
    assert torch.equal(random["cpu"], torch.get_rng_state())
    if not isinstance(batch, Batch):
        assert isinstance(found, tuple)
        for part, wanted in zip(found[:2], batch[:2], strict=True):
            assert list(part) == list(wanted) and all(torch.equal(part[name], wanted[name]) for name in wanted)
        assert torch.equal(found[2], batch[2])
        return
    assert isinstance(found, Batch)
    for field in fields(Batch):
        mine, wanted = getattr(found, field.name), getattr(batch, field.name)
        if field.name == "context":
            assert list(mine) == list(wanted) and all(torch.equal(mine[name], wanted[name]) for name in wanted)
        else:
            assert mine is wanted if wanted is None else torch.equal(mine, wanted) and mine.dtype == wanted.dtype


def test_a_damaged_file_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "batch.npz"
    write_batch(str(path), batch_of(), StepStart.of(ready("TWIN", tmp_path)), {})
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match="cannot be read as a saved batch"):
            read_batch(str(path))
    np.savez(path, other=np.zeros(3))
    with pytest.raises(DataError, match="holds no saved batch"):
        read_batch(str(path))
    with pytest.raises(DataError, match="nowhere"):
        read_batch(str(tmp_path / "nowhere.npz"))


@pytest.mark.parametrize("sparse", [False, True])
def test_the_gradients_norm_is_the_one_that_clipping_sees(tmp_path: Path, sparse: bool) -> None:
    model = ready("TWIN", tmp_path, sparse_embedding_updates=sparse)
    model._optimizer_step = lambda: None
    model.train_step(batch_of())
    norm = gradient_norm(model.parameters())
    torch.testing.assert_close(norm, clip_gradients([p for p in model.parameters()], 1e9), rtol=1e-6, atol=0)
    assert model._gradient_norm == float(norm) > 0
    assert float(gradient_norm(nn.Linear(1, 1).parameters())) == 0


def test_the_record_has_the_mean_and_the_largest_norm_since_the_evaluation_before(tmp_path: Path) -> None:
    model = small_model("TWIN", tmp_path, eval_steps=2)
    norms, step = [], model._optimizer_step
    model._optimizer_step = lambda: (norms.append(model._gradient_norm), step())
    model.fit(tiny_loader(), epochs=1, validation_data=tiny_loader("valid"))
    assert len(model.history) == 2 and len(norms) == 4
    for number, record in enumerate(model.history):
        own = norms[2 * number : 2 * number + 2]
        assert record["gradient_norm"] == {"mean": pytest.approx(sum(own) / 2), "max": max(own)}


# ---- figures and warnings --------------------------------------------------------------------------------------------


def test_the_effective_rank_follows_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((5, 32), (40, 8), (6, 6)):
        matrix = torch.randn(shape, generator=generator)
        share = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
        share /= share.sum()
        # from the squares of singular values in double precision
        assert effective_rank(matrix) == pytest.approx(math.exp(-(share * np.log(share)).sum()), rel=1e-6)
    assert effective_rank(torch.eye(7)) == pytest.approx(7)
    assert effective_rank(torch.arange(1.0, 6).outer(torch.ones(3))) == pytest.approx(1, abs=1e-6)
    assert effective_rank(torch.zeros(4, 3)) == 0 and math.isnan(effective_rank(torch.full((2, 2), torch.nan)))


def test_the_relative_entropy_is_one_where_shares_are_even_and_zero_where_one_has_all() -> None:
    assert relative_entropy(torch.full((5,), 0.2)) == pytest.approx(1)
    assert relative_entropy(torch.tensor([0.0, 1.0, 0.0])) == pytest.approx(0)
    assert relative_entropy(torch.tensor([0.5, 0.5, 0.0, 0.0])) == pytest.approx(0.5)
    assert relative_entropy(torch.tensor([1.0])) == pytest.approx(0)


@pytest.fixture
def enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny data set has some 900 tokens."""
    monkeypatch.setattr(collapse, "ENOUGH_TOKENS", 50)


def collapsed(folder: Path) -> Any:
    """All items in one theme, codes that point one way, a table with one direction."""
    model = ready("MoS_TWIN", folder, embedding_dim=4)
    with torch.no_grad():
        codes = model.mos.item_router.codebook.codes
        codes.copy_(codes[:1] + 1e-4 * torch.eye(*codes.shape))
        codes[1:] -= 1e-2 * codes[0]
        table = model.embedding_layer.embedding_layer.embedding_layers["item_id"].weight
        table.copy_(torch.arange(60.0).outer(torch.ones(4)))
    model.mos.set_fusion(0.5, 0.0)
    return model


def test_collapse_is_warned_of_with_the_figure_once_a_phase(
    tmp_path: Path, enough: None, caplog: pytest.LogCaptureFixture
) -> None:
    model = collapsed(tmp_path)
    random = torch.get_rng_state()
    with caplog.at_level(logging.WARNING):
        figures = collapse.evaluation_figures(model, tiny_loader("valid"))
    assert torch.equal(torch.get_rng_state(), random) and model.training
    warnings = figures["warnings"]
    assert "routing/item/effective_rank" in warnings and "effective_rank/item_id" in warnings
    assert "(effective rank 1.0" in warnings["effective_rank/item_id"]
    assert set(figures["routing"]) == {"item"}  # the window branch has no weight
    assert [record.message for record in caplog.records] == [f"train: {text}" for text in warnings.values()]
    caplog.clear()
    model.history.append({"phase": "train", **figures})
    assert collapse.evaluation_figures(model, tiny_loader("valid"))["warnings"].keys() == warnings.keys()
    assert not caplog.records
    model.phase_name = "phase3"
    collapse.evaluation_figures(model, tiny_loader("valid"))
    assert len(caplog.records) == len(warnings)


def test_a_theme_without_tokens_and_routing_to_one_expert_are_warned_of() -> None:
    figures = {
        "tokens": 10_000, "share": [0.9995, 0.0005, 0.0], "read": [0.9995, 0.0009, 0.2], "entropy": 0.004,
        "effective_rank": 2.9,
    }  # fmt: skip
    warnings = dict(collapse._routing_warnings({"item": figures}))
    assert list(warnings) == ["routing/item/share/1", "routing/item/entropy"]
    assert "theme 1 of the item router reads 0.090% of 10,000 validation tokens" in warnings["routing/item/share/1"]
    assert "99.9% of 10,000" in warnings["routing/item/entropy"] or "100.0%" in warnings["routing/item/entropy"]
    assert not dict(collapse._routing_warnings({"item": {**figures, "tokens": 4_999}}))


def test_a_healthy_model_gets_no_warning(tmp_path: Path, enough: None) -> None:
    dataset = tiny_dataset()
    for name in ("TWIN", "MoS_TWIN", "GShard_TWIN", "ExpertChoice_TWIN", "DSelectK_TWIN"):
        figures = collapse.evaluation_figures(ready(name, tmp_path, seed=3), tiny_loader("valid", dataset=dataset))
        assert [cause for cause in figures["warnings"] if not cause.startswith("routing/")] == [], name
        assert figures["gradient_norm"] == {}  # no step yet


def test_routing_figures_of_mos_start_with_its_experts_and_of_its_rivals_at_once(tmp_path: Path) -> None:
    model = ready("MoS_TWIN", tmp_path)
    found = collapse.routing_figures(model, tiny_loader("valid"))
    assert set(found) == {"item", "window"}
    wanted = {"tokens", "share", "read", "entropy", "margin", "routed", "routed_length", "drift", "effective_rank"}
    for figures in found.values():
        assert wanted <= set(figures)
        assert sum(figures["share"]) == pytest.approx(1) and sum(figures["read"]) == pytest.approx(2)  # topk 2
    model.mos.set_fusion(0.0, 0.0)
    assert collapse.routing_figures(model, tiny_loader("valid")) == {}
    assert collapse.routing_figures(ready("TWIN", tmp_path), tiny_loader("valid")) == {}
    assert collapse.routing_figures(model, None) == {}
    for name in ("GShard_TWIN", "DSelectK_TWIN", "ExpertChoice_TWIN"):
        (figures,) = collapse.routing_figures(ready(name, tmp_path), tiny_loader("valid")).values()
        assert {"tokens", "share", "read", "entropy", "gate_margin", "routed_length", "served_length"} <= set(figures), name
        assert sum(figures["read"]) == pytest.approx(figures["experts_per_token"])


def test_figures_are_read_from_few_batches_and_change_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for observed in (True, False):
        if not observed:
            monkeypatch.setattr("model_zoo.training.evaluation_figures", lambda model, batches: {})
        model = small_model("MoS_TWIN", tmp_path, **SOME)
        model.fit(tiny_loader(shuffle=True), epochs=1, validation_data=tiny_loader("valid"))
        ends.append(state(model))
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_a_large_tables_rank_is_of_a_sample_without_the_padding_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collapse, "SAMPLED_ROWS", 40)
    model = ready("TWIN", tmp_path)
    table = model.embedding_layer.embedding_layer.embedding_layers["item_id"]
    with torch.no_grad():
        table.weight.copy_(torch.arange(60.0).unsqueeze(1).expand(60, 8))
    ((name, rows), *_) = [found for found in collapse._tables(model) if found[0] == "item_id"]
    assert name == "item_id" and len(rows) <= 40 and len(rows.unique(dim=0)) > 20 and bool((rows > 0).all())
    torch.testing.assert_close(rows, dict(collapse._tables(model))["item_id"])
