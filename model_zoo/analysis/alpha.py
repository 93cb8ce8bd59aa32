"""The fusion weights' triangle: phase 3 branched from one trained phase 2, once for every pair of weights."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, replace
from typing import Any

from model_zoo.analysis.trained_run import load_trained
from model_zoo.compat import seed_everything
from model_zoo.errors import ConfigError
from model_zoo.experiment.run import make_loaders
from model_zoo.experiment.unfinished import Run
from model_zoo.phased_training import Phase
from model_zoo.pipeline.histories import digest
from model_zoo.three_phase import ThreePhaseCTR

Cell = tuple[float, float]


def triangle(steps: int = 5) -> list[Cell]:
    """All (alpha_item, alpha_window) that are multiples of 1 / steps and sum to at most 1: 21 of them for 5 steps."""
    return [(i / steps, w / steps) for i in range(steps + 1) for w in range(steps + 1 - i)]


@dataclass(frozen=True)
class Branching:
    """A finished three-phase run whose phase 3 can be trained again.

    Attributes:
        checkpoint: of phase 2.
        mark: digest of that checkpoint.
        phase: phase 3 as it was.
        epochs_before: epochs of phases 1 and 2, which the order of the training rows goes on from.
    """

    run: Run
    model: ThreePhaseCTR
    loaders: dict[str, Any]
    params: dict[str, Any]
    checkpoint: str
    mark: str
    phase: Phase
    epochs_before: int

    def score(self, cell: Cell) -> dict[str, dict[str, float]]:
        """Train phase 3 at the weights of ``cell`` from phase 2's best weights; metrics by split of its best epoch.

        Every cell starts alike: the same weights, new optimizer, random stream and order of rows. A cell without weight
        on a branch leaves its experts as they are; (0, 0) trains the backbone a second time, and is what the others must
        beat.
        """
        model = self.model
        with tempfile.TemporaryDirectory() as folder:
            model.place_checkpoints(folder)
            model.load_weights(self.checkpoint)
            model.history.clear()
            model.epochs_trained = self.epochs_before
            seed_everything(self.params["seed"])
            phase = replace(self.phase, alphas=cell)
            model.enter(phase)
            model.fit_phase(phase, self.loaders["train"], self.loaders["valid"], self.params["max_gradient_norm"])
            return {name: model.evaluate(self.loaders[name]) for name in ("valid", "test") if name in self.loaders}


def branching(folder: str, epochs: int | None = None) -> Branching:
    """Make ready to branch from a run.

    Args:
        epochs: at most, of phase 3; None: as in the run.

    Raises:
        ConfigError: the run is not a finished one of a MoS model with both kinds of experts, or phase 2's weights are gone.
    """
    trained = load_trained(folder)
    run, model, params = Run.read(folder), trained.model, trained.params
    if not isinstance(model, ThreePhaseCTR):
        raise ConfigError(f"{folder}: {type(model).__name__} is not trained in phases; give a run of a MoS model")
    if model.mos.item_experts is None or model.mos.window_experts is None:
        raise ConfigError(f"{folder}: has no item or no window experts; give a run in which both alphas are above 0")
    phases = {phase.name: phase for phase in model.phases(params["epochs"])}
    checkpoint = os.path.join(folder, f"{run.expid}.phase2.model")
    if "phase3" not in phases or not os.path.exists(checkpoint):
        raise ConfigError(f"{checkpoint}: no phase 2 to branch from; run the experiment again with all three phases")
    phase = phases["phase3"] if epochs is None else replace(phases["phase3"], epochs=epochs)
    history = (run.record() or {}).get("history", [])
    before = {(entry["phase"], entry["epoch"]) for entry in history if entry["phase"] in ("phase1", "phase2")}
    loaders = make_loaders(trained.dataset, params)
    return Branching(run, model, loaders, params, checkpoint, digest(checkpoint), phase, len(before))
