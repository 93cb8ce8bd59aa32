"""TWIN against recordings of LongCTR's TWIN, and what the default does where LongCTR is wrong."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_files import Golden, small_model, tiny_dataset, tiny_loader
from torch import Tensor

from model_zoo.batch import Batch
from model_zoo.errors import ConfigError

NAMES = ("TWIN_1", "TWIN_2")
# single precision, sums of at most 1,000 terms in another order: 1e-5 of the largest entry
RELATIVE = 1e-5
# a bias before BatchNorm has no effect on the loss; its recorded gradient is rounding noise of this size or less
NOISE = 1e-7
BEFORE_BATCH_NORM = {"TWIN_1": ("head.dnn.mlp.0.bias", "head.dnn.mlp.3.bias"), "TWIN_2": ()}


@cache
def golden(name: str) -> Golden:
    return Golden(name)


def history_lengths(record: Golden) -> Tensor:
    return record.tensor("mask").sum(1)


def close(found: Tensor, wanted: Tensor, name: str) -> None:
    """Largest difference within `RELATIVE` of the largest entry: single entries may be sums that cancel."""
    assert found.shape == wanted.shape, name
    assert float((found - wanted).abs().max()) <= RELATIVE * float(wanted.abs().max()), name


@pytest.fixture(params=NAMES)
def record(request: pytest.FixtureRequest) -> Golden:
    return golden(request.param)


def test_evaluation_predictions(record: Golden) -> None:
    model = record.model().eval()
    with torch.no_grad():
        found = model(record.inputs())["y_pred"]
    torch.testing.assert_close(found, record.tensor("y_pred_eval"), rtol=RELATIVE, atol=0)


def test_training_predictions_losses_and_every_gradient(record: Golden) -> None:
    model = record.model().train()
    batch = record.inputs()
    answer, label = model(batch), model.get_labels(batch)
    close(answer["y_pred"].detach(), record.tensor("y_pred_train"), "y_pred_train")
    task, regulariser = model.add_loss(answer, label), model.regularization_loss()
    close(task.detach(), record.tensor("loss_bce"), "loss_bce")
    close(regulariser.detach(), record.tensor("loss_reg"), "loss_reg")
    total = model.compute_loss(answer, label)
    close(total.detach(), record.tensor("loss_total"), "loss_total")
    total.backward()
    wanted = model.from_longctr(record.group("grad"))
    found = {name: p.grad for name, p in model.named_parameters()}
    assert set(found) == set(wanted)
    for name, gradient in wanted.items():
        if name in BEFORE_BATCH_NORM[record.name]:
            assert float(found[name].abs().max()) <= NOISE and float(gradient.abs().max()) <= NOISE, name
        else:
            close(found[name], gradient, name)


def test_batch_norm_statistics_after_a_training_forward(record: Golden) -> None:
    model = record.model().train()
    model(record.inputs())
    wanted = model.from_longctr(record.group("after_forward"))
    assert bool(wanted) == bool(record.hparams["batch_norm"])
    for name, value in wanted.items():
        close(model.state_dict()[name], value, name)


def test_parameters_after_one_train_step(record: Golden) -> None:
    model = record.model().train()
    model._batch_index, model._max_gradient_norm = 0, 10.0
    loss = model.train_step(record.inputs())
    close(loss, record.tensor("train_step_loss"), "train_step_loss")
    start, found = model.from_longctr(record.group("state")), model.state_dict()
    # Adam's first step is learning_rate * sign(gradient): of a gradient that is rounding noise the sign is arbitrary, so
    # biases before BatchNorm are left out. The tolerance is 1e-3 of the step: an entry whose gradient is near Adam's eps
    # (1e-8) moves in proportion to it.
    for name, value in model.from_longctr(record.group("step1")).items():
        if name not in BEFORE_BATCH_NORM[record.name]:
            step = float((value - start[name]).abs().max())
            assert step > 0 and float((found[name] - value).abs().max()) <= 1e-3 * step, name


def test_a_batch_of_item_indices_gives_the_recorded_predictions_and_gradients(record: Golden) -> None:
    dataset = tiny_dataset(context=record.name == "TWIN_2")
    model = record.model(item_features=dataset.item_features())
    batch = tiny_loader(dataset=dataset).batch(np.array(record.arrays["row_index"]))
    with torch.no_grad():
        found = model.eval()(batch)["y_pred"]
    torch.testing.assert_close(found, record.tensor("y_pred_eval"), rtol=RELATIVE, atol=0)
    model.train()
    model.compute_loss(model(batch), model.get_labels(batch)).backward()
    wanted = model.from_longctr(record.group("grad"))
    for name, parameter in model.named_parameters():
        if name not in BEFORE_BATCH_NORM[record.name]:
            close(parameter.grad, wanted[name], name)


def test_a_checkpoint_that_longctr_wrote_loads_and_predicts_the_same(record: Golden, tmp_path: Path) -> None:
    path = tmp_path / "TWIN.model"
    torch.save(record.group("state"), path)
    model = small_model_of(record)
    model.load_weights(str(path))
    with torch.no_grad():
        found = model.eval()(record.inputs())["y_pred"]
    torch.testing.assert_close(found, record.tensor("y_pred_eval"), rtol=RELATIVE, atol=0)


def small_model_of(record: Golden) -> Any:
    """The recorded architecture with weights that are certainly not the recorded ones."""
    model = record.model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    return model


# ---- where LongCTR is wrong ------------------------------------------------------------------------------------------


def test_the_default_differs_from_longctr_exactly_in_short_histories(record: Golden) -> None:
    model = record.model(longctr_compat=False).eval()
    with torch.no_grad():
        found = model(record.inputs())["y_pred"]
    gap = (found - record.tensor("y_pred_eval")).abs().view(-1)
    length = history_lengths(record)
    # an empty history's padding attention gives zeros in both: these recordings have a padding row of zeros
    short = (length > 0) & (length < record.hparams["short_seq_len"])
    assert short.any() and (~short).any()
    assert (gap[short] > 1e-5).all()  # 100 times the rounding of the others
    assert (gap[~short] <= 1e-7).all()


def test_longctr_reads_padding_rows_of_an_empty_history_and_the_default_does_not() -> None:
    record = golden("TWIN_2")
    empty = history_lengths(record) == 0
    gaps = {}
    for compat in (True, False):
        model = record.model(longctr_compat=compat).eval()
        with torch.no_grad():
            before = model(record.inputs())["y_pred"]
            for name in ("item_id", "cate_id"):
                model.embedding_layer.embedding_layer.embedding_layers[name].weight[0] = 1.0
            gaps[compat] = (model(record.inputs())["y_pred"] - before).abs().view(-1)
    assert (gaps[True][empty] > 1e-3).all()
    assert float(gaps[False].max()) == 0.0  # padding is never read, by any row


def one_row(length: int, columns: int) -> Batch:
    """One impression, ``length`` items and padding up to ``columns``."""
    history = torch.zeros(1, columns, dtype=torch.int32)
    history[0, columns - length :] = torch.arange(1, length + 1, dtype=torch.int32)
    return Batch(history, torch.tensor([40], dtype=torch.int32), {}, torch.ones(1), None, torch.zeros(1).long())


@pytest.mark.parametrize("length", [0, 1, 3, 5])
def test_a_batch_shorter_than_the_short_window_works_by_default_and_is_refused_like_longctr(length: int) -> None:
    data = tiny_dataset(context=False)
    fixed = small_model("TWIN", dataset=data, short_seq_len=6).eval()
    legacy = small_model("TWIN", dataset=data, short_seq_len=6, longctr_compat=True).eval()
    with torch.no_grad():
        assert torch.isfinite(fixed(one_row(length, length))["y_pred"]).all()
        with pytest.raises(
            ConfigError, match=rf"padded to {length} items when short_seq_len is 6.*longctr_compat: False"
        ):
            legacy(one_row(length, length))


@pytest.mark.parametrize("columns", [1, 4, 20])
def test_a_one_item_history_attends_to_its_item_by_default_and_to_padding_in_longctr(columns: int) -> None:
    data = tiny_dataset(context=False)
    model = small_model("TWIN", dataset=data, short_seq_len=6)
    batch = one_row(1, columns)
    _, target, sequence = model._read(batch)
    item = sequence.last_vectors
    short, long = model.block.short_attention, model.block.long_attention
    with torch.no_grad():
        wanted = torch.cat([part.W_o(part.W_v(item)) for part in (short, long)], dim=1)
        torch.testing.assert_close(model.block(target, sequence), wanted)
        if columns >= 6:
            model.block.longctr_compat = short.attend_padding = True
            assert not torch.allclose(model.block(target, sequence)[:, : item.shape[1]], wanted[:, : item.shape[1]])


def test_empty_histories_give_zeros_and_finite_gradients() -> None:
    data = tiny_dataset(context=False)
    model = small_model("TWIN", dataset=data, batch_norm=False).train()
    for columns in (0, 7):
        batch = one_row(0, columns)
        _, target, sequence = model._read(batch)
        assert float(model.block(target, sequence).detach().abs().max()) == 0.0
        model.compute_loss(model(batch), model.get_labels(batch)).backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
