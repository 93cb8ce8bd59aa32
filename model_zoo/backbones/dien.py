"""DIEN: a GRU extracts interests from the history, a second one that attends to the target evolves them."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo.errors import ConfigError
from model_zoo.layers.attend_items import MASKED_SCORE
from model_zoo.layers.attentional_gru import AttentionalGRU, Steps, gru
from model_zoo.layers.interest_attention import AttentionType, InterestAttention
from model_zoo.layers.positions import Positions, projected
from model_zoo.layers.sequence import Sequence


class DIENBlock(nn.Module):
    """The last state of the evolving GRU; with ``enable_sum_pooling`` ``[state ; sum ; target * sum]`` of the history.

    The evolving GRU is plain (``GRU``), reads interests scaled by attention (``AIGRU``), or is an `AttentionalGRU`.
    There is no auxiliary loss: LongCTR's DIEN has none.

    Args:
        item_dim: d, width of an item vector and of the states.
        gru_type: the evolving GRU.
        enable_sum_pooling: append the sum of the history's items and its product with the target.
        attention_type: how interests are scored; unused by ``GRU``.
        attention_hidden_units: hidden widths of ``din_attention``; None = [80, 40].
        attention_activation: their activation; ``Dice`` has batch statistics, taken over the real items.
        attention_dropout: dropout of ``din_attention``.
        use_attention_softmax: normalise scores by a softmax over the history.
        longctr_compat: LongCTR's reading of a left-padded history as a right-padded one: a row of t items in a batch
            padded to L gives its first t columns, padding included, under attention weights that its mask leaves to the
            last t. The sum counts padding.
        aux_loss_alpha, aux_hidden_units, aux_activation: in LongCTR's configs, whose model reads none of them;
            ``aux_loss_alpha`` must be 0.

    Raises:
        ValueError: ``AIGRU`` under ``longctr_compat``, which LongCTR cannot run.
        ConfigError: under ``longctr_compat``, a batch with fewer than two histories that are not empty.

    Source: Zhou et al., DIEN, AAAI 2019 (arXiv 1809.03672), sections 4.2 and 4.3, as in FuxiCTR.
    """

    #: parts of LongCTR's parameter names and ours
    LONGCTR_NAMES: ClassVar[dict[str, str]] = {
        "extraction_modules.0.": "extraction.",
        "evolving_modules.0.gru_cell.": "evolving.",
        "evolving_modules.0.": "evolving.",
        "attention_modules.0.attn_mlp.": "attention.net.",
        "attention_modules.0.": "attention.",
    }

    def __init__(
        self,
        item_dim: int,
        *,
        gru_type: Literal["GRU", "AIGRU", "AGRU", "AUGRU"] = "AUGRU",
        enable_sum_pooling: bool = False,
        attention_type: AttentionType = "bilinear_attention",
        attention_hidden_units: list[int] | None = None,
        attention_activation: str | list[str] = "Dice",
        attention_dropout: float = 0.0,
        use_attention_softmax: bool = True,
        longctr_compat: bool = False,
        aux_loss_alpha: float = 0.0,
        aux_hidden_units: list[int] | None = None,
        aux_activation: str = "ReLU",
    ) -> None:
        super().__init__()
        if aux_loss_alpha:
            raise ValueError(f"aux_loss_alpha ({aux_loss_alpha}) must be 0: LongCTR's DIEN has no auxiliary loss")
        if longctr_compat and gru_type == "AIGRU":
            raise ValueError("longctr_compat: LongCTR cannot run gru_type AIGRU; set longctr_compat: False")
        self.extraction = nn.GRU(item_dim, item_dim)  # holds parameters, is not called
        self.evolving: nn.GRU | AttentionalGRU
        if gru_type in ("AGRU", "AUGRU"):
            self.evolving = AttentionalGRU(item_dim, item_dim, update_gate=gru_type == "AUGRU")
        else:
            self.evolving = nn.GRU(item_dim, item_dim)
        self.attention: InterestAttention | None = None
        if gru_type != "GRU":
            units = [80, 40] if attention_hidden_units is None else attention_hidden_units
            self.attention = InterestAttention(item_dim, attention_type, units, attention_activation, attention_dropout)
        self.softmax = use_attention_softmax
        self.sum_pooling = enable_sum_pooling
        self.longctr_compat = longctr_compat
        self.out_dim = item_dim * (3 if enable_sum_pooling else 1)

    def forward(self, query: Tensor, sequence: Sequence) -> Tensor:
        """``[B, d]`` or ``[B, 3 d]`` for targets ``query [B, d]``; zeros for an empty history."""
        if self.longctr_compat and int(sequence.mask.any(1).sum()) < 2:
            raise ConfigError(
                "longctr_compat: LongCTR cannot run a batch with fewer than two histories that are not empty; "
                "set longctr_compat: False"
            )
        state = self._state(query, sequence)
        if not self.sum_pooling:
            return state
        read = torch.ones_like(sequence.mask) if self.longctr_compat else sequence.mask
        total = Positions.of(sequence, read).pool(sequence.items)
        return torch.cat([state, total, query * total], dim=-1)

    def _state(self, query: Tensor, sequence: Sequence) -> Tensor:
        """The last state of the evolving GRU, ``[B, d]``."""
        if not bool(sequence.mask.any()):
            return torch.zeros_like(query)
        steps = Steps.of(_as_right_padded(sequence) if self.longctr_compat else sequence)
        of_input, of_state, input_bias, state_bias = self.extraction.all_weights[0]
        inputs = projected(steps.item, sequence.items, of_input, input_bias)
        interests = torch.cat(gru(inputs, of_state, state_bias, steps.counts))  # [N, d]
        if self.attention is None:
            return steps.by_row(self._plain(interests, steps))
        if self.longctr_compat:
            weights = self._longctr_weights(query, sequence, steps, interests)
        else:
            weights = self._weights(query, steps, interests)
        if isinstance(self.evolving, AttentionalGRU):
            return steps.by_row(self.evolving(interests, weights, steps.counts))
        return steps.by_row(self._plain(interests * weights.unsqueeze(1), steps))

    def _plain(self, inputs: Tensor, steps: Steps) -> Tensor:
        """The last states ``[R, d]`` of an evolving GRU without attention inside."""
        assert isinstance(self.evolving, nn.GRU)
        of_input, of_state, input_bias, state_bias = self.evolving.all_weights[0]
        return gru(F.linear(inputs, of_input, input_bias), of_state, state_bias, steps.counts)[-1]

    def _weights(self, query: Tensor, steps: Steps, interests: Tensor) -> Tensor:
        """Attention weights ``[N]`` over each row's real positions."""
        assert self.attention is not None
        scores = self.attention(query, steps.row, interests)
        if not self.softmax:
            return scores
        table = scores.new_full(steps.mask.shape, -torch.inf).masked_scatter(steps.mask, scores)  # [T, R]
        return table.softmax(0).masked_select(steps.mask)

    def _longctr_weights(self, query: Tensor, sequence: Sequence, steps: Steps, interests: Tensor) -> Tensor:
        """Weights ``[N]`` of LongCTR: interests stand at the left end of their row, the mask's ones where items stood."""
        assert self.attention is not None
        rows, length = steps.mask.shape[1], sequence.mask.shape[1]
        kept = steps.order[:rows]
        mask = sequence.mask[kept]  # [R, L]
        column, row = steps.mask.nonzero().unbind(1)  # right-aligned
        place = row * length + column - (steps.mask.shape[0] - steps.mask.sum(0))[row]
        table = interests.new_zeros(rows * length, interests.shape[1]).index_copy(0, place, interests)
        scores = self.attention(query, kept.repeat_interleave(length), table).view(rows, length) * mask
        if self.softmax:
            scores = (scores + MASKED_SCORE * (~mask)).softmax(1)
        return scores.flatten().index_select(0, place)


def _as_right_padded(sequence: Sequence) -> Sequence:
    """As many columns of each row as it has items, from the left end, moved to the right end."""
    columns = torch.arange(sequence.mask.shape[1], device=sequence.mask.device)
    first = columns < sequence.lengths.unsqueeze(1)
    return Sequence(sequence.items, sequence.index, first).compact(first)
