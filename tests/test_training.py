"""The training loop: accumulation, evaluation schedule, early stopping, the record, metrics in one pass, regulariser."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_files import small_model, tiny_dataset, tiny_loader
from sklearn.metrics import log_loss, roc_auc_score
from torch import Tensor

from model_zoo.batch import Batch
from model_zoo.compat import seed_everything
from model_zoo.errors import ConfigError
from model_zoo.guards import NotFiniteError
from model_zoo.pipeline.loader import longctr_batch

# no BatchNorm, no dropout and plain gradient descent: a step is a linear function of the gradient
LINEAR: dict[str, Any] = {"batch_norm": False, "optimizer": "SGD", "learning_rate": 0.5}


class Rows:
    """A training set of given batches, each a list of row numbers of the tiny data set."""

    def __init__(self, *batches: list[int]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        loader = tiny_loader()
        return (loader.batch(np.array(rows)) for rows in self.batches)


FULL = [int(row) for row in np.flatnonzero(tiny_dataset().splits["train"].seq_len >= 6)][:12]
assert len(FULL) == 12


def state(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], rtol: float = 0.0, atol: float = 0.0) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, msg=name, rtol=rtol, atol=atol)


def moved(found: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    return max(float((found[name].float() - value.float()).abs().max()) for name, value in start.items())


def train_only(model: Any, data: Rows, epochs: int = 1) -> dict[str, Tensor]:
    """The weights after the last epoch, and not the best ones that `fit` loads in the end."""
    model.evaluate = lambda batches: {"AUC": 0.5}
    last: dict[str, Tensor] = {}
    model.load_weights = lambda path: last.update(state(model))
    model.fit(data, epochs=epochs, validation_data=data, max_gradient_norm=1e9)
    return last


# ---- accumulation ----------------------------------------------------------------------------------------------------


def test_two_accumulated_batches_are_one_batch_of_twice_the_size(tmp_path: Path) -> None:
    extra: dict[str, Any] = {"embedding_regularizer": 1e-2, "net_regularizer": 1e-3}
    whole = small_model("TWIN", tmp_path, **LINEAR, **extra)
    halves = small_model("TWIN", tmp_path, **LINEAR, **extra, accumulation_steps=2)
    start = state(whole)
    once = train_only(whole, Rows(FULL[:12]))
    # single precision; the mean over 12 rows is formed as the mean of two means of 6
    assert_same(train_only(halves, Rows(FULL[:6], FULL[6:12])), once, rtol=1e-5, atol=1e-6)
    assert moved(once, start) > 1e-2


def test_an_incomplete_group_is_stepped_at_the_epochs_end_with_its_own_mean(tmp_path: Path) -> None:
    batches = (FULL[:4], FULL[4:8], FULL[8:12])
    found = train_only(small_model("TWIN", tmp_path, **LINEAR, accumulation_steps=2), Rows(*batches))
    by_hand = train_only(small_model("TWIN", tmp_path, **LINEAR), Rows(FULL[:8], FULL[8:12]))
    assert_same(found, by_hand, rtol=1e-5, atol=1e-6)


def test_longctr_compat_carries_an_incomplete_group_into_the_next_epoch(tmp_path: Path) -> None:
    batches = [FULL[:4], FULL[4:8], FULL[8:12]]
    legacy = {**LINEAR, "longctr_compat": True}
    model = small_model("TWIN", tmp_path, **legacy, accumulation_steps=2)
    start = state(model)
    found = train_only(model, Rows(*batches), epochs=2)
    # by hand: a step after batches 0 and 1; another after batches 2, 0 and 1, all three halved; batch 2 is never used again
    model = small_model("TWIN", tmp_path, **legacy)
    model.train()
    steps = ([batches[0], batches[1]], [batches[2], batches[0], batches[1]])
    for group in steps:
        model.optimizer.zero_grad()
        for batch in Rows(*group):
            (model.compute_loss(model(batch), model.get_labels(batch)) / 2).backward()
        model.optimizer.step()
    assert_same(found, state(model), rtol=1e-5, atol=1e-6)
    fixed = train_only(small_model("TWIN", tmp_path, **LINEAR, accumulation_steps=2), Rows(*batches), epochs=2)
    assert moved(fixed, found) > 1e-3 and moved(found, start) > 1e-2


def test_gradients_are_clipped_to_the_given_norm(tmp_path: Path) -> None:
    model = small_model("TWIN", tmp_path, **LINEAR)
    start = state(model)
    model.fit(Rows(FULL), epochs=1, validation_data=tiny_loader(), max_gradient_norm=1e-3)
    # the step is rounded at weights a thousand times its size
    step = math.sqrt(sum(float((value - start[name]).square().sum()) for name, value in model.state_dict().items()))
    assert step == pytest.approx(0.5 * 1e-3, rel=1e-2)


def test_train_step_returns_the_whole_loss_undivided() -> None:
    model = small_model("TWIN", accumulation_steps=4, embedding_regularizer=0.1, **LINEAR).train()
    batch = tiny_loader().batch(np.arange(8))
    wanted = model.compute_loss(model(batch), model.get_labels(batch))
    model._batch_index = 0
    torch.testing.assert_close(model.train_step(batch), wanted.detach(), rtol=1e-6, atol=0)


# ---- evaluation schedule, early stopping -----------------------------------------------------------------------------


class Script:
    """Stands in for `evaluate`: given scores one by one, and the weights at each."""

    def __init__(self, model: Any, scores: list[float]) -> None:
        self.model, self.scores, self.states = model, list(scores), []  # type: ignore[var-annotated]
        model.evaluate = self

    def __call__(self, batches: Any) -> dict[str, float]:
        self.states.append(state(self.model))
        return {"AUC": self.scores[len(self.states) - 1]}


@pytest.mark.parametrize(
    "eval_steps, epochs, wanted",
    [(None, 2, [(1, 4), (2, 8)]), (2, 2, [(1, 2), (1, 4), (2, 6), (2, 8)]), (3, 2, [(1, 3), (2, 6)]), (8, 2, [(2, 8)])],
)
def test_evaluations_come_every_eval_steps_batches(
    tmp_path: Path, eval_steps: int | None, epochs: int, wanted: list[tuple[int, int]]
) -> None:
    model = small_model("TWIN", tmp_path, eval_steps=eval_steps)
    model.fit(tiny_loader(), epochs=epochs, validation_data=tiny_loader("valid"))
    assert [(record["epoch"], record["step"]) for record in model.history] == wanted


def test_the_default_schedule_follows_each_fits_own_data(tmp_path: Path) -> None:
    model = small_model("TWIN", tmp_path)
    for batches in (tiny_loader(batch_size=8), tiny_loader(batch_size=15)):
        model.fit(batches, epochs=1, validation_data=tiny_loader("valid"))
    assert [record["step"] for record in model.history] == [4, 2]


def test_eval_steps_beyond_the_whole_training_is_refused_before_it_starts(tmp_path: Path) -> None:
    model = small_model("TWIN", tmp_path, eval_steps=9)
    start = state(model)
    with pytest.raises(ConfigError, match=r"eval_steps \(9\) is longer than train's 8 steps; lower it"):
        model.fit(tiny_loader(), epochs=2, validation_data=tiny_loader("valid"))
    assert_same(state(model), start)


def test_training_stops_after_patience_evaluations_without_a_gain_and_loads_the_best(tmp_path: Path) -> None:
    model = small_model("TWIN", tmp_path, early_stop_patience=2)
    script = Script(model, [0.6, 0.7, 0.65, 0.7, 0.9, 0.9])
    model.fit(tiny_loader(), epochs=6, validation_data=tiny_loader("valid"))
    assert len(script.states) == 4  # an equal score is not a gain
    assert [record["best"] for record in model.history] == [True, True, False, False]
    assert_same(state(model), script.states[1])
    assert moved(script.states[3], script.states[1]) > 0


def test_a_gain_resets_the_patience(tmp_path: Path) -> None:
    model = small_model("TWIN", tmp_path, early_stop_patience=2)
    script = Script(model, [0.6, 0.5, 0.7, 0.6, 0.6])
    model.fit(tiny_loader(), epochs=9, validation_data=tiny_loader("valid"))
    assert len(script.states) == 5


def test_a_monitor_to_be_minimised(tmp_path: Path) -> None:
    model = small_model("TWIN", tmp_path, monitor_mode="min", early_stop_patience=1)
    script = Script(model, [0.6, 0.5, 0.55])
    model.fit(tiny_loader(), epochs=9, validation_data=tiny_loader("valid"))
    assert len(script.states) == 3
    assert_same(state(model), script.states[1])


def test_the_learning_rate_falls_tenfold_at_each_evaluation_without_a_gain_down_to_1e_6(tmp_path: Path) -> None:
    model = small_model("TWIN", tmp_path, early_stop_patience=9, learning_rate=1e-3)
    Script(model, [0.6, 0.5, 0.7, 0.5, 0.5, 0.5, 0.5])
    model.fit(tiny_loader(), epochs=7, validation_data=tiny_loader("valid"))
    rates = [record["learning_rate"] for record in model.history]  # of the steps before the evaluation
    assert rates == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-6, 1e-6], rel=1e-12)
    model = small_model("TWIN", tmp_path, early_stop_patience=9, learning_rate=1e-3, reduce_lr_on_plateau=False)
    Script(model, [0.6, 0.5, 0.5])
    model.fit(tiny_loader(), epochs=3, validation_data=tiny_loader("valid"))
    assert {record["learning_rate"] for record in model.history} == {1e-3}


def test_a_weighted_monitor_decides(tmp_path: Path) -> None:
    model = small_model("TWIN", tmp_path, monitor={"AUC": 1, "logloss": -1}, early_stop_patience=1)
    scores = iter([(0.7, 0.9), (0.6, 0.6), (0.7, 0.8)])  # monitor -0.2, 0, -0.1
    model.evaluate = lambda batches: dict(zip(("AUC", "logloss"), next(scores), strict=True))
    model.fit(tiny_loader(), epochs=9, validation_data=tiny_loader("valid"))
    assert [record["best"] for record in model.history] == [True, True, False]


# ---- record ----------------------------------------------------------------------------------------------------------


def test_the_record_holds_one_entry_per_evaluation(tmp_path: Path) -> None:
    model = small_model("TWIN", tmp_path, batch_norm=False)
    model.fit(tiny_loader(), epochs=3, validation_data=tiny_loader("valid"))
    assert [record["epoch"] for record in model.history] == [1, 2, 3]
    keys = {"phase", "epoch", "step", "seconds", "eval_seconds", "train_loss", "learning_rate", "valid", "best"}
    keys |= {"gradient_norm", "rows_per_second", "routing", "effective_rank", "warnings"}
    for record in model.history:
        assert set(record) == keys and record["phase"] == "train"
        assert record["seconds"] > 0 and record["eval_seconds"] >= 0
        assert set(record["valid"]) == {"AUC", "logloss"}
    best = max(model.history, key=lambda record: record["valid"]["AUC"])
    assert model.evaluate(tiny_loader("valid")) == best["valid"]


def test_the_recorded_train_loss_is_the_mean_over_the_batches_since_the_last_evaluation(tmp_path: Path) -> None:
    model = small_model("TWIN", tmp_path, eval_steps=2, embedding_regularizer=0.1)
    losses: list[float] = []
    step = model.train_step

    def watched(batch: Batch) -> Tensor:
        loss = step(batch)
        losses.append(float(loss))
        return loss

    model.train_step = watched
    model.fit(tiny_loader(), epochs=1, validation_data=tiny_loader("valid"))
    wanted = [np.mean(losses[:2]), np.mean(losses[2:])]
    assert [record["train_loss"] for record in model.history] == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("name", ["TWIN", "MoS_TWIN"])
def test_training_is_a_function_of_the_seed(tmp_path: Path, name: str) -> None:
    ends, histories = [], []
    for number, seed in enumerate((7, 7, 8)):
        model = small_model(name, tmp_path / str(number), seed=7, net_dropout=0.2, attention_dropout=0.2)
        seed_everything(seed)
        model.fit(tiny_loader(shuffle=True), epochs=2, validation_data=tiny_loader("valid"))
        ends.append(state(model))
        histories.append([record["valid"] for record in model.history])
    assert_same(ends[0], ends[1])
    assert histories[0] == histories[1]
    assert moved(ends[2], ends[0]) > 0


def test_each_epoch_has_an_order_of_its_own_and_a_second_fit_goes_on_counting(tmp_path: Path) -> None:
    model, loader = small_model("TWIN", tmp_path), tiny_loader(shuffle=True)
    seen: list[int] = []
    choose = loader.set_epoch

    def watched(epoch: int) -> None:
        seen.append(epoch)
        choose(epoch)

    loader.set_epoch = watched  # type: ignore[method-assign]
    for _ in range(2):
        model.fit(loader, epochs=2, validation_data=tiny_loader("valid"))
    assert seen == [0, 1, 2, 3]


def test_learning_happens(tmp_path: Path) -> None:
    """30 rows can be learnt by heart: the loop does minimise the task loss."""
    model = small_model("TWIN", tmp_path, early_stop_patience=99, seed=2)
    before = model.evaluate(tiny_loader("valid"))
    model.fit(tiny_loader(shuffle=True), epochs=25, validation_data=tiny_loader("valid"))
    after = model.evaluate(tiny_loader("valid"))
    assert after["AUC"] > 0.95 and after["logloss"] < before["logloss"]


# ---- evaluation ------------------------------------------------------------------------------------------------------


class Counted:
    """A loader that counts its passes."""

    def __init__(self, loader: Any) -> None:
        self.loader, self.passes = loader, 0

    def __iter__(self) -> Iterator[Batch]:
        self.passes += 1
        return iter(self.loader)


def test_evaluate_agrees_with_scikit_learn_and_reads_the_split_once() -> None:
    model = small_model("TWIN", metrics=["gAUC", "AUC", "logloss"], monitor={"gAUC": 1, "AUC": 1}).train()
    split = Counted(tiny_loader("valid", batch_size=7))
    found = model.evaluate(split)
    assert split.passes == 1 and not model.training
    prediction = model.predict(tiny_loader("valid", batch_size=30))
    data = tiny_dataset().splits["valid"]
    label, group = data.label, data.user_index
    assert prediction.shape == (30,) and prediction.dtype == np.float32
    wanted = {"AUC": roc_auc_score(label, prediction), "logloss": log_loss(label, prediction.astype(np.float64))}
    weights, areas = [], []
    for user in np.unique(group):
        rows = group == user
        if 0 < label[rows].sum() < rows.sum():
            weights.append(rows.sum())
            areas.append(roc_auc_score(label[rows], prediction[rows]))
    assert len(weights) >= 2
    wanted["gAUC"] = np.average(areas, weights=weights)
    # predictions of other batch sizes differ by rounding, which may not reorder rows here; logloss moves by 1e-7
    assert found == pytest.approx(wanted, rel=1e-6)
    assert list(found) == ["gAUC", "AUC", "logloss"]


def test_the_monitors_metrics_are_evaluated_even_if_not_asked_for() -> None:
    model = small_model("TWIN", metrics=["logloss"], monitor={"gAUC": 1, "AUC": 1})
    assert set(model.evaluate(tiny_loader("valid"))) == {"logloss", "gAUC", "AUC"}
    assert set(model.evaluate(tiny_loader("valid"), ["AUC"])) == {"AUC"}


def test_longctr_batches_are_evaluated_alike() -> None:
    model = small_model("TWIN", metrics=["gAUC", "AUC", "logloss"])
    tuples = [longctr_batch(tiny_dataset(), "valid", np.arange(start, start + 10), 20) for start in (0, 10, 20)]
    assert model.evaluate(tuples) == pytest.approx(model.evaluate(tiny_loader("valid", 10)), rel=1e-6)


def test_evaluation_leaves_no_trace_in_the_model() -> None:
    model = small_model("MoS_TWIN")
    model.enter(model.phases(1)[-1])
    start = state(model)
    model.evaluate(tiny_loader("valid"))
    assert_same(state(model), start)


# ---- regulariser -----------------------------------------------------------------------------------------------------


def norms(model: Any, chosen: Any) -> tuple[float, float]:
    """Sums of absolute and of squared entries over the parameters whose names ``chosen`` accepts."""
    parts = [p.detach().double() for name, p in model.named_parameters() if chosen(name)]
    return sum(float(p.abs().sum()) for p in parts), sum(float(p.square().sum()) for p in parts)


def regulariser(model: Any) -> float:
    return float(torch.as_tensor(model.regularization_loss()).detach())


def is_embedding(name: str) -> bool:
    return name.startswith("embedding_layer.")


@pytest.mark.parametrize("compat", [False, True])
def test_regulariser_values(compat: bool) -> None:
    model = small_model("TWIN", longctr_compat=compat)
    absolute, squared = norms(model, is_embedding)
    net_absolute, net_squared = norms(model, lambda name: not is_embedding(name))
    cases: list[tuple[Any, Any, float]] = [
        (None, None, 0.0),
        (0, 0, 0.0),
        (0.1, None, 0.05 * squared),
        ("l2(0.1)", 0, 0.05 * squared),
        ("l1(0.2)", None, 0.2 * absolute),
        (None, 0.3, 0.15 * net_squared),
        (0.1, "l1_l2(1e-2,0.3)", 0.05 * squared + 0.01 * net_absolute + 0.15 * net_squared),
    ]
    for embedding, net, wanted in cases:
        model._embedding_regularizer, model._net_regularizer = embedding or None, net or None
        assert regulariser(model) == pytest.approx(wanted, rel=1e-5), (embedding, net)


@pytest.mark.parametrize("compat", [False, True])
def test_what_counts_as_embedding_differs_between_fuxictr_versions(compat: bool) -> None:
    """2.3.2: nn.Embedding tables, wherever; net: other parameters called weight or bias. 2.3.10: by place alone."""
    model = small_model("TWIN", longctr_compat=compat)
    model.block.table = torch.nn.Embedding(3, 4)
    model.block.scale = torch.nn.Parameter(torch.ones(5))
    model.embedding_layer.embedding_layer.embedding_layers["cate_id"] = torch.nn.Linear(2, 3)
    cate = "embedding_layer.embedding_layer.embedding_layers.cate_id"
    moved_names = ("block.table.weight", f"{cate}.weight", f"{cate}.bias")

    def embedding(name: str) -> bool:
        return is_embedding(name) != (compat and name in moved_names)

    model._embedding_regularizer, model._net_regularizer = 1.0, None
    assert regulariser(model) == pytest.approx(norms(model, embedding)[1] / 2, rel=1e-5)
    model._embedding_regularizer, model._net_regularizer = None, 1.0
    wanted = norms(model, lambda name: not embedding(name) and not (compat and name == "block.scale"))[1] / 2
    assert regulariser(model) == pytest.approx(wanted, rel=1e-5)


def test_frozen_parameters_are_not_regularised() -> None:
    model = small_model("TWIN", net_regularizer=1.0)
    wanted = norms(model, lambda name: name.startswith("head."))[1] / 2
    model.block.requires_grad_(False)
    model.embedding_layer.requires_grad_(False)
    assert regulariser(model) == pytest.approx(wanted, rel=1e-5)


def test_longctr_compat_clips_logloss_as_fuxictr_2_3_2_does(tmp_path: Path) -> None:
    """A certain and wrong prediction costs -log(1e-7); by default -log of float32's epsilon, 1.2e-7."""
    wrong, right = np.array([1.0, 0.0]), np.array([0.0, 0.0], dtype=np.float32)
    losses = [
        small_model("TWIN", tmp_path, longctr_compat=compat).evaluate_metrics(wrong, right, ["logloss"])["logloss"]
        for compat in (True, False)
    ]
    eps = np.finfo(np.float32).eps
    expected = [-(np.log(e) + np.log1p(-e)) / 2 for e in (1e-7, eps)]
    np.testing.assert_allclose(losses, expected, rtol=1e-6)  # float32 rounding of 1 - eps


def test_a_diverged_training_stops_with_a_sentence(tmp_path: Path) -> None:
    model = small_model("TWIN", tmp_path)
    with torch.no_grad():
        model.head.dnn.mlp[0].weight.fill_(torch.nan)
    with pytest.raises(NotFiniteError, match=r"train epoch 1, batch 1: a prediction is not a finite number.*learning_rate"):
        model.fit(tiny_loader("train", batch_size=8), epochs=1, validation_data=tiny_loader("train", batch_size=8))
