"""The one file that knows which FuxiCTR is installed.

FuxiCTR 2.3.9 and 2.3.10 import Ray, for csv preprocessing, as soon as a model is imported; that takes seconds and is not
used here. ``fuxictr.preprocess`` is therefore registered as a package that runs its ``__init__`` on first use of a name.
"""

import importlib
import importlib.util
import sys
from importlib.metadata import version
from types import ModuleType
from typing import Any


def _defer_package(name: str) -> None:
    """Make the package ``name`` importable without running its ``__init__`` until one of its names is asked for."""
    spec = importlib.util.find_spec(name)
    if name in sys.modules or spec is None or spec.loader is None:
        return
    package: ModuleType = importlib.util.module_from_spec(spec)
    loader = spec.loader

    def load_on_first_use(attribute: str) -> Any:
        if attribute.startswith("__") and attribute != "__all__":
            raise AttributeError(attribute)
        package.__dict__.pop("__getattr__", None)
        loader.exec_module(package)
        return getattr(package, attribute)

    package.__dict__["__getattr__"] = load_on_first_use
    sys.modules[name] = package
    parent, _, child = name.rpartition(".")
    setattr(importlib.import_module(parent), child, package)


_defer_package("fuxictr.preprocess")

from fuxictr.features import FeatureMap  # noqa: E402
from fuxictr.pytorch.layers import CrossNetMix, CrossNetV2, FeatureEmbedding, FeatureEmbeddingDict, MLP_Block  # noqa: E402
from fuxictr.pytorch.models import BaseModel  # noqa: E402
from fuxictr.pytorch.torch_utils import get_activation, get_loss, get_optimizer, get_regularizer, seed_everything  # noqa: E402
from fuxictr.utils import Monitor  # noqa: E402

FUXICTR_VERSION = version("fuxictr")

__all__ = [
    "FUXICTR_VERSION",
    "BaseModel",
    "CrossNetMix",
    "CrossNetV2",
    "FeatureEmbedding",
    "FeatureEmbeddingDict",
    "FeatureMap",
    "MLP_Block",
    "Monitor",
    "get_activation",
    "get_loss",
    "get_optimizer",
    "get_regularizer",
    "seed_everything",
]
