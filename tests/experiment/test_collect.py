"""Runs found and read again: records of any age and any damage, and the leaderboard's csv."""

import copy
import csv
import io
import json
import random
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from run_records import MICRO, result, save

from model_zoo.errors import ConfigError
from model_zoo.experiment import record
from model_zoo.experiment.collect import collect, config_digest, duplicates, merits, row_of, split_model
from model_zoo.experiment.record_flops import count_flops
from model_zoo.experiment.run import build_model
from model_zoo.pipeline.dataset import CTRDataset
from model_zoo.pipeline.feature_map import build_feature_map


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch, root: Path) -> dict[str, ModuleType]:
    """The modules of ``benchmark/``."""
    monkeypatch.syspath_prepend(str(root / "benchmark"))
    return {name: import_module(name) for name in ("collect", "leaderboard")}


# ---- reading records -----------------------------------------------------------------------------------------------------


def test_a_record_of_the_first_format_is_filled_in(tmp_path: Path) -> None:
    old = {key: value for key, value in result("TWIN", 3, 0.7).items() if key in record.REQUIRED}
    (tmp_path / "20251231-235959-seed3").mkdir()
    path = tmp_path / "20251231-235959-seed3" / "metrics.json"
    path.write_text(json.dumps(old))
    found = record.read_record(str(path))
    assert found["format"] == 1 and found["flops"] is None and found["history"] == [] and found["model_config"] == {}
    (row,) = collect([str(tmp_path)]).rows
    assert row.finished == "20251231-235959" and row.flops is None and row.data == "" and row.scores["test"]["AUC"] == 0.7


def test_a_newer_record_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps({**result("TWIN", 3, 0.7), "format": record.FORMAT_VERSION + 1}))
    with pytest.raises(record.RecordError, match=r"newer version \(format 3, this one reads up to 2\); update"):
        record.read_record(str(path))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"scores": {"final": {"test": {"AUC": None, "gAUC": float("nan")}}}}, "no metric of the final model is a number"),
        ({"scores": {"phase1": {}}}, "'scores' lacks the final model's"),
        ({"scores": None}, "'scores' is missing or wrong"),
        ({"seed": True}, "'seed' is missing or wrong"),
        ({"config": [1]}, "'config' is missing or wrong"),
        ({"peak_memory": 3}, "'peak_memory' is missing or wrong"),
        ({"format": "2"}, "format '2' is not known"),
    ],
)
def test_unusable_records_are_listed_and_the_others_kept(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    save(tmp_path / "runs", result("TWIN", 1, 0.7), {**result("TWIN", 2, 0.7), **change, "seed": change.get("seed", 2)})
    found = collect([str(tmp_path / "runs")])
    assert [row.seed for row in found.rows] == [1]
    ((path, said),) = found.unusable
    assert reason in said and path.startswith("runs/") and str(tmp_path) not in said


def test_what_is_no_record_at_all_is_listed(tmp_path: Path) -> None:
    for name, content in (("a", b"{"), ("b", b"[1]"), ("c", b"\xff\xfe"), ("d", b"")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_bytes(content)
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "config.yaml").write_text("TWIN: {}")
    found = collect([str(tmp_path)])
    assert not found.rows and len(found.unusable) == 4 and [Path(path).name for path in found.unfinished] == ["e"]
    with pytest.raises(ConfigError, match="no such folder"):
        collect([str(tmp_path / "absent")])


def test_damaged_records_never_crash(tmp_path: Path) -> None:
    whole, values = result("TWIN", 1, 0.7), [None, True, 3, -1.5, "text", [], [1], {}, {"AUC": "x"}, {"total": [2]}]
    path, draw = tmp_path / "metrics.json", random.Random(0)
    outcomes = set()
    for _ in range(400):
        damaged = copy.deepcopy(whole)
        place = damaged
        while isinstance(place[key := draw.choice(sorted(place))], dict) and place[key] and draw.random() < 0.7:
            place = place[key]
        place[key] = draw.choice(values)
        path.write_text(json.dumps(damaged))
        try:
            row_of(record.read_record(str(path)), "run")
            outcomes.add("read")
        except record.RecordError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_operations_of_a_row(tiny_params: Callable[..., dict[str, Any]], tiny_dataset: CTRDataset) -> None:
    for expid in ("TWIN_tiny", "MoS_TWIN_tiny"):
        params = tiny_params(expid)
        model = build_model(params, build_feature_map(params), tiny_dataset)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        found = count_flops(model, tiny_dataset, params["max_len"])
        assert found is not None and found["rows"] == 100
        assert found["training"]["total"] > found["prediction"]["total"] > found["prediction"]["block"] > 0
        assert (found["paper"] is None) == (expid == "TWIN_tiny")
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert found["paper"]["every_expert"] > found["paper"]["serving_experts"] > 0


def test_operations_that_cannot_be_counted_cost_no_record(
    tiny_dataset: CTRDataset, caplog: pytest.LogCaptureFixture
) -> None:
    assert count_flops(None, tiny_dataset, 5) is None  # type: ignore[arg-type]
    assert "operations are not in the record: AttributeError" in caplog.text


# ---- what makes runs the same --------------------------------------------------------------------------------------------


def test_a_configuration_is_what_is_computed() -> None:
    config = result("TWIN", 1, 0.7)["config"]
    elsewhere = {"train_data": "/elsewhere", "data_root": "/elsewhere", "model_root": "/elsewhere", "gpu": 3}
    same = {**dict(reversed(config.items())), "seed": 9, "model_id": "other", **elsewhere}
    assert config_digest(config) == config_digest(same) == config_digest({**config, "batch_size": 8192})
    assert config_digest(config) != config_digest({**config, "batch_size": 64})
    plugin = {**config, "model": "NotRegistered"}
    assert config_digest(plugin) == config_digest({**plugin, "seed": 2}) != config_digest({**plugin, "topk": 2})


def test_models_are_split_into_method_and_backbone() -> None:
    assert split_model("MoS_TWIN") == ("MoS", "TWIN") and split_model("TWIN") == ("", "TWIN")
    assert split_model("Own_TWIN") == ("Own", "TWIN") and split_model("MoS_Own") == ("MoS", "Own")
    assert split_model("My_Own") == ("", "My_Own")


def test_duplicates_are_told(tmp_path: Path, scripts: dict[str, ModuleType], capsys: pytest.CaptureFixture[str]) -> None:
    runs = save(tmp_path / "runs", result("TWIN", 1, 0.7), result("TWIN", 1, 0.7), result("TWIN", 2, 0.7))
    ((first, second),) = duplicates(collect([str(runs)]).rows)
    assert first.seed == second.seed == 1
    assert scripts["collect"].main([str(runs), "--out", str(tmp_path / "x.csv")]) == 0
    assert "seed 1, ran 2 times with equal scores" in capsys.readouterr().err
    assert len(collect([str(runs), str(runs / MICRO)]).rows) == 3  # a run that two folders lead to is one run


# ---- the leaderboard -----------------------------------------------------------------------------------------------------


def test_the_leaderboard_has_bars_columns_and_comes_back(tmp_path: Path, scripts: dict[str, ModuleType]) -> None:
    runs = save(
        tmp_path / "runs", result("MoS_TWIN", 2, 0.71), result("MoS_TWIN", 1, 0.7), result("SDIM", 1, 0.7, head="dot")
    )
    out = tmp_path / "new" / "x.csv"
    assert scripts["collect"].main([str(runs), "--out", str(out), "--folders", str(tmp_path / "laid")]) == 0
    header, *lines = csv.reader(io.StringIO(out.read_text()))
    bars = ["Year", "Publication", "Model", "Paper URL", "gAUC", "AUC", "Logloss", "Running Steps", "Contributor"]
    assert header[:9] == bars
    seed = header.index("seed")
    assert [(line[2], line[seed]) for line in lines] == [("MoS_TWIN", "1"), ("MoS_TWIN", "2"), ("SDIM", "1")]
    assert lines[0][:9] == ["2026", "WWW'26", "MoS_TWIN", "", "0.6000000000", "0.7000000000", "0.5000000000",
                            "MoS_TWIN/MoS_TWIN_microvideo1.7m_x2", ""]  # fmt: skip
    assert lines[0][header.index("peak_mib")] == "2048.0" and str(tmp_path) not in out.read_text()
    back = scripts["leaderboard"].from_csv(str(out))
    assert [row.identity for row in back] == [row.identity for row in collect([str(runs)]).rows]
    assert scripts["leaderboard"].to_csv(back) == out.read_text()

    folder = tmp_path / "laid" / "MoS_TWIN" / "MoS_TWIN_microvideo1.7m_x2"
    first, _ = (folder / "MoS_TWIN_microvideo1.7m_x2_200.csv").read_text().splitlines()
    command = "[command] python run_expid.py --expid MoS_TWIN_x --seed 1"
    assert first.startswith(f" 20260101-000001,{command},[exp_id] MoS_TWIN_x,")
    assert first.endswith("[test] gAUC: 0.600000 - AUC: 0.700000 - logloss: 0.500000")
    assert len(list(folder.glob("*.yaml"))) == 2 and not any("/somewhere" in p.read_text() for p in folder.iterdir())


def test_published_records_name_no_place_and_compare_alike(tmp_path: Path, scripts: dict[str, ModuleType]) -> None:
    here = {"model_root": str(tmp_path), "data_root": str(tmp_path)}
    runs = save(tmp_path / "runs", result("TWIN", 1, 0.7, **here), result("MoS_TWIN", 1, 0.71, **here))
    for path in runs.glob("*/*/*/metrics.json"):
        found = json.loads(path.read_text())
        path.write_text(json.dumps({**found, "command": f"{tmp_path}/run_expid.py --expid x"}))
    public = tmp_path / "public"
    assert scripts["collect"].main([str(runs), "--out", str(tmp_path / "x.csv"), "--records", str(public)]) == 0
    for path in public.glob("*/*/*/metrics.json"):
        assert str(tmp_path) not in path.read_text() and "/somewhere" not in path.read_text()
    own, theirs = ([(row.identity, row.scores) for row in collect([str(where)]).rows] for where in (runs, public))
    assert own == theirs


def test_the_configuration_with_most_seeds_stands_for_a_model_then_the_best_on_validation(tmp_path: Path) -> None:
    few, many, worse = ({"topk": topk} for topk in (1, 2, 3))
    found = [result("TWIN", 1, 0.9, **few), *(result("TWIN", seed, 0.7, **many) for seed in (1, 2))]
    found += [result("TWIN", seed, 0.6, **worse) for seed in (1, 2)]
    rows = collect([str(save(tmp_path / "runs", *found))]).rows
    merit = merits(rows)
    best = max(merit, key=lambda config: merit[config])
    assert [row.scores["test"]["AUC"] for row in rows if row.config == best] == [0.7, 0.7]
    assert sorted(seeds for seeds, _, _ in merit.values()) == [1, 2, 2]
