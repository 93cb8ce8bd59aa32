"""Reading the golden files: arrays recorded from LongCTR on FuxiCTR 2.3.2."""

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model_zoo.compat import FeatureMap

GOLDEN = Path(__file__).parent / "golden"


def feature_map_of(text: str | dict[str, Any], group_id: str = "user_index") -> FeatureMap:
    """A FuxiCTR feature map from its recorded json."""
    recorded = json.loads(text) if isinstance(text, str) else text
    feature_map = FeatureMap(recorded["dataset_id"], "")
    feature_map.labels = recorded["labels"]
    feature_map.group_id = group_id
    feature_map.default_emb_dim = recorded["default_emb_dim"]
    feature_map.features = OrderedDict((name, spec) for entry in recorded["features"] for name, spec in entry.items())
    return feature_map


class Golden:
    """One ``<Model>_<k>.npz``."""

    def __init__(self, name: str) -> None:
        self.arrays = np.load(GOLDEN / f"{name}.npz", allow_pickle=False)
        self.hparams: dict[str, Any] = json.loads(str(self.arrays["hparams"]))
        self.feature_map = feature_map_of(str(self.arrays["feature_map"]))

    def tensor(self, name: str) -> Tensor:
        """The array ``name``."""
        return torch.from_numpy(np.array(self.arrays[name]))

    def group(self, prefix: str) -> dict[str, Tensor]:
        """All arrays under ``prefix/``, in order, by what follows it."""
        return {
            name[len(prefix) + 1 :]: self.tensor(name) for name in self.arrays.files if name.startswith(f"{prefix}/")
        }

    def inputs(self) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """LongCTR's batch."""
        return self.group("batch"), self.group("item"), self.tensor("mask")
