"""Checkpoints: plain tensors, numbers and text, written whole, checked before they are read, loaded where they belong."""

from __future__ import annotations

import hashlib
import logging
import pickle
import zipfile
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from model_zoo.errors import ConfigError
from model_zoo.files import Path, write_whole_with

logger = logging.getLogger("model_zoo")

FORMAT = "longctr-mos checkpoint"
VERSION = 1
#: key of the digest of everything else in a checkpoint
DIGEST = "digest"
#: bit of a zip entry's attributes
DOS_FOLDER = 0x10
#: mismatches that a message names; it counts the others
SHOWN = 4


@dataclass(frozen=True)
class Weights:
    """A model's weights as they were read.

    Attributes:
        path: the file.
        state: its state dict, on the CPU.
        model: name of the model's class; None for a bare state dict, such as LongCTR writes.
        config: the model's configuration keys.
    """

    path: str
    state: dict[str, Tensor]
    model: str | None = None
    config: dict[str, Any] = field(default_factory=dict)

    def check(self, model: str, config: dict[str, Any], own: dict[str, Tensor], given: dict[str, Tensor]) -> None:
        """Refuse a model that these weights do not belong in; warn of keys that it has other values for.

        Args:
            model: name of the model's class.
            config: its configuration keys.
            own: its state dict.
            given: these weights under its names.

        Raises:
            ConfigError: another model, or other parameters; names both models and the first mismatches.
        """
        faults, here = misfits(own, given), _described(config)
        changed = [
            f"{key} is {self.config[key]!r:.60} there, {here[key]!r:.60} here"
            for key in sorted(self.config.keys() & here.keys())
            if self.config[key] != here[key]
        ]
        if self.model is not None and self.model != model:
            reason = f": {listed(faults)}" if faults else ""
            raise ConfigError(f"{self.path}: holds {self.model}, which does not fit {model}{reason}")
        if faults:
            reason = f" ({listed(changed)})" if changed else ""
            holds = f"holds {self.model} of another config and " if self.model else ""
            raise ConfigError(f"{self.path}: {holds}does not fit {model}: {listed(faults)}{reason}")
        if changed:
            logger.warning("%s: trained with another config: %s", self.path, listed(changed))


def write_weights(path: Path, model: str, config: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Write a model's weights, its name and its configuration keys, whole or not at all.

    Raises:
        FileError: the file cannot be written; what was there before is untouched.
    """
    content = {"format": FORMAT, "version": VERSION, "model": model, "config": _described(config), "state": state}
    write_checkpoint(path, content)


def read_weights(path: Path) -> Weights:
    """What `write_weights` wrote, or a bare state dict that ``torch.save`` did.

    Raises:
        ConfigError: the file is missing, damaged, or holds something else.
    """
    content = read_checkpoint(path)
    found = Weights(str(path), content)
    if content.get("format") == FORMAT:
        version = content.get("version")
        if not isinstance(version, int) or version > VERSION:
            raise ConfigError(
                f"{path}: written by a newer version of this package (checkpoint version {version}, this one reads "
                f"{VERSION}); update the package"
            )
        found = Weights(str(path), content.get("state", {}), content.get("model"), content.get("config", {}))
    if not found.state or not all(isinstance(value, Tensor) for value in found.state.values()):
        kind = f"a {content['format']}" if isinstance(content.get("format"), str) else "something else"
        raise ConfigError(f"{path}: holds {kind}, not a model's weights; give another file")
    return found


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write nested dictionaries, lists and tuples of tensors, numbers, text and None, whole or not at all.

    Raises:
        FileError: the file cannot be written; what was there before is untouched.
        TypeError: something else is in ``content``; `read_checkpoint` would refuse it.
    """
    plain = _plain(content, "content")
    plain[DIGEST] = _digest(plain)
    write_whole_with(path, lambda file: torch.save(plain, file))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `write_checkpoint` wrote, or another dictionary of such values that ``torch.save`` did, on the CPU.

    Raises:
        ConfigError: the file is missing, damaged, or not such a one.
    """
    try:
        with open(path, "rb") as file:
            _check_archive(file, path)
            content = _load(file, path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such checkpoint") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read as a checkpoint ({error.strerror or error})") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"{path}: cannot be read as a checkpoint: it holds no named tensors; give another file")
    if content.pop(DIGEST, None) not in (None, _digest(content)):
        raise _damaged(path)
    return content


def misfits(own: dict[str, Tensor], given: dict[str, Tensor]) -> list[str]:
    """What keeps a state dict from loading, a clause for each parameter; nothing is loaded before this is empty."""
    faults = [f"{name} is missing" for name in own if name not in given]
    faults += [f"{name} is not in this model" for name in given if name not in own]
    for name, value in own.items():
        if name in given and given[name].shape != value.shape:
            faults.append(f"{name} is {tuple(given[name].shape)}, not {tuple(value.shape)}")
    return faults


def listed(clauses: list[str]) -> str:
    """The first clauses, and how many more there are."""
    more = len(clauses) - SHOWN
    return "; ".join(clauses[:SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _check_archive(file: BinaryIO, path: Path) -> None:
    """Refuse a file whose bytes are not those that were written.

    ``torch.save`` writes a zip archive with a check sum for each part, and ``torch.load`` reads parts without
    looking at them: a byte that changed on disk would be a weight that changed. A part that the archive's directory
    calls a folder it does not read at all, and takes what was in memory.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            whole = archive.testzip() is None and not any(part.external_attr & DOS_FOLDER for part in archive.infolist())
    except Exception:  # what a changed byte of the archive's directory raises has no common base
        whole = False
    if not whole:
        raise _damaged(path)
    file.seek(0)


def _damaged(path: Path) -> ConfigError:
    return ConfigError(
        f"{path}: cannot be read as a checkpoint: it is damaged, cut short or another kind of file; "
        "give another file, or train again"
    )


def _load(file: BinaryIO, path: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ConfigError(
            f"{path}: cannot be read as a checkpoint: it holds more than tensors, numbers and text, which could run "
            "code; save its state_dict() with torch.save"
        ) from None
    except Exception as error:  # any zip archive comes as far as this
        reason = (str(error).splitlines() or [""])[0][:200].rstrip(".")
        raise ConfigError(f"{path}: cannot be read as a checkpoint ({type(error).__name__}: {reason})") from None


def _digest(content: dict[str, Any]) -> str:
    """BLAKE2 of plain content: of its structure, its numbers and text, and its tensors' bytes; 32 hex digits."""
    found = hashlib.blake2b(digest_size=16)

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            found.update(f"{value.dtype}{tuple(value.shape)}".encode())
            found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, dict | list | tuple):
            found.update(f"{type(value).__name__}{len(value)}".encode())
            for item in value.items() if isinstance(value, dict) else value:
                add(item)
        else:
            found.update(f"{value!r};".encode())

    add(content)
    return found.hexdigest()


def _plain(value: Any, place: str) -> Any:
    """``value`` as ``torch.load(weights_only=True)`` takes it: builtin containers and numbers, tensors without a graph."""
    if value is None:
        return None
    for kind in (bool, int, float, str):  # of their subclasses, numpy's float64 for one, the builtin value
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, np.generic):
        return _plain(value.item(), place)
    if isinstance(value, Tensor):
        tensor = value.detach()
        whole = tensor.untyped_storage().nbytes() <= tensor.numel() * tensor.element_size()
        return tensor if whole else tensor.clone()  # a view would bring along all that it is a view of
    if isinstance(value, dict):
        return {_plain(key, f"{place}'s keys"): _plain(item, f"{place}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_plain(item, f"{place}[{number}]") for number, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    raise TypeError(f"{place} is a {type(value).__name__}, which no checkpoint holds")


def _described(config: dict[str, Any]) -> dict[str, Any]:
    """Configuration values that a checkpoint can hold; of an object that a script passed, what it prints as."""
    described = {}
    for key, value in config.items():
        try:
            described[key] = _plain(value, key)
        except TypeError:
            described[key] = repr(value)
    return described
