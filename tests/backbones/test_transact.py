"""The TransAct block against torch's own encoder layers run row by row on whole tokens, and LongCTR's padded form."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import gradients, ragged, rows_of
from torch import Tensor, nn
from torch.func import functional_call

from model_zoo.backbones.transact import TransActBlock
from model_zoo.errors import ConfigError
from model_zoo.layers import transact_layer
from model_zoo.layers.sequence import Sequence

# float64: a softmax, layer norms and products of matrices of a dozen rows, taken in another order
EXACT = {"rtol": 1e-9, "atol": 1e-9}
DIM = 4
LENGTHS = [9, 1, 0, 4, 7, 2]


def build(**options: Any) -> TransActBlock:
    torch.manual_seed(2)
    block = TransActBlock(DIM, **{"dim_feedforward": 10, **options}).double()
    for weight in block.parameters():
        nn.init.normal_(weight, std=0.7)
    return block


def case(lengths=LENGTHS, seed: int = 0, padding: int = 0, num_items: int = 9) -> tuple[Tensor, Sequence]:
    generator = torch.Generator().manual_seed(seed + 1)
    query = torch.randn(len(lengths), DIM, generator=generator, dtype=torch.double).requires_grad_()
    return query, ragged(lengths, DIM, seed, padding=padding, num_items=num_items)


def torch_layer(layer: nn.Module, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
    """``nn.TransformerEncoderLayer`` with the tested layer's own parameters, ``[B, T, 2 d]`` -> the same."""
    theirs = nn.TransformerEncoderLayer(
        2 * DIM, layer.self_attn.num_heads, layer.linear1.out_features, 0.0, batch_first=True
    )
    return functional_call(theirs.double(), dict(layer.named_parameters()), (tokens,), {"src_key_padding_mask": padding})


def row_answer(block: TransActBlock, target: Tensor, tokens: Tensor) -> Tensor:
    """One row: target ``[d]``, real items ``[t, d]``."""
    if len(tokens) == 0:
        return target.new_zeros(block.out_dim)
    hidden = torch.cat([tokens, target.expand_as(tokens)], 1).unsqueeze(0)
    for layer in block.layers:
        hidden = torch_layer(layer, hidden)
    newest = hidden[0, max(len(tokens) - block.first_k_cols, 0) :]
    missing = torch.zeros(block.first_k_cols - len(newest), 2 * DIM, dtype=torch.double)
    parts = [missing.flatten(), newest.flatten()]
    return torch.cat(parts if block.out_linear is None else [*parts, block.out_linear(hidden[0].max(0).values)])


def by_row(block: TransActBlock, query: Tensor, sequence: Sequence) -> Tensor:
    rows = rows_of(sequence.vectors, sequence.mask)
    return torch.stack([row_answer(block, target, tokens) for target, tokens in zip(query, rows, strict=True)])


def longctr(block: TransActBlock, query: Tensor, vectors: Tensor, mask: Tensor) -> Tensor:
    """LongCTR's form: all columns computed, keys masked but for an empty row's last, answers at padding zeroed."""
    hidden = torch.cat([vectors, query.unsqueeze(1).expand_as(vectors)], 2)
    padding = ~mask
    padding[padding.all(1), -1] = False
    for layer in block.layers:
        hidden = torch_layer(layer, hidden, padding)
    hidden = hidden.masked_fill(padding.unsqueeze(2), 0.0)
    parts = [hidden[:, -block.first_k_cols :].flatten(1)]
    if block.out_linear is not None:
        parts.append(block.out_linear(hidden.masked_fill(padding.unsqueeze(2), -1e9).max(1).values))
    return torch.cat(parts, 1)


def assert_same(block: nn.Module, query: Tensor, sequence: Sequence, expected: Tensor) -> None:
    """Output and the gradients of every parameter, of the items and of the targets."""
    output = block(query, sequence)
    torch.testing.assert_close(output, expected, **EXACT)
    leaves = [query, sequence.items, *block.parameters()]
    for got, want in zip(gradients(output, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("num_items", [9, 200])  # fewer items than positions, and more
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("layers, columns, pool", [(1, 1, False), (1, 1, True), (1, 3, False), (3, 2, False), (2, 3, True)])
def test_the_block_equals_torchs_layers_row_by_row(layers, columns, pool, heads, num_items):
    block = build(transformer_layers=layers, first_k_cols=columns, concat_max_pool=pool, num_heads=heads)
    query, sequence = case(padding=2, num_items=num_items)
    assert_same(block, query, sequence, by_row(block, query, sequence))


@pytest.mark.parametrize("columns, pool, width", [(1, True, 4 * DIM), (1, False, 2 * DIM), (3, True, 8 * DIM)])
def test_the_answer_is_read_out_columns_then_pool(columns, pool, width):
    block = build(first_k_cols=columns, concat_max_pool=pool)
    query, sequence = case()
    assert block.out_dim == width and block(query, sequence).shape == (6, width)


def test_columns_that_a_history_lacks_are_zeros_before_those_it_has():
    block = build(first_k_cols=3, concat_max_pool=False)
    query, sequence = case()
    output = block(query, sequence).view(6, 3, 2 * DIM)
    present = output.abs().sum(2) > 0
    assert present.sum(1).tolist() == [3, 1, 0, 3, 3, 2]
    assert present[1].tolist() == [False, False, True] and present[5].tolist() == [False, True, True]


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("layers, columns", [(1, 1), (2, 2)])
def test_the_order_of_all_but_the_items_read_out_does_not_matter(layers, columns, pool):
    block = build(transformer_layers=layers, first_k_cols=columns, concat_max_pool=pool)
    query, sequence = case([9, 9, 9])
    before = block(query, sequence)
    order = torch.cat(
        [torch.randperm(9 - columns, generator=torch.Generator().manual_seed(1)), torch.arange(9 - columns, 9)]
    )
    assert not torch.equal(order, torch.arange(9))
    permuted = Sequence(sequence.items, sequence.index[:, order], sequence.mask)
    torch.testing.assert_close(block(query, permuted), before, **EXACT)
    swapped = Sequence(sequence.items, sequence.index.flip(1), sequence.mask)
    assert not torch.allclose(block(query, swapped), before, atol=1e-3)


def test_without_pool_only_the_read_out_columns_of_the_last_layer_are_computed(monkeypatch):
    seen: list[int] = []
    ours = transact_layer.TransActLayer._feed_forward
    monkeypatch.setattr(
        transact_layer.TransActLayer, "_feed_forward", lambda layer, t: seen.append(t[..., 0].numel()) or ours(layer, t)
    )
    query, sequence = case()
    for layers, pool, wanted in ((1, False, [12]), (2, False, [23, 12]), (2, True, [23, 23])):
        seen.clear()
        build(transformer_layers=layers, first_k_cols=2, concat_max_pool=pool)(query, sequence)
        assert seen == wanted  # 6 rows of 2 columns; the 23 real positions


@pytest.mark.parametrize("pool", [False, True])
def test_empty_histories_give_exact_zeros_and_finite_gradients(pool):
    block = build(first_k_cols=2, concat_max_pool=pool, transformer_layers=2)
    query, sequence = case()
    output = block(query, sequence)
    assert torch.equal(output[2], torch.zeros(block.out_dim, dtype=torch.double))
    assert all(g.isfinite().all() for g in gradients(output, [query, sequence.items, *block.parameters()]))
    for found in gradients(output[2], [query, sequence.items, *block.parameters()]):
        assert not found.any()
    none = Sequence.from_vectors(torch.zeros(6, 0, DIM, dtype=torch.double), torch.zeros(6, 0))
    assert torch.equal(block(query, none), torch.zeros(6, block.out_dim, dtype=torch.double))
    blank = Sequence(sequence.items, sequence.index, torch.zeros_like(sequence.mask))
    assert torch.equal(block(query, blank), torch.zeros(6, block.out_dim, dtype=torch.double))


@pytest.mark.parametrize("length", [1, 2])
def test_batches_shorter_than_the_read_out_work(length):
    block = build(first_k_cols=3)
    query, sequence = case([length, 1])
    assert_same(block, query, sequence, by_row(block, query, sequence))


# ---- dropout


@pytest.mark.parametrize("pool", [False, True])
def test_dropout_acts_in_training_only(pool):
    block = build(transformer_dropout=0.4, transformer_layers=2, concat_max_pool=pool)
    query, sequence = case()
    block.eval()
    torch.testing.assert_close(block(query, sequence), by_row(block, query, sequence), **EXACT)
    block.train()
    first, second = block(query, sequence), block(query, sequence)
    assert not torch.allclose(first, second) and torch.isfinite(first).all()


def test_dropped_attention_weights_take_their_values_target_half_with_them():
    """Attention's answer is a sum of kept weights times whole values: mean over draws, five standard errors."""
    block = build(transformer_dropout=0.5, concat_max_pool=False)
    layer = block.layers[0].train()
    query, sequence = case([6])
    answers: list[Tensor] = []
    layer._answer = lambda tokens, attended: answers.append(attended.detach()) or attended  # type: ignore[method-assign]
    copies = torch.zeros(4000, dtype=torch.long)
    layer.newest(sequence.select(copies), query[copies], 1)
    layer.eval()
    layer.newest(sequence, query, 1)
    drawn, wanted = answers[0][:, 0], answers[1][0, 0]
    error = drawn.std(0) / math.sqrt(len(drawn))
    assert bool(((drawn.mean(0) - wanted).abs() <= 5 * error).all())
    # one item: kept twice over, or lost with all but the output bias
    layer.train()
    query, sequence = case([1])
    copies = torch.zeros(50, dtype=torch.long)
    layer.newest(sequence.select(copies), query[copies], 1)
    lost = (answers[2][:, 0] - layer.self_attn.out_proj.bias).abs().amax(1) < 1e-12
    assert 10 < int(lost.sum()) < 40


# ---- LongCTR


@pytest.mark.parametrize("layers, columns, pool", [(1, 1, True), (2, 3, False), (2, 2, True)])
def test_longctr_compat_equals_longctrs_padded_form(layers, columns, pool):
    """Rows: full, one item, empty (reads the padding in its last column), an id 0 inside and at the end of a history."""
    block = build(longctr_compat=True, transformer_layers=layers, first_k_cols=columns, concat_max_pool=pool, num_heads=2)
    query, sequence = case([5, 1, 0, 5, 4])
    sequence.mask[3, 2] = False
    sequence.mask[4, -1] = False
    assert_same(block, query, sequence, longctr(block, query, sequence.vectors, sequence.mask))


def test_the_default_does_not_read_an_empty_historys_padding_and_longctr_does():
    query, sequence = case([3, 0])
    for compat in (True, False):
        output = build(longctr_compat=compat)(query, sequence)
        assert bool(output[1].any()) == compat


def test_longctr_compat_does_not_change_the_callers_mask():
    query, sequence = case([3, 0])
    before = sequence.mask.clone()
    build(longctr_compat=True)(query, sequence)
    assert torch.equal(sequence.mask, before)


def test_longctr_compat_refuses_batches_that_longctr_cannot_run():
    block = build(longctr_compat=True, first_k_cols=3)
    with pytest.raises(ConfigError, match="padded to 2 items when first_k_cols is 3; set longctr_compat: False"):
        block(*case([2, 1]))
    assert block(*case([3, 1])).shape == (2, block.out_dim)


def test_longctrs_layers_start_as_copies_and_ours_do_not():
    for compat in (True, False):
        torch.manual_seed(0)
        first, second = TransActBlock(DIM, transformer_layers=2, longctr_compat=compat).layers
        assert torch.equal(first.self_attn.in_proj_weight, second.self_attn.in_proj_weight) == compat
        assert first.self_attn.in_proj_weight is not second.self_attn.in_proj_weight


def test_parameters_have_the_names_and_shapes_of_torchs_encoder():
    theirs = nn.TransformerEncoder(nn.TransformerEncoderLayer(2 * DIM, 1, 10), 2, enable_nested_tensor=False)
    shapes = {f"transformer_encoders.transformer_encoder.{name}": p.shape for name, p in theirs.named_parameters()}
    shapes |= {f"transformer_encoders.out_linear.{n}": p.shape for n, p in nn.Linear(2 * DIM, 2 * DIM).named_parameters()}
    renamed = {}
    for name, shape in shapes.items():
        for theirs_part, ours in TransActBlock.LONGCTR_NAMES.items():
            name = name.replace(theirs_part, ours)
        renamed[name] = shape
    assert renamed == {name: p.shape for name, p in build(transformer_layers=2).named_parameters()}


# ---- settings, invariance


@pytest.mark.parametrize(
    "options, message",
    [
        ({"use_time_window_mask": True}, "use_time_window_mask must be False"),
        ({"first_k_cols": 0}, "first_k_cols must be at least 1, not 0"),
        ({"transformer_layers": 0}, "transformer_layers must be at least 1, not 0"),
        ({"dim_feedforward": 0}, "dim_feedforward must be at least 1, not 0"),
        ({"num_heads": 3}, r"num_heads \(3\) must divide .* \(8\)"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    padding=st.integers(1, 5),
    layers=st.sampled_from([1, 2]),
    pool=st.booleans(),
    seed=st.integers(0, 100),
)
def test_padding_row_order_and_batch_mates_do_not_matter(lengths, padding, layers, pool, seed):
    block = build(first_k_cols=2, transformer_layers=layers, concat_max_pool=pool).eval()
    query, plain = case(lengths, seed)
    columns = torch.zeros(len(lengths), padding, dtype=torch.long)
    padded = Sequence(plain.items, torch.cat([columns, plain.index], 1), torch.cat([columns.bool(), plain.mask], 1))
    output = block(query, plain)
    torch.testing.assert_close(block(query, padded), output, **EXACT)
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(block(query[order], plain.select(order)), output[order], **EXACT)
    alone = torch.cat([block(query[[b]], plain.select(torch.tensor([b]))) for b in range(len(lengths))])
    torch.testing.assert_close(alone, output, **EXACT)
