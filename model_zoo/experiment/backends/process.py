"""A run's process: it holds its run's lock as long as it lives, and leads a group of its own that can be stopped whole."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from model_zoo.errors import FileError
from model_zoo.files import locked, unwritten

#: exit code of a task that did not start, as another process has its run
HELD = -1000


@dataclass(frozen=True)
class Task:
    """A process to be.

    Attributes:
        command: less its ``--gpu``.
        log: file that its output is added to.
        lock: file that it holds.
        folder: working directory.
    """

    command: tuple[str, ...]
    log: str
    lock: str
    folder: str


class Backend(Protocol):
    """What runs tasks."""

    def free(self) -> int:
        """How many more can be started."""

    def start(self, task: Task) -> str:
        """Start one; returns where, in a word or two."""

    def ended(self) -> list[tuple[Task, int]]:
        """Tasks that have ended since the last call, with their exit codes, or `HELD`."""

    def stop(self, kill: bool = False) -> None:
        """Tell all to end: after writing their state, or at once."""

    def close(self) -> None:
        """Let go of what the backend holds."""


def launch(task: Task, gpu: int, settings: Mapping[str, str]) -> subprocess.Popen[bytes] | None:
    """Start a task; None if another process has its lock.

    The lock's descriptor is handed on to the process: should whoever launched it be killed, the run goes on, and nobody
    else begins it.

    Args:
        settings: environment variables for it, besides this process's own.

    Raises:
        FileError: its log or its lock cannot be written.
    """
    try:
        for path in (task.log, task.lock):
            make_folder(os.path.dirname(path))
        with locked(task.lock, wait=False) as descriptor, open(task.log, "ab") as log:
            return subprocess.Popen(
                [*task.command, "--gpu", str(gpu)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=task.folder,
                env={**os.environ, **settings}, start_new_session=True, pass_fds=(descriptor,),
            )  # fmt: skip
    except OSError as error:
        raise unwritten(error.filename or task.log, error) from None
    except FileError:
        if not os.access(task.lock, os.W_OK):
            raise
        return None


def make_folder(path: str) -> None:
    """Make a folder, if it is not there, and those it lies in.

    Raises:
        FileError: it cannot be made.
    """
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise unwritten(path, error) from None


def stop(process: subprocess.Popen[bytes], kill: bool) -> None:
    """End a process's group: let it write its state first, or at once."""
    with suppress(ProcessLookupError):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL if kill else signal.SIGTERM)
