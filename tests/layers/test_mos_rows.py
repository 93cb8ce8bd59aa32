"""MoS on empty, short and padded histories; rows do not depend on each other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mos_cases import DIM, EXACT, LENGTHS, build, case
from oracles import (
    block_answer,
    gate_row,
    mos,
    rows_of,
)

from model_zoo.layers.sequence import Sequence


def raise_answers(block) -> None:
    """Every answer of the block grows by 7."""
    finish = block.finish
    block.finish = lambda query, pooled: finish(query, pooled) + 7.0


# ---- which rows have which branch


def test_an_empty_history_gets_the_global_answer_or_zeros():
    query, sequence = case()
    empty = LENGTHS.index(0)
    layer = build(topk_item=2)
    whole = layer.global_expert(query, sequence)[empty]
    assert torch.equal(layer(query, sequence)[empty], whole)
    raise_answers(layer.global_expert)
    assert torch.equal(layer(query, sequence)[empty], whole + 7.0)
    zeros = build(topk_item=2, empty_history="zeros")
    raise_answers(zeros.global_expert)
    output = zeros(query, sequence)
    assert torch.equal(output[empty], torch.zeros_like(output[empty]))
    assert bool((output[[0, 1, 3, 4, 5]] != 0).all())


@pytest.mark.parametrize("alphas", [(0.25, 0.25), (0.5, 0.5), (1.0, 0.0)])
def test_batches_without_any_item_get_the_global_answer(alphas):
    layer = build(alpha_item=alphas[0], alpha_window=alphas[1])
    raise_answers(layer.global_expert)
    layer.set_fusion(*alphas, update_codebooks=True)
    codes = layer.item_router.codebook.codes.clone()
    query = torch.randn(3, DIM, dtype=torch.double)
    for columns in (0, 4):
        nothing = Sequence.from_vectors(
            torch.randn(3, columns, DIM, dtype=torch.double), torch.zeros(3, columns, dtype=torch.bool)
        )
        torch.testing.assert_close(layer(query, nothing), layer.global_expert(query, nothing), **EXACT)
    assert torch.equal(layer.item_router.codebook.codes, codes)
    assert layer(query[:0], nothing.select(torch.tensor([], dtype=torch.long))).shape == (0, 2 * DIM)


def test_a_history_of_one_item_is_read_by_its_own_experts_alone():
    layer = build(alpha_item=1.0, alpha_window=0.0)
    query, sequence = case([1, 1, 1])
    for row, item in enumerate(sequence.vectors[:, 0]):
        theme = int(gate_row(layer.item_router, item).argmax())
        want = block_answer(layer.item_experts.experts[theme], query[row], item.unsqueeze(0))
        torch.testing.assert_close(layer(query, sequence)[row], want, **EXACT)


def test_a_history_shorter_than_a_window_is_one_partial_window_or_has_no_window_branch():
    query, sequence = case([3, 2])
    partial = build(alpha_item=0.0, alpha_window=1.0)
    means = torch.stack([row.mean(0) for row in rows_of(sequence.vectors, sequence.mask)])
    for row, mean in enumerate(means):
        theme = int(gate_row(partial.window_router, mean).argmax())
        want = block_answer(partial.window_experts.experts[theme], query[row], mean.unsqueeze(0))
        torch.testing.assert_close(partial(query, sequence)[row], want, **EXACT)
    for option in ({"short_history": "skip"}, {"window_align": "left"}):
        layer = build(alpha_item=0.0, alpha_window=1.0, **option)
        torch.testing.assert_close(layer(query, sequence), layer.global_expert(query, sequence), **EXACT)


def test_interior_padding_is_read_after_right_alignment():
    query, sequence = case([6, 3, 0], padding=2)
    keep = torch.rand(sequence.mask.shape, generator=torch.Generator().manual_seed(0)) < 0.6
    gappy = Sequence(sequence.items, sequence.index, sequence.mask & keep)
    layer = build(topk_item=2)
    expected = mos(layer, query, gappy.vectors, gappy.mask)
    torch.testing.assert_close(layer(query, gappy.right_aligned()), expected, **EXACT)


# ---- padding, order, batch mates


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=5),
    padding=st.integers(1, 7),
    topk=st.integers(1, 3),
    align=st.sampled_from(["right", "left"]),
    seed=st.integers(0, 100),
)
def test_padding_row_order_and_batch_mates_do_not_matter(lengths, padding, topk, align, seed):
    layer = build(seed=seed, topk_item=topk, topk_window=topk, window_align=align)
    query, plain = case(lengths, seed)
    columns = torch.zeros(len(lengths), padding, dtype=torch.long)
    padded = Sequence(plain.items, torch.cat([columns, plain.index], 1), torch.cat([columns.bool(), plain.mask], 1))
    output = layer(query, plain)
    torch.testing.assert_close(layer(query, padded), output, **EXACT)
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(layer(query[order], plain.select(order)), output[order], **EXACT)
    alone = torch.cat([layer(query[[b]], plain.select(torch.tensor([b]))) for b in range(len(lengths))])
    torch.testing.assert_close(alone, output, **EXACT)
