"""Click probabilities of many candidates for one user, whose history is read once for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from model_zoo.batch import Batch
from model_zoo.errors import DataError

if TYPE_CHECKING:
    from model_zoo.sequential_ctr import SequentialCTR

#: candidates scored at a time: scores of candidates against a history's items are held in memory
CANDIDATES_AT_A_TIME = 4096


def score(
    model: SequentialCTR,
    history: Any,
    candidates: Any,
    context: Mapping[str, Any] | None = None,
    max_len: int | None = None,
) -> Tensor:
    """Click probabilities of one user's candidates, as the model in evaluation mode predicts them.

    What depends on the history alone is computed once. The model's mode and gradients are left as they are.

    Args:
        model: with the item table (``item_features=``).
        history: item indices ``[L]``, oldest first (list, numpy array or tensor); may be empty.
        candidates: item indices ``[C]``.
        context: every context feature: one value for all candidates (``[m]`` for a sequence or an embedding), or one for
            each (``[C]``, ``[C, m]``).
        max_len: newest history items read; give the experiment's ``max_len``. None = all.

    Returns:
        ``[C]`` in the order of ``candidates``, on the model's device.

    Raises:
        DataError: an unknown item, a missing, unknown or misshapen context column, or a model without the item table.
        ValueError: ``max_len`` < 0.
    """
    if model.item_features is None:
        raise DataError(f"{type(model).__name__}: scoring needs the item table (item_features=)")
    if max_len is not None and max_len < 0:
        raise ValueError(f"max_len must be at least 0, not {max_len}")
    items = model.item_features.num_items
    past = _item_indices("history", history, items)
    if max_len is not None:
        past = past[max(len(past) - max_len, 0) :]
    targets = _item_indices("candidates", candidates, items)
    count = len(targets)
    columns = _context_columns(model, context or {}, count)
    batch = Batch(
        history=past.unsqueeze(0),
        target=targets,
        context=columns,
        label=torch.zeros(count),
        group=None,
        rows=torch.arange(count),
        owner=torch.zeros(count, dtype=torch.int64),
    )
    answers = [torch.zeros(0, device=model.device)]
    with predicting(model):
        for rows in batch.rows.split(CANDIDATES_AT_A_TIME) if count else ():
            answers.append(model.forward(batch.select(rows))["y_pred"].view(-1))
    return torch.cat(answers)


@contextmanager
def predicting(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _item_indices(name: str, values: Any, num_items: int) -> Tensor:
    """int32 ``[N]`` of indices in 1..num_items - 1."""
    index = _tensor(name, values)
    if index.numel() == 0:
        return torch.zeros(0, dtype=torch.int32)
    if index.dim() != 1 or index.is_floating_point() or index.dtype == torch.bool:
        raise DataError(f"{name}: must be a list of item indices, not {tuple(index.shape)} {index.dtype} values")
    unknown = index[(index < 1) | (index >= num_items)]
    if len(unknown):
        raise DataError(f"{name}: no item {int(unknown[0])}; the item table knows 1 to {num_items - 1}")
    return index.to(torch.int32)


def _context_columns(model: SequentialCTR, context: Mapping[str, Any], count: int) -> dict[str, Tensor]:
    """One column ``[count, ...]`` for each context feature of the model."""
    names = model.context_names
    for name in names:
        if name not in context:
            raise DataError(f"context: {name} is missing; the model reads {', '.join(names)}")
    for name in context:
        if name not in names:
            raise DataError(f"context: the model reads no {name}, only {', '.join(names) or 'histories and candidates'}")
    return {name: _column(name, model.feature_map.features[name], context[name], count) for name in names}


def _column(name: str, spec: dict[str, Any], value: Any, count: int) -> Tensor:
    """``value`` as a column of ``count`` rows of what the feature holds."""
    column = _tensor(f"context: {name}", value)
    width = {"sequence": spec.get("max_len"), "embedding": spec.get("embedding_dim")}.get(spec["type"])
    one = () if width is None else (width,)
    if column.shape == one:
        column = column.expand(count, *one)
    elif column.shape != (count, *one):
        raise DataError(f"context: {name} must be of shape {one} or {(count, *one)}, not {tuple(column.shape)}")
    if spec["type"] not in ("categorical", "sequence"):
        return column.float()
    wrong = column[(column < 0) | (column >= spec["vocab_size"])]
    if column.is_floating_point() or len(wrong):
        raise DataError(f"context: {name} must hold ids from 0 to {spec['vocab_size'] - 1}")
    return column.to(torch.int32)


def _tensor(name: str, values: Any) -> Tensor:
    try:
        return values.detach().cpu() if isinstance(values, Tensor) else torch.from_numpy(np.array(values))
    except (TypeError, ValueError):
        raise DataError(f"{name}: must hold numbers") from None
