"""The selective scan and its convolution as loops that numba compiles for a CPU: one history at a time, channels innermost.

A history's working set stays in the first levels of cache, nothing is transposed and nothing kept for backward. The
formulae are those of `model_zoo.layers.scan_autograd`, in PyTorch. Each function works on the batch rows ``first`` to
``last`` and looks at no bound. Arrays are C-contiguous float32: ``u``, ``delta`` and their gradients ``[b, L, channels]``,
``A`` ``[states, channels]``, ``B`` and ``C`` ``[b, L, states]``; ``begin [b]`` int64 is each row's first real position.
"""

# what numba compiles has no annotations
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,call-arg,var-annotated,attr-defined"

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

if numba.config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT is set")

#: Sums over channels may be taken in any order, as vector units need; NaN and infinity keep their meaning.
FAST = {"reassoc", "contract", "nsz", "arcp"}
#: numpy's division has no branch for a zero, with which a loop would not use vector units
OPTIONS: dict[str, Any] = {"fastmath": FAST, "error_model": "numpy"}
#: floats of one channel block's states over a whole history, if 32 channels have no more: about a second level of cache
BLOCK_FLOATS = 2**18
#: exponents below which a weight is held: the square root of the smallest normal number, as in `LastState`
LOWEST = np.float32(np.log(np.finfo(np.float32).tiny) / 2)
_LOG2E, _LN2_HIGH, _LN2_LOW = np.float32(1.4426950408889634), np.float32(0.693359375), np.float32(-2.12194440e-4)
_LEAST = np.float32(-87.0)


def _kernel(function: Any) -> Any:
    """Compiled at its first call, outside Python's lock, and kept on disk for later processes if numba finds a place."""
    options = {"nogil": True, **OPTIONS}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # neither this folder nor the user's cache can be written
        return numba.njit(**options)(function)


@intrinsic
def _power_of_two(context: Any, exponent: Any) -> Any:
    """``2 ** exponent`` of an int32 in -126..127, by its bits: a form that vector units take, which ``ldexp`` is not."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        i32 = ir.IntType(32)
        biased = builder.add(arguments[0], ir.Constant(i32, 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(i32, 23)), ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def _truncated(context: Any, value: Any) -> Any:
    """A float32 as int32, towards zero."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fptosi(arguments[0], ir.IntType(32))

    return types.int32(types.float32), generate


@numba.njit(inline="always", **OPTIONS)
def _exp(x):
    """exp of ``x <= 0``, relative error below 2e-7; zero below -87, where products would be denormal and many times slower.

    The polynomial is that of Cephes' ``expf``.
    """
    gone = x < _LEAST
    x = _LEAST if gone else x
    number = _truncated(x * _LOG2E - np.float32(0.5))
    n = np.float32(number)
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW  # |r| <= ln 2 / 2
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(0.5)
    power = (p * r * r + r + np.float32(1)) * _power_of_two(number)
    return np.float32(0) if gone else power


@numba.njit(inline="always", **OPTIONS)
def _softplus(x):
    """``log(1 + exp(x))`` and its derivative, the sigmoid; relative errors below 4e-7 above -87, zeros below."""
    e = _exp(-abs(x))
    s = e / (np.float32(2) + e)  # log1p(e) = 2 atanh(s), s <= 1/3
    q = s * s
    p = np.float32(1 / 15)
    p = p * q + np.float32(1 / 13)
    p = p * q + np.float32(1 / 11)
    p = p * q + np.float32(1 / 9)
    p = p * q + np.float32(1 / 7)
    p = p * q + np.float32(1 / 5)
    p = p * q + np.float32(1 / 3)
    p = p * q + np.float32(1)
    inverse = np.float32(1) / (np.float32(1) + e)
    positive = x >= 0
    return max(x, np.float32(0)) + np.float32(2) * s * p, inverse if positive else e * inverse


@numba.njit(inline="always", **OPTIONS)
def _sigmoid(x):
    """The second of `_softplus` without the first."""
    e = _exp(-abs(x))
    inverse = np.float32(1) / (np.float32(1) + e)
    return inverse if x >= 0 else e * inverse


@_kernel
def last_state(u, delta, A, B, bias, begin, first, last, h):
    """``h [b, states, channels]``, each row's state after its newest position."""
    length, channels = u.shape[1], u.shape[2]
    step, x = np.empty(channels, np.float32), np.empty(channels, np.float32)
    for row in range(first, last):
        state = h[row]
        state[:] = 0
        for t in range(begin[row], length):
            for c in range(channels):
                step[c], _ = _softplus(delta[row, t, c] + bias[c])
                x[c] = step[c] * u[row, t, c]
            for n in range(len(A)):
                b = B[row, t, n]
                for c in range(channels):
                    state[n, c] = _exp(step[c] * A[n, c]) * state[n, c] + b * x[c]


@_kernel
def last_state_gradients(u, delta, A, B, bias, begin, first, last, grad, du, ddelta, dB, dA, dbias):
    """Gradients from that of the state, ``grad [b, states, channels]``; those of A and the bias are added to."""
    length, channels, states = u.shape[1], u.shape[2], len(A)
    step, slope = np.empty((length, channels), np.float32), np.empty((length, channels), np.float32)
    dx, drest = np.empty((length, channels), np.float32), np.empty((length, channels), np.float32)
    rest, x, scaled = np.empty(channels, np.float32), np.empty(channels, np.float32), np.empty(channels, np.float32)
    weight, dstep = np.empty(channels, np.float32), np.empty(channels, np.float32)
    for row in range(first, last):
        du[row, : begin[row]] = 0
        ddelta[row, : begin[row]] = 0
        dB[row, : begin[row]] = 0
        rest[:] = 0
        for t in range(length - 1, begin[row] - 1, -1):
            for c in range(channels):
                step[t, c], slope[t, c] = _softplus(delta[row, t, c] + bias[c])
                x[c] = step[t, c] * u[row, t, c]
                scaled[c] = x[c] * rest[c]
                dx[t, c] = 0
                drest[t, c] = 0
            for n in range(states):
                b, total = B[row, t, n], np.float32(0)
                for c in range(channels):
                    exponent = rest[c] * A[n, c]
                    w = _exp(LOWEST if exponent < LOWEST else exponent) * grad[row, n, c]
                    total += w * x[c]
                    weight[c] = w * b
                for c in range(channels):
                    dx[t, c] += weight[c]
                    dA[n, c] += weight[c] * scaled[c]
                    drest[t, c] += weight[c] * A[n, c]
                dB[row, t, n] = total
            for c in range(channels):
                drest[t, c] *= x[c]
                rest[c] += step[t, c]
        dstep[:] = 0
        for t in range(begin[row], length):
            for c in range(channels):
                slant = (dstep[c] + dx[t, c] * u[row, t, c]) * slope[t, c]
                ddelta[row, t, c] = slant
                dbias[c] += slant
                du[row, t, c] = dx[t, c] * step[t, c]
                dstep[c] += drest[t, c]  # a step is part of the rest of the positions before it


@_kernel
def scan(u, delta, A, B, C, bias, begin, first, last, y):
    """``y [b, L, channels]``, the output at every position without D and gate; zeros at padding."""
    length, channels, states = u.shape[1], u.shape[2], len(A)
    state = np.empty((states, channels), np.float32)
    step, x = np.empty(channels, np.float32), np.empty(channels, np.float32)
    for row in range(first, last):
        state[:] = 0
        y[row] = 0
        for t in range(begin[row], length):
            for c in range(channels):
                step[c], _ = _softplus(delta[row, t, c] + bias[c])
                x[c] = step[c] * u[row, t, c]
            for n in range(states):
                b, read = B[row, t, n], C[row, t, n]
                for c in range(channels):
                    state[n, c] = _exp(step[c] * A[n, c]) * state[n, c] + b * x[c]
                    y[row, t, c] += read * state[n, c]


@numba.njit(**OPTIONS)
def _block(length, states, channels):
    """Channels worked on together: all, or a multiple of 16."""
    return min(channels, max(32, BLOCK_FLOATS // (length * states + 1) // 16 * 16))


@_kernel
def scan_gradients(u, delta, A, B, C, bias, begin, first, last, grad, du, ddelta, dB, dC, dA, dbias):
    """Gradients from that of y; those of A and the bias are added to. The states of a few channels are computed again."""
    length, channels, states = u.shape[1], u.shape[2], len(A)
    block = _block(length, states, channels)
    carried = np.empty((length, states, block), np.float32)  # decay times the state before
    step, slope = np.empty((length, block), np.float32), np.empty((length, block), np.float32)
    x, g = np.empty((length, block), np.float32), np.empty((states, block), np.float32)
    dx, dy, dstep = np.empty(block, np.float32), np.empty(block, np.float32), np.empty(block, np.float32)
    a, da = np.empty((states, block), np.float32), np.empty((states, block), np.float32)
    for row in range(first, last):
        du[row, : begin[row]] = 0
        ddelta[row, : begin[row]] = 0
        dB[row] = 0
        dC[row] = 0
        for left in range(0, channels, block):
            width = min(block, channels - left)
            a[:, :width] = A[:, left : left + width]
            da[:] = 0
            g[:] = 0
            for t in range(begin[row], length):
                for c in range(width):
                    step[t, c], slope[t, c] = _softplus(delta[row, t, left + c] + bias[left + c])
                    x[t, c] = step[t, c] * u[row, t, left + c]
                for n in range(states):
                    b = B[row, t, n]
                    for c in range(width):  # g holds the state for now
                        carried[t, n, c] = _exp(step[t, c] * a[n, c]) * g[n, c]
                        g[n, c] = carried[t, n, c] + b * x[t, c]
            g[:] = 0
            for t in range(length - 1, begin[row] - 1, -1):
                for c in range(width):
                    dx[c] = 0
                    dstep[c] = 0
                    dy[c] = grad[row, t, left + c]
                for n in range(states):
                    b, read, of_b, of_c = B[row, t, n], C[row, t, n], np.float32(0), np.float32(0)
                    for c in range(width):
                        dh = g[n, c] + read * dy[c]
                        of_c += (carried[t, n, c] + b * x[t, c]) * dy[c]
                        of_b += dh * x[t, c]
                        dx[c] += dh * b
                        g[n, c] = dh
                    for c in range(width):
                        dweight = g[n, c] * carried[t, n, c]
                        g[n, c] *= _exp(step[t, c] * a[n, c])
                        da[n, c] += dweight * step[t, c]
                        dstep[c] += dweight * a[n, c]
                    dB[row, t, n] += of_b
                    dC[row, t, n] += of_c
                for c in range(width):
                    slant = (dstep[c] + dx[c] * u[row, t, left + c]) * slope[t, c]
                    ddelta[row, t, left + c] = slant
                    dbias[left + c] += slant
                    du[row, t, left + c] = dx[c] * step[t, c]
            dA[:, left : left + width] += da[:, :width]


@numba.njit(**OPTIONS)
def _sum_taps(u, mask, weight, bias, row, t, total):
    """``total [channels]``, the convolution at one position before SiLU."""
    for c in range(len(total)):
        total[c] = bias[c]
    for tap in range(len(weight)):
        at = t - len(weight) + 1 + tap
        if at >= 0 and mask[row, at]:
            for c in range(len(total)):
                total[c] += weight[tap, c] * u[row, at, c]


@_kernel
def convolve(u, mask, weight, bias, first, last, out):
    """``SiLU(b + sum_j W_j u_{t-K+1+j})`` where ``mask [b, L]``, zeros elsewhere; ``weight [K, channels]``."""
    length, channels = u.shape[1], u.shape[2]
    total = np.empty(channels, np.float32)
    for row in range(first, last):
        for t in range(length):
            if not mask[row, t]:
                out[row, t] = 0
                continue
            _sum_taps(u, mask, weight, bias, row, t, total)
            for c in range(channels):
                out[row, t, c] = total[c] * _sigmoid(total[c])


@_kernel
def convolve_gradients(u, mask, weight, bias, first, last, grad, du, dweight, dbias):
    """Gradients from that of the output; those of the weight and the bias are added to."""
    length, channels, taps = u.shape[1], u.shape[2], len(weight)
    total = np.empty(channels, np.float32)
    for row in range(first, last):
        du[row] = 0
        for t in range(length):
            if not mask[row, t]:
                continue
            _sum_taps(u, mask, weight, bias, row, t, total)
            for c in range(channels):
                gate = _sigmoid(total[c])
                slant = gate * (np.float32(1) + total[c] * (np.float32(1) - gate)) * grad[row, t, c]
                dbias[c] += slant
                total[c] = slant
            for tap in range(taps):
                at = t - taps + 1 + tap
                if at >= 0 and mask[row, at]:
                    for c in range(channels):
                        dweight[tap, c] += total[c] * u[row, at, c]
                        du[row, at, c] += total[c] * weight[tap, c]
