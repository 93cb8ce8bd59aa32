"""SDIM: target attention over the newest items beside hash-collision pooling of the whole history."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo.layers.attend_items import grouped_histories
from model_zoo.layers.attention_branches import BranchRead, run_block
from model_zoo.layers.blocks import ROWS_TO_SHARE, call_block
from model_zoo.layers.item_rows import pool_rows
from model_zoo.layers.lsh import LSH
from model_zoo.layers.sequence import Sequence, SharedSequence
from model_zoo.layers.short_window import short_window
from model_zoo.layers.target_attention import TargetAttention

#: buckets over all hashes up to which shared histories are summed by bucket
MOST_BUCKETS = 1024


class SDIMBlock(nn.Module):
    """``[long ; short]``, each of the item's width d.

    The long branch has no trainable parameter: under each of ``num_hashes`` hashes, the items that collide with the target
    are summed; the mean over the hashes weighs an item by its share of colliding hashes, ``y = sum_l share_l x_l``.
    Hashing passes no gradient, so the branch reaches the history's vectors alone.

    Args:
        item_dim: d, width of an item vector.
        wrap_long: builds the long branch from its factory; a mixture of experts over the long branch alone goes here. As
            that branch has nothing to train, its copies get a linear map at their end, which starts as the identity.
        attention_dim: width of the short branch's attention space over all heads.
        use_qkvo: False leaves the short branch's projections out.
        num_heads: heads of the short branch.
        use_scale: divide the short branch's scores by the square root of a head's width.
        attention_dropout: dropout on the short branch's weights.
        reuse_hash: see `LSH`. LongCTR's ``False`` draws for every sample, in evaluation too: random predictions.
        num_hashes: H, hashes.
        hash_bits: signs per hash; a random item collides with probability ``2 ** -hash_bits``.
        hash_seed: of the fixed rotations.
        l2_norm: each hash's sum is scaled to length one before the mean.
        short_seq_len: the short branch reads one item fewer than this.
        longctr_compat: reproduce LongCTR's short window and its draws under ``reuse_hash: False``. Its sums beyond 2^24
            collisions, where offsets counted in float32 lose items, are not reproduced.

    Raises:
        ValueError: ``num_hashes`` < 1, ``hash_bits`` out of 1..52 or ``short_seq_len`` < 2.
        ConfigError: under ``longctr_compat``, a batch padded to less than ``short_seq_len``.

    Source: Cao et al., Sampling Is All You Need on Modeling Long-Term User Behaviors for CTR Prediction, CIKM 2022
    (arXiv 2205.10249), as configured in LongCTR.
    """

    powers_of_two: Tensor

    def __init__(
        self,
        item_dim: int,
        wrap_long: Callable[[Callable[[], nn.Module]], nn.Module] | None = None,
        *,
        attention_dim: int = 64,
        use_qkvo: bool = True,
        num_heads: int = 1,
        use_scale: bool = True,
        attention_dropout: float = 0.0,
        reuse_hash: bool = True,
        num_hashes: int = 1,
        hash_bits: int = 4,
        hash_seed: int = 0,
        l2_norm: bool = False,
        short_seq_len: int = 50,
        longctr_compat: bool = False,
    ) -> None:
        super().__init__()
        if num_hashes < 1:
            raise ValueError(f"num_hashes must be at least 1, not {num_hashes}")
        if short_seq_len < 2:
            raise ValueError(f"short_seq_len must be at least 2, not {short_seq_len}")
        self.short_seq_len = short_seq_len
        self.longctr_compat = longctr_compat
        self.short_attention = TargetAttention(
            item_dim,
            attention_dim,
            num_heads,
            attention_dropout,
            attend_padding=longctr_compat,
            use_scale=use_scale,
            use_qkvo=use_qkvo,
        )

        def long_branch() -> CollisionPooling:
            shape = (1, item_dim, num_hashes, hash_bits)
            lsh = LSH(shape, hash_bits, reuse_hash, hash_seed, longctr_compat)
            return CollisionPooling(lsh, item_dim, l2_norm, with_output=wrap_long is not None)

        self.long = wrap_long(long_branch) if wrap_long else long_branch()
        self.has_losses = bool(getattr(self.long, "has_losses", False))
        self.rows_to_share = int(getattr(self.long, "rows_to_share", ROWS_TO_SHARE))
        self.out_dim = item_dim + int(self.long.out_dim)  # type: ignore[arg-type]
        # read by nothing here: LongCTR's checkpoints hold the place values of a bucket's bits
        self.register_buffer("powers_of_two", 2.0 ** torch.arange(hash_bits))

    @property
    def shares(self) -> bool:
        """Whether it can read a history once for several rows."""
        return not self.longctr_compat

    @property
    def attends(self) -> bool:
        """Whether all that the block does with the history are weighted sums of its items."""
        plain = isinstance(self.long, CollisionPooling) and self.long.output is None and not self.long.l2_norm
        return plain and not self.longctr_compat

    def reads(self) -> list[BranchRead]:
        """All items by their collisions for the long branch, the newest ones for the short branch."""
        short = replace(self.short_attention.reads()[0], newest=self.short_seq_len - 1)
        return [BranchRead(1, weigh=self.long.shares_of), short]  # type: ignore[arg-type]

    def absorb(self, query: Tensor) -> Tensor:
        """The target itself, which the long branch hashes, and the short branch's queries, ``[B, 1 + h, d]``."""
        return torch.cat([query.unsqueeze(1), self.short_attention.absorb(query)], 1)

    def finish(self, query: Tensor, pooled: list[Tensor] | None) -> Tensor:
        """``[long ; short]``."""
        if pooled is None:
            return torch.cat([torch.zeros_like(query), self.short_attention.finish(query, None)], -1)
        return torch.cat([pooled[0].squeeze(1), self.short_attention.finish(query, pooled[1:])], -1)

    def forward(
        self, query: Tensor, sequence: Sequence | SharedSequence, losses: list[Any] | None = None
    ) -> Tensor:
        """``[B, 2d]`` interest of each row towards its target ``query [B, d]``; a wrapped long branch gets ``losses``."""
        if self.attends and isinstance(sequence, Sequence):
            return run_block(self, query, sequence)
        short = self.short_attention(query, short_window(sequence, self.short_seq_len, self.longctr_compat))
        return torch.cat([call_block(self.long, query, sequence, losses), short], dim=-1)


class CollisionPooling(nn.Module):
    """``y = sum_l share_l x_l``, share_l the share of hashes under which item l collides with the target.

    Args:
        lsh: the hashes.
        item_dim: d.
        l2_norm: each hash's sum is scaled to length one before the mean over hashes.
        with_output: a linear map of y, the identity at the start.
    """

    def __init__(self, lsh: LSH, item_dim: int, l2_norm: bool, with_output: bool) -> None:
        super().__init__()
        self.lsh = lsh
        self.l2_norm = l2_norm
        self.out_dim = item_dim
        self.output = nn.Linear(item_dim, item_dim, bias=False) if with_output else None
        self.init_weights()

    def init_weights(self) -> None:
        """The output map starts as the identity."""
        if self.output is not None:
            nn.init.eye_(self.output.weight)

    @property
    def shares(self) -> bool:
        """Whether it can read a history once for several rows."""
        return not self.lsh.draws_in_evaluation and self.lsh.num_hashes << self.lsh.hash_bits <= MOST_BUCKETS

    def forward(self, query: Tensor, sequence: Sequence | SharedSequence) -> Tensor:
        """``[B, d]``; zeros where nothing collides."""
        if isinstance(sequence, SharedSequence):
            pooled = self._shared(query, sequence)
            return pooled if self.output is None else self.output(pooled)
        if sequence.index.shape[1] == 0:
            return query.new_zeros(len(query), self.out_dim)
        if self.l2_norm:
            pooled = self._mean_of_directions(self.lsh.collisions(*self.lsh.hashed(query, sequence)), sequence)
        else:
            pooled = pool_rows(sequence.items, sequence.index, self.shares_of(query, sequence) * sequence.mask)
        return pooled if self.output is None else self.output(pooled)

    @torch.no_grad()
    def shares_of(self, query: Tensor, sequence: Sequence) -> Tensor:
        """``[B, T]`` share of hashes under which each token collides with its row's target (anything where masked)."""
        colliding = self.lsh.num_hashes - self.lsh.mismatches(*self.lsh.hashed(query, sequence))
        return colliding.to(sequence.items.dtype) / self.lsh.num_hashes

    @torch.no_grad()
    def _shared(self, query: Tensor, sequence: SharedSequence) -> Tensor:
        """``[B, d]`` before the output map.

        With T and C the bucket tables of a history's items and of its targets, the answers are ``C T^t X / H``: the share
        of each item first, or the sum of each bucket first, whichever takes fewer products.
        """
        histories, hashes = sequence.histories, self.lsh.num_hashes
        pooled = query.new_zeros(len(query), self.out_dim)
        if histories.index.shape[1] == 0:
            return pooled
        tokens, targets = self.lsh.bucket_table(histories.items), self.lsh.bucket_table(query)
        (length, dim), buckets = (histories.index.shape[1], query.shape[1]), tokens.shape[1]
        for group in grouped_histories(sequence):
            real = histories.mask[group.history]
            vectors = group.vectors if bool(real.all()) else group.vectors.mul_(real.unsqueeze(2))
            token = F.embedding(histories.index[group.history], tokens).transpose(1, 2)  # [p, buckets, T]
            target = targets[group.slots]  # [p, C, buckets]
            columns = target.shape[1]
            if self.l2_norm or buckets * dim * (length + columns) < columns * length * (buckets + dim):
                sums = token @ vectors  # [p, buckets, d]
                answer = target @ (F.normalize(sums, dim=-1) if self.l2_norm else sums)
            else:
                answer = target @ token @ vectors
            pooled[group.rows] = group.unpad(answer / hashes).to(pooled.dtype)
        return pooled

    @staticmethod
    def _mean_of_directions(collides: Tensor, sequence: Sequence) -> Tensor:
        """Mean over hashes of the unit vectors of ``sum_l collides[b, h, l] x_l``, zeros where nothing collides."""
        collides = collides & sequence.mask.unsqueeze(1)  # [B, H, T]
        index = sequence.index.unsqueeze(1).expand_as(collides)[collides]
        counts = collides.sum(2).flatten()
        # whole numbers: as float32 the offsets would stop being exact at 2^24 collisions in a batch
        offsets = counts.cumsum(0) - counts
        sums = F.embedding_bag(index, sequence.items, offsets, mode="sum")
        return F.normalize(sums.unflatten(0, collides.shape[:2]), dim=-1).mean(1)
