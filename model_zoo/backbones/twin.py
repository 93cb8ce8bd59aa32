"""TWIN: target attention over the newest items beside top-k target attention over the whole history."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from model_zoo.layers.attention_branches import BranchRead, run_block
from model_zoo.layers.blocks import ROWS_TO_SHARE, call_block, serving
from model_zoo.layers.sequence import Sequence, SharedSequence
from model_zoo.layers.short_window import short_window
from model_zoo.layers.target_attention import TargetAttention


class TwinBlock(nn.Module):
    """TWIN's interest module as LongCTR has it: ``[short ; long]``, each of the item's width d.

    The short branch attends to the newest ``short_seq_len - 1`` items (LongCTR's "50" means 49), the long branch to the
    ``topk`` best-scored items of the history. Rows shorter than either are read as they are; empty rows give zeros.

    Args:
        item_dim: d, width of an item vector.
        wrap_long: builds the long branch from its factory; a mixture of experts over the long branch alone goes here.
        attention_dim: width of the attention space over all heads.
        num_heads: heads; must divide ``attention_dim``.
        attention_dropout: dropout on attention weights.
        short_seq_len: the short branch reads one item fewer than this.
        topk: history items kept per head by the long branch.
        Kc_cross_features: only 0 (LongCTR's code for cross features cannot run).
        longctr_compat: reproduce LongCTR's short window, whose mask is shifted by one column against its items, and its
            attention to padding in empty rows.

    Raises:
        ValueError: ``short_seq_len`` < 2, ``topk`` < 1, or cross features.
        ConfigError: under ``longctr_compat``, a batch padded to less than ``short_seq_len``.

    Source: Chang et al., TWIN, KDD 2023 (arXiv 2302.02352), eq. 6-9, as configured in LongCTR.
    """

    #: parameter names of LongCTR's TWIN that differ from ours
    LONGCTR_NAMES: ClassVar[dict[str, str]] = {"long_attention.W_h.": "long_attention.W_k."}

    def __init__(
        self,
        item_dim: int,
        wrap_long: Callable[[Callable[[], nn.Module]], nn.Module] | None = None,
        *,
        attention_dim: int = 64,
        num_heads: int = 1,
        attention_dropout: float = 0.0,
        short_seq_len: int = 50,
        topk: int = 50,
        Kc_cross_features: int = 0,
        longctr_compat: bool = False,
    ) -> None:
        super().__init__()
        if short_seq_len < 2:
            raise ValueError(f"short_seq_len must be at least 2, not {short_seq_len}")
        if topk < 1:
            raise ValueError(f"topk must be at least 1, not {topk}")
        if Kc_cross_features:
            raise ValueError("Kc_cross_features must be 0: LongCTR's cross features never ran")
        self.short_seq_len = short_seq_len
        self.longctr_compat = longctr_compat
        self.short_attention = TargetAttention(
            item_dim, attention_dim, num_heads, attention_dropout, attend_padding=longctr_compat
        )

        def long_branch() -> TargetAttention:
            return TargetAttention(
                item_dim, attention_dim, num_heads, attention_dropout, topk, attend_padding=longctr_compat
            )

        self.long_attention = wrap_long(long_branch) if wrap_long else long_branch()
        self.out_dim = item_dim + int(self.long_attention.out_dim)  # type: ignore[arg-type]
        self.has_losses = bool(getattr(self.long_attention, "has_losses", False))
        self.rows_to_share = int(getattr(self.long_attention, "rows_to_share", ROWS_TO_SHARE))

    def forward(
        self, query: Tensor, sequence: Sequence | SharedSequence, losses: list[Tensor] | None = None
    ) -> Tensor:
        """``[B, 2d]`` interest of each row towards its target ``query [B, d]``; a wrapped long branch gets ``losses``."""
        if self.attends and isinstance(sequence, Sequence):
            return run_block(self, query, sequence)
        short = self.short_attention(query, short_window(sequence, self.short_seq_len, self.longctr_compat))
        long = call_block(self.long_attention, query, sequence, losses)
        return torch.cat([short, long], dim=-1)

    @property
    def shares(self) -> bool:
        """Whether it can read a history once for several rows."""
        return not self.longctr_compat

    @property
    def attends(self) -> bool:
        """Whether attention is all that the block does with the history (a wrapped long branch may do more)."""
        return isinstance(serving(self.long_attention), TargetAttention) and not self.longctr_compat

    @property
    def _branches(self) -> tuple[TargetAttention, TargetAttention]:
        """Short and long, while the block `attends`."""
        return self.short_attention, serving(self.long_attention)  # type: ignore[return-value]

    def reads(self) -> list[BranchRead]:
        """The newest items for the short branch, the best-scored ones for the long branch."""
        [short], [long] = (branch.reads() for branch in self._branches)
        return [replace(short, newest=self.short_seq_len - 1), long]

    def absorb(self, query: Tensor) -> Tensor:
        """Both branches' queries in the item space, ``[B, 2h, d]``."""
        return torch.cat([branch.absorb(query) for branch in self._branches], 1)

    def finish(self, query: Tensor, pooled: list[Tensor] | None) -> Tensor:
        """``[short ; long]``."""
        parts = [None, None] if pooled is None else [[result] for result in pooled]
        return torch.cat([b.finish(query, part) for b, part in zip(self._branches, parts, strict=True)], dim=-1)
