"""The one file that knows which FuxiCTR is installed.

Importing a model of FuxiCTR's also imports what is not used here: its preprocessing of csv files (with Ray in 2.3.10, with
Keras-Preprocessing in 2.3.9) and its metrics (with scikit-learn, SciPy and pandas), which together take longer than torch.
Both modules are therefore registered as ones that run on first use.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.metadata import version
from types import ModuleType
from typing import Any


def _defer(name: str, *functions: str) -> None:
    """Make the module ``name`` importable without running it until one of its names is used.

    Args:
        functions: names that other modules import from it, which counts as a use only when one is called.
    """
    spec = importlib.util.find_spec(name)
    if name in sys.modules or spec is None or spec.loader is None:
        return
    module: ModuleType = importlib.util.module_from_spec(spec)
    loader = spec.loader

    def load_on_first_use(attribute: str) -> Any:
        if attribute.startswith("__") and attribute != "__all__":
            raise AttributeError(attribute)
        if module.__dict__.pop("__getattr__", None) is not None:
            for function in functions:
                del module.__dict__[function]
            loader.exec_module(module)
        return getattr(module, attribute)

    def forward(function: str) -> Callable[..., Any]:
        return lambda *args, **options: load_on_first_use(function)(*args, **options)

    module.__dict__.update({function: forward(function) for function in functions}, __getattr__=load_on_first_use)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    setattr(importlib.import_module(parent), child, module)


_defer("fuxictr.preprocess")
_defer("fuxictr.metrics", "evaluate_metrics")

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
