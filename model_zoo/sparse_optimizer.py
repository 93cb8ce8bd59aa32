"""Sparse gradients of embedding tables: Adam on the rows that a step touches, clipping, accumulation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from model_zoo.compat import FeatureEmbeddingDict


class RowAdam(torch.optim.Adam):
    """Adam that updates, of a parameter with a sparse gradient, the rows of that gradient and nothing else.

    Moments of a row decay only in the steps that touch it (Kingma & Ba, algorithm 1, on those rows); the step number of
    the bias correction is the parameter's own, one for all its rows, so a step that touches every row is Adam's. Dense
    gradients are left to torch's fused Adam. Both kinds keep the same state, under the same names.

    Args:
        params: as for ``torch.optim.Adam``.
        lr: learning rate.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(params, lr=lr, fused=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; ``closure`` as in torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        held = [(p, p.grad, group) for group in self.param_groups for p in group["params"] if _is_sparse(p)]
        for parameter, gradient, group in held:
            self._step_rows(parameter, gradient.coalesce(), group)
            parameter.grad = None  # the fused kernel refuses it
        super().step()
        for parameter, gradient, _ in held:
            parameter.grad = gradient
        return loss

    def _step_rows(self, table: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Adam on the rows of ``table`` ``[V, d]`` that ``gradient`` (coalesced) holds."""
        state = self.state[table]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=table.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(table), torch.zeros_like(table)
        state["step"] += 1
        rows, vectors = gradient.indices()[0], gradient.values()
        beta1, beta2 = group["betas"]
        step = state["step"].double()
        mean = state["exp_avg"].index_select(0, rows).lerp_(vectors, 1 - beta1)
        square = state["exp_avg_sq"].index_select(0, rows).mul_(beta2).addcmul_(vectors, vectors, value=1 - beta2)
        state["exp_avg"].index_copy_(0, rows, mean)
        state["exp_avg_sq"].index_copy_(0, rows, square)
        scale = square.sqrt_().div_((1 - beta2**step).sqrt()).add_(group["eps"])
        table.index_add_(0, rows, mean.div_(scale).mul_(-group["lr"] / (1 - beta1**step)))


def use_sparse_tables(model: nn.Module) -> None:
    """Let the tables inside the model's feature embeddings have sparse gradients."""
    for dictionary in model.modules():
        if isinstance(dictionary, FeatureEmbeddingDict):
            for table in dictionary.modules():
                if isinstance(table, nn.Embedding):
                    table.sparse = True


def sparse_tables(model: nn.Module) -> set[int]:
    """``id`` of every parameter that is looked up with sparse gradients."""
    return {id(table.weight) for table in model.modules() if isinstance(table, nn.Embedding) and table.sparse}


@contextmanager
def one_batch_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, a sparse gradient holds the rows of one batch alone; afterwards those of the batches before are added."""
    earlier = [(p, p.grad) for p in parameters if p.grad is not None and p.grad.is_sparse]
    for parameter, _ in earlier:
        parameter.grad = None
    yield
    for parameter, gradient in earlier:
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients so that their joint norm is at most ``max_norm``; sparse ones count, and are scaled, like dense ones.

    Returns:
        The norm before.
    """
    held: list[Tensor] = []
    for parameter in parameters:
        if not _is_sparse(parameter):
            held.append(parameter)
            continue
        assert parameter.grad is not None
        parameter.grad = parameter.grad.coalesce()
        # torch's clipping cannot read sparse gradients: it gets the values, which are scaled in place
        values = parameter.grad.values().detach()
        stand_in = values.detach()
        stand_in.grad = values
        held.append(stand_in)
    return nn.utils.clip_grad_norm_(held, max_norm)


def _is_sparse(parameter: Tensor) -> bool:
    return parameter.grad is not None and parameter.grad.is_sparse
