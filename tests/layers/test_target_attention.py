"""Target attention against its per-position form: outputs, gradients, top-k, dropout, padding."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import gradients, masked_attention, ragged
from torch import nn

from model_zoo.layers import attend_items
from model_zoo.layers.sequence import Sequence
from model_zoo.layers.target_attention import TargetAttention

# float64 sums of at most a few dozen terms of order one, taken in another order
EXACT = {"rtol": 1e-10, "atol": 1e-10}
LENGTHS = [7, 3, 0, 1, 5]


def layer_and_query(heads: int = 2, batch: int = 5, **options):
    torch.manual_seed(3)
    layer = TargetAttention(6, 8, heads, **options).double()
    for weight in layer.parameters():
        nn.init.normal_(weight)  # scores far enough apart for the top-k to matter
    return layer, torch.randn(batch, 6, dtype=torch.double, requires_grad=True)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("topk", [None, 1, 3, 9, 30])
@pytest.mark.parametrize("attend_padding", [False, True])
def test_output_and_every_gradient_equal_the_per_position_form(heads, topk, attend_padding):
    layer, query = layer_and_query(heads, topk=topk, attend_padding=attend_padding)
    if attend_padding and topk is not None and topk < 9:
        # among equal scores torch does not say which columns top-k returns, so no empty row here
        sequence = ragged([7, 3, 3, 1, 5], 6, padding=2)
    else:
        sequence = ragged(LENGTHS, 6, padding=2)
    output = layer(query, sequence)
    expected = masked_attention(layer, query, sequence.vectors, sequence.mask, attend_padding)
    torch.testing.assert_close(output, expected, **EXACT)
    leaves = [query, sequence.items, *layer.parameters()]
    for got, want in zip(gradients(output, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("topk", [None, 2])
def test_rows_without_a_token_give_exact_zeros_and_no_gradient(topk):
    layer, query = layer_and_query(topk=topk)
    sequence = ragged(LENGTHS, 6)
    output = layer(query, sequence)
    assert torch.equal(output[2], torch.zeros(6, dtype=torch.double))
    (grad,) = gradients(output[2], [sequence.items])
    assert torch.equal(grad, torch.zeros_like(grad))


def test_batches_without_columns_or_rows_give_zeros():
    layer, query = layer_and_query()
    none = Sequence.from_vectors(torch.zeros(5, 0, 6, dtype=torch.double), torch.zeros(5, 0, dtype=torch.bool))
    assert torch.equal(layer(query, none), torch.zeros(5, 6, dtype=torch.double))
    assert layer(query[:0], ragged([], 6)).shape == (0, 6)


@pytest.mark.parametrize("topk", [None, 1, 5])
def test_a_history_of_one_item_attends_to_that_item(topk):
    layer, query = layer_and_query(4, topk=topk)
    sequence = ragged([1, 7, 1, 2, 1], 6, padding=3)
    only = sequence.vectors[[0, 2, 4], -1]
    torch.testing.assert_close(layer(query, sequence)[[0, 2, 4]], layer.W_o(layer.W_v(only)), **EXACT)


def test_topk_of_the_length_or_more_equals_full_softmax_attention():
    full, query = layer_and_query(4)
    sequence = ragged(LENGTHS, 6)
    for topk in (7, 8, 100):
        truncated = TargetAttention(6, 8, 4, topk=topk).double()
        truncated.load_state_dict(full.state_dict())
        assert torch.equal(truncated(query, sequence), full(query, sequence))


def test_topk_keeps_the_best_tokens_of_each_head_and_gives_the_others_no_gradient():
    layer, query = layer_and_query(2, batch=1, topk=2)
    vectors = torch.randn(1, 6, 6, dtype=torch.double, requires_grad=True)
    output = layer(query, Sequence.from_vectors(vectors, torch.ones(1, 6, dtype=torch.bool)))
    keys = layer.W_k(vectors[0]).view(6, 2, 4)
    scores = (layer.W_q(query).view(2, 4) * keys).sum(-1)  # [T, h]
    best = set(scores.topk(2, dim=0).indices.flatten().tolist())
    assert 2 <= len(best) < 6
    (grad,) = gradients(output, [vectors])
    assert set(grad[0].abs().sum(1).nonzero().flatten().tolist()) == best


def test_dropping_a_token_below_the_topk_changes_nothing():
    layer, query = layer_and_query(1, batch=1, topk=3)
    sequence = ragged([8], 6)
    scores = layer.W_k(sequence.vectors[0]) @ layer.W_q(query[0])
    worst = int(scores.argmin())
    without = sequence.mask.clone()
    without[0, worst] = False
    expected = layer(query, sequence)
    torch.testing.assert_close(layer(query, Sequence(sequence.items, sequence.index, without)), expected, **EXACT)


@pytest.mark.parametrize("topk", [None, 4])
def test_dropout_acts_on_attention_weights_in_training_only(topk):
    layer, query = layer_and_query(2, topk=topk, dropout=0.5)
    sequence = ragged(LENGTHS, 6)
    layer.eval()
    expected = masked_attention(layer, query, sequence.vectors, sequence.mask)
    torch.testing.assert_close(layer(query, sequence), expected, **EXACT)
    layer.train()
    copies = torch.arange(5).repeat(600)
    draws = layer(query[copies], sequence.select(copies)).view(600, 5, 6)
    # W_o W_v is linear in the weights, so the mean over draws is the undropped answer; five standard errors
    error = draws.std(0) / math.sqrt(len(draws))
    assert bool(((draws.mean(0) - expected).abs() <= 5 * error + 1e-12).all())
    # a history of one item keeps its single weight or loses it
    one = draws[:, 3]
    kept = one.abs().sum(1) > 0
    assert 0.6 < kept.double().mean() < 0.9  # two heads: 3/4, standard error below 0.02


def test_large_scores_do_not_overflow():
    layer, query = layer_and_query()
    sequence = ragged(LENGTHS, 6)
    output = layer(query * 1e5, sequence)
    assert bool(output.isfinite().all())
    assert all(bool(g.isfinite().all()) for g in gradients(output, [query, sequence.items]))


def test_groups_of_rows_of_any_size_give_the_same(monkeypatch):
    layer, query = layer_and_query(2, topk=3)
    sequence = ragged(LENGTHS, 6)
    leaves = [query, sequence.items, *layer.parameters()]
    output = layer(query, sequence)
    expected = gradients(output, leaves)
    for rows in (1, 2, 4):
        monkeypatch.setattr(attend_items, "GATHERED_FLOATS", rows * 7 * 6)
        grouped = layer(query, sequence)
        torch.testing.assert_close(grouped, output, **EXACT)
        for got, want in zip(gradients(grouped, leaves), expected, strict=True):
            torch.testing.assert_close(got, want, **EXACT)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match=r"attention_dim \(8\) must be a multiple of num_heads \(3\)"):
        TargetAttention(6, 8, 3)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    padding=st.integers(0, 4),
    topk=st.sampled_from([None, 1, 2, 5]),
    seed=st.integers(0, 50),
)
def test_padding_row_order_and_batch_mates_do_not_matter(lengths, padding, topk, seed):
    layer, query = layer_and_query(2, len(lengths), topk=topk)
    plain, padded = ragged(lengths, 6, seed), ragged(lengths, 6, seed)
    empty = torch.zeros(len(lengths), padding, dtype=torch.long)
    padded = Sequence(plain.items, torch.cat([empty, plain.index], 1), torch.cat([empty.bool(), plain.mask], 1))
    output = layer(query, plain)
    torch.testing.assert_close(layer(query, padded), output, **EXACT)
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(layer(query[order], plain.select(order)), output[order], **EXACT)
    alone = torch.cat([layer(query[[b]], plain.select(torch.tensor([b]))) for b in range(len(lengths))])
    torch.testing.assert_close(alone, output, **EXACT)
