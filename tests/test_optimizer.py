"""The regulariser folded into the gradient, and Adam on the rows that a step touches."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_files import SMALL, feature_map_of, small_model, tiny_loader
from torch import Tensor, nn

from model_zoo.batch import Batch, ItemFeatures
from model_zoo.compat import seed_everything
from model_zoo.registry import get_model
from model_zoo.regularization import add_gradient, terms
from model_zoo.sparse_optimizer import RowAdam, clip_gradients, one_batch_gradients

State = dict[str, Tensor]
TABLES = ("item_id", "cate_id", "user_id", "tags")
DENSE: dict[str, Any] = {"batch_norm": False, "net_dropout": 0.0}


def state(model: nn.Module) -> State:
    return {name: value.clone() for name, value in model.state_dict().items()}


def batches(*rows: list[int]) -> list[Batch]:
    return [tiny_loader().batch(np.array(chosen)) for chosen in rows]


def ready(model: Any, max_norm: float = 1e9) -> Any:
    """A model whose `train_step` can be called."""
    model._batch_index, model._epoch_index, model._max_gradient_norm = 0, 0, max_norm
    return model.train()


def steps(model: Any, given: list[Batch], max_norm: float = 1e9) -> list[float]:
    """Train on the batches in order, each one once; their losses."""
    ready(model, max_norm)
    losses = []
    for model._batch_index, batch in enumerate(given):
        losses.append(float(model.train_step(batch)))
    return losses


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def sharing_model(**overrides: Any) -> Any:
    """A model with two item features that share one table, and items for it."""
    item = {"type": "categorical", "source": "item", "vocab_size": 9, "embedding_dim": 8}
    specs = [{"first": item}, {"second": {**item, "share_embedding": "first"}}]
    recorded = {"dataset_id": "tiny", "labels": ["is_click"], "default_emb_dim": 8, "features": specs}
    columns = {"first": torch.arange(9), "second": torch.arange(9).flip(0)}
    seed_everything(0)
    params = {key: SMALL[key] for key in ("embedding_dim", "attention_dim", "num_heads", "short_seq_len", "topk")}
    return get_model("TWIN")(
        feature_map_of(recorded), item_features=ItemFeatures(columns), dnn_hidden_units=[6], **params, **overrides
    )


SHARED_BATCH = Batch(
    torch.tensor([[0, 1, 2], [3, 4, 5]], dtype=torch.int32),
    torch.tensor([6, 7], dtype=torch.int32), {}, torch.tensor([1.0, 0.0]), None, torch.zeros(2).long(),
)  # fmt: skip


# ---- the folded regulariser ------------------------------------------------------------------------------------------


def by_autograd(model: Any, given: list[Batch], accumulation_steps: int) -> tuple[dict[str, Tensor | None], list[float]]:
    """Gradients and losses with the regulariser inside the graph."""
    model.train().zero_grad()
    losses = []
    for batch in given:
        loss = model.compute_loss(model(batch), model.get_labels(batch))
        (loss / accumulation_steps).backward()
        losses.append(float(loss.detach()))
    return gradients(model), losses


def assert_folded_equals_autograd(make: Any, given: list[Batch], accumulation_steps: int) -> None:
    wanted, wanted_losses = by_autograd(make(), given, accumulation_steps)
    model = ready(make())
    model._optimizer_step = lambda: None  # the gradients stay
    assert steps(model, given) == pytest.approx(wanted_losses, rel=1e-6)
    found = gradients(model)
    assert any(gradient is not None for gradient in wanted.values())
    for name, gradient in wanted.items():
        assert (found[name] is None) == (gradient is None), name
        if gradient is not None:
            # single precision: a sum of a few terms in another order
            atol = 1e-6 * float(gradient.abs().max())
            torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=atol, msg=name)


@pytest.mark.parametrize("accumulation_steps", [1, 3])
@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize(
    "embedding, net",
    [(1e-2, None), ("l1(1e-2)", 1e-2), ("l2(0.1)", "l1(0.1)"), ("l1_l2(1e-2,1e-3)", "l1_l2(0.1,0.2)"), (None, 0.3)],
)
def test_folded_gradients_and_loss_equal_autograds(
    embedding: Any, net: Any, compat: bool, accumulation_steps: int
) -> None:
    def make() -> Any:
        model = small_model(
            "TWIN", **DENSE, longctr_compat=compat, accumulation_steps=accumulation_steps,
            embedding_regularizer=embedding, net_regularizer=net,
        )  # fmt: skip
        model.block.scale = nn.Parameter(torch.ones(5))  # has no part in the prediction, and is no weight or bias
        model.block.table = nn.Embedding.from_pretrained(torch.ones(3, 4), freeze=False)
        return model

    given = batches(*([[0, 1, 2, 3], [4, 5, 6], [7, 8, 9, 10]][:accumulation_steps]))
    assert_folded_equals_autograd(make, given, accumulation_steps)


def test_frozen_parameters_get_no_gradient_from_the_regulariser() -> None:
    def make() -> Any:
        model = small_model("TWIN", **DENSE, embedding_regularizer=0.1, net_regularizer=0.1)
        model.block.requires_grad_(False)
        model.embedding_layer.embedding_layer.embedding_layers["cate_id"].requires_grad_(False)
        return model

    assert_folded_equals_autograd(make, batches([0, 1, 2]), 1)


@pytest.mark.parametrize("phase", [0, 1, 2])
def test_each_phase_of_mos_regularises_what_it_trains(phase: int) -> None:
    def make() -> Any:
        model = small_model("MoS_TWIN", **DENSE, embedding_regularizer=0.1, net_regularizer="l1_l2(0.1,0.1)")
        model.enter(model.phases(1)[phase])
        return model

    assert_folded_equals_autograd(make, batches([0, 1, 2, 3, 4, 5]), 1)


def test_a_phase_trains_the_regulariser_alone_where_the_batch_gives_it_nothing() -> None:
    model = small_model("MoS_TWIN", **DENSE, net_regularizer=0.1)
    model.enter(model.phases(1)[1])
    empty = Batch(
        torch.zeros(1, 0, dtype=torch.int32), torch.tensor([3], dtype=torch.int32),
        {name: column[:1] for name, column in batches([0])[0].context.items()}, torch.ones(1), None, torch.zeros(1).long(),
    )  # fmt: skip
    model._optimizer_step = lambda: None
    steps(model, [empty])
    for p in model.parameters():
        if p.requires_grad:
            assert p.grad is not None
            torch.testing.assert_close(p.grad, 0.1 * p.detach())


@pytest.mark.parametrize("regularizer", [0.3, "l1(0.3)"])
def test_a_shared_table_is_regularised_once(regularizer: Any) -> None:
    assert_folded_equals_autograd(lambda: sharing_model(embedding_regularizer=regularizer), [SHARED_BATCH], 1)


# ---- sparse updates: the optimizer alone ------------------------------------------------------------------------------


def test_row_adam_is_adam_where_every_row_is_touched_and_for_dense_gradients() -> None:
    torch.manual_seed(0)
    start = [torch.randn(7, 3), torch.randn(4)]
    ours, theirs = ([nn.Parameter(value.clone()) for value in start] for _ in range(2))
    row_adam, adam = RowAdam(ours, lr=0.1), torch.optim.Adam(theirs, lr=0.1)
    for scale in (1.0, 1e-7, 10.0):  # 1e-7: where epsilon counts
        for k, value in enumerate(start):
            theirs[k].grad = scale * torch.randn_like(value)
            ours[k].grad = theirs[k].grad.clone() if k else theirs[k].grad.to_sparse(1)
        row_adam.step()
        adam.step()
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def lazy_adam(start: Tensor, given: list[dict[int, Tensor]], lr: float) -> Tensor:
    """Adam's algorithm 1 written out row by row; each step is ``row -> gradient``."""
    table, mean, square = start.double(), torch.zeros(start.shape).double(), torch.zeros(start.shape).double()
    for number, step in enumerate(given, start=1):
        for row, gradient in step.items():
            mean[row] = 0.9 * mean[row] + 0.1 * gradient
            square[row] = 0.999 * square[row] + 0.001 * gradient**2
            table[row] -= lr * (mean[row] / (1 - 0.9**number)) / ((square[row] / (1 - 0.999**number)).sqrt() + 1e-8)
    return table


def sparse(step: dict[int, Tensor], shape: torch.Size) -> Tensor:
    rows, vectors = torch.tensor([list(step)]), torch.stack(list(step.values())).float()
    return torch.sparse_coo_tensor(rows, vectors, shape, check_invariants=True)


def test_row_adam_against_adam_written_row_by_row() -> None:
    torch.manual_seed(1)
    table = nn.Parameter(torch.randn(6, 2))
    start = table.detach().clone()
    given = [{row: torch.randn(2).double() for row in rows} for rows in ([3, 1], [1], [4, 3, 1], [4])]
    optimizer = RowAdam([table], lr=0.05)
    for number, step in enumerate(given):
        table.grad = sparse(step, table.shape)
        optimizer.step()
        if number == 1:  # the state survives a round trip
            saved = optimizer.state_dict()
            optimizer = RowAdam([table], lr=9.0)
            optimizer.load_state_dict(saved)
    torch.testing.assert_close(table.detach().double(), lazy_adam(start, given, 0.05), rtol=1e-5, atol=1e-6)
    assert torch.equal(table.detach()[[0, 2, 5]], start[[0, 2, 5]])


def test_a_repeated_row_counts_as_one_row_with_the_sum() -> None:
    tables = [nn.Parameter(torch.ones(3, 1)) for _ in range(2)]
    tables[0].grad = torch.sparse_coo_tensor(torch.tensor([[1, 1]]), torch.tensor([[1.0], [-3.0]]), (3, 1))
    tables[1].grad = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.tensor([[-2.0]]), (3, 1))
    for table in tables:
        RowAdam([table], lr=0.1).step()
    assert torch.equal(tables[0], tables[1])


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_clipping_counts_and_scales_sparse_gradients(max_norm: float) -> None:
    torch.manual_seed(2)
    dense, mixed = ([nn.Parameter(torch.zeros(5, 2)), nn.Parameter(torch.zeros(3))] for _ in range(2))
    index = torch.tensor([[4, 1, 4]])  # not coalesced: a norm over the entries would be wrong
    mixed[0].grad = torch.sparse_coo_tensor(index, torch.randn(3, 2), (5, 2))
    mixed[1].grad = torch.randn(3)
    dense[0].grad, dense[1].grad = mixed[0].grad.to_dense(), mixed[1].grad.clone()
    wanted = nn.utils.clip_grad_norm_(dense, max_norm)
    torch.testing.assert_close(clip_gradients(mixed, max_norm), wanted)
    torch.testing.assert_close(mixed[0].grad.to_dense(), dense[0].grad)
    torch.testing.assert_close(mixed[1].grad, dense[1].grad)


def test_sparse_gradients_are_gathered_batch_by_batch() -> None:
    table = nn.Embedding(4, 2, sparse=True)
    for rows in ([1, 2], [2, 3]):
        with one_batch_gradients(table.parameters()):
            table(torch.tensor(rows)).sum().backward()
            assert table.weight.grad.coalesce().indices()[0].tolist() == rows
    assert table.weight.grad.to_dense()[:, 0].tolist() == [0.0, 1.0, 2.0, 1.0]


# ---- sparse updates: models ------------------------------------------------------------------------------------------


def tables_of(model: Any) -> dict[str, Tensor]:
    return {n: t.weight for n, t in model.embedding_layer.embedding_layer.embedding_layers.items() if hasattr(t, "weight")}


def touched(model: Any, batch: Batch) -> dict[str, set[int]]:
    """Rows of the item tables that a batch looks up."""
    ids = torch.cat([batch.history.flatten(), batch.target]).unique()
    return {name: set(column.flatten().tolist()) for name, column in model.item_features.rows(ids).items()}


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_untouched_rows_do_not_move_at_all(accumulation_steps: int) -> None:
    model = small_model(
        "TWIN", sparse_embedding_updates=True, embedding_regularizer=0.1, accumulation_steps=accumulation_steps
    )
    given = batches([0, 1, 2], [3, 4])
    rows = [touched(model, batch)["item_id"] for batch in given]
    first, later = rows[0] - rows[1] - {0}, rows[1] - {0}
    start = tables_of(model)["item_id"].detach().clone()
    steps(model, given[:accumulation_steps])
    middle = tables_of(model)["item_id"].detach().clone()
    steps(model, [given[1]] * accumulation_steps)
    end = tables_of(model)["item_id"].detach()
    untouched = sorted(set(range(len(start))) - rows[0] - rows[1])
    assert len(untouched) > 5 and first and later
    assert torch.equal(end[untouched], start[untouched])
    assert (middle[sorted(first)] != start[sorted(first)]).any(1).all()
    assert torch.equal(end[sorted(first)], middle[sorted(first)])  # their moments do not push them on
    assert (end[sorted(later)] != middle[sorted(later)]).any(1).all()


@pytest.mark.parametrize("options", [{}, {"accumulation_steps": 3}])
@pytest.mark.parametrize("max_norm", [1e9, 1e-2])
def test_with_every_row_touched_it_is_adam(options: dict[str, Any], max_norm: float) -> None:
    ends = []
    for chosen in (False, True):
        model = sharing_model(sparse_embedding_updates=chosen, **options)
        everything = Batch(
            torch.arange(8, dtype=torch.int32).view(1, 8).repeat(2, 1), torch.tensor([8, 8], dtype=torch.int32),
            {}, torch.tensor([1.0, 0.0]), None, torch.zeros(2).long(),
        )  # fmt: skip
        assert touched(model, everything)["first"] == set(range(9))
        steps(model, [everything] * 6, max_norm)
        ends.append(state(model))
    for name, value in ends[0].items():
        # Adam divides by the gradient's size, so its rounding (1e-7 relative, more where terms cancel) shows in full
        torch.testing.assert_close(ends[1][name], value, rtol=1e-4, atol=2e-5, msg=name)


def test_the_regulariser_sees_the_touched_rows_in_gradient_and_loss() -> None:
    model = small_model("TWIN", **DENSE, sparse_embedding_updates=True, embedding_regularizer=0.1, accumulation_steps=2)
    plain = small_model("TWIN", **DENSE, sparse_embedding_updates=True, accumulation_steps=2)
    given = batches([0, 1, 2], [2, 3])
    for each in (model, plain):
        each._optimizer_step = lambda: None
    losses, task = steps(model, given), steps(plain, given)
    table = tables_of(model)["item_id"].detach()
    wanted = tables_of(plain)["item_id"].grad.to_dense()
    for batch in given:
        rows = sorted(touched(model, batch)["item_id"] - {0})
        wanted[rows] += 0.1 / 2 * table[rows]
    torch.testing.assert_close(tables_of(model)["item_id"].grad.to_dense(), wanted, rtol=1e-5, atol=1e-7)
    whole = float(torch.as_tensor(model.regularization_loss()).detach())
    for loss, data in zip(losses, task, strict=True):
        assert 0 < loss - data < whole


def test_the_regulariser_gives_a_table_that_no_row_of_the_batch_reads_no_gradient() -> None:
    tables = [nn.Embedding(4, 2, sparse=True), nn.Embedding(4, 2)]
    chosen = list(terms(nn.ModuleList(tables), None, 0.1, longctr_compat=False))
    assert [term.by_row for term in chosen] == [True, False]
    value = add_gradient(chosen, 1.0)
    assert tables[0].weight.grad is None
    torch.testing.assert_close(tables[1].weight.grad, 0.1 * tables[1].weight.detach())
    torch.testing.assert_close(value, 0.05 * tables[1].weight.detach().square().sum())


def test_only_tables_of_the_feature_embedding_get_sparse_gradients() -> None:
    model = ready(small_model("FinalMLP", sparse_embedding_updates=True))
    model._optimizer_step = lambda: None
    model.train_step(batches([0, 1])[0])
    found = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.is_sparse}
    assert {name.split(".")[-2] for name in found} <= set(TABLES)
    assert {name.split(".")[-2] for name in found if name.startswith("embedding_layer.")} == set(TABLES)


def test_sparse_updates_need_adam() -> None:
    with pytest.raises(ValueError, match="sparse_embedding_updates needs optimizer adam, not SGD"):
        small_model("TWIN", sparse_embedding_updates=True, optimizer="SGD")


@pytest.mark.parametrize("name", ["TWIN", "MoS_TWIN"])
def test_training_with_sparse_updates(tmp_path: Path, name: str) -> None:
    """All phases, an incomplete accumulation group, learning-rate decay."""
    model = small_model(
        name, tmp_path, sparse_embedding_updates=True, accumulation_steps=3, embedding_regularizer=1e-5, seed=2,
        early_stop_patience=99,
    )  # fmt: skip
    before = model.evaluate(tiny_loader("valid"))
    seed_everything(0)
    model.fit(tiny_loader(shuffle=True), epochs=12, validation_data=tiny_loader("valid"))
    assert model.evaluate(tiny_loader("valid"))["logloss"] < before["logloss"]
    assert isinstance(model.optimizer, RowAdam)
    rates = [record["learning_rate"] for record in model.history]
    assert min(rates) < max(rates)


def test_phase_1_of_mos_is_the_plain_backbone_with_sparse_updates_too(tmp_path: Path) -> None:
    options: dict[str, Any] = {"sparse_embedding_updates": True, "embedding_regularizer": 1e-3, "max_len": 20}
    models = [small_model(name, tmp_path / name, **options) for name in ("TWIN", "MoS_TWIN")]
    models[1].enter(models[1].phases(1)[0])
    given = batches([0, 1, 2, 3], [4, 5, 6])
    assert steps(models[0], given) == steps(models[1], given)
    ends = [state(model) for model in models]
    shared = [name for name in ends[0] if name in ends[1]]
    assert len([name for name in shared if name.startswith("embedding_layer.")]) >= len(TABLES)
    for name in shared:
        assert torch.equal(ends[1][name], ends[0][name]), name


def test_phase_2_leaves_the_tables_alone_and_phase_3_moves_them() -> None:
    model = small_model("MoS_TWIN", sparse_embedding_updates=True, embedding_regularizer=0.1)
    given = batches([0, 1, 2, 3], [4, 5, 6])
    for phase, moves in zip(model.phases(1), (True, False, True), strict=True):
        model.enter(phase)
        start = tables_of(model)["item_id"].detach().clone()
        steps(model, given)
        assert torch.equal(tables_of(model)["item_id"].detach(), start) != moves, phase.name
