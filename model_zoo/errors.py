"""Errors that are the user's to mend: one sentence naming the file, column, row or key, and the fix."""


from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

P = ParamSpec("P")


class UserError(Exception):
    """Base of every error that ``run_expid.py`` prints, a line for each mistake, and answers with exit code 2."""


class ConfigError(UserError):
    """A configuration file, an experiment id or a ``--set`` option is wrong."""


class DataError(UserError):
    """A data file is missing, unreadable, or holds something the model must not be trained on."""


class FileError(UserError):
    """A file cannot be written: the disk is full, its folder is not writable, or another process holds it."""


def answered(main: Callable[P, int]) -> Callable[P, int]:
    """A command's ``main`` whose user's errors are said on stderr: exit code 2, and 130 for Ctrl-C."""

    @functools.wraps(main)
    def answering(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return answering
