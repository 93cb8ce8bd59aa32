"""The selective scan's two autograd functions: loops over time whose states stay in cache, nothing kept per position.

``[B, L, channels, states]`` never exists: the loops run over the states of a few batch rows at a time, and backward
computes them again. Tensors are ``[b, ..., channels]`` throughout; `LastState` puts the batch innermost in memory where
channels are few, for a kernel whose inner loop runs over 16 of them is mostly overhead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

#: floats of one working tensor: a CPU core's cache; on a GPU enough for one kernel to outlast its launch
SLICE_FLOATS = {"cpu": 2**17, "cuda": 2**23}
#: channels up to which a longer batch is worth two transposes
NARROW = 64


def row_slices(batch: int, floats: int, device: torch.device) -> Iterator[slice]:
    """Batch rows, as many at a time as keep a working tensor of ``floats`` per row in cache."""
    rows = max(1, SLICE_FLOATS.get(device.type, SLICE_FLOATS["cpu"]) // max(floats, 1))
    return (slice(begin, min(begin + rows, batch)) for begin in range(0, batch, rows))


def _parts(u: Tensor, states: int, lengths: Tensor | None) -> Iterator[tuple[slice, slice]]:
    """Batch rows scanned together, and their columns from the first real position of any of them (if there is one)."""
    batch, length, channels = u.shape
    longest = [length] * batch if lengths is None else lengths.tolist()
    for rows in row_slices(batch, channels * states, u.device):
        if max(longest[rows]):
            yield rows, slice(length - max(longest[rows]), length)


def _turned(part: tuple[slice, slice], u: Tensor) -> bool:
    """Whether a part is worked on with its batch innermost in memory: where a CPU's inner loops get longer by it."""
    return u.device.type == "cpu" and u.shape[2] <= NARROW and u.shape[2] < part[0].stop - part[0].start


def _take(tensor: Tensor, part: tuple[slice, slice], turned: bool) -> Tensor:
    """``tensor[part]``, ``[b, T, width]``; in memory ``[T, width, b]`` if turned."""
    taken = tensor[part]
    if not turned:
        return taken
    return taken.flatten(1).t().contiguous().view(*taken.shape[1:], -1).permute(2, 0, 1)


def _put(tensor: Tensor, part: tuple[slice, slice], values: Tensor, turned: bool) -> None:
    """``tensor[part] = values``; a turned one goes by way of the matrix that torch transposes in blocks."""
    if turned:
        by_row = values.permute(1, 2, 0).flatten(0, 1).t()
        if tensor[part].is_contiguous():
            tensor[part].flatten(1).copy_(by_row)
            return
        values = by_row.contiguous().view(values.shape)
    tensor[part] = values


def _zero_states(step: Tensor, states: int, turned: bool) -> Tensor:
    """Zeros ``[b, states, channels]`` in the memory order of ``step [b, T, channels]``."""
    rows, _, channels = step.shape
    return step.new_zeros(states, channels, rows).permute(2, 0, 1) if turned else step.new_zeros(rows, states, channels)


def _advance(before: Tensor, after: Tensor, decay: Tensor, A: Tensor, step: Tensor, x: Tensor, b: Tensor) -> None:
    """``decay = exp(Delta A)`` and ``after = decay * before + x b`` (``[b, states, channels]``; the two may be one)."""
    torch.mul(step.unsqueeze(1), A, out=decay).exp_()
    torch.mul(before, decay, out=after).addcmul_(b.unsqueeze(2), x.unsqueeze(1))


class Scan(torch.autograd.Function):
    """``y_t = sum_n C_t h_t`` without D and gate; keeps a state every sqrt(L) steps and recomputes those between."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        bias: Tensor,
        lengths: Tensor | None,
        keep: bool,
    ) -> Tensor:
        batch, length, channels = u.shape
        A = A.T.contiguous()  # [states, channels]: the long axis innermost
        every = max(1, math.isqrt(length))
        kept = u.new_empty((length - 1) // every if keep and length else 0, batch, *A.shape)
        y = torch.zeros_like(u)
        for part in _parts(u, len(A), lengths):
            step = F.softplus(delta[part] + bias)
            x, b, c = step * u[part], B[part], C[part]
            h = x.new_zeros(len(x), *A.shape)
            decay, row = torch.empty_like(h), x.new_empty(len(x), 1, channels)
            for t in range(x.shape[1]):
                if keep and t and t % every == 0:
                    kept[t // every - 1, part[0]] = h
                _advance(h, h, decay, A, step[:, t], x[:, t], b[:, t])
                torch.bmm(c[:, t, None], h, out=row)  # with out= autocast leaves it alone
                y[part][:, t] = row[:, 0]
        ctx.save_for_backward(u, delta, A, B, C, bias, lengths, kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, A, B, C, bias, lengths, kept = ctx.saved_tensors
        every = max(1, math.isqrt(u.shape[1]))
        du, ddelta, dB, dC = (torch.zeros_like(t) for t in (u, delta, B, C))
        dA = torch.zeros_like(A)
        for part in _parts(u, len(A), lengths):
            raw = delta[part] + bias
            step = F.softplus(raw)
            x, b, c, dy = step * u[part], B[part], C[part], grad[part]
            dx, dstep = torch.zeros_like(x), torch.zeros_like(x)
            h = x.new_empty(every + 1, len(x), *A.shape)  # the states of one stretch, from the one kept before it
            decay = torch.empty_like(h[1:])
            g, product, dA_rows = (x.new_zeros(len(x), *A.shape) for _ in range(3))  # g = dL/dh_t
            row = x.new_empty(len(x), 1, x.shape[2])
            for begin in reversed(range(0, x.shape[1], every)):
                h[0] = kept[begin // every - 1, part[0]] if begin else 0
                times = range(begin, min(begin + every, x.shape[1]))
                for i, t in enumerate(times):
                    _advance(h[i], h[i + 1], decay[i], A, step[:, t], x[:, t], b[:, t])
                for i, t in reversed(list(enumerate(times))):
                    g.addcmul_(c[:, t].unsqueeze(2), dy[:, t].unsqueeze(1))
                    dC[part][:, t] = torch.mul(h[i + 1], dy[:, t, None], out=product).sum(2)
                    dB[part][:, t] = torch.mul(g, x[:, t, None], out=product).sum(2)
                    torch.bmm(b[:, t, None], g, out=row)
                    dx[:, t] = row[:, 0]
                    torch.mul(g.mul_(decay[i]), h[i], out=product)
                    dA_rows.addcmul_(product, step[:, t, None])
                    dstep[:, t] = product.mul_(A).sum(1)
            du[part] = dx * step
            ddelta[part] = (dstep + dx * u[part]) * torch.sigmoid(raw)
            dA += dA_rows.sum(0)
        return du, ddelta, dA.T, dB, dC, ddelta.sum((0, 1)), None, None


class LastState(torch.autograd.Function):
    """``h_L [B, states, channels] = sum_j exp(A (S_L - S_j)) x_j B_j``, S the running sum of Delta, x = Delta u.

    Forward runs the recursion, half the work of the sum; backward takes each weight from the sum, so it needs no state.
    """

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, bias: Tensor, lengths: Tensor | None
    ) -> Tensor:
        A = A.T.contiguous()
        states = u.new_zeros(u.shape[0], *A.shape)
        for part in _parts(u, len(A), lengths):
            turned = _turned(part, u)
            step = F.softplus(_take(delta, part, turned) + bias)
            x, b = step * _take(u, part, turned), _take(B, part, turned)
            h = _zero_states(step, len(A), turned)
            decay = torch.empty_like(h)
            for t in range(x.shape[1]):
                _advance(h, h, decay, A, step[:, t], x[:, t], b[:, t])
            states[part[0]] = h
        ctx.save_for_backward(u, delta, A, B, bias, lengths)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, A, B, bias, lengths = ctx.saved_tensors
        du, ddelta, dB = (torch.zeros_like(t) for t in (u, delta, B))
        dA = torch.zeros_like(A)
        # exp is many times slower where it underflows; weights held at the square root of the smallest number change
        # no sum, and their products stay normal numbers
        lowest = math.log(torch.finfo(u.dtype).tiny) / 2
        for part in _parts(u, len(A), lengths):
            turned = _turned(part, u)
            raw = _take(delta, part, turned) + bias
            step = F.softplus(raw)
            u_part, b = _take(u, part, turned), _take(B, part, turned)
            x = step * u_part
            dh = _zero_states(step, len(A), turned).copy_(grad[part[0]])
            dx, drest, db = torch.empty_like(x), torch.empty_like(x), torch.empty_like(b)
            weight, product, dA_rows = (torch.zeros_like(dh) for _ in range(3))
            rest = torch.zeros_like(step[:, 0])  # S_L - S_t as the sum of the later steps, which cancels nothing
            for t in reversed(range(x.shape[1])):
                torch.mul(rest.unsqueeze(1), A, out=weight).clamp_(min=lowest).exp_().mul_(dh)
                torch.sum(torch.mul(weight, x[:, t, None], out=product), 2, out=db[:, t])
                weight.mul_(b[:, t].unsqueeze(2))
                torch.sum(weight, 1, out=dx[:, t])
                dA_rows.addcmul_(weight, (x[:, t] * rest).unsqueeze(1))
                torch.sum(weight.mul_(A), 1, out=drest[:, t])
                rest += step[:, t]
            drest *= x
            dstep = torch.zeros_like(x)
            for t in range(1, x.shape[1]):  # a step is part of the rest of the positions before it
                torch.add(dstep[:, t - 1], drest[:, t - 1], out=dstep[:, t])
            _put(du, part, dx * step, turned)
            _put(ddelta, part, (dstep + dx * u_part) * torch.sigmoid(raw), turned)
            _put(dB, part, db, turned)
            dA += dA_rows.sum(0)
        return du, ddelta, dA.T, dB, ddelta.sum((0, 1)), None
