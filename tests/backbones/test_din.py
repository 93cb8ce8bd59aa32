"""The DIN block against its net over whole features row by row, and FuxiCTR's attention for LongCTR's padding."""

import copy
from typing import Any

import pytest
import torch
from fuxictr.pytorch.layers import DIN_Attention
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import gradients, ragged, rows_of
from torch import Tensor, nn
from torch.func import functional_call

from model_zoo.backbones.din import DINBlock
from model_zoo.layers.sequence import Sequence

# float64 sums of at most a few dozen terms, taken in another order
EXACT = {"rtol": 1e-9, "atol": 1e-9}
DIM = 4
LENGTHS = [9, 1, 0, 4, 7, 2]


def build(**options: Any) -> DINBlock:
    torch.manual_seed(2)
    block = DINBlock(DIM, **{"attention_hidden_units": [5], **options}).double()
    for weight in block.parameters():
        nn.init.normal_(weight)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return block


def case(lengths=LENGTHS, seed: int = 0, padding: int = 0, num_items: int = 9) -> tuple[Tensor, Sequence]:
    generator = torch.Generator().manual_seed(seed + 1)
    query = torch.randn(len(lengths), DIM, generator=generator, dtype=torch.double).requires_grad_()
    return query, ragged(lengths, DIM, seed, padding=padding, num_items=num_items)


def widened(sequence: Sequence, columns: int) -> Sequence:
    """The same histories behind more padding."""
    blank = torch.zeros(len(sequence.index), columns, dtype=torch.long)
    mask = torch.cat([blank.bool(), sequence.mask], 1)
    return Sequence(sequence.items, torch.cat([blank, sequence.index], 1), mask)


def by_row(block: DINBlock, query: Tensor, sequence: Sequence) -> Tensor:
    """The net over ``[q ; x ; q - x ; q * x]`` of all real tokens at once (Dice has batch statistics), sums row by row."""
    rows = rows_of(sequence.vectors, sequence.mask)
    features = [torch.cat([q.expand_as(x), x, q - x, q * x], 1) for q, x in zip(query, rows, strict=True)]
    scores = block.attention.mlp(torch.cat(features)).squeeze(1).split([len(x) for x in rows])
    if block.softmax:
        scores = [row.softmax(0) for row in scores]
    return torch.stack([row @ x for row, x in zip(scores, rows, strict=True)])


def fuxictr(block: DINBlock, query: Tensor, sequence: Sequence, units: list[int], activation: str) -> Tensor:
    """FuxiCTR's layer with the block's parameters, on padded vectors."""
    layer = DIN_Attention(DIM, units, activation, use_softmax=block.softmax).double().train(block.training)
    state = {name.replace("attention.", "attention_layer."): value for name, value in block.named_parameters()}
    state |= {name.replace("attention.", "attention_layer."): value.clone() for name, value in block.named_buffers()}
    return functional_call(layer, state, (query, sequence.vectors, sequence.mask))


def assert_same(block: nn.Module, query: Tensor, sequence: Sequence, output: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(output, expected, **EXACT)
    leaves = [query, sequence.items, *block.parameters()]
    for got, want in zip(gradients(output, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("num_items", [9, 200])  # fewer items than positions, and more
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "units, activation, last",
    [([5], "Dice", None), ([6, 3], "ReLU", "Sigmoid"), ([6, 3], ["Dice", "Tanh"], None), ([], "ReLU", None)],
)
def test_the_block_equals_the_net_over_whole_features(units, activation, last, training, softmax, num_items):
    block = build(
        attention_hidden_units=units,
        attention_hidden_activations=activation,
        attention_output_activation=last,
        din_use_softmax=softmax,
    ).train(training)
    query, sequence = case(padding=2, num_items=num_items)
    twin = copy.deepcopy(block)
    assert_same(block, query, sequence, block(query, sequence), by_row(block, query, sequence))
    block = copy.deepcopy(twin)
    block(query, sequence), by_row(twin, query, sequence)
    for got, want in zip(block.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("units, activation", [([5], "Dice"), ([6, 3], "ReLU")])
def test_longctr_compat_equals_fuxictrs_attention(units, activation, training, softmax):
    """Padding takes part in Dice's batch statistics, and an empty row's softmax is even over its padding."""
    block = build(
        attention_hidden_units=units,
        attention_hidden_activations=activation,
        din_use_softmax=softmax,
        longctr_compat=True,
    ).train(training)
    query, sequence = case(padding=2)
    sequence.mask[3, -2] = False  # an id 0 inside a history
    expected = fuxictr(block, query, sequence, units, activation)
    assert_same(block, query, sequence, block(query, sequence), expected)
    assert bool(expected[2].any()) == softmax


def test_longctrs_statistics_depend_on_padding_and_the_defaults_do_not():
    query, short = case()
    long = widened(short, 9)
    for compat in (False, True):
        first, second = build(longctr_compat=compat).train(), build(longctr_compat=compat).train()
        same = torch.allclose(first(query, short), second(query, long), atol=1e-9)
        norms = [block.attention.mlp[1].bn.running_mean for block in (first, second)]
        assert same != compat and torch.allclose(*norms, atol=1e-9) != compat


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_empty_histories_give_exact_zeros(training, softmax):
    block = build(din_use_softmax=softmax).train(training)
    query, sequence = case()
    output = block(query, sequence)
    assert torch.equal(output[2], torch.zeros(DIM, dtype=torch.double))
    assert not any(g.any() for g in gradients(output[2], [query, sequence.items, *block.parameters()]))
    assert all(g.isfinite().all() for g in gradients(output, [query, sequence.items, *block.parameters()]))
    none = Sequence.from_vectors(torch.zeros(6, 0, DIM, dtype=torch.double), torch.zeros(6, 0))
    blank = Sequence(sequence.items, sequence.index, torch.zeros_like(sequence.mask))
    for nothing in (none, blank):
        assert torch.equal(block(query, nothing), torch.zeros(6, DIM, dtype=torch.double))


def test_a_lone_token_in_training_is_normalised_as_in_evaluation():
    block = build().train()
    query, sequence = case([0, 1])
    before = copy.deepcopy(block.state_dict())
    found = block(query, sequence)
    for name, value in block.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(module.training for module in block.modules())
    torch.testing.assert_close(found, block.eval()(query, sequence), **EXACT)
    assert all(g.isfinite().all() for g in gradients(found, [query, sequence.items, *block.parameters()]))


def test_dropout_acts_in_training_only():
    block = build(attention_hidden_activations="ReLU", attention_hidden_units=[40], attention_dropout=0.5)
    query, sequence = case()
    torch.testing.assert_close(block.eval()(query, sequence), by_row(block, query, sequence), **EXACT)
    block.train()
    assert not torch.allclose(block(query, sequence), block(query, sequence))


def test_softmax_weights_of_a_one_item_history_are_one():
    query, sequence = case([1, 3])
    block = build(din_use_softmax=True).eval()
    torch.testing.assert_close(block(query, sequence)[0], sequence.vectors[0, -1], **EXACT)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    padding=st.integers(1, 5),
    softmax=st.booleans(),
    seed=st.integers(0, 100),
)
def test_padding_row_order_and_batch_mates_do_not_matter(lengths, padding, softmax, seed):
    block = build(din_use_softmax=softmax).eval()
    query, plain = case(lengths, seed)
    output = block(query, plain)
    torch.testing.assert_close(block(query, widened(plain, padding)), output, **EXACT)
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(block(query[order], plain.select(order)), output[order], **EXACT)
    alone = torch.cat([block(query[[b]], plain.select(torch.tensor([b]))) for b in range(len(lengths))])
    torch.testing.assert_close(alone, output, **EXACT)
