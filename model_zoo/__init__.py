"""Long-sequence CTR prediction with mixtures of experts.

Every registered model class is an attribute of this package (``model_zoo.TWIN``, ``model_zoo.MoS_TWIN``), built on first
use so that ``import model_zoo`` costs nothing.
"""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    from model_zoo.registry import get_model

    try:
        return get_model(name)
    except KeyError as error:
        raise AttributeError(f"module 'model_zoo' has no model '{name}': {error.args[0]}") from None


def __dir__() -> list[str]:
    from model_zoo.registry import model_names

    return sorted([*globals(), *model_names()])
