"""Where an experiment reads and writes: data paths made absolute, files that are missing, names that make folders."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from model_zoo.faults import Fault, shown
from model_zoo.pipeline.dataset import with_extension

PATH_KEYS = ("train_data", "valid_data", "test_data", "user_info", "item_info")
#: keys whose values become the names of a folder or a file under ``model_root``
NAME_KEYS = ("dataset_id", "model_id")
ADVICE = "see data/README.md for how to get or build the data set"


def resolve_paths(params: dict[str, Any], root: str) -> None:
    """Make the data paths absolute: relative to the working directory if the file is there, else to the repository."""
    for key in PATH_KEYS:
        path = params.get(key)
        if path:
            here, there = (with_extension(os.path.normpath(os.path.join(base, path))) for base in (os.getcwd(), root))
            params[key] = here if os.path.exists(here) else there
    for key, default in (("model_root", "checkpoints"), ("data_root", "data")):
        params[key] = os.path.normpath(os.path.join(root, params.get(key) or default))


def missing_files(params: dict[str, Any], root: str) -> Iterator[Fault]:
    """Data files that are not there; those of a folder that is not there are one fault."""
    paths = {key: params[key] for key in PATH_KEYS if params.get(key)}
    resolve_paths(paths, root)
    by_folder = defaultdict(list)
    for key in PATH_KEYS:
        if key in paths and not os.path.exists(paths[key]):
            by_folder[os.path.dirname(paths[key])].append(key)
    for folder, keys in by_folder.items():
        if len(keys) > 1 and not os.path.exists(folder):
            yield Fault((keys[0],), f"{', '.join(keys)}: {folder}: no such folder; {ADVICE}")
            continue
        for key in keys:
            yield Fault((key,), f"{key}: {paths[key]}: no such file; {ADVICE}")


def name_faults(params: dict[str, Any]) -> Iterator[Fault]:
    """Names that would lead out of ``model_root``, or that no folder can have."""
    for key in NAME_KEYS:
        name = params.get(key)
        if isinstance(name, str) and (not name.strip() or not name.isprintable() or re.search(r"[/\\]|\.\.", name)):
            reason = "it names a folder of the results: no '/', '\\', '..' or control character in it, and not empty"
            yield Fault((key,), f"{key}: {shown(name)}: {reason}; rename it")
