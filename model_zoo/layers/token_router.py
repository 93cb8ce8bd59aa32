"""What routers that score each token by a linear map have in common."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo.layers.routers import Routing
from model_zoo.layers.sequence import Sequence

Aggregate = Literal["last", "mean_gate"]


class RouterLinear(nn.Linear):
    """A linear map computed in float32 or wider, whatever autocast says.

    Being a subclass it is passed over by FuxiCTR's reset, which is for plain ``nn.Linear``: its router initialises it.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """``[..., in_features] -> [..., out_features]``."""
        wide = torch.promote_types(inputs.dtype, torch.float32)
        with torch.autocast(inputs.device.type, enabled=False):
            return F.linear(inputs.to(wide), self.weight.to(wide), None if self.bias is None else self.bias.to(wide))


def gating_tokens(tokens: Sequence, aggregate: Aggregate) -> Sequence:
    """The columns whose mean gate weighs the experts: the newest token's (``last``), or all (``mean_gate``)."""
    return tokens.last(1) if aggregate == "last" else tokens


def row_mean(values: Tensor, mask: Tensor) -> Tensor:
    """``[B, a]`` mean of each row's real tokens' ``values [B, T, a]``; zeros for a row without any."""
    share = mask.to(values.dtype) / mask.sum(1, keepdim=True).clamp(min=1)
    return (values * share.unsqueeze(-1)).sum(1)


def row_imbalance(probability: Tensor, first: Tensor, mask: Tensor) -> Tensor:
    """``n sum_e f_e m_e`` of each row, averaged over the rows that have tokens; 1 if choices and gates are spread evenly.

    Args:
        probability: ``[B, T, n]`` softmax gates; m is their mean over a row's real tokens.
        first: ``[B, T]`` int64 first choices; f is their share.
        mask: ``[B, T]`` bool, True = real.

    Source: Lepikhin et al., GShard (arXiv 2006.16668), Algorithm 1; Fedus et al., Switch (arXiv 2101.03961), eq. 4.
    """
    experts = probability.shape[-1]
    count = torch.zeros(len(first), experts, dtype=torch.long, device=first.device)
    count.scatter_add_(1, first, mask.long())
    share = count.to(probability.dtype) / mask.sum(1).clamp(min=1).unsqueeze(1)
    return experts * (share * row_mean(probability, mask)).sum() / mask.any(1).sum().clamp(min=1)


def token_mean(per_item: Tensor, tokens: Sequence) -> Tensor:
    """Scalar mean of ``per_item [U]`` over the batch's real tokens; 0 if there is none."""
    values = F.embedding(tokens.index, per_item.unsqueeze(1)).squeeze(2)  # [B, T]
    return (values * tokens.mask).sum() / tokens.mask.sum().clamp(min=1)


def no_routing(tokens: Sequence, num_experts: int) -> Routing:
    """The routing of a batch without positions."""
    members = tokens.mask.new_zeros(*tokens.mask.shape, num_experts)
    return Routing(members, tokens.items.new_zeros(len(members), num_experts))
