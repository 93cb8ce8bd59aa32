"""``run_expid.py --resume``: which run goes on, what is refused, and that killed runs end as whole ones."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Answer
from kills import Kill, Trials, differences, experiment, outcome

from model_zoo.experiment import unfinished
from model_zoo.experiment.unfinished import LOCK_FILE
from model_zoo.files import locked

Cli = Callable[..., Answer]
KILLS = 6


@pytest.fixture(scope="module")
def trials(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Trials:
    return Trials(tiny_config, tmp_path_factory.mktemp("kills"), seed=3, settings=("checkpoint_steps=1",))


@pytest.mark.parametrize("number", range(KILLS))
def test_killed_and_resumed_a_run_ends_bit_for_bit_as_one_that_was_left_alone(trials: Trials, number: int) -> None:
    killed, wrong = trials.trial(number)
    while not killed and not wrong:  # a kill whose moment the run did not reach
        number += KILLS
        killed, wrong = trials.trial(number)
    assert not wrong


@pytest.fixture
def stopped(trials: Trials, tmp_path: Path) -> Path:
    """The root of a run that was killed in phase 2."""
    code = experiment(trials.config, tmp_path, trials.options, Kill("step", 8, after=False))
    assert code == -signal.SIGKILL
    return tmp_path


def run_folder(root: Path) -> Path:
    (folder,) = (root / "checkpoints").glob("*/*/*-seed7")
    return folder


def test_by_its_folder_a_run_goes_on_with_its_own_config(trials: Trials, stopped: Path, cli: Cli, tmp_path: Path) -> None:
    folder = run_folder(stopped)
    done = cli("--config", trials.config, "--expid", "TWIN_tiny", "--resume", folder, root=stopped)
    assert done.code == 0, done.err
    assert f"resumed at phase2 epoch 1, after step 1: {folder}" in done.out
    assert differences(outcome(stopped), trials.wanted) == []
    record = json.loads((folder / "metrics.json").read_text())
    assert [place["phase"] for place in record["resumes"]] == ["phase2"]


def test_a_finished_run_is_not_run_again(trials: Trials, cli: Cli, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(trials.whole, root)
    before = outcome(root)
    done = cli("--config", trials.config, "--expid", "MoS_TWIN_tiny", *trials.options, "--resume", root=root)
    assert done.code == 0, done.err
    assert "finished already" in done.out
    assert differences(outcome(root), before) == []


def test_without_a_run_to_resume_one_begins(trials: Trials, cli: Cli, tmp_path: Path) -> None:
    done = cli("--config", trials.config, "--expid", "TWIN_tiny", "--resume", root=tmp_path)
    assert done.code == 0, done.err
    assert "resumed" not in done.out


REFUSED: dict[str, tuple[list[str], str]] = {
    "another config": (["--set", "topk_item=1", "--resume"], "has another config: topk_item (2, now 1)"),
    "options beside a folder": (["--set", "topk_item=1", "--resume", "{folder}"], "leave out --set and --seed"),
    "a folder that is none": (["--resume", "{folder}/no"], "give the folder that a run made"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_resumed_is_refused(case: str, trials: Trials, stopped: Path, cli: Cli) -> None:
    arguments, wanted = REFUSED[case]
    given = [argument.format(folder=run_folder(stopped)) for argument in arguments]
    done = cli("--config", trials.config, "--expid", "MoS_TWIN_tiny", *given, root=stopped)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert wanted in done.err
    assert not (run_folder(stopped) / "metrics.json").exists()


def test_changed_data_are_refused(trials: Trials, stopped: Path, cli: Cli) -> None:
    state = run_folder(stopped) / "config.yaml"
    text = state.read_text()
    (path,) = {word.strip("',\n ") for word in text.split() if word.strip("',\n ").endswith("train.parquet")}
    moved = stopped / "train.parquet"
    shutil.copy(Path(path).with_name("valid.parquet"), moved)
    state.write_text(text.replace(path, str(moved)))
    done = cli("--config", trials.config, "--resume", run_folder(stopped), root=stopped)
    assert done.code == 2
    assert "train_data changed since the run began; put the files back, or start anew" in done.err


def test_another_version_or_number_of_threads_is_said(monkeypatch, caplog, tmp_path: Path) -> None:
    run, now = unfinished.Run(str(tmp_path), "x", {}), unfinished.identity({"train": "a"})
    (tmp_path / unfinished.STATE_FILE).touch()
    before = {**now, "numba": "0.1", "threads": 99}
    monkeypatch.setattr(unfinished, "read_state_file", lambda path: {"identity": before})
    unfinished.saved_state(run, now)
    assert len(caplog.records) == 2
    assert f"resumed with numba {now['numba']}, begun with 0.1: " in caplog.text
    assert f"resumed with threads {now['threads']}, begun with 99: " in caplog.text
    caplog.clear()
    del before["numba"]  # a state of before it was recorded
    before["threads"] = now["threads"]
    unfinished.saved_state(run, now)
    assert not caplog.records


def test_a_run_that_is_running_is_not_resumed(trials: Trials, stopped: Path, cli: Cli) -> None:
    with locked(run_folder(stopped) / LOCK_FILE):
        done = cli("--config", trials.config, "--resume", run_folder(stopped), root=stopped)
    assert done.code == 2
    assert str(run_folder(stopped)) in done.err


def test_sigterm_leaves_a_state_and_says_how_to_resume(trials: Trials, tmp_path: Path) -> None:
    """A process of its own, as a job scheduler would end it."""
    main = "import sys; from model_zoo.experiment.cli import main; sys.exit(main(sys.argv.pop(1)))"
    command = [sys.executable, "-c", main, str(tmp_path), "--config", str(trials.config), "--expid", "MoS_TWIN_tiny"]
    arguments = [*trials.options, "--set", "epochs=40"]
    environment: dict[str, Any] = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["PYTHONUNBUFFERED"] = "1"
    with subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env=environment) as process:  # fmt: skip
        assert process.stdout is not None
        while "epoch 1:" not in process.stdout.readline():
            assert process.poll() is None
        time.sleep(0.1)
        process.terminate()
        out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    folder = run_folder(tmp_path)
    assert f"go on with: python run_expid.py --resume {folder}" in out
    assert err == "stopped by SIGTERM\n"
    assert (folder / "training_state.pt").exists()
