"""Mamba4Rec against its layers applied to one row at a time: outputs, gradients, dropout, start values, rare rows."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import gradients, ragged, rows_of
from torch import Tensor, nn

from model_zoo.backbones.mamba4rec import Mamba4RecBlock
from model_zoo.layers import scan_autograd
from model_zoo.layers.mamba import Mamba
from model_zoo.layers.sequence import Sequence
from model_zoo.sequential_ctr import _initialise

# float64 sums of a few dozen terms of order one, taken in another order
EXACT = {"rtol": 1e-9, "atol": 1e-10}
LENGTHS = [7, 3, 0, 1, 5]


def block_and_query(batch: int = 5, **options) -> tuple[Mamba4RecBlock, Tensor]:
    torch.manual_seed(3)
    block = Mamba4RecBlock(6, **{"d_state": 5, "hidden_dropout": 0.0, **options}).double()
    for name, weight in block.named_parameters():
        if not name.endswith(("A_log", "dt_proj.bias")):
            nn.init.normal_(weight, std=0.5)
    return block, torch.randn(batch, 6, dtype=torch.double, requires_grad=True)


def mamba4rec_row(block: Mamba4RecBlock, tokens: Tensor) -> Tensor:
    """The interest of one row's real tokens ``[t, d]``, every position of every layer computed."""
    if len(tokens) == 0:
        return tokens.new_zeros(block.width)
    x = tokens if block.widen is None else block.widen(tokens)
    x = F.layer_norm(x, (block.width,), block.norm.weight, block.norm.bias, 1e-12)
    for layer in block.layers:
        mixed = layer.mamba(Sequence.from_vectors(x.unsqueeze(0), torch.ones(1, len(x), dtype=torch.bool)))[0]
        x = layer.norm(mixed + x) if len(block.layers) > 1 else layer.norm(mixed)
        inner = layer.inner(x)
        gelu = 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2)))
        x = layer.outer_norm(layer.outer(gelu) + x)
    return x[-1]


def mamba4rec(block: Mamba4RecBlock, query: Tensor, sequence: Sequence) -> Tensor:
    rows = torch.stack([mamba4rec_row(block, tokens) for tokens in rows_of(sequence.vectors, sequence.mask)])
    return (rows * query).sum(1, keepdim=True) if block.head == "dot" else rows


@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"num_layers": 3, "hidden_dim": 4}, {"hidden_dim": 8}])
@pytest.mark.parametrize("rows", [1, 2, 50])
@pytest.mark.parametrize("training", [False, True])
def test_output_and_every_gradient_equal_the_layers_row_by_row(monkeypatch, options, rows, training):
    monkeypatch.setitem(scan_autograd.SLICE_FLOATS, "cpu", rows * 12 * 5)
    block, query = block_and_query(**options)
    block.train(training)
    sequence = ragged(LENGTHS, 6, padding=2)
    output, expected = block(query, sequence), mamba4rec(block, query, sequence)
    assert output.shape == (5, block.out_dim)
    torch.testing.assert_close(output, expected, **EXACT)
    leaves = [sequence.items, *block.parameters()]
    for got, want in zip(gradients(output, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(got, want, **EXACT)


def test_more_items_than_positions_gives_the_same():
    block, query = block_and_query()
    sequence = ragged(LENGTHS, 6, num_items=200)
    output, expected = block(query, sequence), mamba4rec(block, query, sequence)
    torch.testing.assert_close(output, expected, **EXACT)
    (got,), (want,) = gradients(output, [sequence.items]), gradients(expected, [sequence.items])
    torch.testing.assert_close(got, want, **EXACT)


def test_one_layer_has_no_residual_around_mamba_and_two_layers_have():
    for layers in (1, 2):
        block, query = block_and_query(1, num_layers=layers)
        for layer in block.layers:
            nn.init.zeros_(layer.mamba.out_proj.weight)  # Mamba gives zeros: only a residual carries the items on
        one, other = ragged([4], 6, seed=0), ragged([4], 6, seed=1)
        same = torch.equal(block(query, one), block(query, other))
        assert same == (layers == 1)


@pytest.mark.parametrize("layers", [1, 2])
def test_dot_head_gives_the_inner_product_with_the_target(layers):
    block, query = block_and_query(num_layers=layers, head="dot")
    sequence = ragged(LENGTHS, 6)
    output, expected = block(query, sequence), mamba4rec(block, query, sequence)
    assert block.out_dim == 1 and output.shape == (5, 1)
    torch.testing.assert_close(output, expected, **EXACT)
    leaves = [query, sequence.items]
    for got, want in zip(gradients(output, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("head", ["dnn", "dot"])
@pytest.mark.parametrize("layers", [1, 2])
def test_rows_without_an_item_give_exact_zeros_and_no_gradient(head, layers):
    block, query = block_and_query(head=head, num_layers=layers)
    sequence = ragged(LENGTHS, 6, padding=1)
    output = block(query, sequence)
    assert torch.equal(output[2], torch.zeros(block.out_dim, dtype=torch.double))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients(output[2], [sequence.items, *block.parameters()]))
    assert all(bool(g.isfinite().all()) for g in gradients(output, [sequence.items, *block.parameters()]))
    none = Sequence.from_vectors(torch.zeros(5, 0, 6, dtype=torch.double), torch.zeros(5, 0, dtype=torch.bool))
    assert torch.equal(block(query, none), torch.zeros(5, block.out_dim, dtype=torch.double))
    assert block(query[:0], ragged([], 6)).shape == (0, block.out_dim)
    nobody = ragged([0, 0], 6, padding=3)
    assert torch.equal(block(query[:2], nobody), torch.zeros(2, block.out_dim, dtype=torch.double))


@pytest.mark.parametrize("layers", [1, 2])
def test_left_padding_is_neutral_to_the_bit(layers):
    block, query = block_and_query(4, num_layers=layers)
    plain = ragged([7, 3, 6, 1], 6)
    for padding in (1, 4, 15):
        columns = torch.full((4, padding), 5)
        mask = torch.cat([columns < 0, plain.mask], 1)
        padded = Sequence(plain.items, torch.cat([columns, plain.index], 1), mask)
        assert torch.equal(block(query, padded), block(query, plain))


def test_items_are_normalised_once_each_unless_dropout_acts():
    seen = []
    block, query = block_and_query(hidden_dropout=0.5)
    block.norm.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    sequence = ragged(LENGTHS, 6)
    block.eval()
    block(query, sequence)
    block.train()
    block(query, sequence)
    block.dropout.p = 0.0
    block(query, sequence)
    assert seen == [(9, 6), (5, 7, 6), (9, 6)]


def test_dropout_acts_in_training_only_and_draws_per_position():
    block, query = block_and_query(hidden_dropout=0.5)
    sequence = ragged([6, 6], 6, num_items=1)  # one item everywhere
    block.eval()
    assert torch.equal(block(query[:2], sequence), block(query[:2], sequence))
    seen = []
    block.norm.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    block.train()
    block(query[:2], sequence)
    kept = seen[0] != 0
    assert 0.2 < kept.double().mean() < 0.8
    assert len(kept.flatten(0, 1).unique(dim=0)) > 1


def test_recbole_start_values_cover_the_blocks_own_maps():
    for init in ("mamba", "recbole"):
        torch.manual_seed(0)
        block = Mamba4RecBlock(48, hidden_dim=64, mamba_init=init)
        _initialise(list(block.modules()))
        layer, step = block.layers[0], F.softplus(block.layers[0].mamba.dt_proj.bias.detach())
        for linear in (block.widen, layer.inner, layer.outer):
            wide = float(linear.weight.detach().std()) > 0.05  # xavier's 0.08 to 0.13
            assert wide == (init == "mamba")
            assert torch.equal(linear.bias, torch.zeros_like(linear.bias))
        if init == "mamba":
            assert 0.99e-3 < float(step.min()) < float(step.max()) < 0.101
        else:
            torch.testing.assert_close(step, torch.full_like(step, math.log(2)))
            assert float(layer.inner.weight.detach().std()) == pytest.approx(0.02, rel=0.05)


def test_defaults_are_the_papers():
    block = Mamba4RecBlock(64)
    (layer,) = block.layers
    assert isinstance(layer.mamba, Mamba) and sum(p.numel() for p in layer.mamba.parameters()) == 38_784
    assert (block.out_dim, block.dropout.p, layer.residual, layer.inner.out_features) == (64, 0.2, False, 256)


def test_settings_out_of_range_are_refused():
    for key in ("num_layers", "hidden_dim", "d_state", "d_conv", "expand"):
        with pytest.raises(ValueError, match=f"{key} must be at least 1, not 0"):
            Mamba4RecBlock(6, **{key: 0})
    with pytest.raises(ValueError, match=r"hidden_dropout must lie in 0\.\.1, not 1\.5"):
        Mamba4RecBlock(6, hidden_dropout=1.5)
    with pytest.raises(ValueError, match=r"head: dot needs hidden_dim \(8\) to be the width of an item vector \(6\)"):
        Mamba4RecBlock(6, hidden_dim=8, head="dot")


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    padding=st.integers(0, 4),
    layers=st.integers(1, 2),
    seed=st.integers(0, 50),
)
def test_padding_row_order_and_batch_mates_do_not_matter(lengths, padding, layers, seed):
    block, query = block_and_query(len(lengths), num_layers=layers)
    plain = ragged(lengths, 6, seed)
    columns = torch.zeros(len(lengths), padding, dtype=torch.long)
    padded = Sequence(plain.items, torch.cat([columns, plain.index], 1), torch.cat([columns.bool(), plain.mask], 1))
    output = block(query, plain)
    torch.testing.assert_close(block(query, padded), output, **EXACT)
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(block(query[order], plain.select(order)), output[order], **EXACT)
    alone = torch.cat([block(query[[b]], plain.select(torch.tensor([b]))) for b in range(len(lengths))])
    torch.testing.assert_close(alone, output, **EXACT)
