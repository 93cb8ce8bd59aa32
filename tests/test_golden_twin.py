"""TWIN where LongCTR is wrong: what the default does, measured against the recordings of LongCTR's TWIN."""

from functools import cache

import pytest
import torch
from golden_files import Golden, small_model, tiny_dataset
from torch import Tensor

from model_zoo.batch import Batch
from model_zoo.errors import ConfigError

NAMES = ("TWIN_1", "TWIN_2")


@cache
def golden(name: str) -> Golden:
    return Golden(name)


def history_lengths(record: Golden) -> Tensor:
    return record.tensor("mask").sum(1)


@pytest.fixture(params=NAMES)
def record(request: pytest.FixtureRequest) -> Golden:
    return golden(request.param)


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
