"""Expert Choice: experts choose their tokens."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo.layers.routers import Routing
from model_zoo.layers.sequence import Sequence
from model_zoo.layers.token_router import Aggregate, RouterLinear, gating_tokens, no_routing, row_mean, token_mean


class ExpertChoiceRouter(nn.Module):
    """Each expert reads the ``C = ceil(c t / n)`` tokens (at least one) of a group that it scores highest.

    Scores are ``softmax(W x + b)`` over the experts, and the gate of a chosen token is that probability as it is. t is the
    number of the group's real tokens; padding is never chosen. A token may be read by several experts or by none. Among
    equal scores the newer token is chosen (copies of an item in a history have equal scores), and in a group of several
    rows, of tokens equally far from the end the lower row's.

    Args:
        input_dim: width of a token.
        num_experts: n.
        topk_experts: c, experts per token on average.
        aggregate: whose gates weigh the experts, see `gating_tokens`.
        choice_group: experts choose within each row (``sequence``), or within the whole ``batch`` as published. In a batch
            group a row's prediction depends on its batch-mates.
        router_init_std: W starts as N(0, std^2), b as 0.
        z_loss_weight: weight of the mean over real tokens of ``logsumexp(W x + b)^2``.
        last_gate: an expert's gate for a token that it did not choose: 0 (``chosen``), or the probability all the same
            (``softmax``).

    Raises:
        ValueError: ``topk_experts`` out of range.

    Source: Zhou et al., Mixture-of-Experts with Expert Choice Routing (arXiv 2202.09368), section 3.2, as in flaxformer.
    """

    def __init__(
        self,
        input_dim: int,
        num_experts: int,
        *,
        topk_experts: int = 2,
        aggregate: Aggregate = "last",
        choice_group: Literal["sequence", "batch"] = "sequence",
        router_init_std: float = 0.02,
        z_loss_weight: float = 0.0,
        last_gate: Literal["chosen", "softmax"] = "chosen",
    ) -> None:
        super().__init__()
        if not 1 <= topk_experts <= num_experts:
            raise ValueError(f"topk_experts ({topk_experts}) must lie in 1..{num_experts}, the number of experts")
        self.num_experts = num_experts
        self.topk = topk_experts
        self.aggregate: Aggregate = aggregate
        self.choice_group = choice_group
        self.router_init_std = router_init_std
        self.z_loss_weight = z_loss_weight
        self.last_gate = last_gate
        self.linear = RouterLinear(input_dim, num_experts)
        self.init_weights()

    def init_weights(self) -> None:
        """Initial W and b; called again after FuxiCTR's reset."""
        nn.init.normal_(self.linear.weight, std=self.router_init_std)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: Sequence, losses: list[Tensor] | None = None) -> Routing:
        """Route; in training the z-loss, if weighted, is appended to ``losses``."""
        if tokens.index.numel() == 0:
            return no_routing(tokens, self.num_experts)
        logits = self.linear(tokens.items)  # [U, n]
        probability = logits.softmax(-1)
        if losses is not None and self.training and self.z_loss_weight:
            losses.append(self.z_loss_weight * token_mean(logits.logsumexp(-1).square(), tokens))
        with torch.no_grad():
            members = self._choose(F.embedding(tokens.index, probability), tokens.mask)
        gating = gating_tokens(tokens, self.aggregate)
        gates = F.embedding(gating.index, probability)  # [B, columns, n]
        if self.last_gate == "chosen":
            gates = gates * members[:, -gates.shape[1] :]
        return Routing(members, row_mean(gates, gating.mask).to(tokens.items.dtype))

    def _choose(self, scores: Tensor, mask: Tensor) -> Tensor:
        """``[B, T, n]`` bool: the tokens that each expert reads, from ``scores [B, T, n]``."""
        if self.choice_group == "sequence":
            return best_tokens(scores, mask, self.topk)
        batch, length = mask.shape
        scores, mask = scores.flip(0).transpose(0, 1), mask.flip(0).t()  # time first: the newest tokens of all rows last
        members = best_tokens(scores.reshape(1, length * batch, -1), mask.reshape(1, -1), self.topk)
        return members.view(length, batch, -1).transpose(0, 1).flip(0)


def best_tokens(scores: Tensor, mask: Tensor, per_token: int) -> Tensor:
    """The ``max(1, ceil(per_token t / n))`` best tokens of each expert in each of G groups, the later among equals.

    Args:
        scores: ``[G, S, n]``.
        mask: ``[G, S]``, t = its sum over a group; other tokens are never chosen.
        per_token: at most n.

    Returns:
        ``[G, S, n]`` bool.
    """
    real = mask.unsqueeze(2)
    scores = scores.masked_fill(~real, -torch.inf)
    capacity = (-(-mask.sum(1) * per_token // scores.shape[2])).clamp(min=1)  # [G]
    best = scores.topk(int(capacity.max()) if len(capacity) else 1, dim=1).values
    bar = best.gather(1, (capacity - 1).view(-1, 1, 1).expand(-1, 1, scores.shape[2]))  # the C-th best score
    above, level = scores > bar, (scores == bar) & real
    places = capacity.view(-1, 1, 1) - above.sum(1, keepdim=True)
    rank = level.flip(1).cumsum(1, dtype=torch.int32).flip(1)  # 1 = the latest of those at the bar
    return above | (level & (rank <= places))
