"""The file that is written beside another one to take its place."""

from __future__ import annotations

import glob
import io
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class TemporaryFile(io.BufferedWriter):
    """A file of a name of its own beside its target; its lock tells that its writer lives.

    Attributes:
        failure: what the disk answered, which the code that writes may have turned into an error of its own.
    """

    def __init__(self, path: str) -> None:
        super().__init__(io.FileIO(path, "xb"))
        self.path = path
        self.failure: OSError | None = None

    @classmethod
    def beside(cls, target: str) -> TemporaryFile:
        """A new one for that target."""
        while True:
            file = cls(f"{_prefix(target)}{secrets.token_hex(4)}.partial")
            if fcntl is None:
                return file
            with suppress(OSError):  # no locks here: then nobody removes it either
                fcntl.flock(file.fileno(), fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_nlink:  # else it was taken for abandoned before it was locked
                return file
            file.close()

    def write(self, content: Any, /) -> int:
        with self._noting_failure():
            return super().write(content)

    def flush(self) -> None:
        with self._noting_failure():
            super().flush()

    def put_in_place(self, target: str) -> None:
        """Have the content on disk, then the name, and close."""
        with self._noting_failure():
            self.flush()
            os.fsync(self.fileno())
            if fcntl is None:  # Windows renames closed files only
                self.close()
            os.replace(self.path, target)
            sync_folder(target)
            self.close()

    def abandon(self) -> None:
        """Close and remove."""
        with suppress(OSError):
            os.remove(self.path)
        with suppress(OSError):  # what is still buffered cannot be written either
            self.close()

    @contextmanager
    def _noting_failure(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failure = error
            raise


def _prefix(target: str) -> str:
    folder, name = os.path.split(target)
    return os.path.join(folder, f".{name[:50]}.")  # a name has at most 255 bytes, a character up to 4


def remove_abandoned(target: str) -> None:
    """Remove temporary files of the same target whose writer was killed."""
    if fcntl is None:
        return
    for path in glob.glob(f"{glob.escape(_prefix(target))}{'[0-9a-f]' * 8}.partial"):
        with suppress(OSError):  # its writer lives, or another process was faster
            descriptor = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.remove(path)
            finally:
                os.close(descriptor)


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Have the name of the file ``path`` on disk, too; not every system can."""
    with suppress(OSError):
        descriptor = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
