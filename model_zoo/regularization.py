"""FuxiCTR's regulariser, as a differentiable sum and as a gradient added in place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model_zoo.compat import FeatureEmbeddingDict, get_regularizer
from model_zoo.sparse_optimizer import sparse_tables


class Term(NamedTuple):
    """``(strength / power) * |parameter|_power^power``.

    Attributes:
        parameter: a trainable parameter.
        power: 1 or 2.
        strength: lambda.
        by_row: the parameter's gradients are sparse: only rows that a batch touches are regularised.
    """

    parameter: nn.Parameter
    power: int
    strength: float
    by_row: bool


def terms(
    model: nn.Module, embedding: float | str | None, net: float | str | None, longctr_compat: bool
) -> Iterator[Term]:
    """The regulariser's terms, over each trainable parameter once.

    Everything inside the feature embedding counts as embedding, the rest as net. Under ``longctr_compat`` (FuxiCTR
    2.3.2) tables count as embedding, wherever they stand, and of the rest only weights and biases count, as net.

    Args:
        model: whose parameters.
        embedding: FuxiCTR's regulariser of the embedding: L2 strength, ``l1(x)``, ``l2(x)`` or ``l1_l2(x,y)``.
        net: of the rest.
        longctr_compat: see above.
    """
    of_embedding, of_net = get_regularizer(embedding), get_regularizer(net)
    if not of_embedding and not of_net:
        return
    kind = nn.Embedding if longctr_compat else FeatureEmbeddingDict
    inside = {id(p) for m in model.modules() if isinstance(m, kind) for p in m.parameters()}
    by_row = sparse_tables(model)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if longctr_compat and name.rpartition(".")[2] not in ("weight", "bias"):
            continue
        for power, strength in of_embedding if id(parameter) in inside else of_net:
            yield Term(parameter, power, strength, id(parameter) in by_row)


def penalty(chosen: Iterable[Term]) -> Tensor | float:
    """The sum of the terms, differentiable, whole tables included; 0.0 if there are none."""
    total: Tensor | float = 0.0
    for parameter, power, strength, _ in chosen:
        norm = parameter.abs().sum() if power == 1 else parameter.square().sum()
        total = total + (strength / power) * norm
    return total


@torch.no_grad()
def add_gradient(chosen: Iterable[Term], scale: float) -> Tensor | float:
    """Add ``scale`` times the gradient of `penalty` to the parameters' gradients; only L1 needs a temporary, the signs.

    A parameter without a gradient gets one. Of a ``by_row`` term only the rows that the parameter's sparse gradient holds
    take part, in gradient and value.

    Returns:
        The terms' value, not scaled.
    """
    total: Tensor | float = 0.0
    together: dict[tuple[int, float], list[Tensor]] = defaultdict(list)
    for parameter, power, strength, by_row in chosen:
        if parameter.grad is None:
            if by_row:
                continue
            parameter.grad = torch.zeros_like(parameter)
        if parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
            touched = parameter.index_select(0, parameter.grad.indices()[0])
            total = total + strength / power * _power_sum([touched], power)
            parameter.grad.values().add_(touched if power == 2 else touched.sign_(), alpha=strength * scale)
        else:
            together[power, strength].append(parameter)
    for (power, strength), parameters in together.items():
        total = total + strength / power * _power_sum(parameters, power)
        gradients = [p.grad for p in parameters if p.grad is not None]
        if power == 2:
            torch._foreach_add_(gradients, parameters, alpha=strength * scale)
        else:
            for gradient, values in zip(gradients, parameters, strict=True):
                gradient.add_(values.sign(), alpha=strength * scale)
    return total


def _power_sum(tensors: list[Tensor], power: int) -> Tensor:
    """``sum |x|^power`` over all entries of all tensors."""
    norms = torch.stack([torch.linalg.vector_norm(tensor, power) for tensor in tensors])
    return norms.sum() if power == 1 else norms.square().sum()
