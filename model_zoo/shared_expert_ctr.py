"""The rivals' training: end to end, or, for comparison, in MoS's three phases."""

from __future__ import annotations

import inspect
from typing import Any, Literal

from model_zoo.layers.shared_expert_moe import SharedExpertMoE
from model_zoo.phased_training import PhasedCTR


class SharedExpertCTR(PhasedCTR):
    """A model with a `SharedExpertMoE` layer.

    Args:
        training_phases: ``single`` trains everything from the start, as these methods do. ``three`` gives them the schedule
            of MoS: the shared expert is the backbone of phase 1, and phase 2 is at ``alpha_routed`` 1. The keys of
            `PhasedCTR` belong to ``three``.

    Raises:
        ValueError: a key of the phases is set under ``single``.
    """

    def __init__(self, *args: Any, training_phases: Literal["single", "three"] = "single", **params: Any) -> None:
        if training_phases == "single":
            keys = inspect.signature(PhasedCTR).parameters.values()
            for key in (key for key in keys if key.kind is key.KEYWORD_ONLY):
                if params.get(key.name, key.default) != key.default:
                    raise ValueError(f"{key.name} belongs to training_phases: three; set that, or leave {key.name} out")
        self.training_phases = training_phases
        super().__init__(*args, **params)

    @property
    def layer(self) -> SharedExpertMoE:
        """The method's layer."""
        return self.method_layers()[0]

    @property
    def in_phases(self) -> bool:
        return self.training_phases == "three"

    @property
    def final_alphas(self) -> tuple[float, ...]:
        return (self.layer.final_alpha,)

    def fuse(self, alphas: tuple[float, ...], update_codebooks: bool = False) -> None:
        (self.layer.alpha_routed,) = alphas

    def fusion_text(self) -> str:
        return f"routed {self.layer.alpha_routed:g}"

    def fit(self, data_generator: Any, epochs: int = 1, *args: Any, **kwargs: Any) -> None:
        """Run the phases, or train everything at once."""
        fit = super().fit if self.in_phases else super(PhasedCTR, self).fit
        fit(data_generator, epochs, *args, **kwargs)
