"""``run_param_tuner.py --search optuna``: real Optuna over the stand-in's runs."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from tuner_cases import Tune, Workshop, shop_fixture, tune_fixture  # noqa: F401

optuna = pytest.importorskip("optuna", reason="Optuna is not installed")
SEARCH = ("--search", "optuna")


def studies(shop: Workshop, name: str = "g") -> list[Any]:
    storage = f"sqlite:///{shop.runs / 'grids' / name / 'optuna.db'}"
    found = optuna.get_all_study_names(storage)
    return [optuna.load_study(study_name=study, storage=storage) for study in found]


def test_trials_draw_from_lists_and_ranges_and_are_told_the_monitor(shop: Workshop, tune: Tune) -> None:
    space = shop.space(
        topk={"low": 1, "high": 9}, learning_rate={"low": 1e-4, "high": 1e-2, "log": True},
        dnn_hidden_units=[[16], [16, 8]], net_dropout={"low": 0.0, "high": 0.5, "step": 0.25}, epochs=1, seed=1,
    )  # fmt: skip
    done = tune(shop.grid(space), *SEARCH, "--trials", 4)
    assert (done.code, done.err) == (0, "")
    (study,) = studies(shop)
    assert len(study.trials) == 4 and {trial.state.name for trial in study.trials} == {"COMPLETE"}
    for trial, call in zip(study.trials, shop.calls()):
        params = call["params"]
        assert trial.params["topk"] == params["topk"] and 1 <= params["topk"] <= 9
        assert params["learning_rate"] == trial.params["learning_rate"] and 1e-4 <= params["learning_rate"] <= 1e-2
        assert json.loads(trial.params["dnn_hidden_units"]) == params["dnn_hidden_units"]
        assert params["net_dropout"] in (0.0, 0.25, 0.5)
        assert trial.value == pytest.approx(2 * (0.5 + params["topk"] / 100 + 1 / 10000), abs=1e-12)
    assert len({call["params"]["learning_rate"] for call in shop.calls()}) == 4


def test_called_again_a_study_goes_on_to_more_trials(shop: Workshop, tune: Tune) -> None:
    path = shop.grid(shop.space(topk={"low": 1, "high": 1000}, seed=1))
    assert tune(path, *SEARCH, "--trials", 2).code == 0
    assert tune(path, *SEARCH, "--trials", 2).code == 0
    assert len(shop.calls()) == 2
    more = tune(path, *SEARCH, "--trials", 3)
    assert more.code == 0 and "3 of 3 runs done" in more.out
    drawn = [topk for topk, _ in shop.who()]
    assert len(drawn) == len(set(drawn)) == 3, "the first draws are not repeated"


def test_a_stopped_trial_is_gone_on_with(shop: Workshop, tune: Tune) -> None:
    shop.plan({8: ["wait", "done"], 9: ["wait", "done"]})
    path = shop.grid(shop.space(topk={"low": 8, "high": 9}, learning_rate={"low": 0.001, "high": 0.1}, seed=1))

    def stop() -> None:
        while not (shop.root / "waiting").exists():
            time.sleep(0.02)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    assert tune(path, *SEARCH, "--trials", 1).code == 128 + signal.SIGTERM
    done = tune(path, *SEARCH, "--trials", 1)
    assert done.code == 0 and "1 of 1 runs done" in done.out
    assert [call["resumed"] for call in shop.calls()] == [False, True]
    (study,) = studies(shop)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"]


def test_a_trial_is_all_its_seeds_and_each_data_set_has_its_study(
    shop: Workshop, tune: Tune, tiny_config: Path
) -> None:
    described = yaml.safe_load((tiny_config / "dataset_config.yaml").read_text())["tiny"]
    top = {"dataset_id": ["A", "B"], "dataset_config": {"A": described, "B": described}}
    path = shop.grid(shop.space(topk={"low": 1, "high": 1000}), **top)
    done = tune(path, *SEARCH, "--trials", 2, "--seeds", 1, 2, "--gpu", -1, -1)
    assert done.code == 0 and "8 of 8 runs done" in done.out
    assert sorted((call["data"], call["who"][1]) for call in shop.calls()) == [
        (data, seed) for data in "AB" for seed in (1, 1, 2, 2)
    ]
    for study in studies(shop):
        for trial in study.trials:
            assert trial.value == pytest.approx(2 * (0.5 + trial.params["topk"] / 100 + 1.5 / 10000), abs=1e-12)


def test_a_trial_that_was_drawn_before_runs_once(shop: Workshop, tune: Tune) -> None:
    done = tune(shop.grid(shop.space(topk=[8, 4], seed=1)), *SEARCH, "--trials", 5, "--gpu", -1, -1)
    assert done.code == 0 and sorted(set(shop.who())) == sorted(shop.who())
    (study,) = studies(shop)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 5


def test_a_failed_trial_and_a_wrong_combination_are_said_and_the_search_goes_on(shop: Workshop, tune: Tune) -> None:
    shop.plan({8: ["refuse"]})
    space = shop.space(topk=[4, 8], num_heads=[2, 16], attention_dim=[16, 24], seed=1)
    done = tune(shop.grid(space), *SEARCH, "--trials", 9)
    assert done.code == 1 and "failed: TWIN_tiny_" in done.out
    assert "refused: g, trial " in done.out and "attention_dim (24) must be a multiple of num_heads (16)" in done.out
    (study,) = studies(shop)
    assert len(study.trials) == 9 and {trial.state.name for trial in study.trials} == {"COMPLETE", "FAIL"}
    assert all(call["params"]["attention_dim"] % call["params"]["num_heads"] == 0 for call in shop.calls())


def test_what_cannot_be_searched_is_refused(shop: Workshop, tune: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    def error(space: dict[str, Any], *options: object) -> str:
        answer = tune(shop.grid(shop.space(**space)), *SEARCH, *options)
        assert answer.code == 2 and shop.calls() == []
        return answer.err

    assert "every key of tuner_space has one value, so there is nothing to search" in error({"topk": 8})
    assert "topk must be at least 1, not -3" in error({"topk": {"low": -3, "high": 4}})
    assert "--storage nosuch://x: " in error({"topk": [8, 4]}, "--storage", "nosuch://x")
    folder = tune(shop.base, *SEARCH)
    assert folder.code == 2 and "is a folder of experiments; a search needs a tuner file" in folder.err
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert "--search optuna needs the package optuna; install it with: pip install" in error({"topk": [8, 4]})
