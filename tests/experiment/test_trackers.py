"""Where figures go: metrics.csv, TensorBoard, stand-ins for wandb and MLflow, own trackers; and that none stops a run."""

import csv
import io
import json
import logging
import sys
import time
import types
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from model_zoo.errors import FileError
from model_zoo.experiment import trackers as module
from model_zoo.experiment.adapters import IDS_FILE
from model_zoo.experiment.trackers import TrackedRun, Trackers, csv_text, figures, register_tracker, tracker_faults

WARNING = {"effective_rank/item_id": "the embedding of item_id uses few of its 8 dimensions"}


def record(phase: str, step: int, **more: Any) -> dict[str, Any]:
    return {
        "phase": phase, "epoch": 1, "step": step, "seconds": 1.5, "eval_seconds": 0.5, "train_loss": 0.7 - step / 1e3,
        "learning_rate": 1e-3, "valid": {"AUC": 0.5 + step / 1e3, "NDCG(k=5)": 0.25}, "best": True,
        "gradient_norm": {"mean": 1.0, "max": 2.0}, "rows_per_second": 1000.0, "routing": {}, "warnings": {}, **more,
    }  # fmt: skip


ROUTING = {"item": {"tokens": 900, "share": [0.75, 0.25], "entropy": 0.81, "margin": 0.1, "drift": [1.0, 0.5]}}
HISTORY = [
    record("phase1", 10), record("phase1", 20, warnings=WARNING), record("phase2", 7, routing=ROUTING, best=False),
    record("phase3", 5, routing=ROUTING), record("phase3", 10, routing=ROUTING),
]  # fmt: skip
SCORES = {"valid": {"AUC": 0.75}, "test": {"AUC": 0.7, "gAUC": float("nan")}}


class Recorder:
    """A tracker that keeps its calls."""

    def __init__(self, run: TrackedRun) -> None:
        self.run = run
        self.calls: list[tuple[Any, ...]] = []
        MADE.append(self)

    def start(self, config: dict[str, Any]) -> None:
        self.calls.append(("start", config))

    def log(self, step: int, figures: dict[str, float]) -> None:
        self.calls.append(("log", step, figures))

    def finish(self, summary: dict[str, float]) -> None:
        self.calls.append(("finish", summary))


MADE: list[Recorder] = []


@pytest.fixture(autouse=True)
def nothing_made() -> None:
    MADE.clear()


@pytest.fixture(autouse=True)
def own_factories(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FACTORIES", dict(module.FACTORIES))


def tracked(names: list[str], folder: Path, count: int = len(HISTORY), summary: Any = SCORES) -> Trackers:
    """A whole run of ``count`` evaluations."""
    history: list[dict[str, Any]] = []
    with Trackers(names, str(folder), "MoS_TWIN_tiny", history) as found:
        found.start({"model": "MoS_TWIN", "seed": 7})
        for evaluation in HISTORY[:count]:
            history.append(evaluation)
            found(evaluation)
        if summary:
            found.finish(summary)
    return found


# ---- csv -------------------------------------------------------------------------------------------------------------


def test_the_csv_has_a_row_an_evaluation_and_every_figure(tmp_path: Path) -> None:
    tracked(["csv"], tmp_path)
    table = pd.read_csv(tmp_path / "metrics.csv")
    assert list(table.columns[:6]) == ["phase", "epoch", "step", "total_step", "best", "warnings"]
    assert table["phase"].tolist() == ["phase1", "phase1", "phase2", "phase3", "phase3"]
    assert table["total_step"].tolist() == [10, 20, 27, 32, 37]
    assert table["best"].tolist() == [True, True, False, True, True]
    assert table["valid/AUC"].tolist() == [record["valid"]["AUC"] for record in HISTORY]  # every digit
    assert table["warnings"].fillna("").tolist() == ["", "effective_rank/item_id", "", "", ""]
    assert table["routing/item/share/1"].isna().tolist() == [True, True, False, False, False]
    wanted = {"train/loss", "train/learning_rate", "train/rows_per_second", "train/gradient_norm/mean", "time/training",
              "train/gradient_norm/max", "time/evaluation", "routing/item/margin", "routing/item/drift/0",
              "valid/NDCG(k=5)", "routing/item/entropy", "routing/item/tokens"}  # fmt: skip
    assert wanted <= set(table.columns)


def test_rows_behind_the_point_of_a_resume_are_written_anew(tmp_path: Path) -> None:
    tracked(["csv"], tmp_path, 4, summary={})
    history = HISTORY[:2]  # the state that the run goes on from
    resumed = Trackers(["csv"], str(tmp_path), "MoS_TWIN_tiny", history)
    resumed.start({})
    for evaluation in HISTORY[2:]:
        history.append(evaluation)
        resumed(evaluation)
    assert (tmp_path / "metrics.csv").read_text() == csv_text(HISTORY)
    assert len(list(csv.reader(io.StringIO(csv_text(HISTORY))))) == 1 + len(HISTORY)
    assert csv_text([]) == "\n" or csv_text([]).count("\n") == 1


def test_without_csv_in_the_list_there_is_no_file(tmp_path: Path) -> None:
    tracked([], tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_csv_that_cannot_be_written_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: str, text: str) -> None:
        raise FileError(f"{path}: no space left")

    monkeypatch.setattr(module, "write_whole", full)
    tracked(["csv"], tmp_path)
    assert [r.message for r in caplog.records] == [f"tracker csv: {tmp_path}/metrics.csv: no space left; the run goes on"]


# ---- the protocol ----------------------------------------------------------------------------------------------------


def test_a_class_by_its_dotted_name_gets_config_figures_and_scores(tmp_path: Path) -> None:
    tracked([f"{__name__}:Recorder"], tmp_path)
    (tracker,) = MADE
    assert tracker.run.folder == str(tmp_path) and tracker.run.name.startswith("MoS_TWIN_tiny ")
    assert tracker.calls[0] == ("start", {"model": "MoS_TWIN", "seed": 7})
    logged = [call for call in tracker.calls if call[0] == "log"]
    assert [step for _, step, _ in logged] == [10, 20, 27, 32, 37]
    assert logged[0][2] == figures(HISTORY[0]) and logged[0][2]["train/epoch"] == 1
    assert logged[2][2]["routing/item/share/0"] == 0.75
    assert tracker.calls[-1] == ("finish", {"final/valid/AUC": 0.75, "final/test/AUC": 0.7})


def test_finishing_twice_ends_a_tracker_once(tmp_path: Path) -> None:
    tracked([f"{__name__}:Recorder"], tmp_path).finish(SCORES)
    assert [call[0] for call in MADE[0].calls].count("finish") == 1


def test_figures_that_are_not_finite_are_left_out_for_trackers(tmp_path: Path) -> None:
    history = [record("train", 1, valid={"AUC": float("nan"), "logloss": 0.5})]
    found = Trackers([f"{__name__}:Recorder"], str(tmp_path), "x", history)
    found.start({})
    found(history[0])
    assert "valid/AUC" not in MADE[0].calls[-1][2] and MADE[0].calls[-1][2]["valid/logloss"] == 0.5


@pytest.mark.parametrize("method", ["start", "log", "finish"])
@pytest.mark.parametrize("error", [OSError("no route to host"), SystemExit(1)])
def test_a_tracker_that_fails_is_given_up_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, method: str, error: BaseException
) -> None:
    def fail(self: Any, *arguments: Any) -> None:
        raise error

    monkeypatch.setattr(Recorder, method, fail)
    tracked([f"{__name__}:Recorder", "csv"], tmp_path)
    (said,) = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert said == f"tracker {__name__}:Recorder: {type(error).__name__}: {error}; the run goes on without it"
    assert len(pd.read_csv(tmp_path / "metrics.csv")) == len(HISTORY)


@pytest.mark.parametrize(
    "name, reason",
    [
        ("os:system", "must be a class with the methods start, log, finish"),
        ("subprocess:Popen", "must be a class with the methods"),
        (f"{__name__}:record", "must be a class with the methods"),
        ("no_such_package.module:Tracker", "No module named 'no_such_package'"),
        (f"{__name__}:Nothing", "has no attribute 'Nothing'"),
    ],
)
def test_what_is_no_tracker_is_not_called(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, reason: str
) -> None:
    tracked([name], tmp_path)
    (said,) = [r.message for r in caplog.records]
    assert reason in said and said.endswith("the run goes on without it") and not list(tmp_path.iterdir())


def test_a_plugin_registers_a_factory_by_name(tmp_path: Path) -> None:
    register_tracker("mine", lambda run: Recorder(run))
    tracked(["mine"], tmp_path)
    assert len(MADE[0].calls) == 1 + len(HISTORY) + 1
    for taken in ("csv", "wandb", "mine"):
        with pytest.raises(ValueError, match=f"{taken} is a tracker already"):
            register_tracker(taken, Recorder)


def test_faults_of_the_key_are_found_without_importing() -> None:
    assert tracker_faults(["csv", "tensorboard", "wandb", "mlflow", "package.module:Tracker"]) == []
    assert tracker_faults(["tensorbord", "csv", "csv", "a b:c", "a:"]) == [
        "'tensorbord' is no tracker; did you mean 'tensorboard'?",
        "'csv' is listed twice",
        "'a b:c' is no tracker; write csv, tensorboard, wandb, mlflow, or package.module:Class",
        "'a:' is no tracker; write csv, tensorboard, wandb, mlflow, or package.module:Class",
    ]


# ---- adapters, over stand-ins ----------------------------------------------------------------------------------------


class StandIn:
    """Notes every call of any of its attributes, and gives itself back."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.info = types.SimpleNamespace(run_id="id of mlflow")

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> StandIn:
            self.calls.append((name, arguments, options))
            return self

        return call

    def named(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [(arguments, options) for called, arguments, options in self.calls if called == name]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # as if not installed
    tracked([name], tmp_path)
    (said,) = [r.message for r in caplog.records]
    assert said.startswith(f"tracker {name}: ") and said.endswith("the run goes on without it")


def test_a_resumed_wandb_run_goes_on_under_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = StandIn()
    wandb.summary = StandIn()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)  # type: ignore[arg-type]
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    tracked(["wandb"], tmp_path, 2, summary={})
    tracked(["wandb"], tmp_path)
    first, second = (options for _, options in wandb.named("init"))
    assert first["id"] == second["id"] == json.loads((tmp_path / IDS_FILE).read_text())["wandb"]
    assert first["resume"] == "allow" and first["project"] == "longctr-mos" and first["dir"] == str(tmp_path)
    assert first["config"] == {"model": "MoS_TWIN", "seed": 7}
    assert [options["step"] for _, options in wandb.named("log")] == [10, 20, 10, 20, 27, 32, 37]
    assert wandb.named("log")[0][0][0]["valid/AUC"] == 0.51
    assert wandb.summary.named("update")[-1][0] == ({"final/valid/AUC": 0.75, "final/test/AUC": 0.7},)
    assert [options["exit_code"] for _, options in wandb.named("finish")] == [1, 0]


def test_mlflow_gets_parameters_once_and_names_that_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = StandIn()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)  # type: ignore[arg-type]
    history: list[dict[str, Any]] = []
    run = Trackers(["mlflow"], str(tmp_path), "x", history)
    run.start({f"key{number}": "v" * 600 for number in range(150)})
    history.append(HISTORY[0])
    run(HISTORY[0])
    run.finish(SCORES)
    tracked(["mlflow"], tmp_path, 1, summary={})
    given = [arguments[0] for arguments, _ in mlflow.named("log_params")]
    assert [len(part) for part in given] == [100, 50] and len(given[0]["key0"]) == 500
    started = [options for _, options in mlflow.named("start_run")]
    assert list(started[0]) == ["run_name"] and started[1] == {"run_id": "id of mlflow"}
    (logged,), options = mlflow.named("log_metrics")[0]
    assert options == {"step": 10} and logged["valid/NDCG_k_5_"] == 0.25 and logged["valid/AUC"] == 0.51
    assert [arguments for arguments, _ in mlflow.named("end_run")] == [("FINISHED",), ("KILLED",)]


def test_a_missing_tensorboard_is_no_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with caplog.at_level(logging.INFO):
        tracked(["tensorboard"], tmp_path)
    (said,) = caplog.records
    assert said.levelno == logging.INFO and "pip install tensorboard" in said.message
    assert not list(tmp_path.iterdir())


def test_tensorboard_shows_each_step_once_after_a_resume_and_loads_no_tensorflow(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    before = "tensorflow" in sys.modules
    tracked(["tensorboard"], tmp_path, 4, summary={})
    history = HISTORY[:2]
    time.sleep(1.1)  # event files are read in the order of their names, which hold whole seconds
    resumed = Trackers(["tensorboard"], str(tmp_path), "x", history)
    resumed.start({})
    for evaluation in HISTORY[2:]:
        history.append(evaluation)
        resumed(evaluation)
    resumed.finish(SCORES)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(tmp_path / "tensorboard"))
    shown.Reload()
    assert [event.step for event in shown.Scalars("valid/AUC")] == [10, 20, 27, 32, 37]
    assert [event.value for event in shown.Scalars("routing/item/share/0")] == [0.75] * 3
    assert ("tensorflow" in sys.modules) == before
