"""ETA: target attention over the newest items beside target attention over the items of nearest hash code."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model_zoo.layers.lsh import LSH
from model_zoo.layers.retrieval import keep_columns, nearest_columns
from model_zoo.layers.sequence import Sequence
from model_zoo.layers.short_window import short_window
from model_zoo.layers.target_attention import TargetAttention


class ETABlock(nn.Module):
    """``[short ; long]``, each of the item's width d.

    The long branch keeps the ``topk`` items whose sign codes are nearest to the target's in Hamming distance, of equally
    near ones the newest, and attends to them.

    Args:
        item_dim: d, width of an item vector.
        attention_dim: width of each branch's attention space over all heads.
        num_heads: heads of each branch.
        use_scale: divide scores by the square root of a head's width.
        attention_dropout: dropout on attention weights.
        reuse_hash: see `LSH`. LongCTR's ``False`` draws for every sample, in evaluation too: random predictions.
        hash_bits: length of a code.
        hash_seed: of the fixed rotations.
        topk: items kept by the long branch.
        short_seq_len: the short branch reads one item fewer than this.
        longctr_compat: reproduce LongCTR: its short window, its draws under ``reuse_hash: False``, its attention to
            padding in empty rows, and its choice among equally near items, which depends on the batch's padded length.

    Raises:
        ValueError: ``hash_bits`` < 1, ``topk`` < 1 or ``short_seq_len`` < 2.
        ConfigError: under ``longctr_compat``, a batch padded to less than ``short_seq_len``.

    Source: Chen et al., End-to-End User Behavior Retrieval in Click-Through Rate Prediction Model (arXiv 2108.04468),
    as configured in LongCTR.
    """

    def __init__(
        self,
        item_dim: int,
        *,
        attention_dim: int = 64,
        num_heads: int = 1,
        use_scale: bool = True,
        attention_dropout: float = 0.0,
        reuse_hash: bool = True,
        hash_bits: int = 32,
        hash_seed: int = 0,
        topk: int = 50,
        short_seq_len: int = 50,
        longctr_compat: bool = False,
    ) -> None:
        super().__init__()
        for name, value, least in (("hash_bits", hash_bits, 1), ("topk", topk, 1), ("short_seq_len", short_seq_len, 2)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")
        self.topk = topk
        self.short_seq_len = short_seq_len
        self.longctr_compat = longctr_compat
        self.out_dim = 2 * item_dim

        def attention() -> TargetAttention:
            return TargetAttention(
                item_dim,
                attention_dim,
                num_heads,
                attention_dropout,
                attend_padding=longctr_compat,
                use_scale=use_scale,
            )

        self.short_attention, self.long_attention = attention(), attention()
        self.lsh = LSH((1, item_dim, hash_bits), 1, reuse_hash, hash_seed, longctr_compat)

    def forward(self, query: Tensor, sequence: Sequence) -> Tensor:
        """``[B, 2d]`` interest of each row towards its target ``query [B, d]``."""
        short = self.short_attention(query, short_window(sequence, self.short_seq_len, self.longctr_compat))
        distance = self.lsh.mismatches(*self.lsh.hashed(query, sequence))
        columns = nearest_columns(distance, sequence.mask, self.topk, self.longctr_compat)
        long = self.long_attention(query, keep_columns(sequence, columns))
        return torch.cat([short, long], dim=-1)
