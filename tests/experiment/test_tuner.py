"""``run_param_tuner.py``: what it runs, skips, retries and goes on with, how it stops, and what it shows. Its runs are a
stand-in's (tuner_cases.py), but for the last test's."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Answer
from tuner_cases import Tune, Workshop, shop_fixture, tune_fixture  # noqa: F401

import model_zoo.experiment.tuner as tuner_module
from model_zoo.errors import FileError
from model_zoo.experiment.backends.process import Task, launch, stop
from model_zoo.experiment.grid import Point
from model_zoo.experiment.tuner_jobs import Job, State
from model_zoo.experiment.tuner_table import Display, drawn, duration, seconds_left
from model_zoo.files import locked


def when(path: Path, action: Callable[[], object]) -> threading.Thread:
    """Do something as soon as a file is there."""

    def wait() -> None:
        while not path.exists():
            time.sleep(0.02)
        time.sleep(0.1)
        action()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


# ---- what runs -------------------------------------------------------------------------------------------------------


def test_every_point_runs_once_and_the_best_is_named(shop: Workshop, tune: Tune) -> None:
    path = shop.grid(shop.space(topk=[8, 4, 2]))
    done = tune(path, "--seeds", 10, 1)
    assert (done.code, done.err) == (0, "")
    assert sorted(shop.who()) == [(topk, seed) for topk in (2, 4, 8) for seed in (1, 10)]
    assert len(shop.records()) == len(shop.table()) == 6
    ranked = re.findall(r"TWIN_tiny_00\d_\w+  topk=(\d) +(\d) +([\d.]+)", done.out)
    assert ranked == [("8", "2", "1.161100"), ("4", "2", "1.081100"), ("2", "2", "1.041100")]
    assert "6 of 6 runs done, 0 failed, 0 left; results: " + str(shop.runs / "g.csv") in done.out
    assert re.search(r"done 1 of 6: TWIN_tiny_001_\w+ seed 10: topk=8 in 2 s: AUC \+ gAUC 1\.162000", done.out)


def test_what_is_done_is_skipped_even_by_another_grid_and_gets_its_line_there(shop: Workshop, tune: Tune) -> None:
    tune(shop.grid(shop.space(topk=[8, 4], seed=1)))
    (shop.runs / "g.csv").unlink()
    before = [path.read_bytes() for path in shop.records()]
    again = tune(shop.grid(shop.space(topk=[8, 4], seed=1)))
    assert again.code == 0 and "2 of 2 runs done" in again.out and len(shop.table()) == 2
    wider = tune(shop.grid(shop.space(seed=[1, 11], topk=[2, 4, 8]), "wider"))
    assert wider.code == 0 and len(shop.table("wider")) == 6
    assert sorted(shop.who()) == [(2, 1), (2, 11), (4, 1), (4, 11), (8, 1), (8, 11)]
    assert [path.read_bytes() for path in shop.records() if "seed11" not in str(path) and "_4" not in str(path)] != []
    assert before == [p.read_bytes() for p in shop.records() if json.loads(p.read_bytes())["config"]["topk"] != 2
                      and json.loads(p.read_bytes())["seed"] == 1]  # fmt: skip


def test_a_crashed_run_is_gone_on_with_once(shop: Workshop, tune: Tune) -> None:
    shop.plan({8: ["crash", "done"]})
    done = tune(shop.grid(shop.space(topk=[8, 4], seed=1)))
    assert done.code == 0 and len(shop.records()) == 2
    assert [(call["who"][0], call["resumed"]) for call in shop.calls()] == [(8, False), (8, True), (4, False)]
    assert "crashed: TWIN_tiny_001_" in done.out and "RuntimeError: no memory for topk 8); goes on with it" in done.out


def test_failures_are_listed_with_the_end_of_their_logs_and_the_others_go_on(shop: Workshop, tune: Tune) -> None:
    shop.plan({8: ["crash"], 4: ["refuse"], 2: ["none"]})
    done = tune(shop.grid(shop.space(topk=[8, 4, 2, 1], seed=1)))
    assert done.code == 1
    assert [topk for topk, _ in shop.who()] == [8, 8, 4, 2, 1], "a refusal is not tried again"
    closing = done.out[done.out.rindex("tiny, on validation") :]
    assert re.search(r"failed: TWIN_tiny_001_\w+ seed 1: topk=8: exit code 1, twice; its output is in (\S+)", closing)
    assert "    RuntimeError: no memory for topk 8" in closing
    assert "exit code 2; its output is in" in closing and "    error: the data are not sound" in closing
    assert "no metric of the final model is a number" in closing
    assert "1 of 4 runs done, 3 failed, 0 left" in closing
    shop.plan({})
    assert tune(shop.grid(shop.space(topk=[8, 4], seed=1))).code == 0, "called again, it tries again"


def test_devices_take_turns_and_cores_are_shared(
    shop: Workshop, tune: Tune, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    shop.plan({8: ["sleep"], 4: ["sleep"], 2: ["sleep"]})
    assert tune(shop.grid(shop.space(topk=[8, 4, 2], seed=1)), "--jobs", 3).code == 0
    calls = shop.calls()
    assert {call["threads"] for call in calls} == {"2"} and {call["gpu"] for call in calls} == {-1}


def test_set_chooses_among_the_files_values_and_a_folder_has_none(shop: Workshop, tune: Tune) -> None:
    path = shop.grid(shop.space(topk=[8, 4, 2], seed=[1, 2]))
    assert tune(path, "--set", "topk=[4, 1]", "--set", "seed=2").code == 0
    assert sorted(call["who"] for call in shop.calls()) == [[1, 2], [4, 2]]
    folder = tune(shop.runs / "grids" / "g", "--set", "topk=4")
    assert folder.code == 2 and "its experiments run as they are; --set is for a tuner file" in folder.err


def test_a_dry_run_lists_the_runs_and_starts_none(shop: Workshop, tune: Tune) -> None:
    tune(shop.grid(shop.space(topk=[8], seed=1), "first"))
    shown = tune(shop.grid(shop.space(topk=[8, 4], seed=1, verbose=[0, 1])), "--dry-run")
    assert shown.code == 0 and len(shop.calls()) == 1
    assert re.search(r"^  done  TWIN_tiny_001_\w+ seed 1: topk=8", shown.out, re.M)
    assert re.search(r"^  left  TWIN_tiny_00\d_\w+ seed 1: topk=4", shown.out, re.M)
    assert "2 runs, 1 of them done" in shown.out and not (shop.runs / "g.csv").exists()


# ---- records that are not this grid's --------------------------------------------------------------------------------


def spoilt(shop: Workshop, tune: Tune, change: dict[str, Any]) -> tuple[Answer, Path, str]:
    """A grid's answer where one of two records was changed, the record and its text."""
    path = shop.grid(shop.space(topk=[8], seed=1))
    assert tune(path).code == 0
    (record,) = shop.records()
    text = json.dumps({key: value for key, value in (json.loads(record.read_text()) | change).items() if value is not None})
    record.write_text(text)
    return tune(shop.grid(shop.space(topk=[8, 4], seed=1))), record, text


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"format": 99}, "written by a newer version (format 99, "),
        ({"scores": None}, "'scores' is missing or wrong"),
        ({"config": {"model": "TWIN", "dataset_id": "tiny"}}, "another configuration, in "),
        ({"config": {"model": "Gone", "dataset_id": "tiny"}}, "another configuration, in "),
    ],
)
def test_a_record_that_cannot_be_this_runs_is_left_and_said(
    change: dict[str, Any], wanted: str, shop: Workshop, tune: Tune
) -> None:
    done, record, text = spoilt(shop, tune, change)
    assert done.code == 1 and record.read_text() == text
    assert f"{record.parent}" in done.out and wanted in done.out
    assert "move its folder away, or choose another model_root" in done.out
    assert shop.who() == [(8, 1), (4, 1)], "the others run, this one does not"


def test_a_stopped_run_of_another_configuration_is_not_gone_on_with(shop: Workshop, tune: Tune) -> None:
    shop.plan({8: ["refuse"]})
    tune(shop.grid(shop.space(topk=[8], seed=1)))
    (config,) = shop.runs.glob("*/*/*/config.yaml")
    config.write_text(config.read_text().replace("num_heads: 2", "num_heads: 4"))
    shop.plan({})
    done = tune(shop.grid(shop.space(topk=[8], seed=1)))
    assert done.code == 1 and "another configuration, in num_heads" in done.out and len(shop.calls()) == 1


# ---- stopping --------------------------------------------------------------------------------------------------------


def test_a_signal_stops_the_runs_and_the_next_call_goes_on(shop: Workshop, tune: Tune) -> None:
    shop.plan({4: ["wait", "done"]})
    path = shop.grid(shop.space(topk=[8, 4, 2], seed=1))
    when(shop.root / "waiting", interrupt)
    stopped = tune(path)
    assert stopped.code == 128 + signal.SIGINT
    assert stopped.err == f"stopped by SIGINT; go on with: python run_param_tuner.py --config {path}\n"
    assert "stopping: runs under way (1) write their state" in stopped.out
    assert "1 of 3 runs done, 0 failed, 2 left" in stopped.out
    done = tune(path)
    assert done.code == 0 and "stopped earlier: TWIN_tiny_002_" in done.out
    assert [(call["who"][0], call["resumed"]) for call in shop.calls()] == [(8, False), (4, False), (4, True), (2, False)]
    assert len(shop.records()) == 3


def test_a_second_signal_kills(shop: Workshop, tune: Tune) -> None:
    shop.plan({8: ["deaf", "done"]})
    path = shop.grid(shop.space(topk=[8], seed=1))

    def twice() -> None:
        interrupt()
        time.sleep(0.6)
        interrupt()

    when(shop.root / "waiting", twice)
    assert tune(path).code == 128 + signal.SIGINT
    assert shop.records() == [], "left alone, a stand-in that hears nothing ends with a record after a minute"
    assert tune(path).code == 0


def test_a_run_of_another_process_is_waited_for(
    shop: Workshop, tune: Tune, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two grids at once, on one machine or on two that share the results."""
    monkeypatch.setattr(tuner_module, "POLL_ELSEWHERE", 0.1)
    path = shop.grid(shop.space(topk=[8, 4], seed=1))
    assert tune(path, "--tag", "001").code == 0
    (record,) = shop.records()
    lock, text = record.parent.parent / "seed1.lock", record.read_text()
    record.unlink()
    shop.plan({4: ["sleep"]})
    with locked(lock, wait=False):
        (shop.root / "calls.txt").write_text("")
        threading.Timer(1.0, lambda: record.write_text(text)).start()
        done = tune(path)
    assert done.code == 0 and shop.who() == [(4, 1)]
    assert done.out.count("is run by another process; waiting for it") == 1 and "2 of 2 runs done" in done.out


def test_a_run_that_another_process_gave_up_is_taken_up(
    shop: Workshop, tune: Tune, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuner_module, "POLL_ELSEWHERE", 0.1)
    path = shop.grid(shop.space(topk=[8], seed=1))
    shop.plan({8: ["refuse"]})
    tune(path)
    shop.plan({8: ["", "crash", "done"]})
    (folder,) = shop.runs.glob("tiny/*")
    release = threading.Event()

    def hold() -> None:
        with locked(folder / "seed1.lock", wait=False):
            held.set()
            release.wait()

    held = threading.Event()
    threading.Thread(target=hold, daemon=True).start()
    held.wait()
    threading.Timer(1.0, release.set).start()
    done = tune(path)
    assert done.code == 0, "waiting is no try"
    assert [call["resumed"] for call in shop.calls()] == [False, True, True]


def test_a_runs_lock_outlives_who_launched_it(tmp_path: Path) -> None:
    script = "import time; time.sleep(60)"
    task = Task((sys.executable, "-c", script), str(tmp_path / "logs" / "x"), str(tmp_path / "x.lock"), str(tmp_path))
    process = launch(task, -1, {})
    assert process is not None
    try:
        with pytest.raises(FileError, match="another process holds it"), locked(task.lock, wait=False):
            pass
        assert launch(task, -1, {}) is None
    finally:
        stop(process, kill=True)
        process.wait()
    with locked(task.lock, wait=False):
        pass


# ---- options ---------------------------------------------------------------------------------------------------------

OPTIONS = {
    ("--address", "auto"): "--address is for --backend ray",
    ("--trials", "3"): "--trials is for --search optuna",
    ("--storage", "sqlite:///x"): "--storage is for --search optuna",
    ("--jobs", "0"): "--jobs 0: must be at least 1",
    ("--gpu", "-2"): "--gpu -2: name CUDA devices from 0, or -1 for the CPU",
    ("--search", "optuna", "--tag", "1"): "--tag chooses among a grid's runs",
    ("--tag", "nope"): "--tag nope: is in none of the 1 ids",
    ("--load", "absent.py"): "--load absent.py: no such file",
    ("--backend", "ray", "--gpu", "-1", "0", "--address", "x"): "name GPUs or -1, not both",
}


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_options_that_cannot_be_are_refused(options: tuple[str, ...], shop: Workshop, tune: Tune) -> None:
    answer = tune(shop.grid(shop.space(topk=[8])), *options)
    assert answer.code == 2 and answer.err.startswith("error: ") and OPTIONS[options] in answer.err
    assert shop.calls() == [] and answer.err.count("\n") == 1


def test_a_gpu_that_is_not_there_is_refused(shop: Workshop, tune: Tune) -> None:
    answer = tune(shop.grid(shop.space(topk=[8])), "--gpu", "63")
    assert answer.code == 2 and "--gpu 63" in answer.err and shop.calls() == []


def test_results_that_cannot_be_written_are_refused(shop: Workshop, tune: Tune) -> None:
    (shop.root / "runs").write_text("a file")
    answer = tune(shop.grid(shop.space(topk=[8])))
    assert answer.code == 2 and "cannot be written" in answer.err and shop.calls() == []


# ---- what is shown ---------------------------------------------------------------------------------------------------


def job(number: int, state: State, **more: Any) -> Job:
    point = Point(f"T_{number}", f"T_00{number}_ab", 1, {"dataset_id": "tiny"}, frozenset(), {"topk": number})
    made = Job(point, "runs", state, device="gpu 0", monitor="AUC")
    for key, value in more.items():
        setattr(made, key, value)
    return made


JOBS = [
    job(1, State.DONE, seconds=100.0, value=0.6, before=True),
    job(2, State.DONE, seconds=300.0, value=0.7),
    job(3, State.RUNNING, started=1000.0),
    job(4, State.RUNNING, started=900.0),
    job(5, State.LEFT),
    job(6, State.FAILED, reason=("it broke",)),
]


def test_time_left_is_by_the_mean_of_what_is_done() -> None:
    """Of 200 s a run: 150 and 50 of the two under way and two more that wait, on two devices."""
    assert seconds_left(JOBS, 7, 2, now=1050.0) == (150 + 50 + 2 * 200) / 2
    assert seconds_left(JOBS[2:], 7, 2, now=1050.0) is None
    assert seconds_left([JOBS[0]], 1, 2, now=0.0) == 0


def test_the_table_says_how_it_stands(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("epoch 1\n 50%\repoch 2: AUC 0.6\n\n")
    JOBS[2].log = str(log)
    lines = drawn("g", JOBS, 7, 2, began=0.0, now=1050.0)
    assert lines == [
        "g: 7 runs: 2 done (1 before), 2 running, 2 left, 1 failed; 18 min so far, about 5 min left",
        "  best on tiny (AUC) 0.700000: T_002_ab  topk=2",
        "  gpu 0  50 s   T_003_ab seed 1: topk=3  epoch 2: AUC 0.6",
        "  gpu 0  2 min  T_004_ab seed 1: topk=4",
    ]


def test_a_monitor_that_falls_is_shown_as_it_is() -> None:
    low, high = (job(n, State.DONE, value=-n / 10, monitor="min: logloss") for n in (3, 4))
    assert "  best on tiny (min: logloss) 0.300000: T_003_ab  topk=3" in drawn("g", [high, low], 2, 1, 0.0, 1.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59, "59 s"), (60, "1 min"), (3599, "1 h"), (4800, "1 h 20 min"), (98_000, "1 d 3 h"), (86_400, "1 d")],
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_on_a_terminal_the_table_is_drawn_over_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    stream = io.StringIO()
    display = Display("g", stream, live=True)
    display.show(JOBS, 7, 2)
    first = stream.getvalue()
    assert first.count("\n") == 4 and "\x1b" not in first and max(map(len, first.splitlines())) == 39
    display.show(JOBS, 7, 2)
    assert stream.getvalue() == first, "once a second"
    display.note("done")
    display.show(JOBS, 7, 2)
    display.close()
    assert stream.getvalue()[len(first) :] == f"\x1b[4F\x1b[Jdone\n{first}\x1b[4F\x1b[J"


def test_without_a_terminal_there_are_lines_alone() -> None:
    stream = io.StringIO()
    display = Display("g", stream)
    display.show(JOBS, 7, 2)
    display.note("done")
    display.close()
    assert stream.getvalue() == "done\n"


# ---- the real thing --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_real_run_is_killed_gone_on_with_and_recorded(tiny_config: Path, tmp_path: Path) -> None:
    """``python run_param_tuner.py`` in a process of its own, killed with its run, then called again."""
    grid = tmp_path / "real.yaml"
    grid.write_text(
        f"base_config: {tiny_config}\nbase_expid: TWIN_tiny\ntuner_space:\n  model_root: {tmp_path / 'runs'}\n"
        "  topk: [4]\n  epochs: 3\n  checkpoint_steps: 1\n"
    )
    command = [sys.executable, str(ROOT / "run_param_tuner.py"), "--config", str(grid)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as first:
        deadline = time.monotonic() + 100
        while not list(tmp_path.glob("runs/tiny/*/*/training_state.pt")) and time.monotonic() < deadline:
            time.sleep(0.02)
        first.terminate()
    assert first.returncode == 128 + signal.SIGTERM
    assert list(tmp_path.glob("runs/tiny/*/*/training_state.pt"))
    second = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert second.returncode == 0, second.stderr
    (record,) = tmp_path.glob("runs/tiny/*/*/metrics.json")
    assert json.loads(record.read_text())["resumes"] and "stopped earlier: " in second.stdout
    assert len((tmp_path / "runs" / "real.csv").read_text().splitlines()) == 1
