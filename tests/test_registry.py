"""Models by name, new backbones and methods, configuration keys."""

import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from golden_files import SMALL, small_model, tiny_loader
from torch import Tensor, nn

import model_zoo
from model_zoo import registry
from model_zoo.checkpoint import read_weights
from model_zoo.layers.heads import MLPHead
from model_zoo.layers.mos import MoS
from model_zoo.layers.random_state import isolated_rng
from model_zoo.layers.sequence import Sequence
from model_zoo.layers.shared_expert_moe import GShard
from model_zoo.phased_training import PhasedCTR
from model_zoo.registry import Backbone, Method, get_model, model_keys, model_names, register_backbone, register_method
from model_zoo.sequential_ctr import SequentialCTR
from model_zoo.three_phase import ThreePhaseCTR


class MeanBlock(nn.Module):
    """A backbone of a user's own: a projected mean of the history, target ignored."""

    def __init__(self, item_dim: int, *, width: int = 5, scale: float = 1.0) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width must be at least 1, not {width}")
        self.project = nn.Linear(item_dim, width)
        self.scale = scale
        self.out_dim = width

    def forward(self, query: Tensor, sequence: Sequence) -> Tensor:
        weight = sequence.mask.unsqueeze(-1) / sequence.lengths.clamp(min=1).view(-1, 1, 1)
        return self.project((sequence.vectors * weight).sum(1)) * self.scale


class Doubled(nn.Module):
    """A method of a user's own: the sum of two copies of the block."""

    def __init__(self, block_factory: Any, item_dim: int, *, second_weight: float = 1.0) -> None:
        super().__init__()
        self.first = block_factory()
        with isolated_rng():  # so that what is drawn after does not depend on the second copy
            self.second = block_factory()
        self.second_weight = second_weight
        self.out_dim = self.first.out_dim

    def expert_modules(self) -> list[nn.Module]:
        return [self.second]

    def forward(self, query: Tensor, sequence: Sequence) -> Tensor:
        return self.first(query, sequence) + self.second_weight * self.second(query, sequence)


@pytest.fixture
def own_models() -> Iterator[None]:
    """Registers the two above and takes them out again."""
    register_backbone(Backbone("Mean", MeanBlock))
    register_method(Method("Doubled", Doubled))
    yield
    del registry.BACKBONES["Mean"], registry.METHODS["Doubled"]
    get_model.cache_clear()


@pytest.mark.parametrize("name", model_names())
def test_every_model_is_an_attribute_of_the_package(name: str) -> None:
    model = getattr(model_zoo, name)
    assert model is get_model(name) and model.__name__ == name
    assert issubclass(model, SequentialCTR) and name in dir(model_zoo)


def test_names_are_backbones_and_methods_over_backbones() -> None:
    assert {"TWIN", "MoS_TWIN"} <= set(model_names())
    routable = sum(backbone.routable for backbone in registry.BACKBONES.values())
    assert len(set(model_names())) == len(registry.BACKBONES) + routable * len(registry.METHODS)
    assert issubclass(get_model("MoS_TWIN"), ThreePhaseCTR) and not issubclass(get_model("TWIN"), ThreePhaseCTR)


@pytest.mark.parametrize("name, nearest", [("TWINN", "TWIN"), ("MoS_TWINS", "MoS_TWIN"), ("mos_TWIN", "MoS_TWIN")])
def test_an_unknown_name_is_refused_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(KeyError, match=f"no model '{name}'; nearest: .*{nearest}"):
        get_model(name)
    with pytest.raises(AttributeError, match=f"module 'model_zoo' has no model '{name}'.*{nearest}"):
        getattr(model_zoo, name)


def test_a_name_like_no_other_is_refused_with_all_names() -> None:
    with pytest.raises(KeyError, match="nearest: TWIN, "):
        get_model("zzzzzzzzzzzz")
    assert not hasattr(model_zoo, "_private") and not hasattr(model_zoo, "__wrapped__")


@pytest.mark.parametrize("name", ["Mean", "MoS_Mean", "Doubled_Mean", "Doubled_TWIN"])
def test_registered_backbones_and_methods_work_in_every_combination(own_models: None, name: str, tmp_path: Any) -> None:
    assert name in model_names() and getattr(model_zoo, name) is get_model(name)
    model = small_model(name, tmp_path, width=7, scale=2.0, second_weight=0.5)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    model.fit(tiny_loader(shuffle=True), epochs=1, validation_data=tiny_loader("valid"))
    end = read_weights(model.checkpoint).state
    assert all(not torch.equal(end[key], start[key]) for key in start if key.startswith("block.") and ".W_v." in key)
    assert np.isfinite(model.predict(tiny_loader("valid"))).all()
    if name.endswith("Mean"):
        blocks = [module for module in model.modules() if isinstance(module, MeanBlock)]
        assert {(block.out_dim, block.scale) for block in blocks} == {(7, 2.0)}
        assert len(blocks) == {"Mean": 1, "Doubled_Mean": 2, "MoS_Mean": 1 + 3 + 2}[name]


def test_a_methods_model_keeps_the_backbones_start_of_the_same_seed(own_models: None) -> None:
    plain, doubled = (small_model(name, seed=2).state_dict() for name in ("Mean", "Doubled_Mean"))
    for key, value in plain.items():
        assert torch.equal(doubled[key.replace("block.", "block.first.")], value), key


def test_registering_again_replaces(own_models: None) -> None:
    first = get_model("Mean")
    register_backbone(Backbone("Mean", MeanBlock))
    assert get_model("Mean") is not first


def test_model_keys_are_all_constructor_keys_and_no_others(own_models: None) -> None:
    def keyword_only(cls: type) -> set[str]:
        parameters = inspect.signature(cls).parameters.values()
        return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}

    base, block = keyword_only(SequentialCTR), keyword_only(registry.BACKBONES["TWIN"].block)
    base |= keyword_only(MLPHead)
    assert set(model_keys("TWIN")) == base | block
    phases = keyword_only(PhasedCTR)
    assert set(model_keys("MoS_TWIN")) == base | block | phases | keyword_only(MoS) | keyword_only(ThreePhaseCTR)
    assert set(model_keys("GShard_TWIN")) == base | block | phases | keyword_only(GShard) | {"training_phases"}
    assert set(model_keys("Doubled_Mean")) == base | {"width", "scale", "second_weight"}
    assert {"embedding_dim", "longctr_compat", "block_scope"} <= base
    assert {"short_seq_len", "topk", "attention_dim"} <= block


@pytest.mark.parametrize("name", model_names())
def test_every_key_has_a_default_and_a_resolved_annotation(name: str) -> None:
    for key, parameter in model_keys(name).items():
        assert parameter.default is not inspect.Parameter.empty, key
        assert not isinstance(parameter.annotation, str), key


BAD_VALUES: list[tuple[str, dict[str, Any], str]] = [
    ("TWIN", {"num_heads": 3}, r"attention_dim \(8\) must be a multiple of num_heads \(3\)"),
    ("TWIN", {"short_seq_len": 1}, "short_seq_len must be at least 2, not 1"),
    ("TWIN", {"topk": 0}, "topk must be at least 1, not 0"),
    ("TWIN", {"Kc_cross_features": 1}, "Kc_cross_features must be 0"),
    ("MoS_TWIN", {"alpha_item": 0.7, "alpha_window": 0.4}, r"alpha_item \(0.7\) and alpha_window \(0.4\)"),
    ("MoS_TWIN", {"alpha_item": -0.1}, r"alpha_item \(-0.1\)"),
    ("MoS_TWIN", {"topk_item": 4}, r"topk_item \(4\) must lie in 1..n_item_experts \(3\)"),
    ("MoS_TWIN", {"topk_window": 0}, r"topk_window \(0\) must lie in 1..n_window_experts \(2\)"),
    ("MoS_TWIN", {"ema_decay": 1.5}, r"ema_decay \(1.5\) must lie in 0..1"),
    ("MoS_TWIN", {"window_stride": 0}, r"window_stride \(0\) must be at least 1"),
    ("MoS_TWIN", {"router_temperature": 0.0}, r"router_temperature \(0.0\) must be positive"),
    ("MoS_TWIN", {"phase_lrs": [0.1]}, "phase_lrs needs three learning rates"),
]


@pytest.mark.parametrize("name, value, sentence", BAD_VALUES, ids=lambda part: str(part)[:30])
def test_a_bad_constructor_value_is_refused_in_one_sentence(name: str, value: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as error:
        small_model(name, **value)
    assert "\n" not in str(error.value)


def test_keys_reach_the_block_and_the_method() -> None:
    model = small_model("MoS_TWIN", topk=3, short_seq_len=5, codebook_dim=9, window_size=6, ema_decay=0.7)
    expert = model.mos.item_experts.experts[0]
    assert (expert.long_attention.topk, expert.short_seq_len) == (3, 5)
    assert model.mos.item_router.codebook.codes.shape == (3, 9) and model.mos.item_router.codebook.decay == 0.7
    assert model.mos.window_size == 6 and model.mos.global_expert.long_attention.topk == 3
    assert SMALL["topk"] != 3


@pytest.mark.parametrize("name", ["TWIN", "MoS", "MoS_TWIN"])
def test_a_name_that_is_taken_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is registered already; give MeanBlock another name"):
        register_backbone(Backbone(name, MeanBlock))
    with pytest.raises(ValueError, match=f"{name} is registered already; give Doubled another name"):
        register_method(Method(name, Doubled))
    assert get_model("MoS_TWIN").backbone.name == "TWIN"


def test_a_class_defined_anew_takes_its_own_name_over(own_models: None) -> None:
    anew = type("MeanBlock", (MeanBlock,), {"__module__": MeanBlock.__module__})
    register_backbone(Backbone("Mean", anew))
    assert get_model("Mean").backbone.block is anew


def test_a_method_may_have_an_underscore_in_its_name(own_models: None) -> None:
    registry.register_method(registry.Method("My_MoS", MoS, ThreePhaseCTR))
    assert get_model("My_MoS_TWIN").__name__ == "My_MoS_TWIN"
    assert "My_MoS_TWIN" in model_names()
