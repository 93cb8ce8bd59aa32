"""Mamba4Rec: a selective state space model reads the history; the interest is its newest position."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo.layers.mamba import Mamba, MambaInit, init_linears, recbole_normal_
from model_zoo.layers.selective_scan import ScanKernel
from model_zoo.layers.sequence import Sequence

LAYER_NORM_EPS = 1e-12


class Mamba4RecBlock(nn.Module):
    """Item vectors through dropout, layer norm and `MambaLayer`s; the newest position's vector is the interest.

    The interest does not depend on the target, which meets it in the head. Of the last layer only the newest position is
    computed. What depends on an item alone, up to the first layer's input projection, is computed per item unless dropout
    (which the reference draws per position) is active. Rows are taken longest first, so that the scan skips padding.
    The sequence must be right-aligned, as `Sequence` promises: a gap would decay the state and shift the convolution.

    Args:
        item_dim: d.
        num_layers: layers; a single one has no residual around its Mamba half, as in the release.
        d_state: states per channel.
        d_conv: taps of the causal convolution.
        expand: channels per dimension of the layers' width.
        hidden_dropout: on item vectors, and on what both halves of a layer compute.
        hidden_dim: width of the layers, reached by a linear map; None = d, without one.
        mamba_init: see `Mamba`; ``recbole`` covers this block's own linear maps too.
        scan_kernel: see `scan_function`.
        head: ``dnn`` gives the vector, ``dot`` its inner product with the target as ``[B, 1]`` logits, the paper's scoring.

    Raises:
        ValueError: a size below 1, a dropout outside 0..1, or ``head: dot`` with another width than the target's.
        ConfigError: ``scan_kernel`` names a package that is missing.

    Source: Liu et al., Mamba4Rec (arXiv 2403.03900), section 3.
    """

    def __init__(
        self,
        item_dim: int,
        *,
        num_layers: int = 1,
        d_state: int = 32,
        d_conv: int = 4,
        expand: int = 2,
        hidden_dropout: float = 0.2,
        hidden_dim: int | None = None,
        mamba_init: MambaInit = "mamba",
        scan_kernel: ScanKernel = "auto",
        head: Literal["dnn", "dot"] = "dnn",
    ) -> None:
        super().__init__()
        width = item_dim if hidden_dim is None else hidden_dim
        for key, value in (("num_layers", num_layers), ("hidden_dim", width)):
            if value < 1:
                raise ValueError(f"{key} must be at least 1, not {value}")
        if not 0 <= hidden_dropout <= 1:
            raise ValueError(f"hidden_dropout must lie in 0..1, not {hidden_dropout}")
        if head == "dot" and width != item_dim:
            raise ValueError(f"head: dot needs hidden_dim ({hidden_dim}) to be the width of an item vector ({item_dim})")
        self.mamba_init = mamba_init
        self.head = head
        self.width = width
        self.out_dim = 1 if head == "dot" else width
        self.widen = None if hidden_dim is None else nn.Linear(item_dim, width)
        self.dropout = nn.Dropout(hidden_dropout)
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.layers = nn.ModuleList(
            MambaLayer(
                Mamba(
                    width, d_state=d_state, d_conv=d_conv, expand=expand, mamba_init=mamba_init, scan_kernel=scan_kernel
                ),
                width,
                hidden_dropout,
                residual=num_layers > 1,
            )
            for _ in range(num_layers)
        )
        self.init_weights()

    def init_weights(self) -> None:
        """RecBole's start values under ``mamba_init: recbole``; otherwise the model's own reset stands."""
        if self.mamba_init == "recbole":
            own = [linear for layer in self.layers for linear in (layer.inner, layer.outer)]
            init_linears(own if self.widen is None else [*own, self.widen], recbole_normal_)

    def forward(self, query: Tensor, sequence: Sequence) -> Tensor:
        """Interest of each row.

        Args:
            query: ``[B, d]`` target items; read by ``head: dot`` only.
            sequence: histories.

        Returns:
            ``[B, out_dim]``; zeros for empty rows.
        """
        batch, length = sequence.index.shape
        if batch == 0 or length == 0:
            return query.new_zeros(batch, self.out_dim)
        order = sequence.lengths.argsort(descending=True, stable=True)
        tokens = self._tokens(sequence.select(order))
        for layer in self.layers[:-1]:
            tokens = Sequence.from_vectors(layer(tokens), tokens.mask)
        newest = self.layers[-1].newest(tokens)  # type: ignore[operator]
        interest = newest.index_select(0, order.argsort()).masked_fill(~sequence.mask[:, -1:], 0)
        return (interest * query).sum(-1, keepdim=True) if self.head == "dot" else interest

    def _tokens(self, sequence: Sequence) -> Sequence:
        """What the first layer reads, per item where each position of an item has the same."""
        items = sequence.items if self.widen is None else self.widen(sequence.items)
        if (self.training and self.dropout.p > 0) or sequence.index.numel() < len(items):
            return Sequence.from_vectors(self.norm(self.dropout(F.embedding(sequence.index, items))), sequence.mask)
        return Sequence(self.norm(items), sequence.index, sequence.mask)


class MambaLayer(nn.Module):
    """``x' = LN(Dropout(Mamba(x)) + x)``, then ``LN(Dropout(W_2 Dropout(GELU(W_1 x'))) + x')`` with inner width 4 d.

    Args:
        mamba: the sequence mixer.
        dim: d.
        dropout: probability.
        residual: whether x is added in the first half.

    Source: Mamba4Rec (arXiv 2403.03900), section 3.3-3.4.
    """

    def __init__(self, mamba: Mamba, dim: int, dropout: float, residual: bool) -> None:
        super().__init__()
        self.mamba = mamba
        self.residual = residual
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.inner = nn.Linear(dim, 4 * dim)
        self.outer = nn.Linear(4 * dim, dim)
        self.outer_norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Sequence) -> Tensor:
        """Every position, ``[B, T, d]``."""
        return self._finish(self.mamba(tokens), tokens.vectors if self.residual else None)

    def newest(self, tokens: Sequence) -> Tensor:
        """The newest position, ``[B, d]``; needs T >= 1."""
        return self._finish(self.mamba.newest(tokens), tokens.last_vectors if self.residual else None)

    def _finish(self, mixed: Tensor, before: Tensor | None) -> Tensor:
        mixed = self.dropout(mixed)
        x = self.norm(mixed if before is None else mixed + before)
        return self.outer_norm(self.dropout(self.outer(self.dropout(F.gelu(self.inner(x))))) + x)
