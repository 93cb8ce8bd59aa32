"""Choosing the tokens of a history that a search keeps. A choice carries no gradient."""

import torch
from torch import Tensor

from model_zoo.layers.sequence import Sequence


@torch.no_grad()
def nearest_columns(distance: Tensor, mask: Tensor, topk: int, longctr_compat: bool = False) -> Tensor:
    """Columns of each row's ``topk`` nearest tokens in time order; of equally near ones the newest.

    Hamming distances tie often, and which of the tied columns torch's top-k returns depends on how many columns there are,
    so on padding; the newest-first rule does not. Under ``longctr_compat`` torch decides, as in LongCTR.

    Args:
        distance: ``[B, T]`` int64, non-negative.
        mask: ``[B, T]`` bool; padding is farther than any real token.
        topk: tokens kept.

    Returns:
        int64 ``[B, min(topk, T)]``.
    """
    length = mask.shape[1]
    if topk >= length:
        return torch.arange(length, device=mask.device).expand(mask.shape[0], -1)
    if longctr_compat:
        order = distance.float().masked_fill(~mask, torch.inf)
    else:
        age = torch.arange(length - 1, -1, -1, device=mask.device)
        order = (distance * length + age).masked_fill(~mask, torch.iinfo(torch.int64).max)
    return order.topk(topk, dim=1, largest=False).indices.sort(1).values


@torch.no_grad()
def best_columns(scores: Tensor, mask: Tensor, topk: int, longctr_compat: bool = False) -> Tensor:
    """Columns of each row's ``topk`` best-scored tokens in time order.

    Args:
        scores: ``[B, T]``.
        mask: ``[B, T]`` bool; padding is worse than any real token. Under ``longctr_compat`` it scores 0, and so better
            than real tokens of negative score, as in LongCTR.
        topk: tokens kept.

    Returns:
        int64 ``[B, min(topk, T)]``.
    """
    length = mask.shape[1]
    if topk >= length:
        return torch.arange(length, device=mask.device).expand(mask.shape[0], -1)
    order = scores.masked_fill(~mask, 0.0 if longctr_compat else -torch.inf)
    return order.topk(topk, dim=1).indices.sort(1).values


def keep_columns(sequence: Sequence, columns: Tensor) -> Sequence:
    """The tokens at the given columns int64 ``[B, k]`` of each row."""
    return Sequence(sequence.items, sequence.index.gather(1, columns), sequence.mask.gather(1, columns))
