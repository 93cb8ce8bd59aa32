"""FuXi-alpha's layer: three kinds of unnormalised attention over one set of values, and a gated feed-forward net."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo.layers.token_experts import GatedFeedForward, Mix, TokenExperts, mix_linear

NORM_EPS = 1e-6
#: initial standard deviation of the input map and of both tables
INIT_STD = 0.02
#: rows of the table of time gaps, and the natural logarithm of the factor that one of them spans
BUCKETS, BUCKET_WIDTH = 129, 0.301

MoETargets = Literal["all", "uvqk", "output", "ffn"]


class FuXiLayer(nn.Module):
    """Adaptive multi-channel attention, then a feed-forward net that mixes channels and features.

    With ``x' = RMSNorm(x)`` and ``[u | q | v | k] = SiLU(x' W)``, token i gathers ``sum_j A_ij v_j`` over itself and its
    past in each channel: position ``beta[i - j]``, time ``tau[bucket(t_{i+1} - t_j)]`` and meaning ``SiLU(q_i . k_j) / N``.
    Then ``o = W_o Dropout(RMSNorm(channels) * u) + b_o + x`` and, with ``r = Dropout(RMSNorm(o))``, the answer is
    ``W_2 (SiLU(W_1 r) * W_3 r) + o``. Norms have no gain. N is a constant, so that a shorter history is no louder.

    Each of the three maps may be a mixture of experts, whose gate reads ``x'`` (``r`` for the feed-forward net).

    Args:
        width: d.
        num_heads: attention heads.
        qk_dim: width of a head's queries and keys.
        value_dim: width of a head's values.
        max_positions: N, distances of the position channel; a farther token counts as one at N - 1.
        ffn_ratio: hidden width of the feed-forward net over d.
        ffn_single_stage: leave it out, so that o is the answer.
        temporal_channel: with the channel of time gaps. A sequence says nothing of the target's time, so the newest
            token's next time is its own.
        dropout: on what the output map and the feed-forward net read.
        num_experts: experts in the place of each map in ``moe_targets``; 1 = the map itself.
        topk: of which each token has so many.
        moe_targets: which maps are mixtures.

    Source: Ye et al., FuXi-alpha (arXiv 2502.03036), section 3.3, as its release computes it: no softmax, no 1/sqrt(d).
    The release's table of positions has 2 N - 1 rows, of which causal attention reads N: those are kept.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int,
        qk_dim: int,
        value_dim: int,
        max_positions: int,
        ffn_ratio: int,
        ffn_single_stage: bool,
        temporal_channel: bool,
        dropout: float,
        num_experts: int = 1,
        topk: int = 1,
        moe_targets: MoETargets = "all",
    ) -> None:
        super().__init__()
        self.heads = num_heads
        self.max_positions = max_positions
        channels = 3 if temporal_channel else 2
        values = num_heads * value_dim
        #: widths of u and q, which an answering token has, and of v and k, which every token has
        self.query_sizes, self.key_sizes = [channels * values, num_heads * qk_dim], [values, num_heads * qk_dim]

        def mixture(target: MoETargets, make: Callable[[], nn.Module], mix: Mix = mix_linear) -> TokenExperts:
            chosen = moe_targets in (target, "all")
            return TokenExperts(make, mix, width, *((num_experts, topk) if chosen else (1, 1)))

        self.uvqk = mixture("uvqk", lambda: nn.Linear(width, sum(self.query_sizes + self.key_sizes), bias=False))
        self.output = mixture("output", lambda: nn.Linear(channels * values, width))
        self.ffn = None
        if not ffn_single_stage:
            self.ffn = mixture("ffn", lambda: GatedFeedForward(width, ffn_ratio * width), GatedFeedForward.mix)
        self.positions = nn.Parameter(torch.empty(max_positions))
        self.gaps = nn.Parameter(torch.empty(BUCKETS)) if temporal_channel else None
        self.dropout = nn.Dropout(dropout)
        self.init_weights()

    def init_weights(self) -> None:
        """The release's start values; called again after FuxiCTR's reset."""
        for expert in self.uvqk.experts:
            nn.init.normal_(expert.weight, std=INIT_STD)  # type: ignore[arg-type]
        for expert in self.output.experts:
            nn.init.xavier_uniform_(expert.weight)  # type: ignore[arg-type]
        nets = [] if self.ffn is None else [linear for expert in self.ffn.experts for linear in expert.children()]
        for linear in nets:
            nn.init.xavier_uniform_(linear.weight)  # type: ignore[arg-type]
        for table in (self.positions, self.gaps):
            if table is not None:
                nn.init.normal_(table, std=INIT_STD)

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor,
        times: Tensor | None = None,
        losses: list[Tensor] | None = None,
        weight: float = 0.0,
        newest: bool = False,
    ) -> Tensor:
        """Every position's answer, or the newest one's alone.

        Args:
            tokens: ``[B, T, d]``, T >= 1; finite at padding too.
            mask: ``[B, T]`` bool, True = real, at the right end of each row.
            times: ``[B / m, T]`` int64 seconds, read by the time channel; each row's are those of m rows of tokens.
            losses: see `TokenExperts`; ``weight`` likewise.
            newest: answer for the last column only.

        Returns:
            ``[B, T, d]``, finite at padding; T = 1 under ``newest``.
        """
        read = F.rms_norm(tokens, tokens.shape[-1:], eps=NORM_EPS)
        last, queries = slice(-1, None) if newest else slice(None), sum(self.query_sizes)
        if newest:  # u and q of the last column alone
            keys = self.uvqk(read, read, mask, losses, weight, rows=slice(queries, None))
            read = read[:, last]
            asked = self.uvqk(read, read, mask[:, last], rows=slice(queries))
        else:
            asked, keys = self.uvqk(read, read, mask, losses, weight).split([queries, sum(self.key_sizes)], -1)
        u, q = F.silu(asked).split(self.query_sizes, -1)
        # a key at padding adds nothing to any channel
        v, k = F.silu(keys.masked_fill(~mask.unsqueeze(2), 0)).split(self.key_sizes, -1)
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))  # [B, h, T, .]
        mixed = torch.cat([weights @ v for weights in self._weights(q, k, times)], -1)  # [B, h, T', c v]
        mixed = mixed.transpose(1, 2).flatten(2)
        mixed = self.dropout(F.rms_norm(mixed, mixed.shape[-1:], eps=NORM_EPS) * u)
        tokens, mask = tokens[:, last], mask[:, last]
        tokens = self.output(mixed, read, mask, losses, weight) + tokens
        if self.ffn is None:
            return tokens
        read = self.dropout(F.rms_norm(tokens, tokens.shape[-1:], eps=NORM_EPS))
        return self.ffn(read, read, mask, losses, weight) + tokens

    def _weights(self, q: Tensor, k: Tensor, times: Tensor | None) -> list[Tensor]:
        """By channel, ``[T', T]``, ``[B, 1, T', T]`` or ``[B, h, T', T]``: zero where a key comes after its query."""
        length, asking = k.shape[2], q.shape[2]
        column = torch.arange(length, device=k.device)
        distance = column[length - asking :].unsqueeze(1) - column  # [T', T]
        past = (distance >= 0).to(k.dtype)
        found = [F.embedding(distance.clamp(0, self.max_positions - 1), self.positions.unsqueeze(1)).squeeze(2) * past]
        if self.gaps is not None:
            assert times is not None, "the time channel needs the times of the tokens"
            after = torch.cat([times[:, 1:], times[:, -1:]], 1)[:, length - asking :]
            bucket = gap_buckets(after.unsqueeze(2) - times.unsqueeze(1))  # [rows, T', T]
            weights = F.embedding(bucket, self.gaps.unsqueeze(1)).squeeze(3) * past
            found.append(weights.repeat_interleave(len(k) // len(times), 0).unsqueeze(1))
        found.append(F.silu(q @ k.transpose(2, 3)) * (past / self.max_positions))
        return [weights.to(k.dtype) for weights in found]


def gap_buckets(gaps: Tensor) -> Tensor:
    """The bucket of a time gap in seconds, ``floor(ln(max(|gap|, 1)) / 0.301)`` within 0..128; int64, of any shape."""
    size = gaps.abs().clamp(min=1).double().log() / BUCKET_WIDTH
    return size.floor().long().clamp(0, BUCKETS - 1)
