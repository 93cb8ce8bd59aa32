"""ETA's block: both branches against their literal forms, ties, draws, LongCTR's quirks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import gradients
from retrieval_cases import (
    DIM,
    EXACT,
    LENGTHS,
    assert_same,
    attend,
    by_row,
    case,
    check_empty,
    check_padding_order_and_mates,
    check_single_precision,
    longctr_short,
    newest,
    one_item_a_position,
    padded,
    prepared,
)

from model_zoo.backbones.eta import ETABlock
from model_zoo.errors import ConfigError
from model_zoo.layers.sequence import Sequence


def build(**options) -> ETABlock:
    settings = {"attention_dim": 12, "num_heads": 2, "short_seq_len": 5, "topk": 3, "hash_bits": 6, **options}
    return prepared(ETABlock(DIM, **settings))


def distances(target, tokens, rotations):
    """Hamming distances ``[t]`` to the target under rotations ``[d, bits]``."""
    return ((tokens @ rotations > 0) != (target @ rotations > 0)).sum(-1)


def literal(block: ETABlock, query, sequence, scale: bool = True, rotations=None):
    rotations = block.lsh.random_rotations[0] if rotations is None else rotations

    def row(target, tokens):
        distance = distances(target, tokens, rotations).tolist()
        nearest = sorted(range(len(tokens)), key=lambda t: (distance[t], -t))[: block.topk]
        short = attend(block.short_attention, target, newest(block, tokens), scale=scale)
        return torch.cat([short, attend(block.long_attention, target, tokens[nearest], scale=scale)])

    return by_row(row, query, sequence)


def longctr(block: ETABlock, query, vectors, mask, rotations):
    """LongCTR's forward with a rotation a row, ``[B, d, bits]``; torch picks among equally near columns."""
    distance = torch.stack([distances(q, v, r) for q, v, r in zip(query, vectors, rotations)]).float()
    distance = distance.masked_fill(~mask, block.lsh.num_hashes + 1.0)
    kept = distance.topk(min(block.topk, mask.shape[1]), dim=1, largest=False, sorted=True).indices
    rows = zip(query, vectors, mask, kept)
    long = torch.stack([attend(block.long_attention, q, v[k], m[k]) for q, v, m, k in rows])
    return torch.cat([longctr_short(block, query, vectors, mask), long], -1)


@pytest.mark.parametrize("heads, use_scale", [(1, True), (4, True), (2, False)])
@pytest.mark.parametrize("topk, short_seq_len, hash_bits", [(3, 5, 6), (1, 2, 3), (50, 50, 64)])
def test_the_block_equals_a_loop_over_rows(heads, use_scale, topk, short_seq_len, hash_bits):
    block = build(num_heads=heads, use_scale=use_scale, topk=topk, short_seq_len=short_seq_len, hash_bits=hash_bits)
    query, sequence = case(padding=2)
    leaves = [query, sequence.items, *block.parameters()]
    assert_same(block(query, sequence), literal(block, query, sequence, use_scale), leaves)


def test_the_answer_is_short_then_long_of_twice_the_item_width():
    block = build(topk=12)
    query, sequence = case()
    output = block(query, sequence)
    assert block.out_dim == 2 * DIM and output.shape == (len(LENGTHS), 2 * DIM)
    torch.testing.assert_close(output[:, :DIM], block.short_attention(query, sequence.last(4)), **EXACT)
    # topk of the history or more: nothing is searched
    torch.testing.assert_close(output[:, DIM:], block.long_attention(query, sequence), **EXACT)


def test_of_equally_near_items_the_newest_are_read_and_only_read_items_have_a_gradient():
    block = build(hash_bits=1, topk=3)
    vectors = torch.randn(1, 20, DIM, dtype=torch.double)
    target = torch.randn(1, DIM, dtype=torch.double)
    distance = distances(target[0], vectors[0], block.lsh.random_rotations[0])
    near = (distance == 0).nonzero().flatten().tolist()
    assert len(near) > 3
    target, sequence = one_item_a_position(target, vectors, torch.ones(1, 20))
    (grad,) = gradients(block(target, sequence)[:, DIM:], [sequence.items])
    assert grad.any(1).nonzero().flatten().tolist() == near[-3:]


def test_items_differing_in_every_bit_come_last():
    block = build(hash_bits=32, topk=2)
    target = torch.randn(1, DIM, dtype=torch.double)
    vectors = torch.stack([-target, target, -2 * target, 3 * target, -target], 1)
    target, sequence = one_item_a_position(target, vectors, torch.ones(1, 5))
    (grad,) = gradients(block(target, sequence)[:, DIM:], [sequence.items])
    assert grad.any(1).nonzero().flatten().tolist() == [1, 3]


def test_without_reuse_evaluation_repeats_and_training_draws_by_the_global_seed():
    block = build(reuse_hash=False)
    query, sequence = case()
    assert torch.equal(block(query, sequence), block(query, sequence))
    torch.testing.assert_close(block(query, sequence), literal(block, query, sequence), **EXACT)
    block.train()
    torch.manual_seed(3)
    output = block(query, sequence)
    torch.manual_seed(3)
    drawn = torch.randn(1, DIM, 6, dtype=torch.double)[0]
    leaves = [query, sequence.items, *block.parameters()]
    assert_same(output, literal(block, query, sequence, rotations=drawn), leaves)
    assert not torch.allclose(block(query, sequence), output)


# ---- LongCTR's quirks


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("topk", [2, 3, 20])
def test_longctr_compat_is_longctrs_forward_with_its_draws(topk, training):
    """Rows: full, padding inside the window, fewer items than topk, none."""
    block = build(longctr_compat=True, reuse_hash=False, topk=topk).train(training)
    query, sequence = case([8, 7, 3, 1, 0])
    query, sequence = one_item_a_position(query, sequence.vectors, sequence.mask)
    torch.manual_seed(4)
    output = block(query, sequence)
    torch.manual_seed(4)
    drawn = torch.randn(5, DIM, 6, dtype=torch.double)
    expected = longctr(block, query, sequence.vectors, sequence.mask, drawn)
    assert_same(output, expected, [query, sequence.items, *block.parameters()])
    torch.manual_seed(6)
    assert topk == 20 or not torch.allclose(block(query, sequence), output)  # random in evaluation too


def test_longctrs_prediction_depends_on_the_padded_length_and_the_default_one_does_not():
    query, sequence = case([40, 30, 20], num_items=40)
    for compat in (True, False):
        block = build(longctr_compat=compat, hash_bits=3)
        gap = (block(query, padded(sequence, 60)) - block(query, sequence)).detach().abs()[:, DIM:].amax(1)
        assert float(gap.max()) > 1e-2 if compat else float(gap.max()) < 1e-10


def test_longctr_compat_refuses_batches_that_longctr_cannot_run_and_the_default_reads_them():
    query, sequence = case([4, 2])
    with pytest.raises(ConfigError, match="padded to 4 items when short_seq_len is 5; set longctr_compat: False"):
        build(longctr_compat=True)(query, sequence)
    block = build()
    torch.testing.assert_close(block(query, sequence), literal(block, query, sequence), **EXACT)


def test_the_padding_vector_reaches_longctrs_branches_and_not_the_default():
    query, sequence = case([1, 0], padding=6)
    moved = Sequence(sequence.items, torch.where(sequence.mask, sequence.index, (sequence.index + 1) % 9), sequence.mask)
    for compat in (True, False):
        block = build(longctr_compat=compat)
        gap = (block(query, moved) - block(query, sequence)).detach().abs()
        assert float(gap[:, :DIM].amax(1).min()) > 1e-3 if compat else float(gap.max()) == 0.0
        assert (float(gap[1, DIM:].max()) > 1e-3) == compat  # an empty row's long branch


# ---- short and empty histories, settings


def test_empty_histories_give_exact_zeros():
    check_empty(build(), 2 * DIM)


def test_single_precision_is_finite():
    check_single_precision(build())


def test_a_history_of_one_item_attends_to_that_item_in_both_branches():
    block = build()
    query, sequence = case([1, 9], padding=3)
    item = sequence.vectors[0, -1]
    want = torch.cat([branch.W_o(branch.W_v(item)) for branch in (block.short_attention, block.long_attention)])
    torch.testing.assert_close(block(query, sequence)[0], want, **EXACT)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"hash_bits": 0}, "hash_bits must be at least 1, not 0"),
        ({"topk": 0}, "topk must be at least 1, not 0"),
        ({"short_seq_len": 1}, "short_seq_len must be at least 2, not 1"),
        ({"num_heads": 5}, "must be a multiple of num_heads"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    padding=st.integers(1, 6),
    hash_bits=st.sampled_from([1, 3, 30]),
    seed=st.integers(0, 100),
)
def test_padding_row_order_and_batch_mates_do_not_matter(lengths, padding, hash_bits, seed):
    check_padding_order_and_mates(build(hash_bits=hash_bits), lengths, padding, seed)
