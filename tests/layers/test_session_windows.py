"""Sessions as windows, against sessions found event by event; MoS over them against its dense form."""

from typing import Any

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mos_cases import DIM, EXACT, LENGTHS, attention_block, build, case, twin_block
from oracles import gradients, ragged, rows_of
from torch import Tensor

from model_zoo.errors import ConfigError
from model_zoo.layers.blocks import call_block
from model_zoo.layers.mos import MoS
from model_zoo.layers.sequence import Sequence, SharedSequence, own_tables
from model_zoo.layers.session_windows import SessionWindows
from model_zoo.layers.timed_sequence import TimedSequence, timed
from model_zoo.layers.windows import Windows

GAP = 10
SETTINGS = settings(derandomize=True, deadline=None, max_examples=20)


def with_times(sequence: Sequence, seed: int = 0) -> TimedSequence:
    """Steps of 0 to 20 seconds, the gap itself among them; anything at padding."""
    generator = torch.Generator().manual_seed(seed)
    times = torch.randint(0, 2 * GAP + 1, sequence.index.shape, generator=generator).cumsum(1)
    noise = torch.randint(-(10**9), 10**9, times.shape, generator=generator)
    found = timed(sequence, torch.where(sequence.mask, times, noise))
    assert isinstance(found, TimedSequence)
    return found


def sessions(tokens: Tensor, times: Tensor, gap: int) -> Tensor:
    """Means of the sessions of one row's real tokens ``[t, d]``, in time order."""
    runs: list[list[Tensor]] = []
    for number, token in enumerate(tokens):
        if number == 0 or int(times[number]) - int(times[number - 1]) > gap:
            runs.append([])
        runs[-1].append(token)
    return torch.stack([torch.stack(run).sum(0) / len(run) for run in runs]) if runs else tokens[:0]


def dense(layer: MoS, query: Tensor, sequence: TimedSequence) -> Tensor:
    """`oracles.mos` row by row, the row's sessions in place of its windows."""
    answers = []
    for row in range(len(query)):
        one = slice(row, row + 1)
        times = sequence.times[row][sequence.mask[row]]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                oracles,
                "branch_tokens",
                lambda layer, tokens, branch, times=times: (
                    tokens if branch == "item" else sessions(tokens, times, layer.session_gap)
                ),
            )
            answers.append(oracles.mos(layer, query[one], sequence.vectors[one], sequence.mask[one]))
    return torch.cat(answers)


def session_layer(**options: Any) -> MoS:
    return build(**{"windows": "session", "session_gap": GAP, **options})


@SETTINGS
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    padding=st.integers(0, 3),
    gap=st.sampled_from([0, GAP, 50]),
    seed=st.integers(0, 99),
)
def test_means_and_gradients_equal_those_of_sessions_found_one_by_one(lengths, padding, gap, seed):
    sequence = with_times(ragged(lengths, DIM, seed, padding=padding), seed)
    windows = SessionWindows(sequence, gap)
    found = windows.sequence()
    rows = zip(rows_of(sequence.vectors, sequence.mask), sequence.times, sequence.mask)
    expected = [sessions(tokens, times[real], gap) for tokens, times, real in rows]
    assert found.lengths.tolist() == [len(means) for means in expected]
    assert not bool((found.mask[:, :-1] & ~found.mask[:, 1:]).any())  # at the right end
    for means, wanted in zip(rows_of(found.vectors, found.mask), expected):
        torch.testing.assert_close(means, wanted, **EXACT)
    if sum(lengths):
        got = gradients(torch.cat(rows_of(found.vectors, found.mask)), [sequence.items])
        torch.testing.assert_close(got, gradients(torch.cat(expected), [sequence.items]), **EXACT)


def test_a_pause_as_long_as_the_gap_does_not_cut():
    sequence = ragged([4], DIM)
    windows = SessionWindows(timed(sequence, torch.tensor([[0, 10, 20, 31]])), 10)
    assert windows.mask.shape == (1, 2)
    torch.testing.assert_close(windows.sequence().vectors[0, 0], sequence.vectors[0, :3].mean(0), **EXACT)


@pytest.mark.parametrize("topk", [1, 2])
@pytest.mark.parametrize("block", [twin_block, attention_block])
def test_mos_equals_its_dense_form(block, topk):
    layer = session_layer(block=block, topk_item=topk, topk_window=topk)
    query, sequence = case(padding=2)
    sequence = with_times(sequence)
    output, expected = layer(query, sequence), dense(layer, query, sequence)
    torch.testing.assert_close(output, expected, **EXACT)
    leaves = [query, sequence.items, *layer.parameters()]
    for got, want in zip(gradients(output, leaves), gradients(expected, leaves)):
        torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize(
    "options",
    [{"gate_source": "target", "topk_window": 2}, {"router_input": "item_target", "topk_window": 2},
     {"shared_router": True, "gate_norm": "softmax_then_mask"}, {"alpha_item": 0.0, "alpha_window": 1.0},
     {"empty_history": "zeros", "n_item_experts": 0}],
)  # fmt: skip
def test_other_options_hold_for_sessions(options):
    layer = session_layer(**options)
    query, sequence = case()
    sequence = with_times(sequence)
    torch.testing.assert_close(layer(query, sequence), dense(layer, query, sequence), **EXACT)


def test_one_session_is_one_window_and_events_far_apart_are_windows_of_one():
    query, sequence = case()
    sequence = with_times(sequence)
    spaced = timed(sequence, torch.arange(sequence.index.shape[1]).expand_as(sequence.index) * 100)
    whole, single = session_layer(session_gap=10**6), session_layer(session_gap=99)
    torch.testing.assert_close(whole(query, sequence), build(window_size=30)(query, sequence), **EXACT)
    torch.testing.assert_close(single(query, spaced), build(window_size=1, window_stride=1)(query, sequence), **EXACT)


@SETTINGS
@given(order=st.permutations(range(len(LENGTHS))), padding=st.integers(0, 3), rows=st.integers(1, len(LENGTHS)))
def test_rows_depend_on_neither_padding_nor_order_nor_other_rows(order, padding, rows):
    layer = session_layer(topk_window=2).eval()
    query, sequence = case()
    sequence = with_times(sequence)
    chosen = torch.tensor(order[:rows])
    wide = timed(
        Sequence(sequence.items, *(torch.nn.functional.pad(v, (padding, 0)) for v in (sequence.index, sequence.mask))),
        torch.nn.functional.pad(sequence.times, (padding, 0), value=777),
    )
    found = layer(query[chosen], wide.select(chosen))
    torch.testing.assert_close(found, layer(query, sequence)[chosen], **EXACT)
    shift = timed(sequence, sequence.times + 10**12)
    assert torch.equal(layer(query, shift), layer(query, sequence))


def test_parts_of_a_timed_sequence_keep_its_times():
    sequence = with_times(ragged([5, 2, 0], DIM, padding=1))
    keep = torch.tensor([True, False, True, True, False, True]).expand(3, -1)
    rows = torch.tensor([2, 0])
    newest = sequence.last(2)
    assert isinstance(newest, TimedSequence) and torch.equal(newest.times, sequence.times[:, -2:])
    assert sequence.last(6) is sequence
    chosen = sequence.select(rows)
    assert isinstance(chosen, TimedSequence) and torch.equal(chosen.times, sequence.times[rows])
    kept, plain = sequence.select_kept(rows, keep), Sequence(sequence.items, sequence.index, sequence.mask)
    assert isinstance(kept, TimedSequence)
    wanted = plain.select_kept(rows, keep)
    assert torch.equal(kept.mask, wanted.mask) and torch.equal(kept.index[kept.mask], wanted.index[wanted.mask])
    assert kept.times[1][kept.mask[1]].tolist() == sequence.times[0][sequence.mask[0] & keep[0]].tolist()


def test_shared_histories_equal_one_history_per_row():
    layer = session_layer(topk_window=2).eval()
    _, sequence = case([6, 0, 4])
    owner = torch.tensor([2, 0, 0, 1, 2])
    query = torch.randn(5, DIM, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    shared = SharedSequence(with_times(sequence), owner)
    with torch.no_grad():
        torch.testing.assert_close(call_block(layer, query, shared), layer(query, shared.expanded()), **EXACT)


@pytest.mark.parametrize("lengths", [[0, 0], [1], [0, 1, 3]])
def test_empty_and_short_histories_give_finite_answers_and_gradients(lengths):
    for dtype in (torch.float, torch.double):
        layer = session_layer().to(dtype)
        sequence = with_times(ragged(lengths, DIM, dtype=dtype))
        query = torch.randn(len(lengths), DIM, dtype=dtype).requires_grad_()
        output = layer(query, sequence)
        assert output.dtype == dtype and bool(output.isfinite().all())
        if output.requires_grad:  # not so if no row has a history
            leaves = [query, sequence.items, *layer.parameters()]
            assert all(bool(g.isfinite().all()) for g in gradients(output, leaves))


@pytest.mark.parametrize("alphas", [(0.0, 0.0), (0.25, 0.25)])
def test_histories_without_times_are_refused_in_every_phase(alphas):
    layer = session_layer()
    layer.set_fusion(*alphas)
    with pytest.raises(ConfigError, match=r"windows: session needs the time of every event.*time_col.*windows: fixed"):
        layer(*case())
    session_layer(n_window_experts=0)(*case())  # nothing reads sessions


@pytest.mark.parametrize(
    "options, message",
    [
        ({"session_gap": -1}, r"session_gap \(-1\) must be at least 0"),
        ({"window_align": "left"}, "leave out window_align"),
        ({"window_divide_by": "size"}, "leave out window_align"),
        ({"short_history": "skip"}, "leave out window_align"),
    ],
)
def test_keys_that_do_not_go_with_sessions_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        session_layer(**options)


def test_times_change_nothing_for_fixed_windows():
    layer = build(topk_item=2, topk_window=2)
    query, sequence = case()
    timed_output, plain = layer(query, with_times(sequence)), layer(query, sequence)
    assert torch.equal(timed_output, plain)
    assert layer.state_dict().keys() == build(windows="session").state_dict().keys()


@pytest.mark.parametrize(("align", "newest"), [("right", [2, 4, 6, 8]), ("left", [3, 5, 7])])
def test_windows_as_tokens_have_the_time_of_their_newest_item(align, newest):
    sequence = with_times(ragged([8], 3, padding=1))  # columns 1 to 8
    found = Windows(sequence, 3, 2, align).sequence()
    assert isinstance(found, TimedSequence)
    assert found.times[found.mask].tolist() == sequence.times[0, newest].tolist()


def test_sessions_as_tokens_have_the_time_of_their_newest_item():
    sequence = timed(ragged([5, 0, 2], 3), torch.tensor([[0, 5, 30, 31, 60], [9] * 5, [0, 0, 0, 7, 8]]))
    found = SessionWindows(sequence, GAP).sequence()
    assert isinstance(found, TimedSequence)
    assert found.times[found.mask].tolist() == [5, 31, 60, 8]
    empty = SessionWindows(timed(ragged([0], 3, padding=2), torch.zeros(1, 2, dtype=torch.long)), GAP).sequence()
    assert not empty.mask.any()


def test_tables_of_their_own_leave_times_alone():
    sequence = with_times(ragged([6, 6], 3, num_items=50))
    parts = [sequence.select(torch.tensor([row])) for row in range(2)]
    trimmed = own_tables(parts)
    assert any(len(own.items) < len(part.items) for own, part in zip(trimmed, parts, strict=True))
    for own, part in zip(trimmed, parts, strict=True):
        assert isinstance(own, TimedSequence) and torch.equal(own.times, part.times)
