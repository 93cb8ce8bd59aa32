"""Training in phases: backbone warm-up, expert warm-up, joint; one FuxiCTR ``fit`` each."""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from model_zoo.errors import ConfigError
from model_zoo.files import copy_whole
from model_zoo.interrupts import held
from model_zoo.resume import restore
from model_zoo.sequential_ctr import SequentialCTR

logger = logging.getLogger("model_zoo")


Group = Literal["backbone", "experts"]


@dataclass(frozen=True)
class Phase:
    """One phase.

    Attributes:
        name: as shown.
        epochs: at most; early stopping may end it.
        learning_rate: of its own, new optimizer.
        trains: parameter groups with a gradient.
        alphas: fusion weights of the experts: of MoS (item, window), of its rivals one.
        update_codebooks: EMA on in its training forwards.
        patience: evaluations without a gain that end it.
    """

    name: str
    epochs: int
    learning_rate: float
    trains: tuple[Group, ...]
    alphas: tuple[float, ...]
    update_codebooks: bool
    patience: int


class PhasedCTR(SequentialCTR, ABC):
    """A model with a method's layer, trained in three phases.

    Phase 1 trains embedding, the layer's global expert and head exactly as the plain backbone of the same seed. Phase 2
    trains experts and routers alone, which then have all the weight; embedding, head and its BatchNorm statistics do not
    move. Phase 3 trains everything at the final weights. Each phase reloads its best checkpoint
    (``<checkpoint>.phase1`` ...); the final model is phase 3's best.

    Args:
        phase1_epochs: at most; None = ``epochs``.
        phase2_epochs: epochs of expert warm-up.
        phase3_epochs: at most; None = ``epochs``.
        phase_lrs: learning rate per phase; None = ``learning_rate`` for all three.
        phase_patience: early-stopping patience per phase; None = ``early_stop_patience`` for all three.

    Raises:
        ValueError: a list has not one value for each phase.
    """

    #: groups that the phase entered last does not train
    _frozen: AbstractSet[str] = frozenset()

    def __init__(
        self,
        *args: Any,
        phase1_epochs: int | None = None,
        phase2_epochs: int = 1,
        phase3_epochs: int | None = None,
        phase_lrs: list[float] | None = None,
        phase_patience: list[int] | None = None,
        **params: Any,
    ) -> None:
        if phase_lrs is not None and len(phase_lrs) != 3:
            raise ValueError(f"phase_lrs needs three learning rates, one per phase, not {phase_lrs}")
        if phase_patience is not None and (len(phase_patience) != 3 or min(phase_patience) < 1):
            raise ValueError(f"phase_patience needs three numbers of at least 1, one per phase, not {phase_patience}")
        super().__init__(*args, **params)
        if self.in_phases and params.get("save_best_only") is False:
            raise ValueError("save_best_only must be True: each phase goes on from its best weights")
        self.phase_epochs = (phase1_epochs, phase2_epochs, phase3_epochs)
        self.phase_lrs = phase_lrs or [self.learning_rate] * 3
        self.phase_patience = phase_patience or [int(params.get("early_stop_patience", 2))] * 3
        self._final_fusion = self.final_alphas
        self._always_frozen = {name for name, p in self.named_parameters() if not p.requires_grad}

    # ---- what a method's layer decides -------------------------------------------------------------------------------

    @property
    def in_phases(self) -> bool:
        """Whether this model trains in phases at all."""
        return True

    @property
    @abstractmethod
    def final_alphas(self) -> tuple[float, ...]:
        """The experts' fusion weights in phase 3, and in the final model."""

    @abstractmethod
    def fuse(self, alphas: tuple[float, ...], update_codebooks: bool = False) -> None:
        """Put fusion weights in force."""

    @abstractmethod
    def fusion_text(self) -> str:
        """The fusion weights in force, for the log."""

    def start_experts(self, data_generator: Any) -> None:
        """What happens between phases 1 and 2."""

    # ---- phases ------------------------------------------------------------------------------------------------------

    def phases(self, epochs: int) -> list[Phase]:
        """The phases of a training of at most ``epochs`` per phase; only the first if there are no experts."""
        first, second, third = self.phase_epochs
        rates, patience = self.phase_lrs, self.phase_patience
        final = self.final_alphas
        none, all_of_it = (0.0,) * len(final), (1.0 / len(final),) * len(final)
        everything: tuple[Group, ...] = ("backbone", "experts")
        plan = [
            Phase("phase1", epochs if first is None else first, rates[0], ("backbone",), none, False, patience[0]),
            Phase("phase2", second, rates[1], ("experts",), all_of_it, True, patience[1]),
            Phase("phase3", epochs if third is None else third, rates[2], everything, final, True, patience[2]),
        ]
        return [phase for phase in (plan if sum(final) > 0 else plan[:1]) if phase.epochs > 0]

    def enter(self, phase: Phase) -> None:
        """Freeze, fuse and optimise as ``phase`` says."""
        expert_names = {id(p) for module in self.expert_modules() for p in module.parameters()}
        for name, parameter in self.named_parameters():
            group = "experts" if id(parameter) in expert_names else "backbone"
            parameter.requires_grad_(group in phase.trains and name not in self._always_frozen)
        self.fuse(phase.alphas, phase.update_codebooks)
        self._frozen = {"backbone", "experts"} - set(phase.trains)
        self.phase_name = phase.name
        self._early_stop_patience = phase.patience
        self.use_optimizer(phase.learning_rate)

    def train(self, mode: bool = True) -> PhasedCTR:
        """Training mode, but BatchNorm layers of a frozen group (Dice has some, too) keep their running statistics."""
        super().train(mode)
        beside = {id(m) for expert in self.expert_modules() for m in expert.modules()}
        for module in self.modules():
            group: Group = "experts" if id(module) in beside else "backbone"
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and group in self._frozen:
                module.eval()
        return self

    def phase_checkpoint(self, name: str) -> str:
        """Where a phase's best weights lie."""
        stem, extension = os.path.splitext(self.final_checkpoint)
        return f"{stem}.{name}{extension}"

    @property
    def final_checkpoint(self) -> str:
        """Where the final model's weights lie."""
        return os.path.join(os.path.dirname(self.checkpoint), f"{self.model_id}.model")

    def load_backbone(self) -> None:
        """Load phase 1's best weights, the plain backbone's, and let its experts have no weight."""
        self.load_weights(self.phase_checkpoint("phase1"))
        self.fuse((0.0,) * len(self.final_alphas))

    def load_final(self) -> None:
        """Load the final weights, and fuse as after the last phase."""
        self.load_weights(self.final_checkpoint)
        self.fuse(self._final_fusion)

    def fit(
        self,
        data_generator: Any,
        epochs: int = 1,
        validation_data: Any = None,
        max_gradient_norm: float = 10.0,
        **kwargs: Any,
    ) -> None:
        """Run the phases; afterwards the final weights are loaded, and written as the model's checkpoint."""
        plan = self.phases(epochs)
        state = self.resume_from
        first = self._phase_to_resume(plan, state)
        for number, phase in enumerate(plan[first:], start=first):
            within = state is not None and state["stage"] != "start"
            if not within:
                self._begin_phase(number, phase, plan, data_generator)
            state = None
            self.enter(phase)
            logger.info(
                "%s: trains %s, fusion weights %s, learning rate %g, at most %d epoch(s)",
                phase.name, " and ".join(phase.trains), self.fusion_text(), phase.learning_rate, phase.epochs,
            )  # fmt: skip
            self.fit_phase(phase, data_generator, validation_data, max_gradient_norm)
        copy_whole(self.checkpoint, self.final_checkpoint)
        self.checkpoint = self.final_checkpoint
        self._final_fusion = plan[-1].alphas
        self.fuse(self._final_fusion)

    def fit_phase(self, phase: Phase, data_generator: Any, validation_data: Any, max_gradient_norm: float) -> None:
        """Train a phase that was entered; afterwards its best weights are loaded."""
        self.checkpoint = self.phase_checkpoint(phase.name)
        super().fit(data_generator, phase.epochs, validation_data, max_gradient_norm)

    @staticmethod
    def _phase_to_resume(plan: list[Phase], state: dict[str, Any] | None) -> int:
        """Place of the phase that a saved training was in."""
        if state is None:
            return 0
        names = [phase.name for phase in plan]
        if state["phase"] not in names:
            raise ConfigError(
                f"the saved training is in {state['phase']}, which this config does not have; start without --resume"
            )
        return names.index(state["phase"])

    def _begin_phase(self, number: int, phase: Phase, plan: list[Phase], data_generator: Any) -> None:
        """What comes before a phase's first step: its state is kept, experts and codebooks start if it is their first."""
        self.phase_name = phase.name
        if self.resume_from is not None:
            restore(self, self.resume_from)
            self.resume_from = None
        elif self.saver is not None and number:
            with held():
                self.saver.write(self, "start")
        if "experts" in phase.trains and phase is next(p for p in plan if "experts" in p.trains):
            self.start_experts(data_generator)
