"""Mamba's selective scan: every position's output, or the newest position's alone.

For each channel d and state n, ``h_t = exp(Delta_t A) h_{t-1} + (Delta_t u_t) B_t`` and ``y_t = sum_n C_t h_t + D u_t``,
with ``Delta = softplus(delta + bias)``, then the gate ``y_t * SiLU(z_t)``.

Source: Gu and Dao, Mamba (arXiv 2312.00752), eq. 2-4 and algorithm 2, B discretised by an Euler step as in the release.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _len_torch_dispatch_stack

from model_zoo.errors import ConfigError
from model_zoo.layers.scan_autograd import LastState, Scan

ScanKernel = Literal["auto", "torch", "numba", "cuda"]


def scan_loop(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """The definition, step by step under autograd; arguments as in `selective_scan`.

    Returns:
        Output ``[B, L, channels]`` and last state ``[B, channels, states]``.
    """
    step = F.softplus(delta + delta_bias)
    h = u.new_zeros(u.shape[0], *A.shape)
    outputs = []
    for t in range(u.shape[1]):
        h = torch.exp(step[:, t, :, None] * A) * h + (step[:, t] * u[:, t]).unsqueeze(2) * B[:, t].unsqueeze(1)
        outputs.append((h * C[:, t].unsqueeze(1)).sum(2) + D * u[:, t])
    return torch.stack(outputs, dim=1) * F.silu(z), h


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor,
    *,
    lengths: Tensor | None = None,
    kernel: ScanKernel = "auto",
) -> Tensor:
    """Gated scan outputs at every position, computed in float32 (float64 if ``u`` is).

    Args:
        u: ``[B, L, channels]``; zero at padding.
        delta: ``[B, L, channels]``, before bias and softplus.
        A: ``[channels, states]``, negative.
        B: ``[B, L, states]``.
        C: ``[B, L, states]``.
        D: ``[channels]``.
        z: ``[B, L, channels]``, before SiLU.
        delta_bias: ``[channels]``.
        lengths: ``[B]`` real positions at the right end of each row; None = all. The scan begins at the first real
            position of the rows it scans together; the gradient of ``u`` at padding means nothing.
        kernel: see `scan_function`.

    Returns:
        ``[B, L, channels]`` of ``u``'s dtype.
    """
    dtype = u.dtype
    fused = scan_function(kernel, u)
    u, delta, A, B, C, D, z, delta_bias = map(_wide, (u, delta, A, B, C, D, z, delta_bias))
    if fused is not None:
        by_channel = (t.transpose(1, 2) for t in (u, delta))
        out = fused(*by_channel, A, B.transpose(1, 2), C.transpose(1, 2), D, z.transpose(1, 2), delta_bias, True)
        return out.transpose(1, 2).to(dtype)
    compiled = _compiled(kernel, A, u, delta, B, C, delta_bias)
    if compiled is not None:
        y = compiled.Scan.apply(u, delta, A, B, C, delta_bias, lengths)
    else:
        keep = torch.is_grad_enabled() and any(t.requires_grad for t in (u, delta, A, B, C, delta_bias))
        y = Scan.apply(u, delta, A, B, C, delta_bias, lengths, keep)
    return ((y + D * u) * F.silu(z)).to(dtype)


def selective_scan_last(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor,
    *,
    lengths: Tensor | None = None,
    kernel: ScanKernel = "auto",
) -> Tensor:
    """The newest position of `selective_scan`, ``[B, channels]``, for L >= 1; memory linear in L, no states kept.

    Args:
        C: ``[B, states]`` of the newest position.
        z: ``[B, channels]`` of the newest position; the other arguments as in `selective_scan`.
    """
    dtype = u.dtype
    fused = scan_function(kernel, u)
    u, delta, A, B, C, D, z, delta_bias = map(_wide, (u, delta, A, B, C, D, z, delta_bias))
    if fused is not None:  # the kernel gives its last state no gradient, its outputs have one
        every_C = C.unsqueeze(2).expand(-1, -1, u.shape[1])
        by_channel = (t.transpose(1, 2) for t in (u, delta))
        y = fused(*by_channel, A, B.transpose(1, 2), every_C, None, None, delta_bias, True)[:, :, -1]
    else:
        y = (last_state(u, delta, A, B, delta_bias, lengths, kernel) * C.unsqueeze(1)).sum(2)
    return ((y + D * u[:, -1]) * F.silu(z)).to(dtype)


def last_state(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    delta_bias: Tensor,
    lengths: Tensor | None = None,
    kernel: ScanKernel = "auto",
) -> Tensor:
    """``h_L``, ``[B, channels, states]``; arguments as in `selective_scan`, all of one dtype."""
    compiled = _compiled(kernel, A, u, delta, B, delta_bias)
    function = LastState if compiled is None else compiled.LastState
    return function.apply(u, delta, A, B, delta_bias, lengths).transpose(1, 2)


def scan_function(kernel: ScanKernel, inputs: Tensor | None = None) -> Callable[..., Tensor] | None:
    """mamba_ssm's ``selective_scan_fn`` if ``kernel`` asks for it, None for the form in PyTorch.

    Args:
        kernel: ``auto`` uses the CUDA kernel where the package has one and the inputs can go through it, ``torch`` and
            ``numba`` never, ``cuda`` always.
        inputs: what is to be scanned; None checks the choice before there is a batch.

    Raises:
        ConfigError: ``cuda`` and the package, or a GPU, or its precision is missing, or kernels must be deterministic;
            ``numba`` without that package.
        ValueError: no such kernel.
    """
    if kernel not in ("auto", "torch", "numba", "cuda"):
        raise ValueError(f"scan_kernel must be auto, torch, numba or cuda, not {kernel!r}")
    if kernel == "numba" and inputs is None:
        compiled_functions(kernel)
    if kernel in ("torch", "numba"):
        return None
    if torch.are_deterministic_algorithms_enabled():  # torch cannot see that the package's backward adds atomically
        if kernel == "cuda":
            raise ConfigError("scan_kernel: cuda does not repeat its sums, as --deterministic asks; set scan_kernel: torch")
        return None
    fused, fault = _mamba_ssm()
    fix = "or set scan_kernel: auto"
    if kernel == "cuda" and fused is None:
        raise ConfigError(
            f"scan_kernel: cuda needs mamba-ssm with its CUDA kernels ({fault}); "
            f"install the extra where there is a GPU (pip install 'longctr-mos[mamba]'), {fix}"
        )
    if inputs is None:
        return None
    if not inputs.is_cuda or inputs.dtype == torch.float64:
        if kernel == "cuda":
            where = f"{inputs.dtype} on {inputs.device}"
            raise ConfigError(f"scan_kernel: cuda scans float32 or less on a GPU, not {where}; set gpu: 0, {fix}")
        fused, fault = None, f"{inputs.dtype} on {inputs.device}"
    if inputs.is_cuda:  # what scans elsewhere, `compiled_functions` knows
        _log_kernel("mamba_ssm's CUDA kernel" if fused is not None else f"PyTorch ({fault})")
    return fused


def compiled_functions(kernel: ScanKernel, *inputs: Tensor) -> Any | None:
    """The module `model_zoo.layers.scan_compiled` if ``kernel`` asks for it, None for the form in PyTorch.

    Args:
        kernel: ``auto`` uses numba's loops where numba is installed and the inputs can go through them, ``numba`` always,
            the others never. Under a dispatch mode, such as a counter of operations, it is None.
        inputs: what is to be scanned; none checks the choice before there is a batch.

    Raises:
        ConfigError: ``numba`` and the package is missing, or the inputs are not float32 on a CPU.
    """
    if kernel not in ("auto", "numba"):
        return None
    other = next((t for t in inputs if t.device.type != "cpu" or t.dtype != torch.float32), None)
    where = "" if other is None else f"{other.dtype} on {other.device}"
    functions, fault = _numba() if other is None else (None, where)
    if kernel == "numba" and functions is None:
        if other is not None:
            raise ConfigError(f"scan_kernel: numba scans float32 on a CPU, not {where}; set scan_kernel: auto")
        raise ConfigError(
            f"scan_kernel: numba needs numba ({fault}); "
            "install the extra (pip install 'longctr-mos[numba]'), or set scan_kernel: auto"
        )
    if _len_torch_dispatch_stack():  # something counts or traces torch's operators: there must be some
        return None
    if inputs and not inputs[0].is_cuda:
        _log_kernel("loops compiled by numba" if functions is not None else f"PyTorch ({fault})")
    return functions


def _compiled(kernel: ScanKernel, A: Tensor, *inputs: Tensor) -> Any | None:
    """`compiled_functions` for a scan that decays, whose exponents alone numba's loops can take."""
    functions = compiled_functions(kernel, A, *inputs)
    return None if functions is not None and bool((A > 0).any()) else functions


@cache
def _numba() -> tuple[Any | None, str]:
    """The compiled functions, or None and why not."""
    try:
        from model_zoo.layers import scan_compiled
    except Exception as error:  # numba lags behind numpy and Python, and auto can do without it
        return None, f"{type(error).__name__}: {error}"
    return scan_compiled, ""


@cache
def _mamba_ssm() -> tuple[Callable[..., Tensor] | None, str]:
    """The package's function, or None and why not."""
    try:
        from mamba_ssm.ops import selective_scan_interface as interface
    except Exception as error:  # a build for another torch or CUDA fails in many ways, and auto can do without it
        return None, f"{type(error).__name__}: {error}"
    if getattr(interface, "selective_scan_cuda", None) is None:
        return None, "this build of mamba_ssm has no selective_scan_cuda"
    return interface.selective_scan_fn, ""


@cache
def _log_kernel(name: str) -> None:
    """Say once which form scans."""
    logging.getLogger("model_zoo").info("selective scan: %s", name)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
