"""Experts run together over one gather against one expert at a time on its own compacted tokens."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import gradients, ragged

from model_zoo.backbones.twin import TwinBlock
from model_zoo.layers import attend_items
from model_zoo.layers.fused_attention import BranchRead, SlotReads, attend_slots
from model_zoo.layers.routed_experts import RoutedTokens, fusable, run_experts, run_fused
from model_zoo.layers.routers import Routing
from model_zoo.layers.sequence import Sequence
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
    rows_at_a_time=st.sampled_from([1, 2, 100]),
    divide_by=st.sampled_from(["count", "size"]),
    whole=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_answers_and_every_gradient_equal_one_expert_at_a_time(
    lengths, padding, heads, topk, rows_at_a_time, divide_by, whole, seed
):
    sequence = ragged(lengths, DIM, seed, padding=padding)
    if sequence.index.shape[1] == 0:
        return
    query = torch.randn(len(lengths), DIM, dtype=torch.double, requires_grad=True)
    overall, *experts = blocks(6, heads, topk)
    windows = Windows(sequence, 4, 2, divide_by=divide_by)
    active = torch.ones(len(lengths), dtype=torch.bool)
    routed = [
        RoutedTokens(experts[:3], sequence, routing_of(sequence, 3, seed), active),
        RoutedTokens(experts[3:], windows, routing_of(windows, 2, seed + 1, dense=True), windows.mask.any(1)),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attend_items, "GATHERED_FLOATS", rows_at_a_time * sequence.index.shape[1] * DIM)
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


def test_ties_keep_exactly_topk_tokens_and_the_gradient_is_the_derivative():
    sequence = ragged([5, 3], DIM, 1)
    reads = [SlotReads(sequence.mask.unsqueeze(1).expand(-1, 2, -1))]
    branches = [BranchRead(1, 2, None, 0.0), BranchRead(2, None, 2, 0.0)]
    query = torch.randn(2, 2, 3, DIM, dtype=torch.double, requires_grad=True)

    def answer(q, items):
        return attend_slots([q], reads, branches, items, sequence.index, sequence.mask)[0]

    assert torch.autograd.gradcheck(answer, (query, sequence.items))
    same = Sequence(torch.ones_like(sequence.items), sequence.index, sequence.mask)
    torch.testing.assert_close(answer(query, same.items), torch.ones(2, 2, 3, DIM, dtype=torch.double))


def test_dropout_keeps_the_stated_share_scales_it_and_repeats_with_the_seed():
    sequence = ragged([11] * 40, DIM, 2)
    reads = [SlotReads(sequence.mask.unsqueeze(1).expand(-1, 4, -1))]
    one_hot = torch.eye(9, DIM, dtype=torch.double)
    query = torch.zeros(40, 4, 2, DIM, dtype=torch.double)

    def answer(share):
        branches = [BranchRead(1, None, None, share), BranchRead(1, None, None, 0.0)]
        torch.manual_seed(3)
        return attend_slots([query], reads, branches, one_hot, sequence.index, sequence.mask)[0]

    plain, dropped = answer(0.0), answer(0.25)
    assert torch.equal(dropped, answer(0.25))
    assert torch.equal(dropped[:, :, 1], plain[:, :, 1])  # the second branch has no dropout
    # 40 * 4 * 11 weights: the mean of the factors has a standard deviation of sqrt(1/3 / 1760) = 0.014
    ratio = float(dropped[:, :, 0].sum() / plain[:, :, 0].sum())
    assert abs(ratio - 1) < 0.06
    assert not torch.equal(dropped[:, :, 0], plain[:, :, 0])
    assert float(answer(1.0)[:, :, 0].abs().max()) == 0.0


def test_gradients_with_dropout_are_those_of_the_dropped_weights():
    sequence = ragged([7, 4, 9], DIM, 3)
    windows = Windows(sequence, 4, 2)
    reads = [SlotReads(sequence.mask.unsqueeze(1)), SlotReads(windows.mask.unsqueeze(1), windows.pooling())]
    branches = [BranchRead(1, 3, None, 0.3), BranchRead(1, None, 3, 0.5)]
    queries = [torch.randn(3, 1, 2, DIM, dtype=torch.double, requires_grad=True) for _ in reads]

    def answer(*inputs):
        torch.manual_seed(0)
        *q, items = inputs
        return torch.cat(attend_slots(q, reads, branches, items, sequence.index, sequence.mask), 1)

    assert torch.autograd.gradcheck(answer, (*queries, sequence.items))


def test_what_can_be_fused():
    sequence = ragged([5, 9], DIM)
    right, left = Windows(sequence, 4, 2), Windows(sequence, 4, 2, align="left")
    twins = blocks(2)
    assert fusable(twins, sequence, [sequence, right])
    assert not fusable(twins, sequence, [left])
    assert not fusable(twins, sequence, [right.sequence()])
    assert not fusable([*twins, torch.nn.Identity()], sequence, [sequence])
    assert not fusable(twins, replace(sequence, index=sequence.index[:, :0], mask=sequence.mask[:, :0]), [])
