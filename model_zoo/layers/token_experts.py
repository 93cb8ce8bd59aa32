"""A mixture of experts in the place of one map of tokens, a linear layer or a feed-forward net."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as ListOf
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo.layers.token_router import RouterLinear, row_imbalance

#: standard deviation of a gate's first weights
GATE_STD = 0.02
#: ``sum_e g_e f_e(x)`` of experts, tokens ``[..., a]``, gates ``[..., E]`` and which rows of the answer are wanted
Mix = Callable[[ListOf[Any], Tensor, Tensor, slice], Tensor]
EVERY = slice(None)


class TokenExperts(nn.Module):
    """``sum_e g_e f_e(x)`` for each token, ``g`` the softmax over its k largest gate logits ``W_g r``.

    With k = 1 that would be 1 whatever the gate says: ``g`` is then the softmax over all logits, through which the gate
    still learns. The balance loss is that of all of a batch's real tokens together, so that tables of one row, and rows,
    may each have experts of their own.

    With one expert there is no gate, and the module is that expert. With several, all are computed, as one product with
    their weights side by side: for the few narrow experts of one layer, picking each expert's tokens out and putting them
    back costs as much as the experts.

    Args:
        make: makes one expert, a map ``[..., a] -> [..., out]`` of tokens.
        mix: answers for all experts at once, `mix_linear` or `GatedFeedForward.mix`.
        gate_dim: width of r, what a gate reads.
        num_experts: E.
        topk: k.

    Raises:
        ValueError: k does not lie in 1..E.

    Source: Shazeer et al., Outrageously Large Neural Networks (arXiv 1701.06538), eq. 1-5 without noise; k = 1
    and the balance loss: Fedus et al., Switch Transformers (arXiv 2101.03961), eq. 2 and 4.
    """

    def __init__(self, make: Callable[[], nn.Module], mix: Mix, gate_dim: int, num_experts: int, topk: int) -> None:
        super().__init__()
        if not 1 <= topk <= num_experts:
            raise ValueError(f"layer_topk ({topk}) must lie in 1..layer_experts ({num_experts})")
        self.topk = topk
        self.mix = mix
        self.experts = nn.ModuleList(make() for _ in range(num_experts))
        self.gate = RouterLinear(gate_dim, num_experts, bias=False) if num_experts > 1 else None
        self.init_weights()

    def init_weights(self) -> None:
        """Initial gate; called again after FuxiCTR's reset."""
        if self.gate is not None:
            nn.init.normal_(self.gate.weight, std=GATE_STD)

    def forward(
        self,
        tokens: Tensor,
        read: Tensor,
        mask: Tensor,
        losses: list[Tensor] | None = None,
        weight: float = 0.0,
        rows: slice = EVERY,
    ) -> Tensor:
        """Answers for every token.

        Args:
            tokens: ``[B, T, a]``.
            read: ``[B, T, gate_dim]``, what the gate reads of each.
            mask: ``[B, T]`` bool, True = real; the balance loss leaves padding out.
            losses: in training ``weight`` times the balance loss of first choices is appended here.
            rows: of the answer, for maps that know how to leave the others out.

        Returns:
            ``[B, T, out]``.
        """
        if self.gate is None:
            return self.mix(list(self.experts), tokens, tokens.new_ones(1), rows)
        probability = self.gate(read).softmax(-1)  # [B, T, E]
        choice = probability.detach().topk(self.topk, dim=-1).indices
        if losses is not None and self.training and weight:
            every = (probability.flatten(0, 1), choice[..., 0].flatten(), mask.flatten())
            losses.append(weight * row_imbalance(*(values.unsqueeze(0) for values in every)))
        gates = probability * torch.zeros_like(probability).scatter_(-1, choice, 1.0)
        if self.topk > 1:
            gates = gates / gates.sum(-1, keepdim=True)  # the softmax over the kept logits
        return self.mix(list(self.experts), tokens, gates.to(tokens.dtype), rows)


def mix_linear(experts: ListOf[nn.Linear], tokens: Tensor, gates: Tensor, rows: slice = EVERY) -> Tensor:
    """`Mix` of linear maps: all experts' weights side by side, read by the gated token or answering for gates to weigh."""
    weights = [expert.weight[rows] for expert in experts]
    biases = [expert.bias[rows] for expert in experts if expert.bias is not None]
    if len(experts) == 1:
        return F.linear(tokens, weights[0], biases[0] if biases else None)
    out, width = weights[0].shape
    if width <= out:  # the shorter of the two is repeated
        spread = torch.cat([tokens] * len(experts), -1) * _repeated(gates, width)  # [..., E a]
        answer = F.linear(spread, torch.cat(weights, 1))
    else:
        answers = F.linear(tokens, torch.cat(weights)) * _repeated(gates, out)  # [..., E out]
        answer = answers @ torch.eye(out, dtype=answers.dtype, device=answers.device).repeat(len(experts), 1)
    return answer + gates @ torch.stack(biases) if biases else answer


def _repeated(gates: Tensor, width: int) -> Tensor:
    """``[..., E]`` to ``[..., E width]``, each gate ``width`` times.

    A matrix product, whose backward is one too: to multiply ``[..., E, width]`` by ``[..., E, 1]`` takes many times longer
    on a CPU, whose inner loop is then as short as ``width``.
    """
    experts = gates.shape[-1]
    spread = torch.eye(experts, dtype=gates.dtype, device=gates.device).repeat_interleave(width, 1)
    return gates @ spread


class GatedFeedForward(nn.Module):
    """``W_2 (SiLU(W_1 r) * W_3 r)`` without biases, over ``[..., width]``."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=False)  # W_1
        self.inner = nn.Linear(width, inner, bias=False)  # W_3
        self.outer = nn.Linear(inner, width, bias=False)  # W_2

    def forward(self, tokens: Tensor) -> Tensor:
        return self.outer(F.silu(self.gate(tokens)) * self.inner(tokens))

    @staticmethod
    def mix(experts: ListOf[GatedFeedForward], tokens: Tensor, gates: Tensor, rows: slice = EVERY) -> Tensor:
        """`Mix` of such nets; all rows only."""
        if len(experts) == 1:
            return experts[0](tokens)
        gate, inner = (torch.cat([getattr(e, name).weight for e in experts]) for name in ("gate", "inner"))
        hidden = F.silu(F.linear(tokens, gate)) * F.linear(tokens, inner)  # [..., E inner]
        weighted = hidden * _repeated(gates, hidden.shape[-1] // len(experts))
        return F.linear(weighted, torch.cat([expert.outer.weight for expert in experts], 1))
