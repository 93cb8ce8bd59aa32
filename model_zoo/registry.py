"""Backbones, methods, and the models composed of them."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import nn

from model_zoo.backbones.atten_mixer import AttenMixerBlock
from model_zoo.backbones.dien import DIENBlock
from model_zoo.backbones.din import DINBlock
from model_zoo.backbones.eta import ETABlock
from model_zoo.backbones.fuxi import FuXiBlock, FuXiMMEBlock
from model_zoo.backbones.gru4rec import GRU4RecBlock
from model_zoo.backbones.mamba4rec import Mamba4RecBlock
from model_zoo.backbones.mean_pool import MeanPoolBlock
from model_zoo.backbones.miasrec import MiasRecBlock
from model_zoo.backbones.mirrn import MIRRNBlock
from model_zoo.backbones.sasrec import SASRecBlock
from model_zoo.backbones.sdim import SDIMBlock
from model_zoo.backbones.sim import SIMBlock
from model_zoo.backbones.transact import TransActBlock
from model_zoo.backbones.twin import TwinBlock
from model_zoo.layers.cross_head import DCNv2Head, TransActHead
from model_zoo.layers.finalmlp_head import FinalMLPHead
from model_zoo.layers.heads import HeadShape, MLPHead, ScoreHead
from model_zoo.layers.mos import MoS
from model_zoo.layers.shared_expert_moe import DSelectK, ExpertChoice, GShard
from model_zoo.layers.sim_head import SIMHead
from model_zoo.sequential_ctr import SequentialCTR
from model_zoo.shared_expert_ctr import SharedExpertCTR
from model_zoo.three_phase import ThreePhaseCTR

BlockFactory = Callable[[], nn.Module]


@dataclass(frozen=True)
class Backbone:
    """A sequence block, the head that reads it, and how configuration reaches both.

    Attributes:
        name: the plain model's name.
        block: class with signature ``(item_dim, *, <configuration keys>)`` and an ``out_dim`` attribute.
        head: class with signature ``(HeadShape, *, <configuration keys>)``; blocks with a key ``head`` may choose ``dot``.
        longctr_names: parts of parameter names in LongCTR's checkpoints, theirs to ours.
        routable: whether a method may hold copies of the block.
    """

    name: str
    block: type[nn.Module]
    head: type[nn.Module] = MLPHead
    longctr_names: dict[str, str] = field(default_factory=dict)
    routable: bool = True

    def factory(self, item_dim: int, params: dict[str, Any]) -> Callable[..., nn.Module]:
        """Makes blocks; called with a function, it passes that on as the wrapper of the block's long branch."""
        own = {key: params[key] for key in configuration_keys(self.block) if key in params}

        def make(wrap_long: Callable[[BlockFactory], nn.Module] | None = None) -> nn.Module:
            if wrap_long is not None and "wrap_long" not in inspect.signature(self.block).parameters:
                raise ValueError(f"block_scope: long: {self.name} has no long branch apart from the rest; set full")
            return self.block(item_dim, **own) if wrap_long is None else self.block(item_dim, wrap_long, **own)

        return make

    def make_head(self, shape: HeadShape, params: dict[str, Any]) -> nn.Module:
        """The head, its keys taken from ``params``; `ScoreHead` under ``head: dot``."""
        head = self._head(params)
        return head(shape, **{key: params[key] for key in configuration_keys(head) if key in params})

    def configuration(self, method: Method | None, params: dict[str, Any]) -> dict[str, Any]:
        """Every key of block, head and method, with its value in ``params`` or its default."""
        sources: list[Callable[..., Any]] = [self.block, self._head(params), *([method.layer] if method else [])]
        return {key: params.get(key, p.default) for source in sources for key, p in configuration_keys(source).items()}

    def _head(self, params: dict[str, Any]) -> Callable[..., nn.Module]:
        return ScoreHead if params.get("head") == "dot" else self.head


@dataclass(frozen=True)
class Method:
    """A layer that takes a block's place and holds copies of it.

    Attributes:
        name: prefix of the composed models' names.
        layer: class with signature ``(block_factory, item_dim, *, <configuration keys>)``, a block itself, with
            ``expert_modules()``: what it holds beside the backbone's own block, built inside ``isolated_rng()``.
        base: model class that trains it.
    """

    name: str
    layer: type[nn.Module]
    base: type[SequentialCTR] = SequentialCTR

    def wrap(self, make: BlockFactory, item_dim: int, params: dict[str, Any]) -> nn.Module:
        """The layer over ``make``'s blocks, with its keys taken from ``params``."""
        own = {key: params[key] for key in configuration_keys(self.layer) if key in params}
        return self.layer(make, item_dim, **own)


_HASHED = {"random_rotations": "lsh.random_rotations"}
BACKBONES: dict[str, Backbone] = {
    backbone.name: backbone
    for backbone in [
        Backbone("TWIN", TwinBlock, longctr_names=TwinBlock.LONGCTR_NAMES),
        Backbone("SDIM", SDIMBlock, longctr_names={"random_rotations": "long.lsh.random_rotations"}),
        Backbone("ETA", ETABlock, longctr_names=_HASHED),
        Backbone("MIRRN", MIRRNBlock, longctr_names=_HASHED),
        Backbone("SIM", SIMBlock, SIMHead),
        Backbone("TransAct", TransActBlock, TransActHead, longctr_names=TransActBlock.LONGCTR_NAMES),
        Backbone("DIN", DINBlock, longctr_names=DINBlock.LONGCTR_NAMES),
        Backbone("DIEN", DIENBlock, longctr_names=DIENBlock.LONGCTR_NAMES),
        Backbone("Mamba4Rec", Mamba4RecBlock),
        Backbone("SASRec", SASRecBlock),
        Backbone("GRU4Rec", GRU4RecBlock),
        Backbone("FuXi", FuXiBlock),
        Backbone("FuXiMME", FuXiMMEBlock),
        Backbone("AttenMixer", AttenMixerBlock),
        Backbone("MiasRec", MiasRecBlock),
        Backbone("DCNv2", MeanPoolBlock, DCNv2Head, routable=False),
        Backbone("FinalMLP", MeanPoolBlock, FinalMLPHead, routable=False),
    ]
}
METHODS: dict[str, Method] = {
    method.name: method
    for method in [
        Method("MoS", MoS, ThreePhaseCTR),
        Method("GShard", GShard, SharedExpertCTR),
        Method("DSelectK", DSelectK, SharedExpertCTR),
        Method("ExpertChoice", ExpertChoice, SharedExpertCTR),
    ]
}


def configuration_keys(cls: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """A class's configuration keys: the keyword-only parameters of its constructor, annotations resolved."""
    signature = inspect.signature(cls, eval_str=True)
    return {name: p for name, p in signature.parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def compose(backbone: Backbone, method: Method | None = None) -> type[SequentialCTR]:
    """The model class of a backbone, plain or under a method, named ``<Method>_<Backbone>``."""
    name = f"{method.name}_{backbone.name}" if method else backbone.name
    base = method.base if method else SequentialCTR
    return type(name, (base,), {"backbone": backbone, "method": method, "__module__": "model_zoo"})


def model_names() -> list[str]:
    """Names of all models."""
    return [*BACKBONES, *(f"{method}_{name}" for method in METHODS for name, b in BACKBONES.items() if b.routable)]


@cache
def get_model(name: str) -> type[SequentialCTR]:
    """The model class called ``name``.

    Raises:
        KeyError: with the nearest names.
    """
    if name in BACKBONES:
        return compose(BACKBONES[name])
    for method, found in METHODS.items():
        backbone = BACKBONES.get(name.removeprefix(f"{method}_"))
        if name.startswith(f"{method}_") and backbone is not None and backbone.routable:
            return compose(backbone, found)
    near = difflib.get_close_matches(name, model_names(), n=3, cutoff=0.4) or model_names()
    raise KeyError(f"no model '{name}'; nearest: {', '.join(near)}")


def register_backbone(backbone: Backbone) -> None:
    """Add a backbone, and with it its combinations with every method.

    Raises:
        ValueError: another backbone or method has the name, or another model would be called so.
    """
    _claim(backbone.name, BACKBONES.get(backbone.name), backbone.block)
    BACKBONES[backbone.name] = backbone
    get_model.cache_clear()


def register_method(method: Method) -> None:
    """Add a method over every backbone.

    Raises:
        ValueError: another backbone or method has the name.
    """
    _claim(method.name, METHODS.get(method.name), method.layer)
    METHODS[method.name] = method
    get_model.cache_clear()


def _claim(name: str, present: Backbone | Method | None, made_by: type) -> None:
    """Refuse a name that is taken; defining the same class anew (a notebook's cell run again) takes its own name over."""
    if present is not None:
        holder = present.block if isinstance(present, Backbone) else present.layer
        if (holder.__module__, holder.__qualname__) == (made_by.__module__, made_by.__qualname__):
            return
    if name in BACKBONES or name in METHODS or name in model_names():
        raise ValueError(f"{name} is registered already; give {made_by.__qualname__} another name")


def model_keys(name: str) -> dict[str, inspect.Parameter]:
    """Every configuration key of a model: its base's, its block's, its head's and its method's."""
    model = get_model(name)
    keys: dict[str, inspect.Parameter] = {}
    sources: list[type] = [cls for cls in model.__mro__ if "__init__" in vars(cls) and issubclass(cls, SequentialCTR)]
    sources += [model.backbone.block, model.backbone.head] + ([model.method.layer] if model.method else [])
    for source in sources:
        for key, parameter in configuration_keys(source).items():
            keys.setdefault(key, parameter)
    return keys
