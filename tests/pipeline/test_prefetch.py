"""The background thread: the same items in the same order, errors where they belong, and no thread left over."""

import gc
import threading
import time
import traceback
from collections.abc import Iterator

import pytest
import torch

from model_zoo.pipeline.dataset import CTRDataset
from model_zoo.pipeline.loader import SequenceLoader
from model_zoo.pipeline.prefetch import in_background


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    assert workers() == []
    yield
    assert workers() == []


class Numbers:
    """Counts what was asked of it, and knows whether it was closed."""

    def __init__(self, count: int, fail_at: int | None = None) -> None:
        self.count, self.fail_at, self.made, self.closed = count, fail_at, 0, False

    def __iter__(self) -> Iterator[int]:
        try:
            for number in range(self.count):
                if number == self.fail_at:
                    raise KeyError("broken file")
                self.made += 1
                yield number
        finally:
            self.closed = True


@pytest.mark.parametrize("ahead", [1, 2, 5, 100])
def test_the_same_items_in_the_same_order(ahead: int) -> None:
    source = Numbers(20)
    assert list(in_background(iter(source), ahead)) == list(range(20))
    assert source.closed
    assert list(in_background(iter([]), ahead)) == []


def test_none_is_an_item() -> None:
    assert list(in_background(iter([None, 1, None]), 2)) == [None, 1, None]


def test_no_more_than_so_many_items_lie_ready() -> None:
    source = Numbers(50)
    items = in_background(iter(source), 3)
    for taken in range(5):
        assert next(items) == taken
        limit = time.monotonic() + 5
        while source.made < taken + 4 and time.monotonic() < limit:
            time.sleep(0.001)
        assert source.made == taken + 4  # this one, and three ahead
    items.close()  # type: ignore[attr-defined]


def test_an_error_comes_after_the_items_before_it_with_its_traceback() -> None:
    items = in_background(iter(Numbers(10, fail_at=3)), 2)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError, match="broken file") as error:
        next(items)
    frames = [frame.name for frame in traceback.extract_tb(error.value.__traceback__)]
    assert "__iter__" in frames  # where it was raised, in the thread
    with pytest.raises(StopIteration):
        next(items)


@pytest.mark.parametrize("leave", ["close", "forget", "raise", "break", "before the first"])
def test_leaving_early_ends_the_thread_and_closes_the_source(leave: str) -> None:
    source = Numbers(10**9)
    items = in_background(iter(source), 2)
    if leave == "before the first":
        del items
        gc.collect()
        return  # nothing was started
    assert next(items) == 0 and len(workers()) == 1
    if leave == "close":
        items.close()  # type: ignore[attr-defined]
    elif leave == "forget":
        del items
        gc.collect()
    elif leave == "raise":
        with pytest.raises(RuntimeError, match="mine"):
            for _ in items:
                raise RuntimeError("mine")
        del items
        gc.collect()
    else:
        for _ in items:
            break
        del items
        gc.collect()
    assert source.closed and workers() == []


def test_a_loader_with_a_thread_yields_what_it_yields_without(tiny_dataset: CTRDataset) -> None:
    plain = SequenceLoader(tiny_dataset, "train", 200, 20, shuffle=True, seed=1, prefetch=0)
    ahead = SequenceLoader(tiny_dataset, "train", 200, 20, shuffle=True, seed=1, prefetch=3)
    for epoch in (0, 1):
        plain.set_epoch(epoch)
        ahead.set_epoch(epoch)
        kept = list(ahead)  # batches stay what they were while others are made
        assert len(kept) == len(plain)
        for ours, theirs in zip(kept, plain, strict=True):
            assert torch.equal(ours.history, theirs.history) and torch.equal(ours.rows, theirs.rows)


def test_two_iterations_at_once_do_not_disturb_each_other(tiny_dataset: CTRDataset) -> None:
    loader = SequenceLoader(tiny_dataset, "train", 300, 20, prefetch=2)
    pairs = list(zip(loader, loader))
    assert len(pairs) == len(loader)
    assert all(torch.equal(first.history, second.history) for first, second in pairs)


def test_on_the_cpu_there_is_no_thread_by_default(tiny_dataset: CTRDataset) -> None:
    batches = iter(SequenceLoader(tiny_dataset, "train", 200, 20))
    next(batches)
    assert workers() == []
