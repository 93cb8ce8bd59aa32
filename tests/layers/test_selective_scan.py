"""The selective scan against its definition under autograd: outputs, last state, every gradient; the choice of kernel."""

import logging
import math
import sys
import types

import pytest
import torch
from oracles import gradients
from torch import Tensor

from model_zoo.errors import ConfigError
from model_zoo.layers import scan_autograd, selective_scan
from model_zoo.layers.selective_scan import compiled_functions, last_state, scan_function, scan_loop, selective_scan_last

# float64 sums of a few dozen terms of order one, taken in another order
EXACT = {"rtol": 1e-11, "atol": 1e-11}
# float32: rounding 6e-8, over sums of up to 200 steps and gradients of order ten
SINGLE = {"rtol": 1e-4, "atol": 2e-5}


def arguments(batch=3, length=11, channels=5, states=4, dtype=torch.double, seed=0) -> list[Tensor]:
    """u, delta, A, B, C, D, z, delta_bias, all leaves."""
    torch.manual_seed(seed)
    drawn = [
        torch.randn(batch, length, channels), 0.7 * torch.randn(batch, length, channels),
        -0.2 - 2 * torch.rand(channels, states), torch.randn(batch, length, states),
        torch.randn(batch, length, states), torch.randn(channels), torch.randn(batch, length, channels),
        torch.randn(channels) - 1,
    ]  # fmt: skip
    return [t.to(dtype).requires_grad_() for t in drawn]


def newest(given: list[Tensor]) -> list[Tensor]:
    """The arguments of `selective_scan_last`: C and z of the last position."""
    u, delta, A, B, C, D, z, bias = given
    return [u, delta, A, B, C[:, -1], D, z[:, -1], bias]


def golden_arguments() -> list[Tensor]:
    """Facts 8.4 (a), its ``[b, d, L]`` turned to ``[b, L, d]``."""

    def wave(function, scale, shift, *shape):
        return function(scale * torch.arange(math.prod(shape), dtype=torch.double) + shift).view(shape)

    u, delta = wave(torch.sin, 0.7, 0.1, 1, 2, 5), 0.3 * wave(torch.cos, 0.5, 0.0, 1, 2, 5)
    B, C = wave(torch.cos, 0.3, 0.0, 1, 3, 5), wave(torch.sin, 0.2, 0.5, 1, 3, 5)
    z = 0.4 * torch.arange(10, dtype=torch.double).view(1, 2, 5) - 1.5
    A = -torch.arange(1.0, 4.0, dtype=torch.double).repeat(2, 1)
    D, bias = torch.tensor([1, 0.5], dtype=torch.double), torch.tensor([0.1, -0.2], dtype=torch.double)
    return [*(t.transpose(1, 2) for t in (u, delta)), A, B.transpose(1, 2), C.transpose(1, 2), D, z.transpose(1, 2), bias]


def test_golden_scan():
    given = golden_arguments()
    outputs = torch.tensor([
        [-0.02625828, -0.19764746, -0.26522840, -0.13483199, 0.02685995],
        [-0.06595370, -0.33009548, -0.67942282, -0.77731478, -0.42250685],
    ], dtype=torch.double).T.unsqueeze(0)  # fmt: skip
    states = torch.tensor([
        [0.48128546, -0.28794151, -0.14809907],
        [-0.31970479, 0.03739999, 0.02498330],
    ], dtype=torch.double).unsqueeze(0)  # fmt: skip
    printed = {"rtol": 0, "atol": 1e-8}  # eight decimals
    loop, state = scan_loop(*given)
    torch.testing.assert_close(loop, outputs, **printed)
    torch.testing.assert_close(state, states, **printed)
    torch.testing.assert_close(selective_scan.selective_scan(*given), outputs, **printed)
    torch.testing.assert_close(selective_scan_last(*newest(given)), outputs[:, -1], **printed)
    u, delta, A, B, _, _, _, bias = given
    torch.testing.assert_close(last_state(u, delta, A, B, bias), states, **printed)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 9, 11, 30])
@pytest.mark.parametrize(("batch", "rows"), [(3, 1), (3, 2), (3, 8), (8, 7), (8, 8)])
def test_outputs_and_every_gradient_equal_the_loop(monkeypatch, length, batch, rows):
    """At 5 channels, 7 and 8 rows are laid out with the batch innermost, the one row left of 8 is not."""
    monkeypatch.setitem(scan_autograd.SLICE_FLOATS, "cpu", rows * 5 * 4)
    given = arguments(batch, length)
    turned = [scan_autograd._turned(part, given[0]) for part in scan_autograd._parts(given[0], 4, None)]
    assert turned == {3: [False] * -(-3 // rows), 8: [True] if rows == 8 else [True, False]}[batch]
    expected, state = scan_loop(*given)
    output = selective_scan.selective_scan(*given)
    torch.testing.assert_close(output, expected, **EXACT)
    for got, want in zip(gradients(output, given), gradients(expected, given), strict=True):
        torch.testing.assert_close(got, want, **EXACT)
    last = selective_scan_last(*newest(given))
    torch.testing.assert_close(last, expected[:, -1], **EXACT)
    for got, want in zip(gradients(last, given), gradients(expected[:, -1], given), strict=True):
        torch.testing.assert_close(got, want, **EXACT)
    u, delta, A, B, _, _, _, bias = given
    torch.testing.assert_close(last_state(u, delta, A, B, bias), state, **EXACT)


def test_numerical_gradients_of_both_functions():
    given = arguments(2, 5, 2, 3)
    assert torch.autograd.gradcheck(selective_scan.selective_scan, given)
    leaves = [t.detach().requires_grad_() for t in newest(given)]
    assert torch.autograd.gradcheck(selective_scan_last, leaves)


@pytest.mark.parametrize("kernel", ["torch", "numba"])
def test_float32_stays_close_to_the_float64_loop_over_200_steps(kernel):
    if kernel == "numba":
        pytest.importorskip("numba", reason="needs numba: pip install 'longctr-mos[numba]'")
    wide = arguments(4, 200, 6, 8)
    narrow = [t.detach().float().requires_grad_() for t in wide]
    expected, _ = scan_loop(*wide)
    for output, goal in (
        (selective_scan.selective_scan(*narrow, kernel=kernel), expected),
        (selective_scan_last(*newest(narrow), kernel=kernel), expected[:, -1]),
    ):
        torch.testing.assert_close(output.double(), goal, **SINGLE)
        weight = torch.randn(goal.shape, dtype=torch.double)
        wants = torch.autograd.grad((goal * weight).sum(), wide, allow_unused=True, retain_graph=True)
        gots = torch.autograd.grad((output * weight.float()).sum(), narrow, allow_unused=True)
        for got, want in zip(gots, wants, strict=True):
            assert bool(got.isfinite().all())
            scale = want.abs().max().item()
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=2e-5 * max(scale, 1.0))


def test_strong_decay_forgets_without_nan_or_wrong_gradients():
    given = arguments(length=40)
    strong = [t.detach().clone() for t in given]
    strong[1] += 6  # Delta about 5: exp(Delta A) reaches 1e-5 in a step, the first weights underflow even in float64
    strong[2] *= 6
    leaves = [t.requires_grad_() for t in strong]
    expected = scan_loop(*leaves)[0]
    for output, goal in (
        (selective_scan.selective_scan(*leaves), expected),
        (selective_scan_last(*newest(leaves)), expected[:, -1]),
    ):
        torch.testing.assert_close(output, goal, **EXACT)
        for got, want in zip(gradients(output, leaves), gradients(goal, leaves), strict=True):
            torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("rows", [1, 2, 6, 8])
@pytest.mark.parametrize("lengths", [[11, 4, 0, 1], [11, 7, 5, 2, 0, 1, 4], [9, 7, 5, 2, 0, 1, 4, 4]])
def test_leading_padding_is_skipped_and_neutral(monkeypatch, rows, lengths):
    monkeypatch.setitem(scan_autograd.SLICE_FLOATS, "cpu", rows * 5 * 4)
    lengths = torch.tensor(lengths)
    given = arguments(len(lengths))
    real = torch.arange(11) >= 11 - lengths.unsqueeze(1)
    leaf, *rest = given
    u = leaf * real.unsqueeze(2)
    expected, _ = scan_loop(u, *rest)
    output = selective_scan.selective_scan(u, *rest, lengths=lengths)
    torch.testing.assert_close(output, expected, **EXACT)
    last = selective_scan_last(*newest([u, *rest]), lengths=lengths)
    torch.testing.assert_close(last, expected[:, -1], **EXACT)
    for got, goal in ((output, expected), (last, expected[:, -1])):
        for one, other in zip(gradients(got, given), gradients(goal, given), strict=True):
            torch.testing.assert_close(one, other, **EXACT)


def test_batches_without_rows_or_columns():
    assert selective_scan.selective_scan(*arguments(0)).shape == (0, 11, 5)
    assert selective_scan.selective_scan(*arguments(length=0)).shape == (3, 0, 5)
    assert selective_scan_last(*newest(arguments(0))).shape == (0, 5)


def test_nothing_of_batch_times_length_times_state_is_kept_for_backward():
    given = arguments(8, 100, 6, 32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        selective_scan.selective_scan(*given)
        assert sum(kept) < 8 * (100 * (10 * 6 + 2 * 32) + 10 * 6 * 32)  # rows by position, and 10 states of 100
        kept.clear()
        selective_scan_last(*newest(given))
        assert sum(kept) < 8 * (100 * (3 * 6 + 32) + 4 * 6 * 32)


def test_scan_runs_in_float32_under_autocast():
    given = arguments(dtype=torch.float)
    expected = selective_scan.selective_scan(*given)
    goal = gradients(expected, given)
    last = selective_scan_last(*newest(given))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = selective_scan.selective_scan(*given)
        assert torch.equal(output, expected)
        assert all(torch.equal(a, b) for a, b in zip(gradients(output, given), goal, strict=True))
        assert torch.equal(selective_scan_last(*newest(given)), last)
    half = [t.detach().bfloat16() for t in given]
    assert selective_scan.selective_scan(*half).dtype == torch.bfloat16


def mamba_ssm_function(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """What the package's function computes, in its layout ``[B, channels, L]``."""
    assert delta_softplus and u.shape == delta.shape and B.shape == C.shape == (len(u), A.shape[1], u.shape[2])
    open_gate = torch.full_like(u, 50.0)  # SiLU(50) = 50
    out, _ = scan_loop(
        *(t.transpose(1, 2) for t in (u, delta)), A, B.transpose(1, 2), C.transpose(1, 2),
        torch.zeros_like(A[:, 0]) if D is None else D, (open_gate if z is None else z).transpose(1, 2), delta_bias,
    )  # fmt: skip
    return (out / 50 if z is None else out).transpose(1, 2)


def test_the_packages_function_gets_its_own_layout(monkeypatch):
    given = arguments()
    expected = [selective_scan.selective_scan(*given), selective_scan_last(*newest(given))]
    monkeypatch.setattr(selective_scan, "scan_function", lambda kernel, inputs: mamba_ssm_function)
    outputs = [selective_scan.selective_scan(*given), selective_scan_last(*newest(given))]
    for output, goal in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, goal, **EXACT)
        for got, want in zip(gradients(output, given), gradients(goal, given), strict=True):
            torch.testing.assert_close(got, want, **EXACT)


def test_kernel_choice(monkeypatch, caplog):
    inputs = torch.zeros(1)
    monkeypatch.setattr(selective_scan, "_mamba_ssm", lambda: (None, "ImportError: no mamba_ssm"))
    selective_scan._log_kernel.cache_clear()
    on_gpu = types.SimpleNamespace(is_cuda=True, dtype=torch.float, device="cuda:0")  # what the choice reads of a tensor
    with caplog.at_level(logging.INFO, "model_zoo"):
        assert [scan_function("auto", on_gpu) for _ in range(3)] == [None] * 3
        assert scan_function("auto", inputs) is None
    assert [r.name for r in caplog.records] == ["model_zoo"]
    assert "PyTorch (ImportError: no mamba_ssm)" in caplog.text
    assert scan_function("torch", inputs) is None
    with pytest.raises(ConfigError, match=r"scan_kernel: cuda needs mamba-ssm .*no mamba_ssm.*\[mamba\].*kernel: auto"):
        scan_function("cuda")
    monkeypatch.setattr(selective_scan, "_mamba_ssm", lambda: (mamba_ssm_function, ""))
    assert scan_function("auto", inputs) is None
    assert scan_function("cuda") is None
    with pytest.raises(ConfigError, match=r"scan_kernel: cuda scans .*not torch.float32 on cpu; set gpu: 0"):
        scan_function("cuda", inputs)
    for dtype in (torch.float, torch.bfloat16, torch.double):
        on_gpu = types.SimpleNamespace(is_cuda=True, dtype=dtype, device="cuda:0")
        for kernel in ("auto", "torch", "numba"):
            goes = kernel == "auto" and dtype != torch.double
            assert scan_function(kernel, on_gpu) is (mamba_ssm_function if goes else None)
    with pytest.raises(ValueError, match="scan_kernel must be auto, torch, numba or cuda, not 'fast'"):
        scan_function("fast")


def test_choice_of_numbas_loops(monkeypatch, caplog):
    narrow, wide = torch.zeros(1), torch.zeros(1, dtype=torch.double)
    monkeypatch.setattr(selective_scan, "_numba", lambda: ("loops", ""))
    selective_scan._log_kernel.cache_clear()
    with caplog.at_level(logging.INFO, "model_zoo"):
        assert [compiled_functions("auto", narrow, narrow) for _ in range(2)] == ["loops"] * 2
    assert [r.getMessage() for r in caplog.records] == ["selective scan: loops compiled by numba"]
    assert compiled_functions("numba", narrow) == "loops"
    assert compiled_functions("torch", narrow) is compiled_functions("cuda", narrow) is None
    assert compiled_functions("auto", narrow, wide) is None
    with pytest.raises(ConfigError, match=r"numba scans float32 on a CPU, not torch.float64 on cpu; set .*: auto"):
        compiled_functions("numba", narrow, wide)
    monkeypatch.setattr(selective_scan, "_numba", lambda: (None, "ImportError: no numba"))
    assert compiled_functions("auto", narrow) is None
    for check in (compiled_functions, scan_function):
        with pytest.raises(ConfigError, match=r"numba needs numba \(ImportError: no numba\).*\[numba\].*kernel: auto"):
            check("numba")


def test_a_package_without_its_kernel_is_no_kernel(monkeypatch):
    selective_scan._mamba_ssm.cache_clear()
    interface = types.SimpleNamespace(selective_scan_cuda=None, selective_scan_fn=mamba_ssm_function)
    package, ops = types.ModuleType("mamba_ssm"), types.ModuleType("mamba_ssm.ops")
    ops.selective_scan_interface = interface
    monkeypatch.setitem(sys.modules, "mamba_ssm", package)
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops", ops)
    try:
        assert selective_scan._mamba_ssm() == (None, "this build of mamba_ssm has no selective_scan_cuda")
        selective_scan._mamba_ssm.cache_clear()
        interface.selective_scan_cuda = object()
        assert selective_scan._mamba_ssm() == (mamba_ssm_function, "")
    finally:
        selective_scan._mamba_ssm.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_both_functions_on_a_gpu():
    wide = arguments(6, 50, 16, 8)
    narrow = [t.detach().float().cuda().requires_grad_() for t in wide]
    expected = scan_loop(*wide)[0]
    for output, goal in (
        (selective_scan.selective_scan(*narrow, kernel="torch"), expected),
        (selective_scan_last(*newest(narrow), kernel="torch"), expected[:, -1]),
    ):
        torch.testing.assert_close(output.double().cpu(), goal, **SINGLE)
        output.sum().backward()
        wants = torch.autograd.grad(goal.sum(), wide, allow_unused=True, retain_graph=True)
        for leaf, want in zip(narrow, wants, strict=True):
            torch.testing.assert_close(leaf.grad.double().cpu(), want, rtol=1e-3, atol=1e-4 * want.abs().max().item())
            leaf.grad = None


@pytest.mark.gpu
@pytest.mark.mamba
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_mamba_ssms_kernel_agrees():
    pytest.importorskip("mamba_ssm", reason="needs mamba-ssm: pip install 'longctr-mos[mamba]'")
    # tolerances of the package's own test for float32: outputs 6e-4 / 2e-3, gradients up to ten times that
    given = [t.detach().float().cuda().requires_grad_() for t in arguments(2, 128, 16, 8)]
    for function, inputs in ((selective_scan.selective_scan, given), (selective_scan_last, newest(given))):
        ours, theirs = function(*inputs, kernel="torch"), function(*inputs, kernel="cuda")
        torch.testing.assert_close(theirs, ours, rtol=6e-4, atol=2e-3)
        weight = torch.randn_like(ours)
        found = [torch.autograd.grad((out * weight).sum(), given, allow_unused=True) for out in (theirs, ours)]
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=3e-3, atol=2e-2)


def test_reverse_running_sum_of_steps_keeps_late_weights_exact():
    """With a huge first step, S_L - S_j as a difference would lose the small later steps."""
    given = [t.detach() for t in arguments(1, 6, 2, 3, dtype=torch.float)]
    given[1][:, 0] = 1e8
    leaves = [t.requires_grad_() for t in given]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    got = torch.autograd.grad(selective_scan_last(*newest(leaves)).sum(), [leaves[0]])[0]
    want = torch.autograd.grad(scan_loop(*wide)[0][:, -1].sum(), [wide[0]])[0]
    torch.testing.assert_close(got[:, 1:].double(), want[:, 1:], **SINGLE)
