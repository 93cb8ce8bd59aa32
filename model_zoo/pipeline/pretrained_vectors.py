"""Pretrained vectors from ``.h5`` or ``.npz`` files with FuxiCTR's two arrays, ``key`` (ids) and ``value``."""

from __future__ import annotations

import os

import h5py
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model_zoo.compat import FeatureMap
from model_zoo.errors import DataError
from model_zoo.pipeline.parquet_files import reason_of


def load_pretrained(feature_map: FeatureMap, embedding_dim: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Vectors of every feature with ``pretrained_emb``.

    Args:
        feature_map: paths under ``pretrained_emb`` are taken as they stand, then under the data set's folder.
        embedding_dim: width expected where the feature names neither ``pretrain_dim`` nor ``embedding_dim``.

    Returns:
        Feature name to ``(vectors float32 [V, p], known bool [V])``; ids without a vector are zero and not known.
    """
    found = {}
    for name, spec in feature_map.features.items():
        if "pretrained_emb" in spec:
            path = vector_path(feature_map, name)
            width = spec.get("pretrain_dim", spec.get("embedding_dim", embedding_dim))
            found[name] = read_vectors(path, name, spec["vocab_size"], width)
    return found


def vector_path(feature_map: FeatureMap, feature: str) -> str:
    """The file of a feature with ``pretrained_emb``: as it stands, or under the data set's folder."""
    path = str(feature_map.features[feature]["pretrained_emb"])
    return path if os.path.exists(path) else os.path.join(feature_map.data_dir, path)


def read_vectors(path: str, feature: str, vocab_size: int, width: int) -> tuple[Tensor, Tensor]:
    """One file's vectors, placed by id.

    Raises:
        DataError: missing or unreadable file, wrong width, an id twice or outside the vocabulary, NaN or inf.
    """
    if not os.path.exists(path):
        raise DataError(f"{path}: no such file (pretrained_emb of feature '{feature}')")
    try:
        if path.endswith(".npz"):
            with np.load(path, allow_pickle=False) as arrays:
                key, value = arrays["key"], arrays["value"]
        elif path.endswith((".h5", ".hdf5")):
            with h5py.File(path, "r") as arrays:
                key, value = arrays["key"][:], arrays["value"][:]
        else:
            raise DataError(f"{path}: pretrained_emb of feature '{feature}' must be an .h5 or .npz file")
    except DataError:
        raise
    except Exception as error:  # damage makes h5py, zipfile and numpy raise errors of any type
        needed = "needs readable arrays 'key' [n] and 'value' [n, dim]"
        raise DataError(f"{path}: {needed} ({reason_of(error)})") from None
    ids = _whole_numbers(key, path)
    if value.dtype.kind not in "fiu":
        raise DataError(f"{path}: 'value' must hold numbers, not {value.dtype}")
    if value.ndim != 2 or value.shape != (len(ids), width):
        wanted = (len(ids), width)
        raise DataError(f"{path}: 'value' is {value.shape}, feature '{feature}' needs {wanted}; set pretrain_dim")
    if len(np.unique(ids)) != len(ids):
        raise DataError(f"{path}: 'key' holds an id twice")
    if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
        raise DataError(f"{path}: 'key' holds an id outside 0..{vocab_size - 1}; vocab_size of '{feature}' is too small")
    with np.errstate(over="ignore"):
        value = value.astype(np.float32)
    if not np.isfinite(value).all():
        raise DataError(f"{path}: 'value' holds a NaN or infinite number")
    vectors = np.zeros((vocab_size, width), dtype=np.float32)
    known = np.zeros(vocab_size, dtype=bool)
    vectors[ids], known[ids] = value, True
    vectors[0] = 0.0
    return torch.from_numpy(vectors), torch.from_numpy(known)


def _whole_numbers(key: npt.NDArray[np.generic], path: str) -> npt.NDArray[np.int64]:
    """Ids stored as integers, whole floats or text that spells integers, as int64 ``[n]``."""
    if key.ndim != 1:
        raise DataError(f"{path}: 'key' must be one id per vector, not of shape {key.shape}")
    wanted = f"{path}: 'key' must hold the feature's integer ids, not"
    if key.dtype.kind == "f":
        fractions = ~np.isfinite(key) | (key != np.rint(key))
        if fractions.any():
            raise DataError(f"{wanted} {key[fractions][0]}")
    try:
        return key.astype(np.int64)
    except (ValueError, TypeError):
        raise DataError(f"{wanted} {key.dtype}") from None
