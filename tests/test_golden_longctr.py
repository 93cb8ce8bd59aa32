"""Every registered model against recordings of LongCTR's: predictions, losses, gradients, one step, checkpoints."""

from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_files import GOLDEN, RELATIVE, Golden, close, tiny_dataset, tiny_loader
from torch import nn

from model_zoo.registry import BACKBONES

NAMES = sorted(path.stem for path in GOLDEN.glob("*_[0-9].npz") if path.stem.split("_")[0] in BACKBONES)
# a bias before BatchNorm has no effect on the task's loss; that part of its gradient is rounding of this size or less
NOISE = 1e-7


@cache
def golden(name: str) -> Golden:
    return Golden(name)


@pytest.fixture(params=NAMES)
def record(request: pytest.FixtureRequest) -> Golden:
    return golden(request.param)


def biases_before_batch_norm(model: nn.Module) -> set[str]:
    """Names of the biases that a BatchNorm behind them takes out again."""
    return {
        f"{name}.{position}.bias"
        for name, chain in model.named_modules()
        if isinstance(chain, nn.Sequential)
        for (position, layer), (_, after) in pairwise(chain.named_children())
        if isinstance(layer, nn.Linear) and layer.bias is not None and isinstance(after, nn.BatchNorm1d)
    }


def check_gradients(model: Any, record: Golden) -> None:
    """Every gradient of the backward that was run; a parameter without a recorded one has none, or zeros."""
    wanted = model.from_longctr(record.group("grad"))
    unused = set(model.from_longctr(dict.fromkeys(record.meta["no_grad_params"])))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(wanted) | unused == set(trained) and not set(wanted) & unused
    without_effect = biases_before_batch_norm(model)
    for name, parameter in trained.items():
        if name in unused:
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            close(parameter.grad, wanted[name], name, NOISE if name in without_effect else 0.0)


def test_the_models_of_longctr_that_are_registered_are_recorded_twice() -> None:
    found = {name.split("_")[0] for name in NAMES}
    assert {"TWIN", "SDIM", "ETA", "MIRRN", "SIM"} <= found
    assert len(NAMES) == 2 * len(found)


def test_evaluation_predictions(record: Golden) -> None:
    with torch.no_grad():
        found = record.evaluation(record.model())(record.inputs())["y_pred"]
    torch.testing.assert_close(found, record.tensor("y_pred_eval"), rtol=RELATIVE, atol=0)


def test_training_predictions_losses_and_every_gradient(record: Golden) -> None:
    model = record.training(record.model())
    batch = record.inputs()
    answer, label = model(batch), model.get_labels(batch)
    close(answer["y_pred"].detach(), record.tensor("y_pred_train"), "y_pred_train")
    task, regulariser = model.add_loss(answer, label), model.regularization_loss()
    close(task.detach(), record.tensor("loss_bce"), "loss_bce")
    close(regulariser.detach(), record.tensor("loss_reg"), "loss_reg")
    total = model.compute_loss(answer, label)
    close(total.detach(), record.tensor("loss_total"), "loss_total")
    total.backward()
    check_gradients(model, record)


def test_batch_norm_statistics_after_a_training_forward(record: Golden) -> None:
    model = record.training(record.model())
    model(record.inputs())
    wanted = model.from_longctr(record.group("after_forward"))
    assert set(wanted) == {n for n, _ in model.named_buffers() if n.endswith(("running_mean", "running_var"))}
    for name, value in wanted.items():
        close(model.state_dict()[name], value, name)


def test_parameters_after_one_train_step(record: Golden) -> None:
    model = record.training(record.model())
    model._batch_index, model._max_gradient_norm = 0, 10.0
    loss = model.train_step(record.inputs())
    close(loss, record.tensor("train_step_loss"), "train_step_loss")
    start, found = model.from_longctr(record.group("state")), model.state_dict()
    unused = model.from_longctr(dict.fromkeys(record.meta["no_grad_params"]))
    wanted = model.from_longctr(record.group("step1"))
    assert set(wanted) == {name for name, p in model.named_parameters() if p.requires_grad}
    gradient = model.from_longctr(record.group("grad"))
    # Adam's first step is learning_rate * sign(gradient): of a gradient that is rounding the sign is arbitrary. So biases
    # before BatchNorm are left out, and entries of less than RELATIVE of the largest. The tolerance is 1e-3 of the step:
    # an entry whose gradient is near Adam's eps (1e-8) moves in proportion to it.
    for name in set(wanted) - biases_before_batch_norm(model):
        step = float((wanted[name] - start[name]).abs().max())
        assert (step == 0) == (name in unused), name
        if name in unused:
            assert torch.equal(found[name], start[name]), name
            continue
        size = gradient[name].abs()
        sure = size > RELATIVE * size.max()
        assert float((found[name] - wanted[name])[sure].abs().max()) <= 1e-3 * step, name
    for name, _ in model.named_buffers():  # what is not trained stays, but for BatchNorm's statistics
        if name in start and not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            assert torch.equal(found[name], start[name]), name


def test_a_batch_of_item_indices_gives_the_recorded_predictions_and_gradients(record: Golden) -> None:
    dataset = tiny_dataset(context="user_id" in record.feature_map.features)
    model = record.model(item_features=dataset.item_features())
    batch = tiny_loader(dataset=dataset).batch(np.array(record.arrays["row_index"]))
    with torch.no_grad():
        found = record.evaluation(model)(batch)["y_pred"]
    torch.testing.assert_close(found, record.tensor("y_pred_eval"), rtol=RELATIVE, atol=0)
    record.training(model)
    model.compute_loss(model(batch), model.get_labels(batch)).backward()
    check_gradients(model, record)


def test_a_checkpoint_that_longctr_wrote_loads_and_predicts_the_same(record: Golden, tmp_path: Path) -> None:
    path = tmp_path / "LongCTR.model"
    torch.save(record.group("state"), path)
    model = record.model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)  # certainly not the recorded weights
        model.load_weights(str(path))
        found = record.evaluation(model)(record.inputs())["y_pred"]
    torch.testing.assert_close(found, record.tensor("y_pred_eval"), rtol=RELATIVE, atol=0)


def test_draws_of_the_recorded_seeds_are_what_the_hashing_models_predict_by() -> None:
    """``reuse_hash: False``: under another seed LongCTR, and compat mode with it, predicts something else."""
    drawing = [name for name in NAMES if golden(name).hparams.get("reuse_hash") is False]
    assert {name.split("_")[0] for name in drawing} == {"SDIM", "ETA", "MIRRN"}
    for name in drawing:
        record = golden(name)
        model = record.evaluation(record.model())
        torch.manual_seed(1)
        with torch.no_grad():
            found = model(record.inputs())["y_pred"]
        assert float((found - record.tensor("y_pred_eval")).abs().max()) > 1e-4, name
