"""Files of the user's own that register models."""

from __future__ import annotations

import os
import runpy
import sys
import traceback

from model_zoo.errors import ConfigError


def load_plugin(path: str) -> None:
    """Run a Python file, which registers its models (``registry.register_backbone``, ``register_method``).

    Raises:
        ConfigError: there is no such file, or it fails; with its line and the error.
    """
    if not os.path.isfile(path):
        raise ConfigError(f"--load {path}: no such file")
    folder = os.path.dirname(os.path.abspath(path))
    try:
        sys.path.insert(0, folder)  # for modules beside the file
        runpy.run_path(path, run_name=f"loaded_{os.path.splitext(os.path.basename(path))[0]}")
    except SyntaxError as error:
        raise ConfigError(f"--load {path}, line {error.lineno}: SyntaxError: {error.msg}") from None
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame.lineno for frame in frames if os.path.abspath(frame.filename) == os.path.abspath(path)]
        where = f", line {own[-1]}" if own else ""
        reason = " ".join(str(error).split())
        raise ConfigError(f"--load {path}{where}: {type(error).__name__}: {reason}") from None
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
