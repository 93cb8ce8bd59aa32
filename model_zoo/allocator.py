"""Let the C library keep the memory that a train step frees: the next step takes it again."""

from __future__ import annotations

import ctypes
import sys

#: glibc's names for its settings (mallopt(3))
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
    """Stop glibc from returning freed blocks to the system; elsewhere do nothing.

    A train step frees and asks for the same tensors every time. By default each large one is mapped and zeroed by the
    kernel anew, page by page, under a lock that all threads share: up to two fifths of a step. The price is that memory
    once used stays the process's own.

    Returns:
        Whether the setting is in force.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    return bool(mallopt(_MMAP_THRESHOLD, 1 << 30)) and bool(mallopt(_TRIM_THRESHOLD, (1 << 31) - 1))
