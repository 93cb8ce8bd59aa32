"""MIRRN's block: searches, filters and both branches against their literal forms; LongCTR's quirks."""

from functools import partial

import pytest
import retrieval_cases as shared
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from oracles import gradients
from retrieval_cases import DIM, EXACT, LENGTHS, assert_same, case, padded, prepared
from torch import nn

from model_zoo.backbones import mirrn as module
from model_zoo.backbones.mirrn import MIRRNBlock
from model_zoo.errors import ConfigError
from model_zoo.layers import retrieval


def build(**options) -> MIRRNBlock:
    settings = {"attention_dim": 12, "num_heads": 2, "short_seq_len": 5, "topk": 3, "hash_bits": 6, "max_len": 30}
    return prepared(MIRRNBlock(DIM, **{**settings, **options}))


def filtered(part, vectors):
    """``[k, d]`` through the Fourier transform, LayerNorm with its epsilon inside the root."""
    weight = part.complex_weight
    if weight.dim() == 4:
        weight = torch.stack([weight[n, i, i] for n in range(4) for i in range(weight.shape[1])])
    spectrum = torch.fft.rfft(vectors, dim=0, norm="ortho") * torch.view_as_complex(weight)
    summed = torch.fft.irfft(spectrum, n=len(vectors), dim=0, norm="ortho") + vectors
    centred = summed - summed.mean(1, keepdim=True)
    normal = centred / torch.sqrt(centred.square().mean(1, keepdim=True) + 1e-12)
    return part.LayerNorm.weight * normal + part.LayerNorm.bias


def interests(block: MIRRNBlock, target, tokens, rotations, slots=0):
    """One row alone: three searches, places from the newest item, filters, means, ``[3, d]``."""
    found = []
    for centre, part in zip((target, tokens[-16:].mean(0), tokens.mean(0)), block.MHFT_block, strict=True):
        distance = shared.distances(centre, tokens, rotations).tolist()
        kept = sorted(sorted(range(len(tokens)), key=lambda t: (distance[t], -t))[: block.topk])
        places = torch.tensor([len(tokens) - t for t in kept])
        vectors = tokens[kept] + 0.02 * block.pos(places)
        vectors = F.pad(vectors, (0, 0, max(slots - len(kept), 0), 0))
        found.append(filtered(part, vectors).mean(0))
    return torch.stack(found)


def literal(block: MIRRNBlock, query, sequence, scale: bool = True, rotations=None, slots=0):
    rotations = block.lsh.random_rotations if rotations is None else rotations

    def row(target, tokens):
        if len(tokens) == 0:
            return torch.zeros(2 * DIM, dtype=torch.double)
        short = shared.attend(block.short_attention, target, shared.newest(block, tokens), scale=scale)
        three = interests(block, target, tokens, rotations, slots)
        return torch.cat([short, shared.attend(block.long_attention, target, three, scale=scale)])

    return shared.by_row(row, query, sequence)


def longctr(block: MIRRNBlock, query, vectors, mask, rotations):
    """LongCTR's forward, a draw a search; padding that a search picks is filtered and averaged with the items."""
    weight, length = mask.unsqueeze(2).double(), mask.shape[1]
    near = weight[:, -16:]
    centres = (
        query,
        (vectors[:, -16:] * near).sum(1) / (near.sum(1) + 1e-9),
        (vectors * weight).sum(1) / (weight.sum(1) + 1e-9),
    )
    stacked = []
    for centre, drawn, part in zip(centres, rotations, block.MHFT_block, strict=True):
        likeness = -shared.distances(centre.unsqueeze(1), vectors, drawn).float()
        likeness = likeness.masked_fill(~mask, -(block.lsh.num_hashes + 1.0))
        kept = likeness.topk(min(block.topk, length), dim=1, largest=True, sorted=True).indices.sort(-1).values
        rows = [filtered(part, v[k] + 0.02 * block.pos(length - k)).mean(0) for v, k in zip(vectors, kept)]
        stacked.append(torch.stack(rows))
    three = torch.stack(stacked, 1)
    long = torch.stack([shared.attend(block.long_attention, q, t) for q, t in zip(query, three)])
    return torch.cat([shared.longctr_short(block, query, vectors, mask), long], -1)


@pytest.mark.parametrize("heads, use_scale", [(1, True), (4, True), (2, False)])
@pytest.mark.parametrize("topk, short_seq_len, hash_bits", [(3, 5, 6), (1, 2, 3), (4, 5, 64), (50, 50, 8)])
def test_the_block_equals_a_loop_over_rows(heads, use_scale, topk, short_seq_len, hash_bits):
    """With ``mask_retrieved`` a row is what LongCTR's formula makes of it alone in a batch, without padding."""
    block = build(num_heads=heads, use_scale=use_scale, topk=topk, short_seq_len=short_seq_len, hash_bits=hash_bits)
    query, sequence = case([25, 1, 0, 4, 17, 3], padding=2)
    leaves = [query, sequence.items, *block.parameters()]
    assert_same(block(query, sequence), literal(block, query, sequence, use_scale), leaves)


@pytest.mark.parametrize("topk", [3, 9, 40])
def test_without_the_mask_a_history_counts_as_filled_up_with_zero_vectors(topk):
    block = build(mask_retrieved=False, topk=topk, max_len=40)
    query, sequence = case([12, 1, 4, 7], padding=2)
    leaves = [query, sequence.items, *block.parameters()]
    assert_same(block(query, sequence), literal(block, query, sequence, slots=topk), leaves)
    masked = build(topk=topk, max_len=40)
    same = torch.isclose(masked(query, sequence), block(query, sequence)).all(1)
    assert same.tolist() == [n >= topk for n in [12, 1, 4, 7]]


def test_the_answer_is_short_then_long_of_twice_the_item_width():
    block = build()
    query, sequence = case()
    output = block(query, sequence)
    assert block.out_dim == 2 * DIM and output.shape == (len(LENGTHS), 2 * DIM)
    torch.testing.assert_close(output[:, :DIM], block.short_attention(query, sequence.last(4)), **EXACT)


def test_what_is_retrieved_is_in_time_order_and_places_count_from_the_newest(monkeypatch):
    block = build(topk=4)
    kept = []
    monkeypatch.setattr(module, "nearest_columns", lambda *a: kept.append(retrieval.nearest_columns(*a)) or kept[-1])
    query, sequence = case([20])
    (grad,) = gradients(block(query, sequence), [block.pos.weight])
    assert len(kept) == 3 and all(bool((columns.diff(dim=1) > 0).all()) for columns in kept)
    places = {20 - int(column) for columns in kept for column in columns.flatten()}
    assert set(grad.any(1).nonzero().flatten().tolist()) == places


def test_without_reuse_evaluation_repeats_and_training_draws_one_rotation_by_the_global_seed():
    shared.check_draws(partial(build, filter_dropout=0.0), literal, (DIM, 6))


def test_the_filters_dropout_is_a_key():
    assert all(part.out_dropout.p == 0.1 for part in MIRRNBlock(DIM).MHFT_block)
    query, sequence = case()
    for rate in (0.0, 0.5):
        block = build(filter_dropout=rate).train()
        repeats = torch.equal(block(query, sequence), block(query, sequence))
        assert repeats == (rate == 0.0)


def test_groups_of_rows_of_any_size_give_the_same(monkeypatch):
    block = build()
    query, sequence = case()
    leaves = [query, sequence.items, *block.parameters()]
    expected = block(query, sequence)
    for rows in (1, 4):
        monkeypatch.setattr(module, "GATHERED_FLOATS", rows * 3 * DIM)
        assert_same(block(query, sequence), expected, leaves)


# ---- LongCTR's quirks


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("topk", [2, 4, 20])
def test_longctr_compat_is_longctrs_forward_with_its_draws(topk, training):
    """Rows: full, padding inside the window, fewer items than topk, none."""
    block = build(longctr_compat=True, reuse_hash=False, topk=topk, filter_dropout=0.0).train(training)
    draw = lambda: [torch.randn(DIM, 6, dtype=torch.double) for _ in range(3)]  # noqa: E731
    shared.check_longctr_draws(block, longctr, draw, [20, 19, 7, 3, 1, 0], moves=topk < 20)


def test_longctrs_prediction_depends_on_padding_and_the_default_one_does_not():
    query, sequence = case([1, 2, 3], padding=9)
    moved = shared.other_padding(sequence)
    for compat in (True, False):
        block = build(longctr_compat=compat, topk=5)
        for other in (moved, padded(sequence, 6)):
            gap = (block(query, other) - block(query, sequence)).detach().abs()[:, DIM:].amax(1)
            assert float(gap.min()) > 1e-3 if compat else float(gap.max()) < 1e-10


def test_by_default_a_filter_has_its_living_weights_alone():
    alive = {compat: {n: p.numel() for n, p in build(longctr_compat=compat).named_parameters()} for compat in (True, False)}
    for part in range(3):
        name = f"MHFT_block.{part}.complex_weight"
        assert alive[True].pop(name) == 2 * DIM * DIM // 4 and alive[False].pop(name) == 2 * DIM
    assert alive[True] == alive[False]
    block = build(longctr_compat=True)
    query, sequence = case([9, 9])
    for grad in gradients(block(query, sequence), [part.complex_weight for part in block.MHFT_block]):
        assert int((grad != 0).sum()) == 2 * DIM


def test_longctr_compat_refuses_batches_that_longctr_cannot_run_and_the_default_reads_them():
    shared.check_refuses_short_batches(build, literal)


# ---- short, long and empty histories, settings


@pytest.mark.parametrize("mask_retrieved", [True, False])
def test_single_precision_is_finite(mask_retrieved):
    shared.check_single_precision(build(mask_retrieved=mask_retrieved))


def test_empty_histories_give_exact_zeros():
    shared.check_empty(build(), 2 * DIM)


def test_histories_longer_than_the_position_table_are_refused_and_padding_beyond_it_is_not():
    block = build(max_len=7, topk=6)
    query, sequence = case([7, 2], padding=40)
    torch.testing.assert_close(block(query, sequence), literal(block, query, sequence), **EXACT)
    with pytest.raises(ConfigError, match="max_len is 7, but a history has 8 items; raise it"):
        block(*case([2, 8]))


def test_the_position_table_counts_as_an_embedding_and_starts_as_longctrs():
    table = MIRRNBlock(64, max_len=99).pos
    assert isinstance(table, nn.Embedding) and table.weight.shape == (100, 64)
    assert float(table.weight.detach().std()) == pytest.approx(1.0, rel=0.05)


@shared.refused(*(({key: 0}, f"{key} must be at least 1, not 0") for key in ("hash_bits", "topk", "max_len")))
def test_settings_out_of_range_are_refused(options, message):
    shared.check_refused(build, options, message)


@shared.any_histories(topk=st.sampled_from([1, 3, 6]), mask_retrieved=st.booleans())
def test_padding_row_order_and_batch_mates_do_not_matter(lengths, padding, seed, **options):
    shared.check_padding_order_and_mates(build(**options), lengths, padding, seed)
