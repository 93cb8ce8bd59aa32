"""SIGTERM and Ctrl-C as an exception that comes between two training steps, never within one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

#: after so many signals the step under way is given up
IMPATIENT = 3


class Stopped(BaseException):
    """The process was asked to end.

    Attributes:
        signal: which one.
    """

    def __init__(self, signal: signal.Signals) -> None:
        super().__init__(signal.name)
        self.signal = signal


class _State:
    depth = 0
    received: list[signal.Signals]


_state = _State()
_state.received = []


@contextmanager
def listening() -> Iterator[None]:
    """Inside, SIGTERM and SIGINT raise `Stopped`: at once, or at the end of the `held` section that runs.

    Handlers can be set in the main thread only; in another one this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _state.received.clear()
    before = {number: signal.signal(number, _receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _state.received.clear()


@contextmanager
def held() -> Iterator[None]:
    """What must be done whole: a signal waits for its end."""
    _state.depth += 1
    try:
        yield
    finally:
        _state.depth -= 1
    # an exception of the section itself went past this line; a signal swallowed elsewhere is raised here too
    if not _state.depth and _state.received:
        raise Stopped(_state.received[0])


def _receive(number: int, frame: FrameType | None) -> None:
    _state.received.append(signal.Signals(number))
    if not _state.depth or len(_state.received) >= IMPATIENT:
        raise Stopped(_state.received[0])
