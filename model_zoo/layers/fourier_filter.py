"""MIRRN's filter over a short sequence: one complex number a channel, in the frequency domain."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: LongCTR cuts the channels into so many blocks
BLOCKS = 4


class FourierFilter(nn.Module):
    """``LayerNorm(x + dropout(irfft(w * rfft(x))))`` along time, w one complex number for each channel.

    As w does not depend on the frequency, the filter is ``Re(w) x + Im(w) H x`` with one fixed matrix H for each length,
    the discrete Hilbert transform: it turns every oscillation by a quarter period and drops the mean (and, for even
    lengths, the fastest oscillation). So rows of any lengths are filtered in one product.

    Args:
        width: channels.
        max_length: longest row.
        dropout: on the filtered values.
        full_blocks: LongCTR's weights, a complex matrix for each of 4 blocks of channels, of which LongCTR reads the
            diagonal alone: with d channels all but d of its d * d / 4 complex weights have no effect and no gradient.
            Otherwise only the diagonal exists.

    Raises:
        ValueError: ``full_blocks`` with a width that is not a multiple of 4.

    Source: MIRRN (arXiv 2411.15005), multi-head Fourier transformer, as coded in LongCTR.
    """

    kernels: Tensor

    def __init__(self, width: int, max_length: int, dropout: float = 0.0, full_blocks: bool = False) -> None:
        super().__init__()
        if full_blocks and width % BLOCKS:
            raise ValueError(f"longctr_compat: the width of an item vector ({width}) must be a multiple of {BLOCKS}")
        size = width // BLOCKS
        shape = (BLOCKS, size, size, 2) if full_blocks else (width, 2)
        self.complex_weight = nn.Parameter(torch.randn(shape) * 0.02)
        self.out_dropout = nn.Dropout(dropout)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)
        self.max_length = max_length
        self.register_buffer("kernels", hilbert_kernels(max_length), persistent=False)

    def forward(self, vectors: Tensor, mask: Tensor) -> Tensor:
        """Filter each row over its real columns alone.

        Args:
            vectors: ``[B, K, d]``, 1 <= K <= ``max_length``.
            mask: ``[B, K]`` bool, True = real, at the right end of each row.

        Returns:
            ``[B, K, d]``, without meaning where ``mask`` is False.
        """
        columns = mask.shape[1]
        middle = self.max_length - 1
        kernels = self.kernels[:, middle + 1 - columns : middle + columns].to(vectors.dtype)
        kernels = F.embedding(mask.sum(1), kernels)  # [B, 2K - 1]
        # each row of a Toeplitz matrix is the kernel, a step further: windows of K entries, last row first
        matrix = kernels.unfold(1, columns, 1).flip(1) * mask.unsqueeze(1)
        weight: Tensor = self.complex_weight
        if weight.dim() == 4:
            weight = weight.diagonal(dim1=1, dim2=2).transpose(1, 2).reshape(-1, 2)
        filtered = torch.addcmul(weight[:, 0] * vectors, weight[:, 1], matrix @ vectors)
        return self.LayerNorm(self.out_dropout(filtered) + vectors)


def hilbert_kernels(max_length: int) -> Tensor:
    """Kernels of the discrete Hilbert transform, float64 ``[max_length + 1, 2 * max_length - 1]``, one for each length.

    With ``h_n = irfft(i * 1)`` of n values, entry ``[n, max_length - 1 - s]`` is ``h_n(s mod n)`` for ``|s| < n``, else 0.
    """
    kernels = torch.zeros(max_length + 1, 2 * max_length - 1, dtype=torch.double)
    for length in range(1, max_length + 1):
        spectrum = torch.full((length // 2 + 1,), 1j, dtype=torch.cdouble)
        kernel = torch.fft.irfft(spectrum, n=length)
        shift = torch.arange(1 - length, length)
        kernels[length, max_length - 1 - shift] = kernel[shift % length]
    return kernels
