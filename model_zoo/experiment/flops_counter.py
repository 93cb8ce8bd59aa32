"""Floating-point operations counted as PyTorch runs them: a rule for each kind of operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

#: torch's formulas for matrix products, and those of products that it leaves out
PRODUCTS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        flop_registry[aten._scaled_dot_product_flash_attention_backward]
    ),
    aten.mv: lambda matrix, vector, **_: 2 * matrix.numel(),
    aten.dot: lambda left, right, **_: 2 * left.numel(),
    aten.sparse_sampled_addmm: lambda pattern, left, right, **_: 2 * pattern.values().numel() * left.shape[1],
}
#: operations per element of the result of elementwise functions; any other has one, whatever it computes
ELEMENTWISE = {
    **dict.fromkeys((aten.clone, aten.where, aten.masked_fill, aten.fill, aten.copy, aten._to_copy), 0),
    **dict.fromkeys((aten.addcmul, aten.addcmul_, aten.addcdiv, aten.addcdiv_), 2),
    **dict.fromkeys((aten.lerp, aten.lerp_), 3),
}
#: operations per element of the first argument: sums, softmax (difference, exponential, sum, quotient), normalisations
PER_INPUT = {
    **dict.fromkeys((aten.sum, aten.mean, aten.cumsum, aten.embedding_dense_backward), 1),
    aten.linalg_vector_norm: 2,
    **dict.fromkeys((aten.softmax, aten._softmax, aten._safe_softmax, aten._softmax_backward_data), 4),
    **dict.fromkeys((aten.native_layer_norm, aten.native_batch_norm), 7),
    **dict.fromkeys((aten.native_layer_norm_backward, aten.native_batch_norm_backward), 14),
}
#: sums of rows of a table, by index
BAGS = (aten._embedding_bag, aten._embedding_bag_forward_only, aten._embedding_bag_backward)


@dataclass(frozen=True)
class Flops:
    """Operations of matrix products (a multiply-add is two), and of everything else."""

    products: int = 0
    other: int = 0

    @property
    def total(self) -> int:
        """Both."""
        return self.products + self.other

    def __add__(self, more: Flops) -> Flops:
        return Flops(self.products + more.products, self.other + more.other)


class FlopCounter(TorchDispatchMode):
    """Counts every operator that PyTorch runs inside ``with FlopCounter() as counter``, backward passes included.

    Custom autograd functions and loops over time are counted by the operators in them, at the shapes of the call.
    Comparing, moving and drawing numbers, and arithmetic on integers (hashing, indexing), count as nothing.

    Attributes:
        flops: so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = Flops()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        kind = func.overloadpacket
        if kind in PRODUCTS:
            self.flops += Flops(products=PRODUCTS[kind](*args, **kwargs, out_val=result))
        else:
            self.flops += Flops(other=_arithmetic(func, kind, args, kwargs, result))
        return result


def _arithmetic(func: Any, kind: Any, args: Any, kwargs: dict[str, Any], result: Any) -> int:
    """Operations of one operator that is no matrix product."""
    first = result[0] if isinstance(result, tuple | list) else result
    if not isinstance(first, Tensor) or not first.is_floating_point():
        return 0
    if kind in PER_INPUT:
        return PER_INPUT[kind] * args[0].numel()
    if kind in (aten.index_add, aten.index_add_):
        return args[3].numel()
    if kind in BAGS:
        place = [argument.name for argument in func._schema.arguments].index("per_sample_weights")
        weighted = (args[place] if place < len(args) else kwargs.get("per_sample_weights")) is not None
        return (2 if weighted else 1) * args[1].numel() * args[0].shape[1]
    if kind is aten._embedding_bag_per_sample_weights_backward:
        return 2 * args[2].numel() * args[0].shape[1]
    return ELEMENTWISE.get(kind, 1) * first.numel() if torch.Tag.pointwise in func.tags else 0
