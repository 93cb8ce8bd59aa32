"""The DIEN block against torch's GRU and cells written out, row by row, and LongCTR's reading of left padding."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import gradients, ragged, rows_of
from torch import Tensor, nn

from model_zoo.backbones.dien import DIENBlock
from model_zoo.errors import ConfigError
from model_zoo.layers.attentional_gru import AttentionalGRU
from model_zoo.layers.sequence import Sequence

# float64: a dozen steps of two recurrences, products taken in another order
EXACT = {"rtol": 1e-9, "atol": 1e-9}
DIM = 4
LENGTHS = [9, 1, 0, 4, 7, 2, 4]
EVERY_GRU = ["GRU", "AIGRU", "AGRU", "AUGRU"]
EVERY_ATTENTION = ["bilinear_attention", "dot_attention", "din_attention"]


def build(**options: Any) -> DIENBlock:
    torch.manual_seed(2)
    block = DIENBlock(DIM, **{"attention_hidden_units": [5], **options}).double()
    for weight in block.parameters():
        nn.init.normal_(weight, std=0.6)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return block.eval()


def case(lengths=LENGTHS, seed: int = 0, padding: int = 0, num_items: int = 9) -> tuple[Tensor, Sequence]:
    generator = torch.Generator().manual_seed(seed + 1)
    query = torch.randn(len(lengths), DIM, generator=generator, dtype=torch.double).requires_grad_()
    return query, ragged(lengths, DIM, seed, padding=padding, num_items=num_items)


def widened(sequence: Sequence, columns: int) -> Sequence:
    """The same histories behind more padding."""
    blank = torch.zeros(len(sequence.index), columns, dtype=torch.long)
    mask = torch.cat([blank.bool(), sequence.mask], 1)
    return Sequence(sequence.items, torch.cat([blank, sequence.index], 1), mask)


def raw_scores(block: DIENBlock, query: Tensor, interests: Tensor) -> Tensor:
    """Scores ``[N]`` of interests ``[N, d]`` and as many targets."""
    attention = block.attention
    assert attention is not None
    if attention.kind == "din_attention":
        features = [query, interests, query - interests, query * interests]
        return attention.net.mlp(torch.cat(features, 1)).squeeze(1)
    if attention.kind == "bilinear_attention":
        interests = interests @ attention.W_kernel
    return (interests * query).sum(1)


def cell(layer: AttentionalGRU, token: Tensor, state: Tensor, attention: Tensor) -> Tensor:
    """One step of one row by the formulas."""
    i_u, i_r, i_n = layer.x2h(token).chunk(3)
    h_u, h_r, h_n = layer.h2h(state).chunk(3)
    new = torch.tanh(i_n + torch.sigmoid(i_r + h_r) * h_n)
    update = attention * torch.sigmoid(i_u + h_u) if layer.update_gate else attention
    return (1 - update) * state + update * new


def evolved(block: DIENBlock, interests: Tensor, weights: Tensor | None) -> Tensor:
    """The evolving GRU's last state for one row."""
    if isinstance(block.evolving, AttentionalGRU):
        state = torch.zeros(DIM, dtype=torch.double)
        for token, weight in zip(interests, weights, strict=True):
            state = cell(block.evolving, token, state, weight)
        return state
    inputs = interests if weights is None else interests * weights.unsqueeze(1)
    return block.evolving(inputs.unsqueeze(1))[1].flatten()


def by_row(block: DIENBlock, query: Tensor, sequence: Sequence) -> Tensor:
    rows = rows_of(sequence.vectors, sequence.mask)
    interests = [block.extraction(x.unsqueeze(1))[0].squeeze(1) if len(x) else x for x in rows]
    weights: list[Any] = [None] * len(rows)
    if block.attention is not None:
        targets = query.repeat_interleave(sequence.lengths, 0)
        weights = list(raw_scores(block, targets, torch.cat(interests)).split([len(x) for x in rows]))
        if block.softmax:
            weights = [row.softmax(0) for row in weights]
    answers = []
    for q, x, h, w in zip(query, rows, interests, weights, strict=True):
        state = evolved(block, h, w) if len(x) else torch.zeros(DIM, dtype=torch.double)
        answers.append(torch.cat([state, x.sum(0), q * x.sum(0)]) if block.sum_pooling else state)
    return torch.stack(answers)


def longctr(block: DIENBlock, query: Tensor, vectors: Tensor, mask: Tensor) -> Tensor:
    """LongCTR's form: the first t columns are read, attention is masked where the t real items stood."""
    batch, length = mask.shape
    counts = mask.sum(1).tolist()
    kept = [row for row in range(batch) if counts[row]]
    interests = torch.zeros(batch, length, DIM, dtype=torch.double)
    for row in kept:
        first = block.extraction(vectors[row, : counts[row]].unsqueeze(1))[0].squeeze(1)
        interests = interests.index_put((torch.tensor(row), torch.arange(counts[row])), first)
    weights = None
    if block.attention is not None:
        flat = interests[kept].flatten(0, 1)
        scores = raw_scores(block, query[kept].repeat_interleave(length, 0), flat).view(-1, length) * mask[kept]
        weights = (scores - 1e9 * (~mask[kept]).double()).softmax(1) if block.softmax else scores
    state = torch.zeros(batch, DIM, dtype=torch.double)
    for place, row in enumerate(kept):
        weight = None if weights is None else weights[place, : counts[row]]
        last = evolved(block, interests[row, : counts[row]], weight)
        state = state.index_put((torch.tensor(row),), last)
    if not block.sum_pooling:
        return state
    total = vectors.sum(1)
    return torch.cat([state, total, query * total], 1)


def assert_same(block: nn.Module, query: Tensor, sequence: Sequence, output: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(output, expected, **EXACT)
    leaves = [query, sequence.items, *block.parameters()]
    for got, want in zip(gradients(output, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("gru_type", EVERY_GRU)
@pytest.mark.parametrize("attention", EVERY_ATTENTION)
@pytest.mark.parametrize("softmax, pool, num_items", [(True, False, 9), (False, True, 200)])
def test_the_block_equals_the_recurrences_row_by_row(gru_type, attention, softmax, pool, num_items):
    block = build(gru_type=gru_type, attention_type=attention, use_attention_softmax=softmax, enable_sum_pooling=pool)
    query, sequence = case(padding=2, num_items=num_items)
    assert block.out_dim == DIM * (3 if pool else 1)
    assert_same(block, query, sequence, block(query, sequence), by_row(block, query, sequence))


def test_dice_in_training_takes_its_statistics_over_real_items():
    block = build(attention_type="din_attention").train()
    query, sequence = case(padding=3)
    twin = copy.deepcopy(block)
    assert_same(block, query, sequence, block(query, sequence), by_row(block, query, sequence))
    block = copy.deepcopy(twin)
    block(query, sequence), by_row(twin, query, sequence)
    for got, want in zip(block.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("gru_type", ["GRU", "AGRU", "AUGRU"])
@pytest.mark.parametrize("attention", EVERY_ATTENTION)
@pytest.mark.parametrize("softmax, pool", [(True, False), (False, True)])
def test_longctr_compat_equals_longctrs_reading(gru_type, attention, softmax, pool, training):
    block = build(
        gru_type=gru_type,
        attention_type=attention,
        use_attention_softmax=softmax,
        enable_sum_pooling=pool,
        longctr_compat=True,
    ).train(training)
    query, sequence = case()
    sequence.mask[0, 3] = False  # an id 0 inside a history
    expected = longctr(block, query, sequence.vectors, sequence.mask)
    assert_same(block, query, sequence, block(query, sequence), expected)


@pytest.mark.parametrize("gru_type", EVERY_GRU)
@pytest.mark.parametrize("attention", EVERY_ATTENTION)
def test_empty_histories_give_exact_zeros(gru_type, attention):
    block = build(gru_type=gru_type, attention_type=attention, enable_sum_pooling=True).train()
    query, sequence = case()
    output = block(query, sequence)
    assert torch.equal(output[2], torch.zeros(3 * DIM, dtype=torch.double))
    assert not any(g.any() for g in gradients(output[2], [query, sequence.items, *block.parameters()]))
    assert all(g.isfinite().all() for g in gradients(output, [query, sequence.items, *block.parameters()]))
    none = Sequence.from_vectors(torch.zeros(7, 0, DIM, dtype=torch.double), torch.zeros(7, 0))
    blank = Sequence(sequence.items, sequence.index, torch.zeros_like(sequence.mask))
    for nothing in (none, blank):
        assert torch.equal(block(query, nothing), torch.zeros(7, 3 * DIM, dtype=torch.double))


@pytest.mark.parametrize("gru_type", EVERY_GRU)
@pytest.mark.parametrize("lengths", [[1], [3], [0, 4], [5, 0, 0]])
def test_batches_that_longctr_cannot_run_work(gru_type, lengths):
    block = build(gru_type=gru_type)
    query, sequence = case(lengths, padding=1)
    assert_same(block, query, sequence, block(query, sequence), by_row(block, query, sequence))


# ---- where LongCTR is wrong


def test_a_history_shorter_than_half_the_batchs_length_has_no_influence_in_longctr_and_has_by_default():
    for compat in (True, False):
        block = build(longctr_compat=compat)
        query, sequence = case([10, 4, 6])
        vectors = sequence.vectors.detach().requires_grad_()
        output = block(query, Sequence.from_vectors(vectors, sequence.mask))
        reads = [gradients(output[row], [vectors])[0][row].abs().sum(1).nonzero().flatten().tolist() for row in range(3)]
        if compat:  # the row of six reads its first six columns of ten, attention leaves two of them a weight
            assert reads == [list(range(10)), [], list(range(6))]
            assert not output[1].any()
        else:
            assert reads == [list(range(10)), list(range(6, 10)), list(range(4, 10))]


def test_longctrs_answer_depends_on_the_batchs_length_and_the_defaults_does_not():
    query, plain = case([5, 4, 5])
    for compat in (True, False):
        block = build(longctr_compat=compat)
        assert torch.allclose(block(query, plain), block(query, widened(plain, 2)), atol=1e-9) != compat


def test_padding_content_changes_longctrs_answer_and_not_the_defaults():
    query, plain = case([5, 3, 4])
    other = Sequence(plain.items, (plain.index + 1).remainder(9).where(~plain.mask, plain.index), plain.mask)
    for compat in (True, False):
        block = build(longctr_compat=compat, enable_sum_pooling=True)
        changed = (block(query, plain) - block(query, other)).abs().amax(1) > 0
        assert changed.tolist() == ([False, True, True] if compat else [False] * 3)


def test_longctr_compat_refuses_what_longctr_cannot_run():
    with pytest.raises(ValueError, match="LongCTR cannot run gru_type AIGRU; set longctr_compat: False"):
        build(gru_type="AIGRU", longctr_compat=True)
    block = build(longctr_compat=True)
    for lengths in ([3], [3, 0], [0, 0]):
        with pytest.raises(ConfigError, match="fewer than two histories that are not empty; set longctr_compat: False"):
            block(*case(lengths))
    assert block(*case([3, 1, 0])).shape == (3, DIM)


# ---- parameters, invariance


@pytest.mark.parametrize("gru_type", ["AGRU", "AUGRU"])
def test_agru_leaves_its_update_gate_alone(gru_type):
    block = build(gru_type=gru_type)
    query, sequence = case()
    grads = gradients(block(query, sequence), [block.evolving.x2h.weight, block.evolving.h2h.bias])
    assert [bool(g[:DIM].any()) for g in grads] == [gru_type == "AUGRU"] * 2
    assert all(g[DIM:].any() for g in grads)


def test_dropout_acts_in_training_only():
    options = {"attention_type": "din_attention", "attention_activation": "ReLU", "attention_hidden_units": [40]}
    block = build(**options, attention_dropout=0.5)
    query, sequence = case()
    torch.testing.assert_close(block(query, sequence), by_row(block, query, sequence), **EXACT)
    block.train()
    assert not torch.allclose(block(query, sequence), block(query, sequence))


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    padding=st.integers(1, 5),
    gru_type=st.sampled_from(EVERY_GRU),
    attention=st.sampled_from(EVERY_ATTENTION),
    seed=st.integers(0, 100),
)
def test_padding_row_order_and_batch_mates_do_not_matter(lengths, padding, gru_type, attention, seed):
    block = build(gru_type=gru_type, attention_type=attention, enable_sum_pooling=True)
    query, plain = case(lengths, seed)
    output = block(query, plain)
    torch.testing.assert_close(block(query, widened(plain, padding)), output, **EXACT)
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(block(query[order], plain.select(order)), output[order], **EXACT)
    alone = torch.cat([block(query[[b]], plain.select(torch.tensor([b]))) for b in range(len(lengths))])
    torch.testing.assert_close(alone, output, **EXACT)
