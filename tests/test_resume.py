"""Trainings that were stopped: from every state that is written, another process ends where the whole training did."""

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_files import small_model, tiny_loader

from model_zoo import interrupts
from model_zoo.compat import seed_everything
from model_zoo.errors import ConfigError, FileError
from model_zoo.interrupts import Stopped, held, listening
from model_zoo.pipeline.loader import SequenceLoader
from model_zoo.resume import StateSaver, read_state_file, restore
from model_zoo.training import batches_from

EPOCHS = 2


class EveryState(StateSaver):
    """Keeps each state in a file of its own."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        super().__init__("", {"data": {}}, minutes=None, steps=1)
        self.folder = folder
        self.written: list[str] = []

    def write(self, model: Any, stage: Any = "training") -> None:
        self.path = str(self.folder / f"{len(self.written):03d}-{stage}")
        super().write(model, stage)
        self.written.append(self.path)


def fit(model: Any, make_loader: Callable[[], SequenceLoader]) -> None:
    model.fit(make_loader(), epochs=EPOCHS, validation_data=tiny_loader("valid"))


def ending(model: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Final weights, and the history without times."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return state, [{k: v for k, v in entry.items() if "second" not in k} for entry in model.history]


def assert_same(found: Any, wanted: Any) -> None:
    assert found[1] == wanted[1]
    assert found[0].keys() == wanted[0].keys()
    for name, value in wanted[0].items():
        assert torch.equal(found[0][name], value), name


DROPOUT = {"net_dropout": 0.2, "attention_dropout": 0.2}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": ("TWIN", DROPOUT, {}),
    "accumulated over 3 batches": ("TWIN", {"accumulation_steps": 3, "eval_steps": 3}, {}),
    "LongCTR's accumulation": ("TWIN", {"accumulation_steps": 3, "longctr_compat": True}, {}),
    "sparse updates": ("SDIM", {"sparse_embedding_updates": True, "accumulation_steps": 2}, {}),
    "plateaus and an early stop": ("TWIN", {"learning_rate": 3.0, "early_stop_patience": 2}, {}),
    "another optimizer": ("TWIN", {"optimizer": "Adagrad"}, {}),
    "a thread that loads": ("TWIN", DROPOUT, {"prefetch": 2}),
    "MoS": ("MoS_TWIN", {**DROPOUT, "eval_steps": 3}, {}),
    "MoS over a recurrent block": ("MoS_GRU4Rec", {}, {}),
    "GShard": ("GShard_TWIN", DROPOUT, {}),
    "GShard in phases": ("GShard_TWIN", {**DROPOUT, "training_phases": "three"}, {}),
    "FuXiMME": ("FuXiMME", {}, {}),
    "DSelectK": ("DSelectK_SDIM", DROPOUT, {}),
    "ExpertChoice": ("ExpertChoice_TWIN", DROPOUT, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_from_every_state_a_training_ends_as_if_it_had_not_stopped(case: str, tmp_path: Path) -> None:
    name, settings, options = CASES[case]

    def loader() -> SequenceLoader:
        made = tiny_loader(shuffle=True)
        for key, value in options.items():
            setattr(made, key, value)
        return made

    whole = small_model(name, tmp_path / "whole", **settings)
    whole.saver = EveryState(tmp_path / "states")
    seed_everything(5)
    fit(whole, loader)
    wanted = ending(whole)
    written = whole.saver.written
    assert len(written) > 6
    every = 1 if case in ("plain", "MoS") else 3
    for number, path in list(enumerate(written))[::every]:
        # best weights lie beside a state; if a later evaluation was better, it is repeated, and written again
        shutil.copytree(tmp_path / "whole", tmp_path / f"resumed{number}")
        model = small_model(name, tmp_path / f"resumed{number}", seed=99, **settings)
        model.resume_from = read_state_file(path)
        fit(model, loader)
        assert_same(ending(model), wanted)
        assert model.resume_from is None


def test_a_state_behind_the_training_gives_the_trained_model(tmp_path: Path) -> None:
    for name in ("TWIN", "MoS_TWIN"):
        model = small_model(name, tmp_path / name)
        fit(model, tiny_loader)
        saver = StateSaver(str(tmp_path / "done"), {"data": {}})
        saver.write(model, "done")
        other = small_model(name, tmp_path / name, seed=3)
        other.resume_from = read_state_file(saver.path)
        fit(other, tiny_loader)
        assert_same(ending(other), ending(model))
        assert other.checkpoint == model.checkpoint


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    model = small_model("MoS_TWIN", tmp_path_factory.mktemp("whole"))
    seed_everything(5)
    fit(model, lambda: tiny_loader(shuffle=True))
    return model


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("place, call", [("train_step", 3), ("eval_step", 3), ("predict_split", 2), ("start_experts", 1)])
def test_a_signal_stops_between_two_steps_with_a_state_to_go_on_from(
    place: str, call: int, kind: signal.Signals, whole: Any, tmp_path: Path
) -> None:
    stopped = small_model("MoS_TWIN", tmp_path)
    stopped.saver = StateSaver(str(tmp_path / "state"), {"data": {}}, minutes=60, steps=None)
    original, calls = getattr(stopped, place), 0

    def signalled(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), kind)
            time.sleep(0)  # the handler runs between two of the interpreter's instructions
        return original(*arguments, **options)

    setattr(stopped, place, signalled)
    seed_everything(5)
    with pytest.raises(Stopped) as stop, listening():
        fit(stopped, lambda: tiny_loader(shuffle=True))
    assert stop.value.signal == kind
    resumed = small_model("MoS_TWIN", tmp_path, seed=3)
    resumed.resume_from = read_state_file(stopped.saver.path)
    fit(resumed, lambda: tiny_loader(shuffle=True))
    assert_same(ending(resumed), ending(whole))


def test_outside_of_steps_a_signal_is_raised_at_once_and_within_one_at_its_end() -> None:
    done = []
    with pytest.raises(Stopped), listening():
        with held():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("the step")
        done.append("what follows")
    assert done == ["the step"]
    with pytest.raises(Stopped), listening():
        os.kill(os.getpid(), signal.SIGINT)
        done.append("what follows")
    with pytest.raises(Stopped), listening(), held():
        for _ in range(interrupts.IMPATIENT):
            os.kill(os.getpid(), signal.SIGINT)
        done.append("a step that nobody waits for")
    assert done == ["the step"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("minutes, steps, wanted", [(None, 4, [4, 8, 12]), (1.0, None, [3, 6, 9, 12]), (None, None, [])])
def test_states_are_written_by_time_or_by_steps(
    minutes: float | None, steps: int | None, wanted: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model("TWIN", tmp_path)
    saver = StateSaver(str(tmp_path / "state"), {"data": {}}, minutes, steps)
    clock = saver._last = 0.0  # whole numbers, whose differences are exact
    written: list[int] = []
    monkeypatch.setattr("model_zoo.resume.time.monotonic", lambda: clock)

    def write(model: Any, stage: str = "training") -> None:
        written.append(model._total_steps)
        saver._last = clock

    monkeypatch.setattr(saver, "write", write)
    for model._total_steps in range(1, 13):
        clock += 20.0
        saver.after_step(model)
    assert written == wanted


def test_a_full_disk_does_not_stop_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = small_model("TWIN", tmp_path)
    model.saver = StateSaver(str(tmp_path / "state"), {"data": {}}, minutes=None, steps=1)

    def full(path: str, content: dict[str, Any]) -> None:
        raise FileError(f"{path}: no space left")

    monkeypatch.setattr("model_zoo.resume.write_checkpoint", full)
    fit(model, tiny_loader)
    assert "no space left; training goes on" in caplog.text


def test_a_state_of_another_model_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    model = small_model("TWIN", tmp_path / "TWIN")
    saver = StateSaver(str(tmp_path / "state"), {"data": {}})
    fit(model, tiny_loader)
    saver.write(model, "done")
    other = small_model("SDIM", tmp_path / "SDIM")
    before = ending(other)
    with pytest.raises(ConfigError, match=r"the saved training is of another model: .* is missing"):
        restore(other, read_state_file(saver.path))
    assert_same(ending(other), before)


def test_what_is_no_state_is_refused(tmp_path: Path) -> None:
    model = small_model("TWIN", tmp_path)
    model.save_weights(str(tmp_path / "weights"))
    with pytest.raises(ConfigError, match="holds no training state; start without --resume"):
        read_state_file(str(tmp_path / "weights"))


@pytest.mark.parametrize("first", [0, 1, 3, 4])
def test_an_epoch_can_be_iterated_over_from_any_batch(first: int) -> None:
    loader = tiny_loader(shuffle=True)
    loader.set_epoch(2)
    whole = [batch.rows.tolist() for batch in loader if batch.rows is not None]
    assert [batch.rows.tolist() for batch in loader.iterate_from(first)] == whole[first:]  # type: ignore[union-attr]
    assert list(batches_from(range(5), first)) == list(range(5))[first:]
