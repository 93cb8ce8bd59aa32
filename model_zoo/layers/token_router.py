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


def token_mean(per_item: Tensor, tokens: Sequence) -> Tensor:
    """Scalar mean of ``per_item [U]`` over the batch's real tokens; 0 if there is none."""
    values = F.embedding(tokens.index, per_item.unsqueeze(1)).squeeze(2)  # [B, T]
    return (values * tokens.mask).sum() / tokens.mask.sum().clamp(min=1)


def no_routing(tokens: Sequence, num_experts: int) -> Routing:
    """The routing of a batch without positions."""
    members = tokens.mask.new_zeros(*tokens.mask.shape, num_experts)
    return Routing(members, tokens.items.new_zeros(len(members), num_experts))
