"""Attention over window means formed by groups of rows, against the means as a sequence of their own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import gradients, ragged

from model_zoo.layers import window_attention as module
from model_zoo.layers.attention_branches import BranchRead, Reading, attend_branches
from model_zoo.layers.sequence import Sequence
from model_zoo.layers.window_attention import attend_windows
from model_zoo.layers.windows import Windows

DIM = 4
# float64 sums of some dozens of terms of order one, taken in another order
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def both(lengths, size, stride, divide_by, branches, seed, padding=1, scattered=True):
    """Answers and their leaves, by `attend_windows` and over the sequence of means."""
    sequence = ragged(lengths, DIM, seed, padding=padding)
    windows = Windows(sequence, size, stride, divide_by=divide_by)
    generator = torch.Generator().manual_seed(seed)
    row = torch.randint(len(lengths), (2 * len(lengths),), generator=generator)
    heads = sum(branch.heads for branch in branches)
    query = torch.randn(len(row), heads, DIM, generator=generator, dtype=torch.double).requires_grad_()
    members = windows.mask[row]
    if scattered:
        members = members & (torch.rand(members.shape, generator=generator) < 0.6)
    means = windows.sequence()
    answers = []
    for fast in (True, False):
        torch.manual_seed(seed)
        if fast:
            answers.append(torch.cat(attend_windows(query, windows, row, members, branches), 1))
        else:
            reading = Reading(query, Sequence(means.items, means.index[row], members), aligned=False)
            answers.append(torch.cat(attend_branches([reading], branches)[0], 1))
    return *answers, [query, sequence.items]


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 13), min_size=1, max_size=5),
    size=st.integers(1, 6),
    stride=st.integers(1, 6),
    divide_by=st.sampled_from(["count", "size"]),
    newest=st.sampled_from([None, 1, 3]),
    topk=st.sampled_from([None, 1, 3]),
    heads=st.integers(1, 2),
    rows_at_a_time=st.sampled_from([1, 2, 100]),
    seed=st.integers(0, 99),
)
def test_answers_and_gradients_equal_attention_over_the_means(
    lengths, size, stride, divide_by, newest, topk, heads, rows_at_a_time, seed
):
    branches = [BranchRead(heads, newest=newest), BranchRead(1, topk=topk)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MEANS_FLOATS", rows_at_a_time * 14 * DIM // stride)
        got, want, leaves = both(lengths, size, stride, divide_by, branches, seed)
        torch.testing.assert_close(got, want, **EXACT)
        for a, b in zip(gradients(got, leaves), gradients(want, leaves), strict=True):
            torch.testing.assert_close(a, b, **EXACT)


def test_gradients_with_dropout_are_those_of_the_dropped_weights():
    dropped, _, (query, items) = both([9, 4, 13], 4, 2, "count", [BranchRead(1, dropout=0.4)], seed=3)
    assert not torch.equal(dropped, both([9, 4, 13], 4, 2, "count", [BranchRead(1)], seed=3)[0])

    def answer(q, x):
        torch.manual_seed(0)
        sequence = ragged([9, 4, 13], DIM, 3, padding=1)
        windows = Windows(Sequence(x, sequence.index, sequence.mask), 4, 2)
        row = torch.tensor([2, 0, 1, 2, 1, 0])
        return attend_windows(q, windows, row, windows.mask[row], [BranchRead(1, dropout=0.4)])[0]

    assert torch.autograd.gradcheck(answer, (query, items))


def test_given_weights_over_windows():
    def weigh(query, tokens):
        return tokens.vectors[..., 0].detach().abs() + query[:, :1]

    got, want, leaves = both([9, 0, 13], 4, 2, "count", [BranchRead(1, weigh=weigh), BranchRead(1)], seed=1)
    torch.testing.assert_close(got, want, **EXACT)
    for a, b in zip(gradients(got, leaves), gradients(want, leaves), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_rows_whose_windows_nobody_reads_and_branches_without_a_weight():
    def nothing(query, tokens):
        return torch.zeros_like(tokens.mask, dtype=torch.double)

    sequence = ragged([9, 4, 0], DIM, 3)
    windows = Windows(sequence, 4, 2)
    query = torch.randn(2, 1, DIM, dtype=torch.double).requires_grad_()
    row = torch.tensor([1, 0])
    members = windows.mask[row]
    for branch, read in ((BranchRead(1, weigh=nothing), members), (BranchRead(1), members & False)):
        [answer] = attend_windows(query, windows, row, read, [branch])
        assert torch.equal(answer, torch.zeros_like(answer))
        assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients(answer, [query, sequence.items]))


def test_a_group_that_is_alone_keeps_its_means_and_others_form_again_those_that_have_a_weight(monkeypatch):
    formed = []
    means = module._Group.means
    monkeypatch.setattr(module._Group, "means", lambda group, items: formed.append(len(group.bag)) or means(group, items))

    def run():
        got, want, leaves = both([19, 23], 4, 2, "count", [BranchRead(1, topk=2)], seed=2, scattered=False)
        for a, b in zip(gradients(got, leaves), gradients(want, leaves), strict=True):
            torch.testing.assert_close(a, b, **EXACT)

    run()
    assert formed == [9 + 11]
    formed.clear()
    monkeypatch.setattr(module, "MEANS_FLOATS", DIM)
    run()
    assert formed[:2] == [9, 11] and len(formed) == 4
    assert sum(formed[2:]) <= 4 * 2  # of four queries two windows each
