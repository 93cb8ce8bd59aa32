"""The base model: two batch forms, one answer; nothing but a row's own data decides its prediction; checkpoints."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_files import TINY_MAX_LEN, small_model, tiny_dataset, tiny_loader
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model_zoo.batch import Batch
from model_zoo.compat import seed_everything
from model_zoo.errors import ConfigError, DataError
from model_zoo.pipeline.dataset import CTRDataset
from model_zoo.pipeline.loader import longctr_batch
from model_zoo.registry import get_model

MODELS = ("TWIN", "MoS_TWIN")
# single precision; other row counts and paddings reorder sums of at most 100 terms, at values of order 1
ROUNDING: dict[str, Any] = {"rtol": 1e-5, "atol": 2e-6}
SETTINGS = settings(derandomize=True, deadline=None, max_examples=25)


def lively(name: str, **overrides: Any) -> Any:
    """A model in evaluation mode with weights large enough that every input matters to the prediction."""
    model = small_model(name, **overrides)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.6)
    return model.eval()


@cache
def fixed_model(name: str) -> Any:
    return lively(name)


def predict(model: Any, batch: Any) -> Tensor:
    with torch.no_grad():
        return model(batch)["y_pred"].view(-1)


def random_batch(lengths: list[int], seed: int, columns: int | None = None) -> Batch:
    """Histories of random items, of the given lengths, and random targets and context."""
    rng = np.random.default_rng(seed)
    columns = max(lengths) if columns is None else columns
    history = np.zeros((len(lengths), columns), np.int32)
    for row, length in enumerate(lengths):
        history[row, columns - length :] = rng.integers(1, 60, length)
    rows = len(lengths)
    return Batch(
        history=torch.from_numpy(history),
        target=torch.from_numpy(rng.integers(1, 60, rows).astype(np.int32)),
        context={
            "user_id": torch.from_numpy(rng.integers(1, 42, rows).astype(np.int32)),
            "tags": torch.from_numpy(rng.integers(0, 6, (rows, 3)).astype(np.int32)),
        },
        label=torch.from_numpy(rng.integers(0, 2, rows).astype(np.float32)),
        group=torch.arange(rows),
        rows=torch.arange(rows),
    )


def padded(batch: Batch, columns: int) -> Batch:
    """``columns`` more padding before every history."""
    return replace(batch, history=torch.nn.functional.pad(batch.history, (columns, 0)))


histories = st.lists(st.integers(0, 14), min_size=2, max_size=7)
seeds = st.integers(0, 10_000)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("context", [True, False])
def test_longctr_batches_and_index_batches_give_one_answer_and_one_gradient(name: str, context: bool) -> None:
    dataset = tiny_dataset(context)
    model = lively(name, dataset=dataset)
    rows = np.arange(30)
    forms = (tiny_loader(dataset=dataset).batch(rows), longctr_batch(dataset, "train", rows, TINY_MAX_LEN))
    answers, gradients = [], []
    for batch in forms:
        model.zero_grad(set_to_none=True)
        answer = model(batch)
        model.compute_loss(answer, model.get_labels(batch)).backward()
        answers.append(answer["y_pred"].detach())
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(answers[0], answers[1], **ROUNDING)
    assert answers[0].std() > 0.01
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 10
    for key, gradient in gradients[0].items():
        # an item's gradient is summed over its positions in another order
        torch.testing.assert_close(gradient, gradients[1][key], rtol=1e-4, atol=2e-6, msg=key)


@pytest.mark.parametrize("name", MODELS)
def test_both_batch_forms_train_alike(name: str) -> None:
    seen = []
    for form in ("index", "longctr"):
        model = small_model(name, optimizer="SGD", learning_rate=0.1).train()
        model._batch_index, model._max_gradient_norm = 0, 10.0
        if name == "MoS_TWIN":
            model.enter(model.phases(1)[-1])
        rows = np.arange(12)
        batch = (
            tiny_loader().batch(rows) if form == "index" else longctr_batch(tiny_dataset(), "train", rows, TINY_MAX_LEN)
        )
        model.train_step(batch)
        seen.append(model.state_dict())
    for key, value in seen[0].items():
        torch.testing.assert_close(value, seen[1][key], rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", MODELS)
def test_longctr_padding_behind_the_history_is_read_like_padding_before_it(name: str) -> None:
    rows = np.array([1, 3, 9, 17])
    length = int(min(tiny_dataset().splits["train"].seq_len[rows].max(), TINY_MAX_LEN))
    pre = longctr_batch(tiny_dataset(), "train", rows, length)
    fits = tiny_dataset().splits["train"].seq_len[rows] <= length  # longer ones lose other items at each end
    post = longctr_batch(tiny_dataset(), "train", rows, length, padding="post")
    model = fixed_model(name)
    torch.testing.assert_close(predict(model, pre)[fits], predict(model, post)[fits], **ROUNDING)
    assert fits.sum() >= 2 and not torch.equal(pre[2], post[2])


@pytest.mark.parametrize("name", MODELS)
@SETTINGS
@given(lengths=histories, seed=seeds, columns=st.integers(1, 9))
def test_padding_does_not_change_predictions(name: str, lengths: list[int], seed: int, columns: int) -> None:
    model, batch = fixed_model(name), random_batch(lengths, seed)
    torch.testing.assert_close(predict(model, padded(batch, columns)), predict(model, batch), **ROUNDING)


@pytest.mark.parametrize("name", MODELS)
@SETTINGS
@given(lengths=histories, seed=seeds)
def test_row_order_does_not_change_predictions(name: str, lengths: list[int], seed: int) -> None:
    model, batch = fixed_model(name), random_batch(lengths, seed)
    order = torch.from_numpy(np.random.default_rng(seed + 1).permutation(len(lengths)))
    torch.testing.assert_close(predict(model, batch.select(order)), predict(model, batch)[order], **ROUNDING)


@pytest.mark.parametrize("name", MODELS)
@SETTINGS
@given(lengths=histories, seed=seeds)
def test_batch_size_and_batch_mates_do_not_change_predictions(name: str, lengths: list[int], seed: int) -> None:
    model, batch = fixed_model(name), random_batch(lengths, seed)
    together = predict(model, batch)
    for row, length in enumerate(lengths):
        alone = batch.select(torch.tensor([row]))
        alone = replace(alone, history=alone.history[:, alone.history.shape[1] - length :])
        torch.testing.assert_close(predict(model, alone)[0], together[row], **ROUNDING)
    half = len(lengths) // 2
    mates = random_batch([14] * len(lengths), seed + 1)
    mixed = Batch(
        torch.cat([padded(batch, 14 - batch.history.shape[1]).history[:half], mates.history[half:]]),
        torch.cat([batch.target[:half], mates.target[half:]]),
        {key: torch.cat([value[:half], mates.context[key][half:]]) for key, value in batch.context.items()},
        mates.label, None, mates.rows,
    )  # fmt: skip
    torch.testing.assert_close(predict(model, mixed)[:half], together[:half], **ROUNDING)


@pytest.mark.parametrize("name", MODELS)
def test_history_target_order_and_context_all_matter(name: str) -> None:
    """What the invariances above hold constant does reach the prediction."""
    model, batch = fixed_model(name), random_batch([14] * 6, 3)
    before = predict(model, batch)
    changed = {
        "newest item": replace(batch, history=torch.cat([batch.history[:, :-1], batch.history[:, :1]], 1)),
        "target": replace(batch, target=batch.target.flip(0)),
        "context": replace(batch, context={key: value.flip(0) for key, value in batch.context.items()}),
        "tags": replace(batch, context={**batch.context, "tags": batch.context["tags"].flip(0)}),
    }
    for what, other in changed.items():
        assert float((predict(model, other) - before).abs().max()) > 1e-3, what


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("lengths", [[0, 0, 0], [1, 0, 1], [1, 14, 0, 5]])
@pytest.mark.parametrize("training", [False, True])
def test_empty_and_one_item_histories_are_finite_with_finite_gradients(
    name: str, lengths: list[int], training: bool
) -> None:
    model = lively(name).train(training)
    batch = random_batch(lengths, 0)
    answer = model(batch)
    model.compute_loss(answer, model.get_labels(batch)).backward()
    assert torch.isfinite(answer["y_pred"]).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", MODELS)
def test_with_an_empty_history_only_target_and_context_count(name: str) -> None:
    model = fixed_model(name)
    empty = random_batch([0, 0], 1, columns=6)
    _, target, sequence = model._read(empty)
    assert float(model.block(target, sequence).detach().abs().max()) == 0.0


def test_the_item_tables_padding_row_is_never_read() -> None:
    model, batch = lively("TWIN"), random_batch([3, 0, 9], 2)
    before = predict(model, padded(batch, 4))
    with torch.no_grad():
        for name in ("item_id", "cate_id"):
            model.embedding_layer.embedding_layer.embedding_layers[name].weight[0] = 100.0
        model.item_features.column("image_emb_dim8")[0] = 100.0
    torch.testing.assert_close(predict(model, padded(batch, 4)), before, rtol=0, atol=0)


# ---- construction ----------------------------------------------------------------------------------------------------


def without_item_features() -> CTRDataset:
    data = tiny_dataset()
    feature_map = type(data.feature_map)("tiny", "")
    feature_map.__dict__.update(data.feature_map.__dict__)
    feature_map.features = {name: {**spec, "source": ""} for name, spec in data.feature_map.features.items()}
    return replace(data, feature_map=feature_map)


def test_a_feature_map_without_item_features_is_refused() -> None:
    with pytest.raises(ConfigError, match="feature_cols: no feature has `source: item`"):
        small_model("TWIN", dataset=without_item_features())


def test_an_index_batch_without_the_item_table_is_refused_and_a_longctr_batch_is_not() -> None:
    model = get_model("TWIN")(tiny_dataset().feature_map, embedding_dim=8, attention_dim=8, dnn_hidden_units=[4]).eval()
    with pytest.raises(DataError, match=r"TWIN: a batch of item indices needs the item table \(item_features=\)"):
        model(tiny_loader().batch(np.arange(3)))
    assert model(longctr_batch(tiny_dataset(), "train", np.arange(3), 5))["y_pred"].shape == (3, 1)


def with_pretrained(usage: str, freeze: bool) -> tuple[CTRDataset, dict[str, tuple[Tensor, Tensor]]]:
    """The tiny data set whose item_id has vectors of width 5 for ids 1..39."""
    data = tiny_dataset()
    feature_map = type(data.feature_map)("tiny", "")
    feature_map.__dict__.update(data.feature_map.__dict__)
    spec = {"pretrained_emb": "vectors.npz", "pretrain_dim": 5, "pretrain_usage": usage, "freeze_emb": freeze}
    feature_map.features = {name: dict(value) for name, value in data.feature_map.features.items()}
    feature_map.features["item_id"].update(spec)
    known = torch.arange(60) < 40
    known[0] = False
    vectors = torch.randn(60, 5, generator=torch.Generator().manual_seed(3)) * known.unsqueeze(1)
    return replace(data, feature_map=feature_map), {"item_id": (vectors, known)}


@pytest.mark.parametrize("usage", ["init", "sum", "concat"])
@pytest.mark.parametrize("freeze", [True, False])
def test_pretrained_item_vectors_are_used_and_trained_only_if_not_frozen(usage: str, freeze: bool) -> None:
    data, pretrained = with_pretrained(usage, freeze)
    model = small_model("TWIN", dataset=data, pretrained=pretrained).train()
    table = model.embedding_layer.embedding_layer.embedding_layers["item_id"].pretrain_embedding.weight
    vectors, known = pretrained["item_id"]
    assert torch.equal(table[known], vectors[known])  # FuxiCTR's reset of the parameters leaves them alone
    assert table.requires_grad != freeze
    model._batch_index, model._max_gradient_norm = 0, 10.0
    model.train_step(tiny_loader().batch(np.arange(12)))
    assert torch.equal(table[known], vectors[known]) == freeze


def test_a_feature_with_pretrained_emb_but_no_vectors_is_refused() -> None:
    data, _ = with_pretrained("init", True)
    with pytest.raises(ConfigError, match="item_id: pretrained_emb is set, but its vectors were not loaded"):
        small_model("TWIN", dataset=data)


def test_initialisation_is_a_function_of_the_seed_and_does_not_depend_on_the_experts_beside_it() -> None:
    twin = small_model("TWIN", seed=3).state_dict()
    again = small_model("TWIN", seed=3).state_dict()
    other = small_model("TWIN", seed=4).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in twin.items())
    assert not torch.equal(twin["head.dnn.mlp.0.weight"], other["head.dnn.mlp.0.weight"])
    for experts in (1, 3):
        mos = small_model("MoS_TWIN", seed=3, n_item_experts=experts, topk_item=1).state_dict()
        for key, value in twin.items():
            assert torch.equal(value, mos[key.replace("block.", "block.global_expert.")]), key


def test_the_random_stream_after_building_does_not_depend_on_the_experts() -> None:
    draws = []
    for name in MODELS:
        small_model(name, seed=3)
        draws.append(torch.rand(4))
    assert torch.equal(draws[0], draws[1])


def test_linear_layers_start_xavier_normal_with_zero_biases_and_embeddings_near_zero() -> None:
    seed_everything(0)
    data = tiny_dataset()
    model = get_model("TWIN")(data.feature_map, embedding_dim=8, attention_dim=256, dnn_hidden_units=[400, 200])
    for layer in (module for module in model.modules() if type(module) is torch.nn.Linear):
        if layer.weight.numel() > 5_000:  # standard error of a sample deviation: 1 % at 5,000
            wanted = (2 / sum(layer.weight.shape)) ** 0.5
            assert abs(float(layer.weight.detach().std()) / wanted - 1) < 0.05
        assert layer.bias is None or float(layer.bias.detach().abs().max()) == 0.0
    table = model.embedding_layer.embedding_layer.embedding_layers["item_id"].weight.detach()
    assert abs(float(table[1:].std()) / 1e-4 - 1) < 0.15  # 472 entries


def test_parameter_counts_add_up() -> None:
    model = small_model("MoS_TWIN")
    counts = model.parameter_counts()
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    assert counts["total"] == counts["embedding"] + counts["block"] + counts["head"]
    plain = small_model("TWIN").parameter_counts()
    assert plain["experts"] == 0 and counts["block"] - counts["experts"] == plain["block"]
    assert (plain["embedding"], plain["head"]) == (counts["embedding"], counts["head"])


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_predicts_the_same_after_loading(name: str, tmp_path: Path) -> None:
    batch = random_batch([3, 14, 0, 8], 1)
    model = lively(name)
    model.save_weights(str(tmp_path / "a.model"))
    other = small_model(name, seed=9).eval()
    assert not torch.equal(predict(other, batch), predict(model, batch))
    other.load_weights(str(tmp_path / "a.model"))
    assert torch.equal(predict(other, batch), predict(model, batch))
    assert list(tmp_path.iterdir()) == [tmp_path / "a.model"]


def test_the_item_table_is_not_in_the_checkpoint() -> None:
    assert not [key for key in small_model("TWIN").state_dict() if "item_features" in key]


def test_checkpoints_that_do_not_fit_are_refused_in_one_sentence(tmp_path: Path) -> None:
    model = lively("TWIN")
    lively("MoS_TWIN").save_weights(str(tmp_path / "mos.model"))
    lively("TWIN", attention_dim=16).save_weights(str(tmp_path / "wide.model"))
    (tmp_path / "text.model").write_text("not a checkpoint")
    (tmp_path / "empty.model").write_bytes(b"")
    whole = (tmp_path / "mos.model").read_bytes()
    (tmp_path / "half.model").write_bytes(whole[: len(whole) // 2])
    wrong = {
        "mos": "does not fit TWIN",
        "wide": "does not fit TWIN: block.*, not ",
        "text": "cannot be read as a checkpoint",
        "empty": "cannot be read as a checkpoint",
        "half": "cannot be read as a checkpoint",
        "absent": "no such checkpoint",
    }
    for name, sentence in wrong.items():
        with pytest.raises(ConfigError, match=sentence) as error:
            model.load_weights(str(tmp_path / f"{name}.model"))
        assert f"{name}.model" in str(error.value) and "\n" not in str(error.value)


def test_a_write_that_fails_leaves_the_old_checkpoint_and_no_partial_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.model"
    model = lively("TWIN")
    model.save_weights(str(path))
    old = path.read_bytes()

    def half(state: Any, target: Any) -> None:
        target.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        model.save_weights(str(path))
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


def test_checkpoints_are_placed_where_the_run_wants_them(tmp_path: Path) -> None:
    model = small_model("TWIN", folder=tmp_path / "run")
    assert model.checkpoint == str(tmp_path / "run" / "TWIN.model")
