"""ETA's block: both branches against their literal forms, ties, draws, LongCTR's quirks."""

import pytest
import retrieval_cases as shared
import torch
from hypothesis import strategies as st
from oracles import gradients
from retrieval_cases import DIM, EXACT, LENGTHS, assert_same, case, one_item_a_position, padded, prepared

from model_zoo.backbones.eta import ETABlock


def build(**options) -> ETABlock:
    settings = {"attention_dim": 12, "num_heads": 2, "short_seq_len": 5, "topk": 3, "hash_bits": 6, **options}
    return prepared(ETABlock(DIM, **settings))


def literal(block: ETABlock, query, sequence, scale: bool = True, rotations=None):
    rotations = block.lsh.random_rotations[0] if rotations is None else rotations

    def row(target, tokens):
        distance = shared.distances(target, tokens, rotations).tolist()
        nearest = sorted(range(len(tokens)), key=lambda t: (distance[t], -t))[: block.topk]
        short = shared.attend(block.short_attention, target, shared.newest(block, tokens), scale=scale)
        return torch.cat([short, shared.attend(block.long_attention, target, tokens[nearest], scale=scale)])

    return shared.by_row(row, query, sequence)


def longctr(block: ETABlock, query, vectors, mask, rotations):
    """LongCTR's forward with a rotation a row, ``[B, d, bits]``; torch picks among equally near columns."""
    distance = torch.stack([shared.distances(q, v, r) for q, v, r in zip(query, vectors, rotations)]).float()
    distance = distance.masked_fill(~mask, block.lsh.num_hashes + 1.0)
    kept = distance.topk(min(block.topk, mask.shape[1]), dim=1, largest=False, sorted=True).indices
    rows = zip(query, vectors, mask, kept)
    long = torch.stack([shared.attend(block.long_attention, q, v[k], m[k]) for q, v, m, k in rows])
    return torch.cat([shared.longctr_short(block, query, vectors, mask), long], -1)


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
    distance = shared.distances(target[0], vectors[0], block.lsh.random_rotations[0])
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
    shared.check_draws(build, literal, (1, DIM, 6), 0)


# ---- LongCTR's quirks


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("topk", [2, 3, 20])
def test_longctr_compat_is_longctrs_forward_with_its_draws(topk, training):
    """Rows: full, padding inside the window, fewer items than topk, none."""
    block = build(longctr_compat=True, reuse_hash=False, topk=topk).train(training)
    draw = lambda: torch.randn(5, DIM, 6, dtype=torch.double)  # noqa: E731
    shared.check_longctr_draws(block, longctr, draw, [8, 7, 3, 1, 0], moves=topk < 20)


def test_longctrs_prediction_depends_on_the_padded_length_and_the_default_one_does_not():
    query, sequence = case([40, 30, 20], num_items=40)
    for compat in (True, False):
        block = build(longctr_compat=compat, hash_bits=3)
        gap = (block(query, padded(sequence, 60)) - block(query, sequence)).detach().abs()[:, DIM:].amax(1)
        assert float(gap.max()) > 1e-2 if compat else float(gap.max()) < 1e-10


def test_longctr_compat_refuses_batches_that_longctr_cannot_run_and_the_default_reads_them():
    shared.check_refuses_short_batches(build, literal)


def test_the_padding_vector_reaches_longctrs_branches_and_not_the_default():
    shared.check_padding_reaches_longctrs_short_branch(build, slice(DIM))
    empty_rows_long_branch = shared.padding_gap(build(longctr_compat=True))[1, DIM:]
    assert float(empty_rows_long_branch.max()) > 1e-3


# ---- short and empty histories, settings


def test_empty_histories_give_exact_zeros():
    shared.check_empty(build(), 2 * DIM)


def test_single_precision_is_finite():
    shared.check_single_precision(build())


def test_a_history_of_one_item_attends_to_that_item_in_both_branches():
    block = build()
    query, sequence = case([1, 9], padding=3)
    item = sequence.vectors[0, -1]
    want = torch.cat([branch.W_o(branch.W_v(item)) for branch in (block.short_attention, block.long_attention)])
    torch.testing.assert_close(block(query, sequence)[0], want, **EXACT)


@shared.refused(({"hash_bits": 0}, "hash_bits must be at least 1, not 0"), ({"topk": 0}, "topk must be at least 1, not 0"))
def test_settings_out_of_range_are_refused(options, message):
    shared.check_refused(build, options, message)


@shared.any_histories(hash_bits=st.sampled_from([1, 3, 30]))
def test_padding_row_order_and_batch_mates_do_not_matter(lengths, padding, seed, **options):
    shared.check_padding_order_and_mates(build(**options), lengths, padding, seed)
