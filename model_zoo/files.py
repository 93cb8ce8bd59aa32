"""Files written whole or not at all, and lines that several processes append to one file."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

from model_zoo.errors import FileError
from model_zoo.temporary_file import TemporaryFile, fcntl, remove_abandoned, sync_folder

logger = logging.getLogger("model_zoo")

Path = str | os.PathLike[str]

ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space, or choose another disk"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "make the folder writable, or choose another one"),
}
#: what a file system without locks answers
LOCKLESS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


def write_whole(path: Path, text: str) -> None:
    """Write a text file, in UTF-8, whole or not at all.

    Raises:
        FileError: it cannot be written; what was there before is untouched.
    """
    content = text.encode()
    write_whole_with(path, lambda file: file.write(content))


def write_whole_with(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file whole or not at all: ``write`` fills a temporary one beside it, which takes its place once on disk.

    An exception of ``write``'s own passes through. What a killed writer of the same file left behind is removed.

    Raises:
        FileError: it cannot be written; what was there before is untouched.
    """
    target = os.path.abspath(path)
    if os.path.exists(target) and not os.path.isfile(target):
        raise FileError(f"{path}: is not a regular file; choose another path")
    try:
        remove_abandoned(target)
        file = TemporaryFile.beside(target)
    except OSError as error:
        raise unwritten(path, error) from None
    try:
        write(file)
        file.put_in_place(target)
    except BaseException as error:
        file.abandon()
        if file.failure is not None and isinstance(error, Exception):  # torch.save raises an error of its own after it
            raise unwritten(path, file.failure) from None
        raise


def copy_whole(source: Path, target: Path) -> None:
    """Copy a file's content whole or not at all.

    Raises:
        FileError: ``source`` cannot be read or ``target`` not be written; what was there before is untouched.
    """
    try:
        with open(source, "rb") as original:
            write_whole_with(target, lambda file: shutil.copyfileobj(original, file, 1 << 20))
    except OSError as error:
        raise FileError(f"{source}: cannot be read ({error.strerror or error}); {target} is untouched") from None


def append_line(path: Path, line: str, once: bool = False) -> bool:
    """Append a line whole or not at all, alone at it; a line that an earlier writer left torn stays one by itself.

    Args:
        line: without a line break.
        once: leave the file as it is if it has this very line.

    Returns:
        Whether the line was appended.

    Raises:
        FileError: it cannot be written; the lines that were there before are untouched.
    """
    if "\n" in line:
        raise ValueError(f"line: {line!r:.60} has a line break; append its lines one by one")
    content = f"{line}\n".encode(errors="backslashreplace")  # a command line may hold bytes that are no text
    with locked(path) as descriptor:
        try:
            size = os.lseek(descriptor, 0, os.SEEK_END)
            if once and _has_line(descriptor, content):
                return False
            torn = size and os.pread(descriptor, 1, size - 1) != b"\n"
            _append(descriptor, b"\n" + content if torn else content, size)
            if not size:
                sync_folder(path)
        except OSError as error:
            raise unwritten(path, error) from None
    return True


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[int]:
    """Hold the exclusive lock of a file, which is made if missing, or of a folder; it ends with the process at the latest.

    Where the system or the file system has no locks, a warning says so, and nothing is held.

    Args:
        wait: until another holder lets go.

    Yields:
        A descriptor of the file, open to read and append.

    Raises:
        FileError: it cannot be opened, or, without ``wait``, another holds it.
    """
    descriptor = _open_locked(path, wait)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def unwritten(path: Path, error: OSError) -> FileError:
    """What to tell the user when ``path`` could not be written: why, what is free, what to do."""
    reason = error.strerror or str(error) or type(error).__name__
    with suppress(OSError):
        reason += f", {shutil.disk_usage(os.path.dirname(os.path.abspath(path))).free / 2**20:,.0f} MiB free there"
    advice = ADVICE.get(error.errno or 0, "choose another path")
    return FileError(f"{path}: cannot be written ({reason}); {advice}; what was there before is untouched")


def _append(descriptor: int, content: bytes, size: int) -> None:
    """Append to a file of ``size`` bytes, or leave it at that size."""
    try:
        written = 0
        while written < len(content):
            written += os.write(descriptor, content[written:])
        os.fsync(descriptor)
    except BaseException:
        with suppress(OSError):
            os.ftruncate(descriptor, size)
        raise


def _has_line(descriptor: int, line: bytes) -> bool:
    with open(descriptor, "rb", closefd=False) as file:
        file.seek(0)
        return any(there.rstrip(b"\n") == line.rstrip(b"\n") for there in file)


def _open_locked(path: Path, wait: bool) -> int:
    while True:
        try:
            flags = os.O_RDONLY if os.path.isdir(path) else os.O_RDWR | os.O_CREAT | os.O_APPEND
            descriptor = os.open(path, flags, 0o666)
        except OSError as error:
            raise unwritten(path, error) from None
        try:
            _lock(descriptor, path, wait)
            if _is_at(path, descriptor):  # else it was replaced or removed while this waited
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, path: Path, wait: bool) -> None:
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "no locks")
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FileError(f"{path}: another process holds it; wait until that ends") from None
    except OSError as error:
        if error.errno not in LOCKLESS:
            raise unwritten(path, error) from None
        logger.warning("%s: there are no locks here; let no other run write to it meanwhile", path)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
