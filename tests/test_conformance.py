"""What every registered model must do: a new model is tested by being registered."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_files import small_model, tiny_dataset, tiny_loader
from torch import Tensor

from model_zoo.batch import Batch
from model_zoo.pipeline.loader import SequenceLoader, longctr_batch
from model_zoo.registry import BACKBONES, METHODS, get_model, model_keys, model_names

NAMES = model_names()
DOT = [name for name in NAMES if "head" in model_keys(name)]
MOS = [name for name in NAMES if name.startswith("MoS_")]
#: (model, options): every model, and with the dot-product head where there is one
CASES = [pytest.param(name, {}, id=name) for name in NAMES]
CASES += [
    pytest.param(n, {"head": "dot", **({"hidden_dim": None} if "hidden_dim" in model_keys(n) else {})}, id=f"{n}-dot")
    for n in DOT
    if n in BACKBONES
]
every_case = pytest.mark.parametrize("name, options", CASES)
every_model = pytest.mark.parametrize("name", NAMES)

# float64: sums of a few hundred terms in another order, under layers that divide by norms
SAME = {"rtol": 1e-8, "atol": 1e-9}

#: trainable parameters without a gradient, and why: (case, parameter) patterns
NO_GRADIENT = [
    (r".*-dot", r"embedding_layer\..*\.(user_id|tags)\.weight", "a dot-product head does not read context features"),
    (r"(.*_)?MiasRec(-dot)?", r".*\.importance\.(weight|bias)", "intents are normalised again, so their weight cancels"),
    (r"MoS_.*", r".*experts\.experts\.\d+\..*", "an expert that no row of the batch chose"),
    (r"(GShard|DSelectK|ExpertChoice)_.*", r".*experts\.experts\.\d+\..*", "an expert that no row of the batch chose"),
]


@pytest.fixture(autouse=True)
def silent(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING")


def model_of(name: str, folder: Path | None = None, seed: int = 0, **options: Any) -> Any:
    """A small model in float64 whose embeddings and codes are large enough for every part to matter."""
    model = small_model(name, folder, seed=seed, **options).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for table in model.embedding_layer.parameters():
            table.copy_(torch.randn(table.shape, generator=generator, dtype=table.dtype))
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm1d) and module.running_mean is not None:
                module.running_mean.normal_(generator=generator)
                module.running_var.uniform_(0.5, 2.0, generator=generator)
    return model.eval()


def histories(lengths: list[int], padding: int = 0, seed: int = 0) -> Batch:
    """A batch of random histories of the given lengths; context columns as in the tiny data set."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = len(lengths), max(lengths, default=0) + padding
    history = torch.zeros(rows, columns, dtype=torch.int32)
    for row, length in enumerate(lengths):
        if length:
            history[row, columns - length :] = torch.randint(1, 60, (length,), generator=generator, dtype=torch.int32)
    target = torch.randint(1, 60, (rows,), generator=generator, dtype=torch.int32)
    context = {
        "user_id": torch.randint(1, 42, (rows,), generator=generator),
        "tags": torch.randint(1, 6, (rows, 3), generator=generator),
    }
    return Batch(history, target, context, torch.ones(rows), None, torch.arange(rows))


def widened(batch: Batch, columns: int) -> Batch:
    """The same batch with more padding."""
    blank = torch.zeros(len(batch), columns, dtype=torch.int32)
    history = torch.cat([blank, batch.history], 1)
    return Batch(history, batch.target, batch.context, batch.label, batch.group, batch.rows)


def trimmed(batch: Batch) -> Batch:
    """The same batch without columns that are padding in all rows."""
    used = int((batch.history > 0).sum(1).max())
    history = batch.history[:, batch.history.shape[1] - used :]
    return Batch(history, batch.target, batch.context, batch.label, batch.group, batch.rows)


@torch.no_grad()
def predict(model: Any, batch: Any) -> Tensor:
    return model(batch)["y_pred"].view(-1)


# empty, one item, shorter than every window and top-k, longer than the max_len (20) and the position tables (24)
LENGTHS = [0, 1, 2, 3, 5, 9, 20, 33]


@every_case
def test_padding_batch_mates_order_and_batch_size_do_not_change_a_prediction(name: str, options: dict[str, Any]) -> None:
    model = model_of(name, **options)
    batch = histories(LENGTHS)
    whole = predict(model, batch)
    assert torch.isfinite(whole).all()
    assert float(whole.std()) > 1e-4, "the model does not read its inputs"
    torch.testing.assert_close(predict(model, widened(batch, 3)), whole, **SAME)
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(predict(model, batch.select(order)), whole[order], **SAME)
    alone = [predict(model, trimmed(batch.select(torch.tensor([row])))) for row in range(len(batch))]
    torch.testing.assert_close(torch.cat(alone), whole, **SAME)


@every_model
def test_batches_of_empty_histories_and_without_columns(name: str) -> None:
    model = model_of(name)
    found = [predict(model, histories([0, 0], padding)) for padding in (0, 1, 7)]
    assert all(torch.isfinite(answer).all() for answer in found)
    torch.testing.assert_close(found[1], found[0], **SAME)
    torch.testing.assert_close(found[2], found[0], **SAME)


@every_case
def test_the_history_matters_and_the_padding_item_does_not(name: str, options: dict[str, Any]) -> None:
    model = model_of(name, **options)
    batch = histories([4, 9, 15])
    before = predict(model, batch)
    other = histories([4, 9, 15], seed=1)
    changed = Batch(other.history, batch.target, batch.context, batch.label, None, batch.rows)
    assert float((predict(model, changed) - before).abs().max()) > 1e-6
    with torch.no_grad():
        for feature in ("item_id", "cate_id"):
            model.embedding_layer.embedding_layer.embedding_layers[feature].weight[0] += 1.0
    torch.testing.assert_close(predict(model, batch), before, **SAME)


@every_case
def test_gradients_are_finite_and_reach_every_parameter(name: str, options: dict[str, Any]) -> None:
    model = model_of(name, **options).train()
    torch.manual_seed(0)
    reached: dict[str, float] = {}
    for seed in range(3):
        batch = histories([0, 1, 3, 7, 12, 18, 20, 16], seed=seed)
        label = torch.arange(len(batch)).remainder(2).double().view(-1, 1)
        model.zero_grad()
        answer = model(batch)
        (model.loss_fn(answer["y_pred"], label) + sum(t(label) if callable(t) else t for t in answer["losses"])).backward()
        for parameter_name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.grad is not None:
                assert torch.isfinite(parameter.grad).all(), parameter_name
                size = float(parameter.grad.abs().max())
                reached[parameter_name] = max(reached.get(parameter_name, 0.0), size)
    case = f"{name}-dot" if options else name
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    missed = [
        n
        for n in trainable
        if reached.get(n, 0.0) == 0.0
        and not any(re.fullmatch(m, case) and re.fullmatch(pattern, n) for m, pattern, _ in NO_GRADIENT)
    ]
    assert not missed
    if METHODS.keys() & {name.partition("_")[0]}:  # of the experts, at least one of each kind is reached
        stems = {re.sub(r"experts\.\d+\.", "experts.*.", n) for n in trainable}
        found = {re.sub(r"experts\.\d+\.", "experts.*.", n) for n, size in reached.items() if size > 0}
        unreached = {s for s in stems - found if not any(re.fullmatch(p, s) for _, p, _ in NO_GRADIENT[:2])}
        assert not unreached


@every_model
def test_a_saved_model_loads_and_predicts_the_same_and_evaluation_repeats(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    batch = histories(LENGTHS)
    wanted = predict(model, batch)
    torch.manual_seed(99)
    assert torch.equal(predict(model, batch), wanted)
    path = tmp_path / "model.model"
    model.save_weights(str(path))
    other = small_model(name, seed=5).double()
    other.load_weights(str(path))
    assert torch.equal(predict(other.eval(), batch), wanted)


@every_model
def test_a_longctr_tuple_and_a_batch_of_indices_give_the_same_prediction(name: str) -> None:
    model = model_of(name)
    loader = tiny_loader()
    batch = loader.batch(np.arange(30))
    context, items, mask = longctr_batch(tiny_dataset(), "train", np.arange(30), 20)
    as_double = {key: value.double() if value.is_floating_point() else value for key, value in items.items()}
    torch.testing.assert_close(predict(model, (context, as_double, mask)), predict(model, batch), **SAME)


@every_model
def test_one_epoch_of_training_lowers_the_loss(name: str, tmp_path: Path) -> None:
    model = small_model(name, tmp_path, seed=1)
    loader = tiny_loader(batch_size=6, shuffle=True)
    everything = loader.batch(np.arange(30))

    def loss() -> float:
        """With batch statistics, as in training: running ones need more than five steps."""
        model.train()
        state = copy.deepcopy(model.state_dict())
        with torch.no_grad():
            found = float(model.loss_fn(model(everything)["y_pred"], model.get_labels(everything)))
        model.load_state_dict(state)
        return found

    torch.manual_seed(0)
    before = np.mean([loss() for _ in range(3)])
    if name in MOS:
        model.enter(model.phases(1)[-1])
    model._max_gradient_norm, model._batch_index = 10.0, 0
    model.train()
    for batch in loader:
        model.train_step(batch)
    assert np.mean([loss() for _ in range(3)]) < before


@pytest.mark.parametrize("name", MOS)
def test_each_phase_of_mos_trains_exactly_its_part(name: str, tmp_path: Path) -> None:
    model = small_model(name, tmp_path, seed=2)
    experts = {id(p) for module in model.expert_modules() for p in module.parameters()}
    batch = tiny_loader().batch(np.arange(30))
    model._max_gradient_norm, model._batch_index = 10.0, 0
    model.start_experts(tiny_loader())
    for phase in model.phases(1):
        model.enter(phase)
        model.train()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        statistics = {n: b.clone() for n, b in model.head.named_buffers() if b.is_floating_point()}
        codes = model.mos.item_router.codebook.codes.clone()
        model.train_step(batch)
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        in_experts = {n for n, p in model.named_parameters() if id(p) in experts}
        assert bool(moved & in_experts) == ("experts" in phase.trains)
        assert bool(moved - in_experts) == ("backbone" in phase.trains)
        kept = all(torch.equal(b, dict(model.head.named_buffers())[n]) for n, b in statistics.items())
        assert kept == ("backbone" not in phase.trains) or not statistics
        assert torch.equal(codes, model.mos.item_router.codebook.codes) != phase.update_codebooks


@pytest.mark.parametrize("name", [n for n in NAMES if n.partition("_")[0] in METHODS])
def test_without_weight_on_its_experts_a_method_is_its_backbone_bit_for_bit(name: str) -> None:
    method, _, backbone = name.partition("_")
    none = {"alpha_item": 0.0, "alpha_window": 0.0} if method == "MoS" else {"alpha_routed": 0.0}
    plain, mixture = small_model(backbone, seed=3).eval(), small_model(name, seed=3, **none).eval()
    assert plain.parameter_counts()["total"] == mixture.parameter_counts()["total"]
    batch = histories(LENGTHS)
    assert torch.equal(predict(plain, batch), predict(mixture, batch))


def test_the_zoo_is_complete() -> None:
    grid = [f"{m}{b}" for b in ("TWIN", "SDIM", "TransAct", "Mamba4Rec") for m in ("", *(f"{m}_" for m in METHODS))]
    longctr = ["DCNv2", "FinalMLP", "DIN", "DIEN", "TransAct", "SIM", "ETA", "SDIM", "TWIN", "MIRRN"]
    others = ["AttenMixer", "MiasRec", "SASRec", "GRU4Rec", "FuXi", "FuXiMME", "MoS_SASRec", "MoS_GRU4Rec"]
    wanted = {*grid, *longctr, *others}
    assert len(METHODS) == 4 and len(wanted) == 35 and wanted <= set(NAMES)
    assert all(get_model(name).__name__ == name for name in NAMES)


def test_the_loader_gives_rows_longer_than_max_len_their_newest_items() -> None:
    loader = SequenceLoader(tiny_dataset(), "train", 30, 4, shuffle=False, seed=0)
    long = tiny_loader().batch(np.arange(30)).history[:, -4:]
    assert torch.equal(loader.batch(np.arange(30)).history, long)


@pytest.mark.parametrize("name", ["MoS_TWIN", "MoS_SDIM", "GShard_SDIM"])
def test_block_scope_long_puts_the_experts_over_the_long_branch_alone(name: str) -> None:
    model = model_of(name, block_scope="long")
    assert model.method_layers()[0] is (model.block.long if "SDIM" in name else model.block.long_attention)
    names = [n for module in model.expert_modules() for n, _ in module.named_parameters()]
    assert names and not any("short_attention" in n for n in names)
    batch = histories(LENGTHS)
    whole = predict(model, batch)
    torch.testing.assert_close(predict(model, widened(batch, 2)), whole, **SAME)
    label = torch.ones(len(batch), 1, dtype=torch.double)
    model.train()
    answer = model(batch)
    (model.loss_fn(answer["y_pred"], label) + sum(answer["losses"])).backward()
    for module in model.expert_modules():
        assert any(p.grad is not None and bool(p.grad.abs().max() > 0) for p in module.parameters()) or not list(
            module.parameters()
        )


def test_block_scope_long_of_a_block_without_such_a_branch_is_refused() -> None:
    with pytest.raises(ValueError, match="block_scope: long: DIN has no long branch apart from the rest; set full"):
        small_model("MoS_DIN", block_scope="long")


@every_model
def test_training_under_autocast_is_finite_and_near_full_precision(name: str) -> None:
    model = small_model(name)
    batch = tiny_loader().batch(np.arange(30))
    wanted = predict(model.eval(), batch)
    with torch.autocast("cpu", torch.bfloat16):
        found = predict(model, batch).float()
        answer = model.train()(batch)["y_pred"]
    # bfloat16 has 8 bits: probabilities near 1/2 from logits of order one; a routing or a hash may fall the other way
    assert float((found - wanted).abs().mean()) < 0.05
    answer.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
