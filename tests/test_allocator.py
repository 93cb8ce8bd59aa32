"""The allocator's setting: in force or refused, never an error."""

import ctypes
import platform
import sys

import pytest

from model_zoo.allocator import keep_freed_memory, return_freed_memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_it_is_in_force_on_glibc_and_may_be_asked_for_again() -> None:
    assert keep_freed_memory() and return_freed_memory() and keep_freed_memory()


def test_elsewhere_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory() and not return_freed_memory()
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not keep_freed_memory() and not return_freed_memory()
