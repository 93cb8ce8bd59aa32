"""SIM with soft search: target attention over the newest items beside target attention over the best-scored ones."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from model_zoo.layers.retrieval import best_columns, keep_columns
from model_zoo.layers.sequence import Sequence
from model_zoo.layers.short_window import short_window
from model_zoo.layers.soft_search import soft_search
from model_zoo.layers.target_attention import TargetAttention


class SIMBlock(nn.Module):
    """``[short ; long ; pooled]``, each of the item's width d.

    The search scores each item by ``W_a q . W_b x_l``; the long branch attends to the ``topk`` best. The choice carries
    no gradient: the search learns through ``pooled``, the sum of the items by their scores, which `SIMHead` reads
    beside the interest.

    Args:
        item_dim: d, width of an item vector.
        attention_dim: width of the search space, and of each branch's attention space over all heads.
        num_heads: heads of each branch.
        attention_dropout: dropout on attention weights.
        gsu_type: the search; only the soft one.
        topk: items kept by the long branch.
        short_seq_len: the short branch reads one item fewer than this.
        longctr_compat: reproduce LongCTR: its short window, its attention to padding in empty rows, and its search, where
            padding scores 0 and so outranks real items of negative score.

    Raises:
        ValueError: ``topk`` < 1 or ``short_seq_len`` < 2.
        ConfigError: under ``longctr_compat``, a batch padded to less than ``short_seq_len``.

    Source: Pi et al., Search-based User Interest Modeling with Lifelong Sequential Behavior Data, CIKM 2020
    (arXiv 2006.05639), section on the two search units, as configured in LongCTR.
    """

    def __init__(
        self,
        item_dim: int,
        *,
        attention_dim: int = 64,
        num_heads: int = 1,
        attention_dropout: float = 0.0,
        gsu_type: Literal["soft"] = "soft",
        topk: int = 50,
        short_seq_len: int = 50,
        longctr_compat: bool = False,
    ) -> None:
        super().__init__()
        if gsu_type != "soft":
            raise ValueError(f"gsu_type must be soft, not {gsu_type}")
        if topk < 1:
            raise ValueError(f"topk must be at least 1, not {topk}")
        if short_seq_len < 2:
            raise ValueError(f"short_seq_len must be at least 2, not {short_seq_len}")
        self.topk = topk
        self.short_seq_len = short_seq_len
        self.longctr_compat = longctr_compat
        self.out_dim = 3 * item_dim
        self.W_a = nn.Linear(item_dim, attention_dim, bias=False)
        self.W_b = nn.Linear(item_dim, attention_dim, bias=False)

        def attention() -> TargetAttention:
            return TargetAttention(
                item_dim, attention_dim, num_heads, attention_dropout, attend_padding=longctr_compat
            )

        self.short_attention, self.long_attention = attention(), attention()

    def forward(self, query: Tensor, sequence: Sequence) -> Tensor:
        """``[B, 3d]``: interest of each row towards its target ``query [B, d]``, and its pooled history."""
        short = self.short_attention(query, short_window(sequence, self.short_seq_len, self.longctr_compat))
        absorbed = self.W_a(query) @ self.W_b.weight  # W_a q . W_b x = (W_b^T W_a q) . x
        pooled, scores = soft_search(absorbed, sequence.items, sequence.index, sequence.mask)
        columns = best_columns(scores, sequence.mask, self.topk, self.longctr_compat)
        long = self.long_attention(query, keep_columns(sequence, columns))
        return torch.cat([short, long, pooled], dim=-1)
