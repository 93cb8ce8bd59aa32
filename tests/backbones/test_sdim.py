"""SDIM's block: both branches against their literal forms, its sums as bags, its draws, LongCTR's quirks."""

import math

import pytest
import retrieval_cases as shared
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from oracles import gradients, ragged
from retrieval_cases import DIM, EXACT, LENGTHS, assert_same, case, one_item_a_position, padded, prepared
from torch import nn

from model_zoo.backbones.sdim import SDIMBlock
from model_zoo.layers.mos import MoS
from model_zoo.layers.sequence import Sequence


def build(**options) -> SDIMBlock:
    settings = {"attention_dim": 12, "num_heads": 2, "short_seq_len": 5, "num_hashes": 3, "hash_bits": 2, **options}
    return prepared(SDIMBlock(DIM, **settings))


def buckets(vectors, rotations):
    """``[..., H]`` bucket numbers under rotations ``[d, H, bits]``."""
    bits = torch.einsum("...d,dhk->...hk", vectors, rotations) > 0
    return (bits * 2 ** torch.arange(rotations.shape[-1])).sum(-1)


def pooled(target, tokens, rotations, l2_norm: bool):
    """One row of the long branch: hash by hash, the sum of the tokens in the target's bucket; the mean over hashes."""
    sums = []
    for h in range(rotations.shape[1]):
        total = torch.zeros_like(target)
        for token in tokens:
            if buckets(token, rotations)[h] == buckets(target, rotations)[h]:
                total = total + token
        sums.append(F.normalize(total, dim=0) if l2_norm else total)
    return torch.stack(sums).mean(0)


def literal(block: SDIMBlock, query, sequence, scale: bool = True, rotations=None):
    rotations = block.long.lsh.random_rotations[0] if rotations is None else rotations

    def row(target, tokens):
        short = shared.attend(block.short_attention, target, shared.newest(block, tokens), scale=scale)
        return torch.cat([pooled(target, tokens, rotations, block.long.l2_norm), short])

    return shared.by_row(row, query, sequence)


def longctr(block: SDIMBlock, query, vectors, mask, rotations):
    """LongCTR's forward with a rotation a row, ``[B, d, H, bits]``."""
    rows = zip(query, vectors, mask, rotations)
    long = torch.stack([pooled(q, v[m], r, block.long.l2_norm) for q, v, m, r in rows])
    return torch.cat([long, shared.longctr_short(block, query, vectors, mask)], -1)


@pytest.mark.parametrize("l2_norm", [False, True])
@pytest.mark.parametrize("use_qkvo, use_scale, heads", [(1, 1, 1), (1, 0, 4), (0, 1, 2), (0, 0, 1)])
def test_the_block_equals_a_loop_over_rows_and_hashes(l2_norm, use_qkvo, use_scale, heads):
    block = build(l2_norm=l2_norm, use_qkvo=bool(use_qkvo), use_scale=bool(use_scale), num_heads=heads)
    query, sequence = case(padding=2)
    leaves = [query, sequence.items, *block.parameters()]
    assert_same(block(query, sequence), literal(block, query, sequence, use_scale), leaves)
    assert use_qkvo == bool(list(block.parameters()))


@pytest.mark.parametrize("num_hashes, hash_bits", [(1, 4), (60, 1), (4, 14)])
@pytest.mark.parametrize("l2_norm", [False, True])
def test_any_number_of_hashes_and_bits(num_hashes, hash_bits, l2_norm):
    block = build(num_hashes=num_hashes, hash_bits=hash_bits, l2_norm=l2_norm)
    query, sequence = case([3, 2, 6])
    assert_same(block(query, sequence), literal(block, query, sequence), [query, sequence.items])


def test_the_answer_is_long_then_short_of_twice_the_item_width():
    block = build()
    query, sequence = case()
    output = block(query, sequence)
    assert block.out_dim == 2 * DIM and output.shape == (len(LENGTHS), 2 * DIM)
    short = block.short_attention(query, sequence.last(4))
    torch.testing.assert_close(output[:, DIM:], short, **EXACT)


@pytest.mark.parametrize("l2_norm", [False, True])
def test_the_long_branch_passes_gradients_to_colliding_items_alone(l2_norm):
    block = build(l2_norm=l2_norm)
    query, sequence = one_item_a_position(torch.randn(1, DIM).double(), torch.randn(1, 9, DIM).double(), torch.ones(1, 9))
    long = block(query, sequence)[:, :DIM]
    to_query, *to_weights = gradients(long, [query, *block.parameters()])
    assert not to_query.any() and not any(g.any() for g in to_weights)
    (to_items,) = torch.autograd.grad(long.sum(), [sequence.items])
    rotations = block.long.lsh.random_rotations[0]
    collides = (buckets(sequence.items, rotations) == buckets(query, rotations)).any(1)
    assert torch.equal(to_items.any(1), collides) and collides.any() and not collides.all()


# ---- what the sums are


@pytest.mark.parametrize("l2_norm", [False, True])
def test_shares_of_hashes_are_the_bags_of_each_hash_and_no_count_is_kept_in_a_float(l2_norm):
    """LongCTR's bags: with exact offsets its answer; with offsets in a type too short for the count, other items.

    float32 is too short from 2^24 collisions on, half precision from 2^11, so a batch of 3,000 shows it.
    """
    block = build(l2_norm=l2_norm, num_hashes=4, hash_bits=1)
    query, sequence = case([30] * 60, num_items=50)

    def bags(kind):
        rotations = block.long.lsh.random_rotations[0]
        of_tokens, of_target = buckets(sequence.vectors, rotations), buckets(query, rotations)
        collides = (of_tokens == of_target.unsqueeze(1)).permute(2, 0, 1).flatten(1)  # [H, B * T]
        places = collides.nonzero()[:, 1]
        counts = collides.reshape(4 * len(query), -1).sum(1)
        assert 2**11 < int(counts.sum()) < 2**24
        offsets = F.pad(counts.to(kind).cumsum(0), (1, 0)).long()[:-1]
        sums = F.embedding_bag(places, sequence.vectors.flatten(0, 1), offsets, mode="sum").view(4, len(query), -1)
        return (F.normalize(sums, dim=-1) if l2_norm else sums).mean(0)

    with torch.no_grad():
        found = block(query, sequence)[:, :DIM]
        torch.testing.assert_close(found, bags(torch.int64), **EXACT)
        torch.testing.assert_close(found, bags(torch.float32), **EXACT)
        assert float((found - bags(torch.float16)).abs().max()) > 0.01


def test_running_counts_are_whole_numbers(monkeypatch):
    """A float32 count of 2^24 does not move when one is added; a running count of the sums' bags must not be one."""
    count = torch.tensor(2.0**24)
    assert count + 1 == count
    kinds = []
    plain = torch.Tensor.cumsum
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda self, *args: kinds.append(self.dtype) or plain(self, *args))
    query, sequence = case()
    for l2_norm in (False, True):
        build(l2_norm=l2_norm)(query, sequence)
    assert set(kinds) == {torch.int64}


def test_with_many_bits_nothing_collides_and_the_long_branch_is_zero():
    block = build(num_hashes=8, hash_bits=40)
    query, sequence = case([40] * 4, num_items=160)
    assert not block(query, sequence)[:, :DIM].any()


def test_with_many_hashes_of_one_bit_an_items_weight_is_one_less_its_angle_over_pi():
    block = build(num_hashes=20_000, hash_bits=1)
    query, sequence = case([5, 3])
    angle = torch.arccos(F.cosine_similarity(query.unsqueeze(1), sequence.vectors, dim=-1))
    weight = (1 - angle / math.pi) * sequence.mask
    expected = (weight.unsqueeze(2) * sequence.vectors).sum(1)
    # a share's standard deviation is at most .5 / sqrt(20,000) = .0036; sums of five items of entries up to 3
    torch.testing.assert_close(block(query, sequence)[:, :DIM], expected, rtol=0, atol=0.1)


# ---- draws


def test_without_reuse_evaluation_repeats_and_training_draws_by_the_global_seed():
    shared.check_draws(build, literal, (1, DIM, 3, 2), 0)


def test_the_blocks_of_a_mixture_hash_alike():
    make = lambda: SDIMBlock(DIM, attention_dim=8, short_seq_len=5, num_hashes=3)  # noqa: E731
    torch.manual_seed(1)
    layer = MoS(make, DIM, n_item_experts=2, n_window_experts=2, codebook_dim=4, window_size=4, window_stride=2).double()
    rotations = [m.random_rotations for m in layer.modules() if hasattr(m, "random_rotations")]
    assert len(rotations) == 5 and all(torch.equal(r, rotations[0]) for r in rotations)
    query, sequence = case()
    output = layer(query, sequence)
    assert output.shape == (len(LENGTHS), 2 * DIM) and bool(output.isfinite().all())


# ---- LongCTR's quirks


@pytest.mark.parametrize("l2_norm", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_longctr_compat_is_longctrs_forward_with_its_draws(l2_norm, training):
    """Rows: full, padding inside the window, one item, none."""
    block = build(longctr_compat=True, reuse_hash=False, l2_norm=l2_norm).train(training)
    draw = lambda: torch.randn(5, DIM, 3, 2, dtype=torch.double)  # noqa: E731
    shared.check_longctr_draws(block, longctr, draw, [8, 7, 3, 1, 0])


def test_longctr_compat_refuses_batches_that_longctr_cannot_run_and_the_default_reads_them():
    shared.check_refuses_short_batches(build, literal)


def test_the_padding_vector_reaches_longctrs_short_branch_and_not_the_default():
    shared.check_padding_reaches_longctrs_short_branch(build, slice(DIM, None))


def test_a_checkpoints_place_values_are_those_of_longctr():
    assert build(hash_bits=3).state_dict()["powers_of_two"].tolist() == [1.0, 2.0, 4.0]


# ---- short and empty histories, settings


@pytest.mark.parametrize("l2_norm", [False, True])
def test_empty_histories_give_exact_zeros(l2_norm):
    shared.check_empty(build(l2_norm=l2_norm), 2 * DIM)


@pytest.mark.parametrize("l2_norm", [False, True])
def test_single_precision_is_finite(l2_norm):
    shared.check_single_precision(build(l2_norm=l2_norm, hash_bits=6))


def test_a_history_of_the_target_alone_collides_in_every_hash():
    block = build(num_hashes=9, hash_bits=7)
    query = torch.randn(2, DIM, dtype=torch.double)
    output = block(query, padded(Sequence.from_vectors(query.unsqueeze(1), torch.ones(2, 1)), 2))
    torch.testing.assert_close(output[:, :DIM], query, **EXACT)


@shared.refused(({"num_hashes": 0}, "num_hashes must be at least 1, not 0"), ({"hash_bits": 0}, "hash_bits must lie in"))
def test_settings_out_of_range_are_refused(options, message):
    shared.check_refused(build, options, message)


@shared.any_histories(l2_norm=st.booleans())
def test_padding_row_order_and_batch_mates_do_not_matter(lengths, padding, seed, **options):
    shared.check_padding_order_and_mates(build(**options), lengths, padding, seed)


def test_a_wrapped_long_branch_ends_in_a_map_that_starts_as_the_identity():
    keys = {"num_hashes": 4, "hash_bits": 1}
    block, plain = SDIMBlock(DIM, lambda make: make(), **keys).double(), SDIMBlock(DIM, **keys).double()
    plain.load_state_dict({name: value for name, value in block.state_dict().items() if "output" not in name})
    query, sequence = torch.randn(3, DIM, dtype=torch.double), ragged([4, 0, 6], DIM)
    assert torch.equal(block(query, sequence), plain(query, sequence))
    nn.init.xavier_normal_(block.long.output.weight)  # what the model's reset does
    block.long.init_weights()
    assert torch.equal(block.long.output.weight, torch.eye(DIM, dtype=torch.double))
    gradient = torch.autograd.grad(block(query, sequence).sum(), block.long.output.weight)[0]
    assert float(gradient.abs().sum()) > 0
