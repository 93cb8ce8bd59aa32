"""The Mamba block over left-padded histories."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model_zoo.layers.scan_autograd import row_slices
from model_zoo.layers.selective_scan import (
    ScanKernel,
    compiled_functions,
    scan_function,
    selective_scan,
    selective_scan_last,
)
from model_zoo.layers.sequence import Sequence

MambaInit = Literal["mamba", "recbole", "fuxictr"]


class Mamba(nn.Module):
    """``W_out (scan(c) * SiLU(z))`` with ``[u ; z] = W_in x`` and ``c = SiLU(conv(u))`` causal and depthwise.

    Parameters have the names and shapes of mamba_ssm's ``Mamba``, so weights pass between the two. Padding before a row's
    first item is neutral: u is zero there (the convolution reads nothing) and so is c (its bias would otherwise enter the
    state), so the state is zero when the first item comes.

    Args:
        dim: width of inputs and outputs.
        d_state: states per channel, N.
        d_conv: taps of the convolution, K.
        expand: channels per input dimension.
        mamba_init: ``mamba`` (the release: torch's default layers, Delta's bias such that Delta starts in 0.001..0.1),
            ``recbole`` (what Mamba4Rec's release makes of it: linear weights N(0, 0.02^2) and zero biases, so that Delta
            starts at 0.69) or ``fuxictr`` (xavier-normal weights, zero biases).
        scan_kernel: see `scan_function`.

    Raises:
        ValueError: a size below 1, or an unknown ``mamba_init`` or ``scan_kernel``.
        ConfigError: ``scan_kernel`` names a package that is missing.

    Source: Gu and Dao, Mamba (arXiv 2312.00752), section 3.4 and figure 3; initial Delta: section 3.6.
    """

    def __init__(
        self,
        dim: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        mamba_init: MambaInit = "mamba",
        scan_kernel: ScanKernel = "auto",
    ) -> None:
        super().__init__()
        for key, value in (("d_state", d_state), ("d_conv", d_conv), ("expand", expand)):
            if value < 1:
                raise ValueError(f"{key} must be at least 1, not {value}")
        if mamba_init not in ("mamba", "recbole", "fuxictr"):
            raise ValueError(f"mamba_init must be mamba, recbole or fuxictr, not {mamba_init!r}")
        scan_function(scan_kernel)
        self.scan_kernel: ScanKernel = scan_kernel
        self.mamba_init = mamba_init
        self.channels = expand * dim
        self.dt_rank = math.ceil(dim / 16)
        self.in_proj = nn.Linear(dim, 2 * self.channels, bias=False)
        self.conv1d = nn.Conv1d(self.channels, self.channels, d_conv, groups=self.channels, padding=d_conv - 1)
        self.x_proj = nn.Linear(self.channels, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.channels)
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(self.channels, 1))
        self.D = nn.Parameter(torch.ones(self.channels))
        self.out_proj = nn.Linear(self.channels, dim, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Start values by ``mamba_init``; FuxiCTR's reset calls this after it overwrote all but ``A_log`` and ``D``."""
        linears = [self.in_proj, self.x_proj, self.dt_proj, self.out_proj]
        if self.mamba_init == "fuxictr":
            init_linears([*linears, self.conv1d], nn.init.xavier_normal_)
            return
        self.conv1d.reset_parameters()
        if self.mamba_init == "recbole":
            init_linears(linears, recbole_normal_)
            return
        for linear in linears:
            linear.reset_parameters()
        with torch.no_grad():
            self.dt_proj.weight.uniform_(-(self.dt_rank**-0.5), self.dt_rank**-0.5)
            low, high = math.log(1e-3), math.log(1e-1)
            step = torch.empty_like(self.dt_proj.bias).uniform_(low, high).exp_().clamp_(min=1e-4)
            self.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))  # softplus of it is the step

    def forward(self, sequence: Sequence) -> Tensor:
        """Outputs at every position ``[B, T, dim]``; zeros at padding."""
        states = self.A_log.shape[1]
        u, z = sequence.project(self.in_proj).chunk(2, -1)
        c = self._convolved(u, sequence.mask)
        low_rank, B, C = self.x_proj(c).split([self.dt_rank, states, states], -1)
        delta, A = F.linear(low_rank, self.dt_proj.weight), -torch.exp(self.A_log)
        options: dict[str, Any] = {"lengths": sequence.lengths, "kernel": self.scan_kernel}
        return self.out_proj(selective_scan(c, delta, A, B, C, self.D, z, self.dt_proj.bias, **options))

    def newest(self, sequence: Sequence) -> Tensor:
        """Outputs at the newest position alone, ``[B, dim]``; needs T >= 1.

        The gate and C are computed for that position only, and of the scan only its last state.
        """
        gate, read = self.channels, self.dt_rank + self.A_log.shape[1]  # first rows of z and of C
        u = F.embedding(sequence.index, F.linear(sequence.items, self.in_proj.weight[:gate]))
        z = F.linear(sequence.last_vectors, self.in_proj.weight[gate:])
        c = self._convolved(u, sequence.mask)
        low_rank, B = F.linear(c, self.x_proj.weight[:read]).split([self.dt_rank, read - self.dt_rank], -1)
        C = F.linear(c[:, -1], self.x_proj.weight[read:])
        delta, A = F.linear(low_rank, self.dt_proj.weight), -torch.exp(self.A_log)
        options: dict[str, Any] = {"lengths": sequence.lengths, "kernel": self.scan_kernel}
        return self.out_proj(selective_scan_last(c, delta, A, B, C, self.D, z, self.dt_proj.bias, **options))

    def _convolved(self, u: Tensor, mask: Tensor) -> Tensor:
        assert self.conv1d.bias is not None
        return causal_conv(u, mask, self.conv1d.weight.squeeze(1), self.conv1d.bias, self.scan_kernel)


def init_linears(layers: list[Any], init_weight: Any) -> None:
    """``init_weight`` on each layer's weight, zero biases."""
    for layer in layers:
        init_weight(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def recbole_normal_(weight: Tensor) -> Tensor:
    """N(0, 0.02^2), RecBole's ``initializer_range``."""
    return nn.init.normal_(weight, std=0.02)


def causal_conv(u: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, kernel: ScanKernel = "auto") -> Tensor:
    """``SiLU(b + sum_j W_j u_{t-K+1+j})`` at real positions, zeros at padding; u counts as zero there and before t = 0.

    Args:
        u: ``[B, T, channels]``.
        mask: ``[B, T]`` bool, True = real.
        weight: ``[channels, K]``; tap K - 1 is the current position.
        bias: ``[channels]``.
        kernel: see `compiled_functions`; what cannot go through numba's loops goes through PyTorch.
    """
    narrow = u.device.type == "cpu" and {u.dtype, weight.dtype, bias.dtype} == {torch.float32}
    compiled = compiled_functions(kernel) if narrow else None
    function = _CausalConv if compiled is None else compiled.CausalConv
    return function.apply(u, mask, weight, bias)


class _CausalConv(torch.autograd.Function):
    """Shifted multiply-adds over batch rows that stay in cache; keeps its input alone."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, mask: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out = u.new_empty(u.shape)
        for rows in row_slices(len(u), u[0].numel() if len(u) else 0, u.device):
            padding = _padding(mask[rows])
            _, before = _shifted_sum(u[rows], padding, weight, bias)
            out[rows] = _zero_at(padding, F.silu(before))
        ctx.save_for_backward(u, mask, weight, bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        u, mask, weight, bias = ctx.saved_tensors
        du = u.new_empty(u.shape)
        dweight, dbias = torch.zeros_like(weight), torch.zeros_like(bias)
        length, taps = u.shape[1], weight.shape[1]
        for rows in row_slices(len(u), u[0].numel() if len(u) else 0, u.device):
            padding = _padding(mask[rows])
            padded, before = _shifted_sum(u[rows], padding, weight, bias)
            gate = torch.sigmoid(before)
            dbefore = gate * (1 + before * (1 - gate)) * _zero_at(padding, grad[rows])
            dbias += dbefore.sum((0, 1))
            dpadded = torch.zeros_like(padded)
            for tap in range(taps):
                dweight[:, tap] += (dbefore * padded[:, tap : tap + length]).sum((0, 1))
                dpadded[:, tap : tap + length].addcmul_(dbefore, weight[:, tap])
            du[rows] = _zero_at(padding, dpadded[:, taps - 1 :])
        return du, None, dweight, dbias


def _padding(mask: Tensor) -> Tensor | None:
    """``[b, T, 1]``, True at padding; None if a CPU sees that there is none (a GPU is not waited for)."""
    return None if mask.device.type == "cpu" and bool(mask.all()) else ~mask.unsqueeze(2)


def _zero_at(padding: Tensor | None, values: Tensor) -> Tensor:
    return values if padding is None else values.masked_fill(padding, 0)


def _shifted_sum(u: Tensor, padding: Tensor | None, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """``u`` with K - 1 zeros before it, padding zeroed, in the weight's precision; and the convolution before SiLU."""
    length, taps = u.shape[1], weight.shape[1]
    padded = F.pad(_zero_at(padding, u.to(weight.dtype)), (0, 0, taps - 1, 0))
    before = bias.repeat(*u.shape[:2], 1)
    for tap in range(taps):
        before.addcmul_(padded[:, tap : tap + length], weight[:, tap])
    return padded, before
