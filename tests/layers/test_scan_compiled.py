"""The loops that numba compiles against the definition in float64: outputs, every gradient, padding, threads, extremes."""

import os
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import ragged
from test_selective_scan import arguments, newest
from torch import Tensor, nn

from model_zoo.experiment.flops_counter import FlopCounter
from model_zoo.layers.mamba import Mamba, causal_conv
from model_zoo.layers.selective_scan import last_state, scan_loop, selective_scan, selective_scan_last
from model_zoo.layers.sequence import Sequence

numba = pytest.importorskip("numba", reason="needs numba: pip install 'longctr-mos[numba]'")
from model_zoo.layers import scan_compiled, scan_kernels  # noqa: E402

# float32 rounding 6e-8, over sums of as many terms as the batch has positions; of the largest value of each tensor
SINGLE = 2e-5


def close(got: Tensor, want: Tensor, reach: float = SINGLE) -> None:
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=0, atol=reach * max(1e-3, want.abs().max().item()))


def narrowed(wide: list[Tensor]) -> list[Tensor]:
    return [t.detach().float().requires_grad_() for t in wide]


def compare(lengths: list[int], length: int, channels: int, states: int, seed: int = 0) -> None:
    """Both functions and the bare state, with padding, against the loop."""
    wide = arguments(len(lengths), length, channels, states, seed=seed)
    wide = [t.detach().float().double().requires_grad_() for t in wide]
    given, count = narrowed(wide), torch.tensor(lengths)
    real = torch.arange(length) >= length - count.unsqueeze(1)
    expected, state = scan_loop(wide[0] * real.unsqueeze(2), *wide[1:])
    u = given[0] * real.unsqueeze(2)
    options = {"lengths": count, "kernel": "numba"}
    for output, goal in (
        (selective_scan(u, *given[1:], **options), expected),
        (selective_scan_last(*newest([u, *given[1:]]), **options), expected[:, -1]),
        (last_state(u, *given[1:4], given[7], **options), state),
    ):
        close(output, goal)
        weight = torch.randn(goal.shape).double()
        wants = torch.autograd.grad((goal * weight).sum(), wide, allow_unused=True, retain_graph=True)
        gots = torch.autograd.grad((output * weight.float()).sum(), given, allow_unused=True, retain_graph=True)
        for got, want in zip(gots, wants, strict=True):
            assert (got is None) == (want is None)
            if got is not None:
                close(got, want)


def test_elementary_functions_over_their_range():
    @numba.njit
    def each(x, y):
        out = np.empty((4, len(x)), np.float32)
        for i in range(len(x)):
            out[0, i] = scan_kernels._exp(x[i])
            out[1, i], out[2, i] = scan_kernels._softplus(y[i])
            out[3, i] = scan_kernels._sigmoid(y[i])
        return out

    x, y = np.linspace(-87, 0, 100_001, dtype=np.float32), np.linspace(-80, 80, 100_001, dtype=np.float32)
    exp, softplus, slope, sigmoid = each(x, y).astype(np.float64)
    wide = y.astype(np.float64)
    np.testing.assert_allclose(exp, np.exp(x.astype(np.float64)), rtol=2e-7)
    np.testing.assert_allclose(softplus, np.logaddexp(0, wide), rtol=4e-7)
    np.testing.assert_allclose(sigmoid, 1 / (1 + np.exp(-wide)), rtol=4e-7)
    assert np.array_equal(slope, sigmoid)
    far = np.array([-1e30, -np.inf], np.float32)
    assert not each(far, far).any()


@pytest.mark.parametrize("states", [1, 4])
@pytest.mark.parametrize("channels", [1, 5, 16, 33])
def test_outputs_and_every_gradient_equal_the_loop(channels, states):
    compare([11, 4, 0, 1, 11], 11, channels, states)


def test_a_batch_of_several_chunks():
    compare([3, 0, 2] * (2 * scan_compiled.CHUNK // 3), 3, 5, 2)


def test_channels_in_several_blocks():
    length, states, channels = 300, 32, 40
    assert scan_kernels._block(length, states, channels) == 32
    compare([300, 7], length, channels, states)


@settings(derandomize=True, deadline=None, max_examples=20)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    channels=st.integers(1, 20),
    states=st.integers(1, 6),
    seed=st.integers(0, 50),
)
def test_any_shape(lengths, channels, states, seed):
    compare(lengths, 9, channels, states, seed)


@pytest.mark.parametrize("taps", [1, 4])
@pytest.mark.parametrize("length", [2, 7])
def test_convolution_equals_torchs(length, taps):
    torch.manual_seed(0)
    conv = nn.Conv1d(6, 6, taps, groups=6, padding=taps - 1).double()
    u = torch.randn(5, length, 6, dtype=torch.double, requires_grad=True)
    mask = torch.arange(length) >= length - torch.tensor([7, 3, 0, 1, 5]).unsqueeze(1)
    weights = mask.unsqueeze(2)
    expected = F.silu(conv((u * weights).transpose(1, 2))[..., :length].transpose(1, 2)) * weights
    wide = [u, conv.weight, conv.bias]
    given = narrowed(wide)
    output = causal_conv(given[0], mask, given[1].squeeze(1), given[2], "numba")
    close(output, expected)
    weight = torch.randn(expected.shape).double()
    wants = torch.autograd.grad((expected * weight).sum(), wide)
    for got, want in zip(torch.autograd.grad((output * weight.float()).sum(), given), wants, strict=True):
        close(got, want)


def test_blocks_with_both_kernels_agree():
    sequence, found = ragged([20, 7, 0, 1], 12, padding=3, dtype=torch.float), []
    for kernel in ("torch", "numba"):
        torch.manual_seed(0)
        layer = Mamba(12, d_state=4, scan_kernel=kernel)
        outputs = layer(sequence)[sequence.mask], layer.newest(sequence)[sequence.mask[:, -1]]
        leaves = [sequence.items, *layer.parameters()]
        slopes = [torch.autograd.grad(o.square().sum(), leaves) for o in outputs]
        found.append([*outputs, *slopes[0], *slopes[1]])
    for one, other in zip(*found, strict=True):
        close(other.detach(), one.detach().double())


def test_padding_with_nan_is_never_read():
    layer, sequence = Mamba(12, d_state=4, scan_kernel="numba"), ragged([20, 7, 0, 1], 12, padding=3, dtype=torch.float)
    items = torch.cat([sequence.items.detach(), torch.full((1, 12), torch.nan)])
    poisoned = Sequence(items, sequence.index.masked_fill(~sequence.mask, len(items) - 1), sequence.mask)
    real = sequence.mask[:, -1]
    assert torch.equal(layer(poisoned)[sequence.mask], layer(sequence)[sequence.mask])
    assert torch.equal(layer.newest(poisoned)[real], layer.newest(sequence)[real])


def test_threads_change_no_bit():
    given = narrowed(arguments(3 * scan_compiled.CHUNK, 9, 6, 3))
    mask = torch.ones(len(given[0]), 9, dtype=torch.bool)
    weight, bias = torch.randn(6, 4, requires_grad=True), torch.randn(6, requires_grad=True)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outputs = [
                selective_scan(*given, kernel="numba"), selective_scan_last(*newest(given), kernel="numba"),
                causal_conv(given[0], mask, weight, bias, "numba"),
            ]  # fmt: skip
            leaves = [*given[:4], given[7], weight, bias]
            slopes = [torch.autograd.grad(o.sum(), leaves, allow_unused=True) for o in outputs]
            found.append([*outputs, *(s for found in slopes for s in found if s is not None)])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_a_counter_of_operations_counts_the_same():
    given, mask = narrowed(arguments(2, 6, 3, 2)), torch.ones(2, 6, dtype=torch.bool)
    weight, bias = torch.randn(3, 4, requires_grad=True), torch.randn(3, requires_grad=True)
    counts = []
    for kernel in ("torch", "numba"):
        with FlopCounter() as counter:
            conv = causal_conv(given[0], mask, weight, bias, kernel)
            output = selective_scan_last(*newest([conv, *given[1:]]), kernel=kernel)
            torch.autograd.grad(output.sum(), [given[0], weight])
        counts.append(counter.flops)
    assert counts[0] == counts[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_makes_its_own_threads():
    def work(first, last, sums):
        sums[0] += last - first

    rows, zero, threads = 3 * scan_compiled.CHUNK, np.zeros(1, np.float32), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert float(scan_compiled._run(rows, work, zero)[0]) == rows
        child = os.fork()
        if child == 0:
            os._exit(float(scan_compiled._run(rows, work, zero)[0]) != rows)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        torch.set_num_threads(threads)


def test_a_large_batch_has_no_more_than_so_many_sums():
    calls = []
    zero = np.zeros(1, np.float32)
    scan_compiled._run(100_000, lambda first, last, sums: calls.append((first, last)), zero)
    calls.sort()
    assert len(calls) <= scan_compiled.CHUNKS and calls[0][0] == 0 and calls[-1][1] == 100_000
    assert all(one[1] == two[0] for one, two in pairwise(calls))


def test_a_cache_that_cannot_be_written_stops_nothing():
    """numba writes after it has compiled and before it runs; the second call runs what it compiled."""
    asked = []

    def work(first, last, sums):
        asked.append(first)
        if len(asked) == 1:
            raise OSError("No space left on device")

    scan_compiled._run(1, work)
    assert asked == [0, 0]


def test_shapes_that_the_loops_would_read_beyond_are_refused():
    given = [t.detach().float() for t in arguments(3, 7, 5, 4)]
    u, delta, A, B, C, _, _, bias = given
    for place, wrong, name in (
        (1, delta[:, :, :1], "delta"), (2, A[:1], "A"), (3, B[:, :3], "B"), (3, B[:1], "B"), (3, B[..., :2], "B"),
        (4, C[:, :2], "C"), (7, bias[:1], "delta_bias"),
    ):  # fmt: skip
        changed = [*given[:place], wrong, *given[place + 1 :]]
        with pytest.raises(ValueError, match=f"^{name} must be of shape"):
            selective_scan(*changed, kernel="numba")
        if name != "C":
            with pytest.raises(ValueError, match=f"^{name} must be of shape"):
                last_state(*changed[:4], changed[7], kernel="numba")
    for lengths, message in (
        ([8, 1, 1], r"lengths must lie in 0\.\.7"),
        ([-1, 1, 1], "must lie"),
        ([7], "must be of shape"),
    ):
        with pytest.raises(ValueError, match=message):
            last_state(u, delta, A, B, bias, torch.tensor(lengths), kernel="numba")
    mask, weight = torch.ones(3, 7, dtype=torch.bool), torch.randn(5, 4)
    for one, two, three, name in (
        (mask[:1], weight, bias, "mask"),
        (mask, weight[:1], bias, "weight"),
        (mask, weight, bias[:1], "bias"),
    ):
        with pytest.raises(ValueError, match=f"^{name} must be of shape"):
            causal_conv(u, one, two, three, "numba")


def test_growing_states_go_through_pytorch():
    given = [t.detach().float() for t in arguments(2, 6, 3, 2)]
    given[2] = given[2].abs() * 50
    expected = selective_scan(*given, kernel="torch")
    assert not bool(expected.isfinite().all())
    torch.testing.assert_close(selective_scan(*given, kernel="numba"), expected, rtol=0, atol=0, equal_nan=True)


def test_another_default_dtype_changes_nothing():
    layer, sequence = Mamba(12, d_state=4, scan_kernel="numba"), ragged([20, 7], 12, dtype=torch.float)
    before = layer(sequence), layer.newest(sequence)
    torch.set_default_dtype(torch.float64)
    try:
        after = layer(sequence), layer.newest(sequence)
        gradients = torch.autograd.grad(after[0].sum() + after[1].sum(), list(layer.parameters()))
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
    assert all(g.dtype == torch.float32 for g in gradients)


def test_strong_decay_and_large_steps_stay_finite_and_right():
    wide = arguments(length=40)
    strong = [t.detach().clone() for t in wide]
    strong[1] += 6  # Delta about 5: exp(Delta A) underflows over a few steps
    strong[1][0, 3] = 95.0
    strong[1][1, 5] = -95.0
    strong[2] *= 6
    wide = [t.float().double().requires_grad_() for t in strong]
    given, expected = narrowed(wide), scan_loop(*wide)[0]
    for output, goal in (
        (selective_scan(*given, kernel="numba"), expected),
        (selective_scan_last(*newest(given), kernel="numba"), expected[:, -1]),
    ):
        close(output, goal)
        wants = torch.autograd.grad(goal.sum(), wide, allow_unused=True, retain_graph=True)
        for got, want in zip(torch.autograd.grad(output.sum(), given, allow_unused=True), wants, strict=True):
            if got is not None:
                close(got, want)


@pytest.mark.parametrize("argument", range(5))
def test_nan_comes_through(argument):
    """A broken weight or vector is seen in the outputs, as the guards of a training need."""
    given = [t.detach().float() for t in arguments(2, 6, 3, 2)]
    given[argument].view(-1)[0] = torch.nan
    for output in (selective_scan(*given, kernel="numba"), selective_scan_last(*newest(given), kernel="numba")):
        assert bool(output.isnan().any()) or (argument == 4 and output.ndim == 2)  # C of another position is not read


def test_without_a_place_for_its_cache_numba_compiles_in_every_process(monkeypatch):
    asked, njit = [], numba.njit

    def refused(**options):
        asked.append(options.pop("cache", False))
        if asked[-1]:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(**options)

    monkeypatch.setattr(scan_kernels.numba, "njit", refused)
    assert scan_kernels._kernel(lambda x: x + 1)(2) == 3
    assert asked == [True, False]


def test_empty_batches_and_histories():
    for shape in ((0, 11, 5), (3, 0, 5)):
        given = narrowed(arguments(*shape[:2]))
        output = selective_scan(*given, kernel="numba")
        assert output.shape == shape
        assert all(g.shape == t.shape for g, t in zip(torch.autograd.grad(output.sum(), given[:4]), given, strict=False))
