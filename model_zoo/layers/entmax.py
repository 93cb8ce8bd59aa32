"""Masked softmax and entmax, its relative whose answers hold exact zeros."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

#: below every threshold: entmax's is at least -1 once the largest score is moved to 0
_OUT_OF_REACH = -2.0


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the last dimension's unmasked entries; zeros elsewhere, and in rows without an entry.

    Args:
        scores: ``[..., T]``.
        mask: bool, True = real, broadcast against ``scores``.
    """
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1) * mask


def entmax(scores: Tensor, alpha: float = 1.5, mask: Tensor | None = None) -> Tensor:
    """``p_i = [(alpha - 1) x_i - tau]_+^(1 / (alpha - 1))`` with tau such that the p add up to 1.

    alpha = 2 is sparsemax; as alpha falls to 1 it becomes softmax and no entry is zero. For 1.5 tau comes from a sort, for
    any other alpha from bisection to the precision of the type. Half types are computed and answered in float32.

    Args:
        scores: ``[..., T]``.
        alpha: 1 < alpha <= 2.
        mask: bool, True = real, broadcast against ``scores``; None = all.

    Returns:
        ``[..., T]``; zeros where masked. Rows without an entry are zeros and pass no gradient.

    Raises:
        ValueError: alpha out of range.

    Source: Peters, Niculae, Martins: Sparse Sequence-to-Sequence Models, ACL 2019 (arXiv 1905.05702), eq. 7-10, alg. 1-2.
    """
    if not 1 < alpha <= 2:
        raise ValueError(f"alpha must be above 1 and at most 2, not {alpha}")
    real = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.expand_as(scores)
    return _Entmax.apply(scores.float() if scores.dtype.itemsize < 4 else scores, real, alpha)


class _Entmax(torch.autograd.Function):
    """The Jacobian is ``diag(s) - s s^T / sum(s)`` with ``s = p^(2 - alpha)`` on the support: tau needs no graph."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, mask: Tensor, alpha: float) -> Tensor:
        if scores.shape[-1] == 0:
            weight = torch.zeros_like(scores)
        else:
            top = scores.masked_fill(~mask, -torch.inf).amax(-1, keepdim=True)
            shifted = ((scores - top) * (alpha - 1)).masked_fill(~mask, _OUT_OF_REACH)
            weight = _sorted_15(shifted) if alpha == 1.5 else _bisected(shifted, mask, alpha)
            weight = weight.masked_fill(~mask, 0.0)  # a row without an entry would share 1 among masked ones
        ctx.save_for_backward(weight)
        ctx.alpha = alpha
        return weight

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        slope = torch.where(weight > 0, weight ** (2 - ctx.alpha), 0.0)
        total = slope.sum(-1, keepdim=True)
        mean = (slope * grad).sum(-1, keepdim=True) / total.masked_fill(total == 0, 1.0)
        return slope * (grad - mean), None, None


def _sorted_15(shifted: Tensor) -> Tensor:
    """Exact tau for alpha = 1.5: if the k best are the support, ``sum (x_i - tau)^2 = 1`` is quadratic in tau.

    Args:
        shifted: ``[..., T]`` scores / 2, the largest 0.
    """
    best = shifted.sort(-1, descending=True).values
    count = torch.arange(1, best.shape[-1] + 1, device=best.device, dtype=best.dtype)
    mean = best.cumsum(-1) / count
    spread = (best.square().cumsum(-1) / count - mean.square()) * count  # sum of squared deviations from the mean
    threshold = mean - ((1 - spread) / count).clamp(min=0).sqrt()
    size = (threshold <= best).sum(-1, keepdim=True).clamp(min=1)  # supports are prefixes of the order; 0 only for nan
    tau = threshold.gather(-1, size - 1)
    return (shifted - tau).clamp(min=0).square()


def _bisected(shifted: Tensor, mask: Tensor, alpha: float) -> Tensor:
    """Tau by bisection between -1, where the largest alone makes 1, and ``-n^(1 - alpha)``, where none exceeds 1 / n."""
    power = 1 / (alpha - 1)
    count = mask.sum(-1, keepdim=True).clamp(min=1).to(shifted.dtype)
    low, high = torch.full_like(count, -1.0), -(count ** (1 - alpha))
    for _ in range(2 - round(math.log2(torch.finfo(shifted.dtype).eps))):
        tau = (low + high) / 2
        enough = (shifted - tau).clamp(min=0).pow(power).sum(-1, keepdim=True) >= 1
        low, high = torch.where(enough, tau, low), torch.where(enough, high, tau)
    weight = (shifted - low).clamp(min=0).pow(power)
    total = weight.sum(-1, keepdim=True)
    return weight / total.masked_fill(total == 0, 1.0)
