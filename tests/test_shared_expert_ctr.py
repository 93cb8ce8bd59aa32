"""The rivals in MoS's three phases: what moves in each, at what weight, and that `single` is what it was."""

from pathlib import Path
from typing import Any

import pytest
import torch
from golden_files import small_model, tiny_loader
from torch import Tensor

from model_zoo.checkpoint import read_weights
from model_zoo.collapse import routing_figures
from model_zoo.compat import seed_everything

RIVALS = ["GShard", "DSelectK", "ExpertChoice"]


def state(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def fit(model: Any, epochs: int = 1) -> dict[str, tuple[dict[str, Tensor], float, bool]]:
    """Fit on the tiny data set: state, weight of the experts, and whether routers report, as each phase was entered."""
    entered = {}
    enter = model.enter

    def watch(phase: Any) -> None:
        enter(phase)
        entered[phase.name] = (state(model), model.layer.alpha_routed, bool(routing_figures(model, tiny_loader("valid"))))

    model.enter = watch
    seed_everything(0)
    model.fit(tiny_loader(shuffle=True), epochs=epochs, validation_data=tiny_loader("valid"))
    return entered


@pytest.mark.parametrize("method", RIVALS)
def test_each_phase_moves_its_part_at_its_weight(method: str, tmp_path: Path) -> None:
    model = small_model(f"{method}_TWIN", tmp_path, training_phases="three", alpha_routed=0.25)
    entered = fit(model)
    assert [(name, alpha, reports) for name, (_, alpha, reports) in entered.items()] == [
        ("phase1", 0.0, False), ("phase2", 1.0, True), ("phase3", 0.25, True)
    ]  # fmt: skip
    experts = {id(p) for module in model.expert_modules() for p in module.parameters()}
    of_experts = {name for name, p in model.named_parameters() if id(p) in experts}
    for phase, (before, _, _) in entered.items():
        after = read_weights(model.phase_checkpoint(phase)).state
        moved = {name for name, value in before.items() if not torch.equal(after[name], value)}
        assert bool(moved & of_experts) == (phase != "phase1"), phase
        assert bool(moved - of_experts) == (phase != "phase2"), phase
    assert model.layer.alpha_routed == 0.25
    final = read_weights(model.final_checkpoint).state
    assert all(torch.equal(value, final[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("method", RIVALS)
def test_phase_1_is_the_plain_backbone_bit_for_bit(method: str, tmp_path: Path) -> None:
    plain = small_model("TWIN", tmp_path / "plain", seed=4)
    seed_everything(0)
    plain.fit(tiny_loader(shuffle=True), epochs=2, validation_data=tiny_loader("valid"))
    model = small_model(f"{method}_TWIN", tmp_path / "mixture", seed=4, training_phases="three")
    fit(model, epochs=2)
    batch = next(iter(tiny_loader("valid")))
    final = model.eval()(batch)["y_pred"]
    model.load_backbone()
    assert torch.equal(model.eval()(batch)["y_pred"], plain.eval()(batch)["y_pred"])
    model.load_final()
    assert torch.equal(model.eval()(batch)["y_pred"], final)


def test_single_trains_everything_at_once_and_its_records_know_no_phases(tmp_path: Path) -> None:
    model = small_model("GShard_TWIN", tmp_path)
    before = state(model)
    fit(model)
    assert [entry["phase"] for entry in model.history] == ["train"]
    assert not all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if "experts" in name)
    assert not list(tmp_path.rglob("*.phase1*"))


@pytest.mark.parametrize(("key", "value"), [("phase1_epochs", 1), ("phase2_epochs", 3), ("phase_lrs", [1e-3] * 3)])
def test_keys_of_phases_under_single_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{key} belongs to training_phases: three; set that, or leave {key} out"):
        small_model("DSelectK_TWIN", **{key: value})


def test_without_experts_three_phases_are_the_first(tmp_path: Path) -> None:
    model = small_model("GShard_TWIN", tmp_path, training_phases="three", alpha_routed=0.0)
    assert [phase.name for phase in model.phases(3)] == ["phase1"]


def test_phases_go_on_from_their_best_weights_so_those_must_be_kept() -> None:
    with pytest.raises(ValueError, match="save_best_only must be True"):
        small_model("GShard_TWIN", training_phases="three", save_best_only=False)
    small_model("GShard_TWIN", save_best_only=False)
