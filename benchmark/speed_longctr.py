"""LongCTR's own models and loader, run from a checkout that the user has (``--longctr DIR``); nothing of it is copied here.

Its files are loaded under private names, so that its top folders do not stand in the way of other packages. LongCTR pins
FuxiCTR 2.3.2. On the FuxiCTR that is installed here it runs as it is, but for two things that are put right from outside:
`model_zoo.compat` is imported first, so that FuxiCTR does not start Ray; and NumPy 2 lacks the name ``unicode_``, which
keras_preprocessing, the loader's padding, still asks for. FuxiCTR's ``FeatureProcessor`` and ``RankDataLoader`` are left
out: the feature map is ours, equal to the one that they make, and the loader that they would pick is made directly.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from model_zoo.batch import LongCTRBatch
from model_zoo.compat import FeatureMap
from model_zoo.errors import ConfigError
from model_zoo.experiment.record import git_commit

#: LongCTR's config has `num_workers: 3`
WORKERS = 3
Rows = np.ndarray


class LongCTR:
    """A checkout of reczoo/LongCTR.

    Args:
        folder: the checkout.

    Raises:
        ConfigError: the folder is not one, or something that its loader imports is not installed.
    """

    def __init__(self, folder: str) -> None:
        self.folder = os.path.abspath(folder)
        if not hasattr(np, "unicode_"):
            setattr(np, "unicode_", np.str_)  # noqa: B010 - as an attribute it would be refused, rightly
        self.loading = self._module("longctr_dataloader")
        if not hasattr(self.loading, "LongCTRDataLoader"):
            raise ConfigError(f"--longctr {folder}: longctr_dataloader.py there has no LongCTRDataLoader")

    @property
    def commit(self) -> str | None:
        """The checkout's commit."""
        return git_commit(self.folder)

    def _module(self, name: str) -> ModuleType:
        """``<name>.py`` of the checkout, under a private name."""
        path = os.path.join(self.folder, f"{name}.py")
        private = "_longctr_" + name.replace("/", "_")
        if private in sys.modules and sys.modules[private].__file__ == path:
            return sys.modules[private]
        if not os.path.isfile(path):
            raise ConfigError(
                f"--longctr {self.folder}: {name}.py is not there; give a checkout of https://github.com/reczoo/LongCTR"
            )
        spec = importlib.util.spec_from_file_location(private, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[private] = module  # worker processes look the loader's classes up there
        try:
            spec.loader.exec_module(module)
        except ImportError as error:
            del sys.modules[private]
            raise ConfigError(f"--longctr {self.folder}: {name}.py needs {error.name}: pip install {error.name}") from None
        return module

    def has(self, name: str) -> bool:
        """Whether LongCTR has the model ``name``."""
        return os.path.isfile(os.path.join(self.folder, name, f"{name}.py"))

    def model(self, name: str, feature_map: FeatureMap, params: dict[str, Any]) -> nn.Module:
        """Its model of our experiment's settings, ready for train steps.

        Raises:
            ConfigError: it has no such model.
        """
        found = getattr(self._module(f"{name}/{name}"), name, None)
        if found is None:
            raise ConfigError(f"--longctr {self.folder}: {name}/{name}.py has no class {name}")
        model = found(feature_map, **{**params, "verbose": 0})
        model._batch_index, model._max_gradient_norm = 0, 10.0
        return model

    def loader(
        self, feature_map: FeatureMap, params: dict[str, Any], split: str, rows: int, workers: int = WORKERS
    ) -> Any:
        """Its loader over the first ``rows`` rows of a split's file, which are all that its workers prepare."""
        loader = self.loading.LongCTRDataLoader(
            feature_map,
            params[f"{split}_data"],
            params["user_info"],
            params["item_info"],
            batch_size=params["batch_size"],
            shuffle=split == "train",
            num_workers=workers,
            max_len=params["max_len"],
        )
        loader.dataset.darray = loader.dataset.darray[:rows]
        loader.num_samples = len(loader.dataset)
        loader.num_batches = -(-loader.num_samples // params["batch_size"])
        return loader

    def batches(self, loader: Any, parts: list[Rows]) -> list[LongCTRBatch]:
        """The given rows of the loader's file as its batches."""
        return [loader.collate_fn([loader.dataset[row] for row in rows]) for rows in parts]

    def candidates(self, loader: Any, row: int, items: Rows) -> LongCTRBatch:
        """One row of the loader's file with each of ``items`` as its target."""
        repeated = np.repeat(loader.dataset.darray[row : row + 1], len(items), axis=0)
        repeated[:, loader.dataset.column_index["item_index"]] = items
        return loader.collate_fn(list(repeated))


def train_steps(model: nn.Module, batches: Any, count: int | None = None) -> int:
    """LongCTR's or our train step on each batch, its loss read as in FuxiCTR's epoch; returns how many there were."""
    model.train()
    done = 0
    for batch in batches:
        model.train_step(batch).item()  # type: ignore[operator]
        done += 1
        if done == count:
            break
    return done


@torch.no_grad()
def largest_difference(ours: Any, theirs: nn.Module, batch: LongCTRBatch) -> float:
    """Largest difference of two models' predictions with ``theirs`` weights, draws from the same seed.

    Args:
        ours: a model under ``longctr_compat``; its weights are replaced.
    """
    ours.load_state_dict(ours.from_longctr(theirs.state_dict()))
    predictions = []
    for model in (ours, theirs):
        torch.manual_seed(0)
        columns, items, mask = batch
        predictions.append(model.eval()((columns, dict(items), mask))["y_pred"])
    return float((predictions[0] - predictions[1]).abs().max())
