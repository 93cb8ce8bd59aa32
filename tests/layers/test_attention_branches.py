"""Attention of many branches and experts done together, against gathers and against one expert at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import gradients, ragged

from model_zoo.backbones.twin import TwinBlock
from model_zoo.layers import attend_rows as rows_module
from model_zoo.layers.attend_items import attend_items
from model_zoo.layers.attend_rows import RowReads, attend_rows
from model_zoo.layers.attention_branches import BranchRead, Reading, attend_branches
from model_zoo.layers.routed_experts import RoutedTokens, fusable, run_experts, run_fused
from model_zoo.layers.routers import Routing
from model_zoo.layers.sequence import Sequence, SharedSequence
from model_zoo.layers.windows import Windows

DIM = 6
# float64 softmaxes over at most twelve tokens
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def blocks(count: int, heads: int = 2, topk: int = 3, dropout: float = 0.0) -> list[TwinBlock]:
    torch.manual_seed(count)
    made = [
        TwinBlock(DIM, attention_dim=4, num_heads=heads, short_seq_len=4, topk=topk, attention_dropout=dropout).double()
        for _ in range(count)
    ]
    return made


def routing_of(tokens: Sequence | Windows, experts: int, seed: int, dense: bool = False) -> Routing:
    """Random members and gates; some rows are served by nobody, some by several."""
    generator = torch.Generator().manual_seed(seed)
    batch, length = tokens.mask.shape
    members = torch.rand(batch, length, experts, generator=generator) < 0.5
    gates = torch.rand(batch, experts, generator=generator, dtype=torch.double)
    if not dense:
        gates = gates * (torch.rand(batch, experts, generator=generator) < 0.4)
    return Routing(members, gates.requires_grad_())


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(0, 11), min_size=1, max_size=6),
    padding=st.integers(0, 2),
    heads=st.integers(1, 2),
    topk=st.integers(1, 12),
    gather=st.booleans(),
    divide_by=st.sampled_from(["count", "size"]),
    whole=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_answers_and_every_gradient_equal_one_expert_at_a_time(
    lengths, padding, heads, topk, gather, divide_by, whole, seed
):
    sequence = ragged(lengths, DIM, seed, padding=padding)
    query = torch.randn(len(lengths), DIM, dtype=torch.double, requires_grad=True)
    overall, *experts = blocks(6, heads, topk)
    windows = Windows(sequence, 4, 2, divide_by=divide_by)
    active = torch.ones(len(lengths), dtype=torch.bool)
    routed = [
        RoutedTokens(experts[:3], sequence, routing_of(sequence, 3, seed), active),
        RoutedTokens(experts[3:], windows, routing_of(windows, 2, seed + 1, dense=True), windows.mask.any(1)),
    ]
    with pytest.MonkeyPatch.context() as patch:
        if gather:  # what a GPU does
            patch.setattr(rows_module, "sparse_rows", lambda items: False)
        got_whole, got = run_fused(query, sequence, overall if whole else None, routed)
        want = [
            run_experts(r.experts, query, r.tokens if r.tokens is sequence else windows.sequence(), r.routing, r.active)
            for r in routed
        ]
        if whole:
            got, want = [got_whole, *got], [overall(query, sequence), *want]
        else:
            assert got_whole is None
        leaves = [query, sequence.items, routed[0].routing.gates, routed[1].routing.gates]
        leaves += [p for block in (overall, *experts) for p in block.parameters()]
        for found, wanted in zip(got, want, strict=True):
            torch.testing.assert_close(found, wanted, **EXACT)
            if not wanted.requires_grad:  # nobody is served: plain zeros
                assert not found.requires_grad
                continue
            for a, b in zip(gradients(found, leaves), gradients(wanted, leaves), strict=True):
                torch.testing.assert_close(a, b, **EXACT)


def test_topk_keeps_exactly_k_of_equal_scores_and_the_gradient_is_the_derivative():
    sequence = ragged([5, 3], DIM, 1)
    branches = [BranchRead(1, newest=2), BranchRead(2, topk=2)]
    query = torch.randn(2, 3, DIM, dtype=torch.double, requires_grad=True)

    def answer(q, items):
        tokens = Sequence(items, sequence.index, sequence.mask)
        [pooled] = attend_branches([Reading(q, tokens, aligned=True)], branches)
        return torch.cat(pooled, 1)

    assert torch.autograd.gradcheck(answer, (query, sequence.items))
    torch.testing.assert_close(answer(query, torch.ones_like(sequence.items)), torch.ones(2, 3, DIM, dtype=torch.double))


@pytest.mark.parametrize("newest", [1, 2, 3, 9])
def test_the_newest_of_scattered_tokens(newest):
    sequence = ragged([9, 9, 9, 0], DIM, 1)
    members = torch.rand(4, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    chosen = Sequence(sequence.items, sequence.index, members & sequence.mask)
    query = torch.randn(4, 2, DIM, dtype=torch.double)
    [[got]] = attend_branches([Reading(query, chosen, aligned=False)], [BranchRead(2, newest=newest)])
    compacted = sequence.compact(members).last(newest)
    want = attend_items(query, compacted.items, compacted.index, compacted.mask)
    torch.testing.assert_close(got, want, **EXACT)


def test_given_weights_need_no_query_and_pass_no_gradient_to_it():
    sequence = ragged([5, 3, 0], DIM, 1)
    weight = torch.rand(3, 5, dtype=torch.double)
    query = torch.randn(3, 2, DIM, dtype=torch.double, requires_grad=True)
    branches = [BranchRead(1, weigh=lambda q, tokens: weight), BranchRead(1)]
    [[given, attended]] = attend_branches([Reading(query, sequence, aligned=True)], branches)
    want = torch.einsum("nk,nkd->nd", weight * sequence.mask, sequence.vectors).unsqueeze(1)
    torch.testing.assert_close(given, want, **EXACT)
    leaves = [query, sequence.items]
    for a, b in zip(gradients(given, leaves), gradients(want, leaves), strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    assert float(gradients(attended, [query])[0][:, 0].abs().max()) == 0.0


@pytest.mark.parametrize("attend_padding", [False, True])
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("known_scores", [False, True])
def test_rows_by_sparse_products_equal_gathered_rows(attend_padding, dropout, known_scores, monkeypatch):
    sequence = ragged([4, 0, 2, 1], DIM, padding=1)
    query = torch.randn(4, DIM, dtype=torch.double, requires_grad=True)
    keep = torch.randint(2, (4, 5)).double() * 2 if dropout else None
    scores = torch.einsum("nd,nkd->nk", query, sequence.vectors).detach() if known_scores else None
    read = RowReads(sequence.index, sequence.mask, keep, attend_padding, scores)
    answers = [attend_rows([query, -query], [read, RowReads(sequence.index, sequence.mask)], sequence.items)]
    monkeypatch.setattr(rows_module, "sparse_rows", lambda items: False)
    answers.append(attend_rows([query, -query], [read, RowReads(sequence.index, sequence.mask)], sequence.items))
    got, want = (torch.cat(answer) for answer in answers)
    torch.testing.assert_close(got, want, **EXACT)
    leaves = [query, sequence.items]
    for a, b in zip(gradients(got, leaves), gradients(want, leaves), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def dropped(share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Answers of a branch with dropout and of one without, on one-hot items."""
    sequence = ragged([11] * 160, DIM, 2)
    tokens = Sequence(torch.eye(9, DIM, dtype=torch.double), sequence.index, sequence.mask)
    query = torch.zeros(160, 2, DIM, dtype=torch.double)
    torch.manual_seed(3)
    [[first, second]] = attend_branches([Reading(query, tokens, True)], [BranchRead(1, dropout=share), BranchRead(1)])
    return first, second


def test_dropout_keeps_the_stated_share_scales_it_and_repeats_with_the_seed():
    plain, some = dropped(0.0), dropped(0.25)
    assert torch.equal(some[0], dropped(0.25)[0])
    assert torch.equal(some[1], plain[1])  # the second branch has no dropout
    # 160 * 11 weights: the mean of the factors has a standard deviation of sqrt(1/3 / 1760) = 0.014
    assert abs(float(some[0].sum() / plain[0].sum()) - 1) < 0.06
    assert not torch.equal(some[0], plain[0])
    assert float(dropped(1.0)[0].abs().max()) == 0.0


def test_what_can_be_fused():
    sequence = ragged([5, 9], DIM)
    assert fusable(blocks(2), sequence)
    assert not fusable([*blocks(2), torch.nn.Identity()], sequence)
    assert not fusable(blocks(2), SharedSequence(sequence, torch.tensor([0, 1, 1])))


@pytest.mark.parametrize("heads", [1, 2, 5])
@pytest.mark.parametrize("dropout", [False, True])
def test_heads_of_a_row_equal_gathered_attention(heads, dropout):
    sequence = ragged([4, 0, 2, 1], DIM, padding=1)
    query = torch.randn(4, heads, DIM, dtype=torch.double, requires_grad=True)
    keep = torch.randint(2, (4, heads, 5)).double() * 2 if dropout else None
    given = (query, sequence.items, sequence.index, sequence.mask, keep)
    got, want = rows_module.attend_heads(*given), attend_items(*given)
    torch.testing.assert_close(got, want, **EXACT)
    leaves = [query, sequence.items]
    for a, b in zip(gradients(got, leaves), gradients(want, leaves), strict=True):
        torch.testing.assert_close(a, b, **EXACT)
