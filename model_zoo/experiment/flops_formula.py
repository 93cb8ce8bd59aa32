"""The MoS paper's accounting of operations: a formula for each block, fed with measured routed lengths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model_zoo.backbones.mamba4rec import Mamba4RecBlock
from model_zoo.backbones.sdim import CollisionPooling, SDIMBlock
from model_zoo.backbones.transact import TransActBlock
from model_zoo.backbones.twin import TwinBlock
from model_zoo.experiment.flops import RoutedBatch
from model_zoo.layers.target_attention import TargetAttention


@dataclass(frozen=True)
class AnalyticFlops:
    """The paper's accounting, in operations per batch.

    Attributes:
        shared: the global (shared) expert on the whole history.
        every_expert: all experts, each on all tokens routed to it (the paper's counting).
        serving_experts: of these, the experts with a weight in a row's answer.
    """

    shared: float
    every_expert: float
    serving_experts: float


def analytic_flops(routed: RoutedBatch, cost: Callable[[nn.Module, Tensor], Tensor] | None = None) -> AnalyticFlops:
    """``sum_e cost(block, tokens routed to e)`` with measured routed lengths; routers are not counted, as in the paper.

    Args:
        routed: a batch.
        cost: of a block for histories of the given lengths; None = `block_cost`. ``lambda block, t: t**2`` gives the
            paper's own comparison, in units of one pair of tokens.

    Source: MoS: Mixture of Sequence (WWW 2026), complexity analysis.
    """
    cost = cost or block_cost
    every = serving = 0.0
    for branch in routed.branches:
        for number, expert in enumerate(branch.experts):
            spent = cost(expert, branch.lengths[:, number].double())
            every += float(spent.sum())
            serving += float(spent[branch.serves[:, number]].sum())
    return AnalyticFlops(float(cost(routed.shared, routed.histories.double()).sum()), every, serving)


def block_cost(block: nn.Module, lengths: Tensor) -> Tensor:
    """Operations of a block that computes every position of histories of the given lengths, as LongCTR's models do.

    A projection of a token from a to b numbers has 2ab operations; scores and values have 4Ta for one query, 4T^2 a for T
    of them; norms, activations and softmax are left out. Empty histories cost nothing.

    Args:
        block: a block of TWIN, SDIM, TransAct or Mamba4Rec, or a long branch of the first two.
        lengths: float, any shape.

    Raises:
        ValueError: another block.
    """
    if isinstance(block, TwinBlock | SDIMBlock):
        long = block.long_attention if isinstance(block, TwinBlock) else block.long
        return block_cost(block.short_attention, lengths.clamp(max=block.short_seq_len - 1)) + block_cost(long, lengths)
    if isinstance(block, TargetAttention):
        spent = _attention_cost(block, lengths)
    elif isinstance(block, CollisionPooling):
        bits = block.lsh.num_hashes * block.lsh.hash_bits
        spent = 2 * block.out_dim * ((lengths + 1) * bits + lengths)
        spent = spent + (0 if block.output is None else 2 * block.out_dim**2)
    elif isinstance(block, TransActBlock):
        first: Any = block.layers[0]
        width, inner = first.linear1.in_features, first.linear1.out_features
        spent = len(block.layers) * (lengths * (8 * width**2 + 4 * width * inner) + 4 * lengths**2 * width)
        spent = spent + (0 if block.out_linear is None else 2 * width**2)
    elif isinstance(block, Mamba4RecBlock):
        spent = lengths * _mamba_cost(block)
    else:
        raise ValueError(f"no formula for the operations of {type(block).__name__}; give one as cost=")
    return torch.where(lengths > 0, spent, 0.0)


def _attention_cost(layer: TargetAttention, lengths: Tensor) -> Tensor:
    """Four projections, scores of all tokens, values of those kept."""
    width = len(layer.W_q.weight) if layer.use_qkvo else layer.out_dim
    kept = lengths if layer.topk is None else lengths.clamp(max=layer.topk)
    projections = 4 * layer.out_dim * width * (1 + lengths) if layer.use_qkvo else 0
    return projections + 2 * width * (lengths + kept)


def _mamba_cost(block: Mamba4RecBlock) -> int:
    """Operations per token: projections, convolution, seven per state of the scan, feed-forward net."""
    spent = 0 if block.widen is None else 2 * block.widen.weight.numel()
    for layer in block.layers:
        linears = [module for module in layer.modules() if isinstance(module, nn.Linear | nn.Conv1d)]
        spent += sum(2 * linear.weight.numel() for linear in linears) + 7 * layer.mamba.A_log.numel()  # type: ignore
    return spent
