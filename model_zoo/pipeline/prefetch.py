"""A thread that works ahead of its consumer."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from queue import SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")


class _End:
    """What the thread sends last: nothing more, or the exception that stopped it."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


class _Worker(threading.Thread, Generic[T]):
    """Fills ``done``, each item after a permit of ``room``."""

    def __init__(self, items: Iterator[T], ahead: int) -> None:
        super().__init__(name="prefetch", daemon=True)
        self.items = items
        self.room = threading.Semaphore(ahead)
        self.done: SimpleQueue[T | _End] = SimpleQueue()
        self.stopped = False

    def run(self) -> None:
        try:
            while self.room.acquire() and not self.stopped:
                item = next(self.items, self)
                if item is self:
                    break
                self.done.put(item)  # type: ignore[arg-type]
                del item  # the consumer may want its memory back while this thread waits
            self.done.put(_End())
        except BaseException as error:  # the consumer's to handle
            self.done.put(_End(error))

    def stop(self) -> None:
        self.stopped = True
        self.room.release()
        self.join()


def in_background(items: Iterator[T], ahead: int) -> Iterator[T]:
    """The same items in the same order, made by a thread while the consumer works.

    The thread starts with the iteration and has ended when the iteration is exhausted, closed, or left by an exception
    or garbage collection.

    Args:
        items: a generator; it runs in the thread.
        ahead: items that may lie ready, one under way included.

    Raises:
        Exception: what ``items`` raised, with its traceback, after all items before it.
    """
    worker = _Worker(items, ahead)
    worker.start()
    try:
        while not isinstance(item := worker.done.get(), _End):
            worker.room.release()
            yield item
            del item
        if item.error is not None:
            raise item.error
    finally:
        worker.stop()
        if isinstance(items, Generator):
            items.close()
