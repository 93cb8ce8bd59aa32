"""A backbone and a router of one's own; docs/extending.md explains them."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo.layers.routers import Routing
from model_zoo.layers.sequence import Sequence
from model_zoo.layers.shared_expert_moe import SharedExpertMoE
from model_zoo.registry import Backbone, Method, register_backbone, register_method


class RecencyPool(nn.Module):
    """Items weighed by their match with the target and by their age, with a learned decay per head.

    Args:
        item_dim: d, width of an item vector.
        pool_heads: heads.
        start_decay: every head's decay at the start.
    """

    def __init__(self, item_dim: int, *, pool_heads: int = 2, start_decay: float = 0.1) -> None:
        super().__init__()
        if pool_heads < 1:
            raise ValueError(f"pool_heads must be at least 1, not {pool_heads}")
        self.out_dim = item_dim
        self.key = nn.Linear(item_dim, pool_heads * item_dim, bias=False)
        self.mix = nn.Linear(pool_heads * item_dim, item_dim)
        self.decay = nn.Parameter(torch.full((pool_heads,), start_decay))

    def forward(self, query: Tensor, sequence: Sequence) -> Tensor:
        """``[B, d]`` interest towards the targets ``query [B, d]``."""
        dim, length = query.shape[1], sequence.mask.shape[1]
        keys = sequence.project(self.key).unflatten(2, (-1, dim))  # [B, T, h, d], once per item
        age = torch.arange(length - 1, -1, -1, device=query.device).log1p().to(query.dtype)  # 0 = newest
        scores = torch.einsum("bd,bthd->bht", query, keys) / dim**0.5 - self.decay.unsqueeze(1) * age
        real = sequence.mask.unsqueeze(1)  # [B, 1, T]
        weight = scores.masked_fill(~real, -1e9).softmax(-1) * real
        return self.mix(torch.einsum("bht,btd->bhd", weight, sequence.vectors).flatten(1))


class AgeRouter(nn.Module):
    """Expert 0 reads the newest 7 items, expert 1 the 8 before them, expert 2 the 16 before those, ..."""

    def __init__(self, input_dim: int, num_experts: int, *, topk_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate = nn.Linear(input_dim, num_experts)

    def forward(self, tokens: Sequence, losses: list[Tensor] | None = None) -> Routing:
        """Which expert reads each token (``members [B, T, n]``), and what its answer counts (``gates [B, n]``)."""
        batch, length = tokens.mask.shape
        age = torch.arange(length, 0, -1, device=tokens.mask.device)  # 1 = newest
        band = (age.float().log2().long() - 2).clamp(0, self.num_experts - 1)
        members = F.one_hot(band, self.num_experts).bool().expand(batch, -1, -1)
        if length == 0:
            return Routing(members, tokens.items.new_zeros(batch, self.num_experts))
        gates = self.gate(tokens.last_vectors).softmax(-1)
        return Routing(members, gates * (members & tokens.mask.unsqueeze(2)).any(1))  # 0: nothing to read


class Ages(SharedExpertMoE):
    """A shared expert and one expert per age band."""

    def __init__(self, block_factory, item_dim: int, *, n_experts: int = 4, alpha_routed: float = 0.5) -> None:
        router = partial(AgeRouter, item_dim)
        super().__init__(block_factory, router, n_experts, 1, alpha_routed, "convex", "literal")


register_backbone(Backbone("RecencyPool", RecencyPool))
register_method(Method("Ages", Ages))
