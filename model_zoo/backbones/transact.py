"""TransAct: a transformer over the history, every item paired with the target, read at the newest items."""

from __future__ import annotations

import copy
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo.errors import ConfigError
from model_zoo.layers.sequence import Sequence, SharedSequence
from model_zoo.layers.transact_layer import TransActLayer


class TransActBlock(nn.Module):
    """Post-norm transformer layers over ``[item ; target]`` tokens without positions (a set, but for what is read out).

    The answer is the last layer at the ``first_k_cols`` newest items, oldest first, and with ``concat_max_pool`` a linear
    map of its maximum over the history. Columns that a short history lacks are zeros, and so is an empty history's answer.
    Without max-pool the last layer computes those columns only; a single layer then projects nothing per position.

    Args:
        item_dim: d, width of an item vector; tokens have 2d.
        transformer_layers: layers.
        num_heads: heads of each; must divide 2d.
        dim_feedforward: hidden width of their feed-forward nets.
        transformer_dropout: dropout in them, on attention weights too.
        first_k_cols: newest items that are read out.
        concat_max_pool: append the pooled history.
        use_time_window_mask: only False: no data set here has the times that the mask needs.
        time_window_ms: of that mask.
        longctr_compat: an empty history reads the padding in its last column; layers start as copies of one another.

    Raises:
        ValueError: a count below 1, heads that do not divide 2d, or a time window.
        ConfigError: under ``longctr_compat``, a batch padded to less than ``first_k_cols``.

    Source: Xia et al., TransAct, KDD 2023 (arXiv 2306.00248), section 3.3, as configured in LongCTR.
    """

    #: rows that a history must serve in the mean, for it to pay to read it once for all of them
    rows_to_share = 4
    #: parts of LongCTR's parameter names and ours
    LONGCTR_NAMES: ClassVar[dict[str, str]] = {
        "transformer_encoders.transformer_encoder.": "",
        "transformer_encoders.": "",
    }

    def __init__(
        self,
        item_dim: int,
        *,
        transformer_layers: int = 1,
        num_heads: int = 1,
        dim_feedforward: int = 512,
        transformer_dropout: float = 0.0,
        first_k_cols: int = 1,
        concat_max_pool: bool = True,
        use_time_window_mask: bool = False,
        time_window_ms: int = 86_400_000,
        longctr_compat: bool = False,
    ) -> None:
        super().__init__()
        counts = {
            "transformer_layers": transformer_layers,
            "first_k_cols": first_k_cols,
            "dim_feedforward": dim_feedforward,
        }
        for key, count in counts.items():
            if count < 1:
                raise ValueError(f"{key} must be at least 1, not {count}")
        if use_time_window_mask:
            raise ValueError("use_time_window_mask must be False: the data holds no times of past clicks")
        width = 2 * item_dim
        self.first_k_cols = first_k_cols
        self.longctr_compat = longctr_compat
        make = partial(TransActLayer, width, num_heads, dim_feedforward, transformer_dropout)
        first = make()
        rest = [copy.deepcopy(first) if longctr_compat else make() for _ in range(1, transformer_layers)]
        self.layers = nn.ModuleList([first, *rest])
        self.out_linear = nn.Linear(width, width) if concat_max_pool else None
        self.out_dim = (first_k_cols + int(concat_max_pool)) * width

    @property
    def shares(self) -> bool:
        """Whether it can read a history once for several rows: one layer whose answers only at the newest items count."""
        return len(self.layers) == 1 and self.out_linear is None and not self.longctr_compat

    def forward(self, query: Tensor, sequence: Sequence | SharedSequence) -> Tensor:
        """``[B, (first_k_cols + concat_max_pool) 2d]`` for targets ``query [B, d]``."""
        if isinstance(sequence, SharedSequence):
            return self._shared(query, sequence)
        length = sequence.index.shape[1]
        tokens: Sequence = self._longctr_mask(sequence) if self.longctr_compat else sequence
        if not bool(tokens.mask.any()):
            return query.new_zeros(query.shape[0], self.out_dim)
        columns = min(self.first_k_cols, length)
        target: Tensor | None = query
        *before, last = self.layers
        for layer in before:
            tokens, target = layer.all_positions(tokens, target), None  # type: ignore[operator]
        if self.out_linear is None:
            newest = last.newest(tokens, target, columns)  # type: ignore[operator]
            return self._columns(newest, tokens)
        tokens = last.all_positions(tokens, target)  # type: ignore[operator]
        hidden = tokens.vectors  # [B, T, 2d]
        highest = hidden.masked_fill(~tokens.mask.unsqueeze(2), -1e9).max(dim=1).values
        pooled = self.out_linear(highest) * tokens.mask.any(1, keepdim=True)
        return torch.cat([self._columns(hidden[:, length - columns :], tokens), pooled], dim=-1)

    def _shared(self, query: Tensor, sequence: SharedSequence) -> Tensor:
        if not bool(sequence.histories.mask.any()):
            return query.new_zeros(query.shape[0], self.out_dim)
        columns = min(self.first_k_cols, sequence.histories.index.shape[1])
        newest = self.layers[0].newest(sequence, query, columns)  # type: ignore[operator]
        return self._columns(newest, sequence.last(columns).expanded())

    def _columns(self, newest: Tensor, sequence: Sequence) -> Tensor:
        """The read-out columns ``[B, R, 2d]`` side by side, zeros where a history has no item."""
        columns = newest.shape[1]
        newest = newest * sequence.mask[:, sequence.mask.shape[1] - columns :].unsqueeze(2)
        return F.pad(newest, (0, 0, self.first_k_cols - columns, 0)).flatten(1)

    def _longctr_mask(self, sequence: Sequence) -> Sequence:
        """LongCTR's mask: where all is padding, the last column counts as real."""
        length = sequence.index.shape[1]
        if length < self.first_k_cols:
            raise ConfigError(
                f"longctr_compat: LongCTR cannot run a batch padded to {length} items when first_k_cols is "
                f"{self.first_k_cols}; set longctr_compat: False, or a smaller first_k_cols"
            )
        mask = sequence.mask.clone()
        mask[:, -1] |= ~mask.any(1)
        return Sequence(sequence.items, sequence.index, mask)
