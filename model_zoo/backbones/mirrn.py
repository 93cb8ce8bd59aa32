"""MIRRN: target attention over the newest items beside three retrieved interests, each passed through a filter."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo.errors import ConfigError
from model_zoo.layers.attend_items import GATHERED_FLOATS
from model_zoo.layers.fourier_filter import FourierFilter
from model_zoo.layers.lsh import LSH
from model_zoo.layers.retrieval import keep_columns, nearest_columns
from model_zoo.layers.sequence import Sequence
from model_zoo.layers.short_window import short_window
from model_zoo.layers.target_attention import TargetAttention

#: items whose mean is the query of the local retrieval
LOCAL_ITEMS = 16
#: of position embeddings, beside item vectors
POSITION_SCALE = 0.02


class MIRRNBlock(nn.Module):
    """``[short ; long]``, each of the item's width d.

    Three searches by Hamming distance, for the target, for the mean of the newest 16 items (local) and for the mean of the
    whole history (global), keep ``topk`` items each, in time order. Their vectors, with the embedding of their place
    counted from the newest item, pass through a filter each (MHFT); the means over the kept items are three interests, and
    the long branch attends to them.

    Args:
        item_dim: d, width of an item vector.
        attention_dim: width of each branch's attention space over all heads.
        num_heads: heads of each branch.
        use_scale: divide scores by the square root of a head's width.
        attention_dropout: dropout on attention weights.
        reuse_hash: see `LSH`. LongCTR's ``False`` draws for every search, in evaluation too: random predictions.
        hash_bits: length of a code.
        hash_seed: of the fixed rotations.
        topk: items kept by each search.
        max_len: longest history; the position table has a row more.
        mask_retrieved: a history with fewer than ``topk`` items is filtered and averaged over those it has, as LongCTR
            would read it alone in a batch. False: it counts as filled up to ``topk`` with zero vectors. Not used under
            ``longctr_compat``: LongCTR computes the searches' mask and drops it, so padding is filtered and averaged with
            the items and predictions depend on the padding vector and on the batch's length (by up to 0.11).
        filter_dropout: dropout of the filters' outputs.
        short_seq_len: the short branch reads one item fewer than this.
        longctr_compat: reproduce LongCTR: its short window, its draws under ``reuse_hash: False``, its use of padding, its
            choice among equally near items, and its filters' weights, most of which have no effect (see `FourierFilter`).

    Raises:
        ValueError: ``hash_bits``, ``topk`` or ``max_len`` < 1, or ``short_seq_len`` < 2; under ``longctr_compat`` a d that
            is not a multiple of 4.
        ConfigError: a history longer than ``max_len``; under ``longctr_compat`` a batch padded to less than
            ``short_seq_len``.

    Source: Xu et al., Multi-granularity Interest Retrieval and Refinement Network for Long-Term User Behavior Modeling in
    CTR Prediction, KDD 2025 (arXiv 2411.15005), as configured in LongCTR.
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
        max_len: int = 1000,
        mask_retrieved: bool = True,
        filter_dropout: float = 0.1,
        short_seq_len: int = 50,
        longctr_compat: bool = False,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("hash_bits", hash_bits, 1), ("topk", topk, 1), ("max_len", max_len, 1), ("short_seq_len", short_seq_len, 2),
        ):  # fmt: skip
            if value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")
        self.topk = topk
        self.max_len = max_len
        self.mask_retrieved = mask_retrieved
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
        self.lsh = LSH((item_dim, hash_bits), 1, reuse_hash, hash_seed, longctr_compat)
        self.pos = nn.Embedding(max_len + 1, item_dim)
        self.MHFT_block = nn.ModuleList(
            FourierFilter(item_dim, topk, filter_dropout, full_blocks=longctr_compat) for _ in range(3)
        )

    def forward(self, query: Tensor, sequence: Sequence) -> Tensor:
        """``[B, 2d]`` interest of each row towards its target ``query [B, d]``."""
        short = self.short_attention(query, short_window(sequence, self.short_seq_len, self.longctr_compat))
        if sequence.index.shape[1] == 0:
            return query.new_zeros(len(query), self.out_dim)
        if sequence.index.shape[1] > self.max_len:
            longest = int(sequence.lengths.max())
            if longest > self.max_len:
                raise ConfigError(f"max_len is {self.max_len}, but a history has {longest} items; raise it")
        searches = zip(self._searches(query, sequence), self.MHFT_block, strict=True)
        stacked = torch.stack([self._interest(columns, sequence, part) for columns, part in searches], 1)  # [B, 3, d]
        everyone = torch.ones(stacked.shape[:2], dtype=torch.bool, device=stacked.device)
        long = self.long_attention(query, Sequence.from_vectors(stacked, everyone))
        return torch.cat([short, long], dim=-1)

    @torch.no_grad()
    def _searches(self, query: Tensor, sequence: Sequence) -> list[Tensor]:
        """Columns ``[B, k]`` kept for the target, for the newest items and for the whole history."""

        def hashed() -> tuple[Tensor, Tensor, Tensor]:
            rotations = self.lsh.rotations(len(query))
            rotated = self.lsh.rotate(sequence.items, rotations)  # [U, bits]
            return rotations, rotated, self.lsh.codes(rotated)

        rotations, rotated, tokens = hashed()
        found: list[Tensor] = []
        for centre in (None, sequence.last(LOCAL_ITEMS), sequence):
            if found and self.longctr_compat:  # LongCTR draws anew for every search
                rotations, rotated, tokens = hashed()
            # the mean's sign is the sum's, and the sum is taken after rotating: bits are fewer than d
            point = self.lsh.rotate(query, rotations) if centre is None else _sum_rows(rotated, centre)
            distance = self.lsh.mismatches(self.lsh.codes(point), tokens, sequence.index)
            found.append(nearest_columns(distance, sequence.mask, self.topk, self.longctr_compat))
        return found

    def _interest(self, columns: Tensor, sequence: Sequence, part: nn.Module) -> Tensor:
        """Mean ``[B, d]`` of the filtered vectors of the tokens at ``columns [B, k]``."""
        kept = keep_columns(sequence, columns)
        place = (sequence.index.shape[1] - columns).clamp(max=self.max_len)  # 1 = newest; clamped ones are padding
        vectors, positions = kept.vectors, POSITION_SCALE * self.pos.weight
        budget = 2**28 if vectors.is_cuda else GATHERED_FLOATS
        rows = max(budget // max(vectors[0].numel() if len(vectors) else 0, 1), 1)
        groups = zip(vectors.split(rows), place.split(rows), kept.mask.split(rows), strict=True)
        return torch.cat([self._refined(part, v + F.embedding(p, positions), m) for v, p, m in groups])

    def _refined(self, part: nn.Module, vectors: Tensor, mask: Tensor) -> Tensor:
        """Mean over the real tokens of what the filter makes of a group of rows ``[r, k, d]``; zeros if there are none."""
        if self.longctr_compat:
            mask = torch.ones_like(mask)
        elif not self.mask_retrieved:
            vectors = F.pad(vectors * mask.unsqueeze(2), (0, 0, self.topk - mask.shape[1], 0))
            mask = mask.any(1, keepdim=True).expand(-1, self.topk)
        weight = mask.to(vectors.dtype) / mask.sum(1, keepdim=True).clamp(min=1)
        return (weight.unsqueeze(1) @ part(vectors, mask)).squeeze(1)


def _sum_rows(table: Tensor, sequence: Sequence) -> Tensor:
    """``[B, D]`` sum over each row's real tokens of the rows of a table ``[U, D]`` over the items."""
    return F.embedding_bag(sequence.index, table, mode="sum", per_sample_weights=sequence.mask.to(table.dtype))
