"""The newest items of a history, as the short branch of TWIN, SDIM, SIM, ETA and MIRRN reads them."""

from typing import overload

from model_zoo.errors import ConfigError
from model_zoo.layers.sequence import Sequence, SharedSequence


@overload
def short_window(sequence: Sequence, short_seq_len: int, longctr_compat: bool) -> Sequence: ...
@overload
def short_window(sequence: SharedSequence, short_seq_len: int, longctr_compat: bool) -> SharedSequence: ...
def short_window(
    sequence: Sequence | SharedSequence, short_seq_len: int, longctr_compat: bool
) -> Sequence | SharedSequence:
    """The newest ``short_seq_len - 1`` items (LongCTR's "50" means 49).

    Under ``longctr_compat``, LongCTR's slices ``[-S:-1]`` of L + 1 item columns and of L mask columns: the mask lags the
    items by one; shared histories do not occur there.

    Raises:
        ConfigError: under ``longctr_compat``, a batch padded to less than ``short_seq_len``.
    """
    if isinstance(sequence, SharedSequence) or not longctr_compat:
        return sequence.last(short_seq_len - 1)
    length = sequence.index.shape[1]
    if length < short_seq_len:
        raise ConfigError(
            f"longctr_compat: LongCTR cannot run a batch padded to {length} items when short_seq_len is {short_seq_len}; "
            "set longctr_compat: False, or a smaller short_seq_len"
        )
    start = 1 - short_seq_len
    return Sequence(sequence.items, sequence.index[:, start:], sequence.mask[:, start - 1 : -1])
