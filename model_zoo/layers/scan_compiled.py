"""Autograd functions over `model_zoo.layers.scan_kernels`; importing this module needs numba (the extra ``numba``).

Rows are worked on in chunks whose size depends on the batch alone, on as many threads as torch has, and the chunks' sums
are added in the order of the rows: neither outputs nor gradients depend on the number of threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from model_zoo.layers import scan_kernels

#: batch rows of one call, and calls at most, each with its own sums
CHUNK, CHUNKS = 64, 256

Array = NDArray[np.float32]


class LastState(torch.autograd.Function):
    """`model_zoo.layers.scan_autograd.LastState`, compiled; float32 on a CPU."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, bias: Tensor, lengths: Tensor | None) -> Tensor:
        _check(u, delta, A, bias, B=B)
        given = _arrays(u, delta, A.T, B, bias)
        begin = _begin(u, lengths)
        states = u.new_empty(len(u), A.shape[1], A.shape[0])
        _run(len(u), lambda first, last, _: scan_kernels.last_state(*given, begin, first, last, states.numpy()))
        ctx.save_for_backward(u, delta, A, B, bias, lengths)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, A, B, bias, lengths = ctx.saved_tensors
        given, begin, (dstates,) = _arrays(u, delta, A.T, B, bias), _begin(u, lengths), _arrays(grad)
        found = [t.new_empty(t.shape) for t in (u, delta, B)]
        into = [t.numpy() for t in found]
        dA, dbias = _run(
            len(u),
            lambda first, last, sums: scan_kernels.last_state_gradients(
                *given, begin, first, last, dstates, *into, *sums
            ),
            given[2], given[4],
        )  # fmt: skip
        du, ddelta, dB = found
        return du, ddelta, dA.T, dB, dbias, None


class Scan(torch.autograd.Function):
    """`model_zoo.layers.scan_autograd.Scan`, compiled; float32 on a CPU."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, bias: Tensor, lengths: Tensor | None
    ) -> Tensor:
        _check(u, delta, A, bias, B=B, C=C)
        given = _arrays(u, delta, A.T, B, C, bias)
        begin = _begin(u, lengths)
        y = u.new_empty(u.shape)
        _run(len(u), lambda first, last, _: scan_kernels.scan(*given, begin, first, last, y.numpy()))
        ctx.save_for_backward(u, delta, A, B, C, bias, lengths)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, A, B, C, bias, lengths = ctx.saved_tensors
        given, begin, (dy,) = _arrays(u, delta, A.T, B, C, bias), _begin(u, lengths), _arrays(grad)
        found = [t.new_empty(t.shape) for t in (u, delta, B, C)]
        into = [t.numpy() for t in found]
        dA, dbias = _run(
            len(u),
            lambda first, last, sums: scan_kernels.scan_gradients(*given, begin, first, last, dy, *into, *sums),
            given[2], given[5],
        )  # fmt: skip
        du, ddelta, dB, dC = found
        return du, ddelta, dA.T, dB, dC, dbias, None


class CausalConv(torch.autograd.Function):
    """The convolution of `model_zoo.layers.mamba.causal_conv`, compiled; float32 on a CPU."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, mask: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        _expect("mask", mask, u.shape[:2])
        _expect("weight", weight, (u.shape[2], weight.shape[1]))
        _expect("bias", bias, u.shape[2:])
        given, real = _arrays(u, weight.T, bias), mask.contiguous().numpy()
        out = u.new_empty(u.shape)
        _run(
            len(u),
            lambda first, last, _: scan_kernels.convolve(given[0], real, *given[1:], first, last, out.numpy()),
        )  # fmt: skip
        ctx.save_for_backward(u, mask, weight, bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        u, mask, weight, bias = ctx.saved_tensors
        given, real, (dout,) = _arrays(u, weight.T, bias), mask.contiguous().numpy(), _arrays(grad)
        du = u.new_empty(u.shape)
        dweight, dbias = _run(
            len(u),
            lambda first, last, sums: scan_kernels.convolve_gradients(
                given[0], real, *given[1:], first, last, dout, du.numpy(), *sums
            ),
            *given[1:],
        )  # fmt: skip
        return du, None, dweight.T, dbias


def _check(u: Tensor, delta: Tensor, A: Tensor, bias: Tensor, **by_state: Tensor) -> None:
    """The loops look at no bound: shapes must be those of `model_zoo.layers.selective_scan`, nothing is broadcast.

    Raises:
        ValueError: one is not.
    """
    batch, length, channels = u.shape
    _expect("delta", delta, u.shape)
    _expect("A", A, (channels, A.shape[1]))
    _expect("delta_bias", bias, (channels,))
    for name, given in by_state.items():
        _expect(name, given, (batch, length, A.shape[1]))


def _expect(name: str, given: Tensor, shape: tuple[int, ...]) -> None:
    if given.shape != shape:
        raise ValueError(f"{name} must be of shape {tuple(shape)}, not {tuple(given.shape)}")


def _arrays(*tensors: Tensor) -> list[Array]:
    return [t.detach().resolve_neg().contiguous().numpy() for t in tensors]


def _begin(u: Tensor, lengths: Tensor | None) -> NDArray[np.int64]:
    """Each row's first real position.

    Raises:
        ValueError: a length is none of a row of u.
    """
    if lengths is None:
        return np.zeros(len(u), np.int64)
    _expect("lengths", lengths, u.shape[:1])
    begin: NDArray[np.int64] = u.shape[1] - lengths.numpy()
    if len(begin) and not 0 <= begin.min() <= begin.max() <= u.shape[1]:
        raise ValueError(f"lengths must lie in 0..{u.shape[1]}")
    return begin


def _run(rows: int, work: Callable[[int, int, list[Array]], None], *summed: Array) -> list[Tensor]:
    """``work(first, last, sums)`` over chunks of the rows; the sums, zeros like ``summed`` at first, over all chunks."""
    size = max(CHUNK, -(-rows // CHUNKS))
    starts = range(0, rows, size)
    sums = [np.zeros((len(starts), *array.shape), np.float32) for array in summed]

    def one(number: int) -> None:
        given = starts[number], min(starts[number] + size, rows), [total[number] for total in sums]
        try:
            work(*given)
        except OSError:  # numba compiled the loop but could not write it to its cache: before it ran
            work(*given)

    threads = torch.get_num_threads()
    if threads == 1 or len(starts) < 2:
        for number in range(len(starts)):
            one(number)
    else:
        list(_pool(threads).map(one, range(len(starts))))
    return [torch.from_numpy(total.sum(0)) for total in sums]


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="scan")


if hasattr(os, "register_at_fork"):  # a child has the pool, but none of its threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
