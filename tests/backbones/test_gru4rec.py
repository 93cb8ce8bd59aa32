"""GRU4Rec against the gates computed step by step: outputs, gradients, dropout, rare rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import gradients, ragged, rows_of
from torch import Tensor, nn

from model_zoo.backbones.gru4rec import GRU4RecBlock
from model_zoo.layers.sequence import Sequence

# float64 sums of a few dozen terms of order one, taken in another order
EXACT = {"rtol": 1e-10, "atol": 1e-10}
LENGTHS = [7, 3, 0, 1, 5]


def block_and_query(batch: int = 5, **options) -> tuple[GRU4RecBlock, Tensor]:
    torch.manual_seed(3)
    block = GRU4RecBlock(6, **{"hidden_dropout": 0.0, **options}).double()
    for weight in block.parameters():
        nn.init.normal_(weight, std=0.7)
    return block, torch.randn(batch, 6, dtype=torch.double, requires_grad=True)


def gru4rec_row(block: GRU4RecBlock, tokens: Tensor) -> Tensor:
    """The interest of one row's real tokens ``[t, d]``: reset, update and new gates, step by step."""
    if len(tokens) == 0:
        return tokens.new_zeros(6)
    inputs = list(tokens)
    for number in range(block.gru.num_layers):
        into, across, bias, bias_across = (
            getattr(block.gru, f"{name}_l{number}").chunk(3) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        h, states = tokens.new_zeros(block.gru.hidden_size), []
        for x in inputs:
            gates = [(into[g] @ x + bias[g], across[g] @ h + bias_across[g]) for g in range(3)]
            reset, update = (torch.sigmoid(a + b) for a, b in gates[:2])
            new = torch.tanh(gates[2][0] + reset * gates[2][1])
            h = (1 - update) * new + update * h
            states.append(h)
        inputs = states
    return block.output(inputs[-1])


def gru4rec(block: GRU4RecBlock, query: Tensor, sequence: Sequence) -> Tensor:
    rows = torch.stack([gru4rec_row(block, tokens) for tokens in rows_of(sequence.vectors, sequence.mask)])
    return (rows * query).sum(1, keepdim=True) if block.head == "dot" else rows


@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"hidden_dim": 4}, {"hidden_dim": 9, "num_layers": 2}])
@pytest.mark.parametrize("head", ["dnn", "dot"])
def test_output_and_every_gradient_equal_the_gates_step_by_step(options, head):
    block, query = block_and_query(head=head, **options)
    sequence = ragged(LENGTHS, 6, padding=2)
    output, expected = block(query, sequence), gru4rec(block, query, sequence)
    assert output.shape == (5, block.out_dim) == (5, 1 if head == "dot" else 6)
    torch.testing.assert_close(output, expected, **EXACT)
    leaves = [query, sequence.items, *block.parameters()]
    for got, want in zip(gradients(output, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(got, want, **EXACT)


def test_a_width_other_than_the_items_is_mapped_back():
    assert isinstance(GRU4RecBlock(6).output, nn.Identity)
    block = GRU4RecBlock(6, hidden_dim=4)
    assert (block.output.in_features, block.output.out_features, block.out_dim) == (4, 6, 6)


@pytest.mark.parametrize("head", ["dnn", "dot"])
def test_rows_without_an_item_give_exact_zeros_and_no_gradient(head):
    block, query = block_and_query(head=head, hidden_dim=4)
    sequence = ragged(LENGTHS, 6, padding=1)
    output = block(query, sequence)
    assert torch.equal(output[2], torch.zeros(block.out_dim, dtype=torch.double))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients(output[2], [sequence.items, *block.parameters()]))
    none = Sequence.from_vectors(torch.zeros(5, 0, 6, dtype=torch.double), torch.zeros(5, 0, dtype=torch.bool))
    assert torch.equal(block(query, none), torch.zeros(5, block.out_dim, dtype=torch.double))
    assert block(query[:0], ragged([], 6)).shape == (0, block.out_dim)
    nobody = ragged([0, 0], 6, padding=3)
    assert torch.equal(block(query[:2], nobody), torch.zeros(2, block.out_dim, dtype=torch.double))


def test_only_real_positions_reach_the_recurrence():
    block, query = block_and_query()
    seen = []
    block.gru.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].data.shape))
    block(query, ragged(LENGTHS, 6, padding=4))
    assert seen == [(16, 6)]


def test_dropout_acts_in_training_only_on_inputs_and_between_layers():
    block, query = block_and_query(hidden_dropout=0.5, num_layers=2)
    sequence = ragged([7, 3, 4, 6, 5], 6)
    block.eval()
    torch.testing.assert_close(block(query, sequence), gru4rec(block, query, sequence), **EXACT)
    block.train()
    assert not torch.equal(block(query, sequence), block(query, sequence))
    block.dropout.p = 0.0  # what is left acts between the layers
    assert not torch.equal(block(query, sequence), block(query, sequence))
    single, _ = block_and_query(hidden_dropout=0.5)
    assert single.gru.dropout == 0 and single.dropout.p == 0.5
    assert not torch.equal(single(query, sequence), single(query, sequence))


def test_settings_out_of_range_are_refused():
    for key in ("num_layers", "hidden_dim"):
        with pytest.raises(ValueError, match=f"{key} must be at least 1, not 0"):
            GRU4RecBlock(6, **{key: 0})
    with pytest.raises(ValueError, match=r"hidden_dropout must lie in 0\.\.1, not 2"):
        GRU4RecBlock(6, hidden_dropout=2)


def test_float32_works():
    torch.manual_seed(0)
    block, sequence = GRU4RecBlock(6), ragged([20, 0, 3], 6, dtype=torch.float)
    output = block(torch.randn(3, 6), sequence)
    assert output.dtype == torch.float
    assert all(bool(g.isfinite().all()) for g in gradients(output, [sequence.items, *block.parameters()]))


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    padding=st.integers(0, 4),
    layers=st.integers(1, 2),
    seed=st.integers(0, 50),
)
def test_padding_row_order_and_batch_mates_do_not_matter(lengths, padding, layers, seed):
    block, query = block_and_query(len(lengths), num_layers=layers, hidden_dim=5)
    plain = ragged(lengths, 6, seed)
    columns = torch.zeros(len(lengths), padding, dtype=torch.long)
    padded = Sequence(plain.items, torch.cat([columns, plain.index], 1), torch.cat([columns.bool(), plain.mask], 1))
    output = block(query, plain)
    torch.testing.assert_close(block(query, padded), output, **EXACT)
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(block(query[order], plain.select(order)), output[order], **EXACT)
    alone = torch.cat([block(query[[b]], plain.select(torch.tensor([b]))) for b in range(len(lengths))])
    torch.testing.assert_close(alone, output, **EXACT)
