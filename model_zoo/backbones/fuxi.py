"""FuXi-alpha and FuXi-MME: several embeddings of each item read by one decoder whose maps are mixtures of experts."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo.layers.fuxi_layer import FuXiLayer, MoETargets
from model_zoo.layers.sequence import Sequence
from model_zoo.layers.timed_sequence import times_of

#: of FuxiCTR's embeddings; positions start as large as they, as in the release, where both start much larger. So small
#: vectors are of the size of the first norm's epsilon, which makes it a little less than a norm at first.
EMBEDDING_STD = 1e-4
#: a vector shorter than this has a smaller cosine: towards an item vector of nearly zero gradients would be huge otherwise
COSINE_EPS = 1e-6


class FuXiMMEBlock(nn.Module):
    """M vectors of each item, each history of such vectors read by the same `FuXiLayer`s; their newest answers joined.

    An item vector of width d is M vectors of width d / M: the tables have together as many parameters as one. Dimension i
    belongs to table i mod M, so that each table has a part of every item feature that is at least M wide. The M histories
    of a row share the layers, whose maps are therefore mixtures of experts with a gate for each token.

    Positions count from the newest item (0), so neither padding nor a longer history moves them. Of the last layer only
    the newest position is answered. The interest does not depend on the target, which meets it in the head.

    Args:
        item_dim: d.
        num_tables: M; must divide d.
        layer_experts: E, experts of each map.
        layer_topk: k, experts of a token.
        moe_targets: the maps that are mixtures: the input map ``uvqk``, the ``output`` map, the feed-forward net ``ffn``,
            or ``all`` three.
        balance_weight: of the balance loss, summed over the mixtures. A copy of this block that is an expert of MoS or of a
            rival has none.
        num_layers: layers.
        num_heads: attention heads; must divide d / M unless both head widths are given.
        qk_dim: width of a head's queries and keys; None = d / M / heads.
        value_dim: width of a head's values; None likewise.
        ffn_ratio: hidden width of the feed-forward net over d / M.
        ffn_single_stage: leave the feed-forward net out.
        temporal_channel: with the channel of time gaps; the data need times then (``time_col``). LongCTR's have none.
        max_positions: N, rows of both position tables, and the constant that divides semantic scores; ``max_len``, say.
            Items older than that share the oldest position.
        hidden_dropout: on item vectors with their positions, and in both halves of a layer.
        temperature: under ``head: dot``, divides the cosine.
        merge: under ``head: dot``, ``concat`` compares the joined vectors with the target's, ``mean_cosine`` averages the
            M cosines.
        head: ``dnn`` gives the joined unit vector, ``dot`` its cosine with the target over the temperature as ``[B, 1]``
            logits, the paper's scoring.

    Raises:
        ValueError: a setting out of range, or widths that do not divide.
        ConfigError: ``temporal_channel`` and histories without times.

    Source: FuXi-MME (arXiv 2510.25285), of which no code is public: its abstract names the tables of constant total size,
    the shared decoder and the mixtures; which maps, the gate, the merge and all figures are our choice.
    """

    has_losses = True

    def __init__(
        self,
        item_dim: int,
        *,
        num_tables: int = 4,
        layer_experts: int = 4,
        layer_topk: int = 2,
        moe_targets: MoETargets = "all",
        balance_weight: float = 0.01,
        num_layers: int = 2,
        num_heads: int = 2,
        qk_dim: int | None = None,
        value_dim: int | None = None,
        ffn_ratio: int = 1,
        ffn_single_stage: bool = False,
        temporal_channel: bool = False,
        max_positions: int = 200,
        hidden_dropout: float = 0.2,
        temperature: float = 0.05,
        merge: Literal["concat", "mean_cosine"] = "concat",
        head: Literal["dnn", "dot"] = "dnn",
    ) -> None:
        super().__init__()
        sizes = {"num_tables": num_tables, "layer_experts": layer_experts, "num_layers": num_layers}
        sizes |= {"num_heads": num_heads, "ffn_ratio": ffn_ratio, "max_positions": max_positions}
        sizes |= {key: size for key, size in (("qk_dim", qk_dim), ("value_dim", value_dim)) if size is not None}
        for key, size in sizes.items():
            if size < 1:
                raise ValueError(f"{key} must be at least 1, not {size}")
        if moe_targets not in get_args(MoETargets):
            raise ValueError(f"moe_targets must be one of {', '.join(get_args(MoETargets))}, not {moe_targets!r}")
        if moe_targets == "ffn" and ffn_single_stage:
            raise ValueError("moe_targets: ffn needs a feed-forward net; set ffn_single_stage: False, or another target")
        if merge not in ("concat", "mean_cosine"):
            raise ValueError(f"merge must be concat or mean_cosine, not {merge!r}")
        if item_dim % num_tables:
            raise ValueError(f"num_tables ({num_tables}) must divide the width of an item vector ({item_dim})")
        width = item_dim // num_tables
        if width % num_heads and (qk_dim is None or value_dim is None):
            raise ValueError(
                f"num_heads ({num_heads}) must divide the width of an item's vector in each of {num_tables} tables "
                f"({width}); or set qk_dim and value_dim"
            )
        if not 0 <= hidden_dropout <= 1:
            raise ValueError(f"hidden_dropout must lie in 0..1, not {hidden_dropout}")
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, not {temperature}")
        if balance_weight < 0:
            raise ValueError(f"balance_weight must be >= 0, not {balance_weight}")
        self.num_tables = num_tables
        self.balance_weight = balance_weight
        self.temporal_channel = temporal_channel
        self.temperature = temperature
        self.merge = merge
        self.head = head
        self.out_dim = 1 if head == "dot" else item_dim
        self.positions = nn.Parameter(torch.empty(max_positions, item_dim))
        self.dropout = nn.Dropout(hidden_dropout)
        self.layers = nn.ModuleList(
            FuXiLayer(
                width,
                num_heads=num_heads,
                qk_dim=qk_dim or width // num_heads,
                value_dim=value_dim or width // num_heads,
                max_positions=max_positions,
                ffn_ratio=ffn_ratio,
                ffn_single_stage=ffn_single_stage,
                temporal_channel=temporal_channel,
                dropout=hidden_dropout,
                num_experts=layer_experts,
                topk=layer_topk,
                moe_targets=moe_targets,
            )
            for _ in range(num_layers)
        )
        self.init_weights()

    def init_weights(self) -> None:
        """Positions as large as scaled item vectors; drawn anew after FuxiCTR's reset."""
        nn.init.normal_(self.positions, std=EMBEDDING_STD * math.sqrt(self.positions.shape[1] / self.num_tables))

    def forward(self, query: Tensor, sequence: Sequence, losses: list[Tensor] | None = None) -> Tensor:
        """Interest of each row.

        Args:
            query: ``[B, d]`` target items; read by ``head: dot`` only.
            sequence: histories.
            losses: in training the weighted balance losses are appended here.

        Returns:
            ``[B, out_dim]``; zeros for empty rows.
        """
        batch, length = sequence.index.shape
        if batch == 0 or length == 0:
            return query.new_zeros(batch, self.out_dim)
        times = times_of(sequence, "temporal_channel: True", "temporal_channel: False") if self.temporal_channel else None
        age = torch.arange(length - 1, -1, -1, device=query.device).clamp(max=len(self.positions) - 1)
        scale = math.sqrt(query.shape[1] / self.num_tables)
        tokens = self._by_table(self.dropout(sequence.vectors * scale + F.embedding(age, self.positions)))
        mask = sequence.mask.repeat_interleave(self.num_tables, 0)
        for number, layer in enumerate(self.layers, 1):
            tokens = layer(tokens, mask, times, losses, self.balance_weight, newest=number == len(self.layers))
        newest = tokens.view(batch, self.num_tables, -1)  # [B, M, d / M]
        newest = newest.masked_fill(~sequence.mask[:, -1:, None], 0)
        target = self._by_table(query.unsqueeze(1)).view_as(newest)
        if self.head == "dnn":
            return F.normalize(newest.transpose(1, 2).flatten(1), dim=1)
        if self.merge == "mean_cosine":
            cosine = F.cosine_similarity(newest, target, dim=2, eps=COSINE_EPS).mean(1, keepdim=True)
        else:
            cosine = F.cosine_similarity(newest.flatten(1), target.flatten(1), dim=1, eps=COSINE_EPS).unsqueeze(1)
        return cosine / self.temperature

    def _by_table(self, vectors: Tensor) -> Tensor:
        """``[B, T, d]`` to ``[B M, T, d / M]``, the M tables of a row one after the other."""
        return vectors.unflatten(2, (-1, self.num_tables)).permute(0, 3, 1, 2).flatten(0, 1)


class FuXiBlock(FuXiMMEBlock):
    """FuXi-alpha: one vector an item and no mixtures; keys as for `FuXiMMEBlock`.

    Source: Ye et al., FuXi-alpha (arXiv 2502.03036), with a CTR head instead of a sampled softmax.
    """

    def __init__(
        self,
        item_dim: int,
        *,
        num_layers: int = 2,
        num_heads: int = 2,
        qk_dim: int | None = None,
        value_dim: int | None = None,
        ffn_ratio: int = 1,
        ffn_single_stage: bool = False,
        temporal_channel: bool = False,
        max_positions: int = 200,
        hidden_dropout: float = 0.2,
        temperature: float = 0.05,
        head: Literal["dnn", "dot"] = "dnn",
    ) -> None:
        super().__init__(
            item_dim,
            num_tables=1,
            layer_experts=1,
            layer_topk=1,
            num_layers=num_layers,
            num_heads=num_heads,
            qk_dim=qk_dim,
            value_dim=value_dim,
            ffn_ratio=ffn_ratio,
            ffn_single_stage=ffn_single_stage,
            temporal_channel=temporal_channel,
            max_positions=max_positions,
            hidden_dropout=hidden_dropout,
            temperature=temperature,
            head=head,
        )
