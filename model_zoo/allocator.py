"""Whether the C library keeps the memory that a train step frees, for the next step to take again."""

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
    return _set(1 << 30, (1 << 31) - 1)


def return_freed_memory() -> bool:
    """glibc's own behaviour again, as it is once large blocks have been freed: blocks from 32 MiB on are mapped anew.

    Returns:
        Whether the setting is in force.
    """
    library = _library()
    changed = _set(32 << 20, 64 << 20)
    if changed and library is not None:
        library.malloc_trim(0)
    return changed


def _set(mmap_threshold: int, trim_threshold: int) -> bool:
    """Whether glibc took both sizes (bytes)."""
    library = _library()
    if library is None:
        return False
    taken = library.mallopt(_MMAP_THRESHOLD, mmap_threshold), library.mallopt(_TRIM_THRESHOLD, trim_threshold)
    return all(taken)


def _library() -> ctypes.CDLL | None:
    """The C library if it is glibc."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        library = ctypes.CDLL(None)
        return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
    except OSError:
        return None
