"""What a run leaves: folders of its own, files whole or not at all, lines that other tools can read."""

import json
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from model_zoo.errors import ConfigError
from model_zoo.experiment import record


def test_every_run_has_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record.time, "strftime", lambda _: "20260101-000000")
    folders = [Path(record.new_run_folder(str(tmp_path), "shop", "TWIN", 3)) for _ in range(3)]
    stem = tmp_path / "shop" / "TWIN" / "20260101-000000-seed3"
    assert folders == [stem, Path(f"{stem}-2"), Path(f"{stem}-3")] and all(folder.is_dir() for folder in folders)


def test_runs_that_start_together_do_not_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record.time, "strftime", lambda _: "20260101-000000")
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(record.new_run_folder(str(tmp_path), "shop", "TWIN", 3)))
        for _ in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 12


def test_a_model_root_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    for blocked in ("", "shop", "shop/TWIN"):
        place = tmp_path / "root" / blocked
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("a file")
        with pytest.raises(ConfigError, match=r"seed3: cannot be made \(.*\); choose another model_root") as refusal:
            record.new_run_folder(str(tmp_path / "root"), "shop", "TWIN", 3)
        assert "\n" not in str(refusal.value)
        place.unlink()


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    record.write_json(str(path), {"AUC": 0.5})
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(TypeError):
        record.write_json(str(path), {("a", "tuple"): 1})
    assert json.loads(path.read_text()) == {"AUC": 0.5}


def test_what_is_not_a_number_is_null_in_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    record.write_json(str(path), {"gAUC": np.float32("nan"), "deep": [{"loss": float("inf")}], "AUC": np.float32(0.5)})

    def refuse(constant: str) -> Any:
        raise AssertionError(constant)

    found = json.loads(path.read_text(), parse_constant=refuse)
    assert found == {"gAUC": None, "deep": [{"loss": None}], "AUC": 0.5}


def test_yaml_comes_back_as_it_was(tmp_path: Path) -> None:
    value = {"TWIN": {"seed": 3, "lr": 1e-5, "text": "é", "none": None, "on": [1, "1e-5"], "off": {"a": True}}}
    record.write_yaml(str(tmp_path / "config.yaml"), value)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8")) == value


def test_the_results_line_is_longctrs(tmp_path: Path) -> None:
    path = tmp_path / "config.csv"
    scores = {"valid": {"gAUC": 0.5, "AUC": 0.6250004}, "test": {"gAUC": 0.25, "AUC": 1.0}}
    record.append_result(str(path), "run_expid.py --expid A", "A", "shop", scores)
    record.append_result(str(path), "run_expid.py --expid B", "B", "shop", {"valid": {"AUC": 0.5}})
    first, second = path.read_text().splitlines()
    stamp = r" \d{8}-\d{6}"
    assert re.fullmatch(
        stamp + r",\[command\] python run_expid\.py --expid A,\[exp_id\] A,\[dataset_id\] shop,\[train\] N\.A\.,"
        r"\[val\] gAUC: 0\.500000 - AUC: 0\.625000,\[test\] gAUC: 0\.250000 - AUC: 1\.000000",
        first,
    )
    assert second.endswith(",[train] N.A.,[val] AUC: 0.500000,[test] ")


def test_lines_of_runs_that_end_together_do_not_mix(tmp_path: Path) -> None:
    path = str(tmp_path / "config.csv")
    scores = {"valid": {"AUC": 0.5}, "test": {"AUC": 0.5}}
    threads = [
        threading.Thread(target=lambda: [record.append_result(path, "x" * 500, "A", "s", scores) for _ in range(20)])
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = Path(path).read_text().splitlines()
    assert len(lines) == 160 and len({line.split(",", 1)[1] for line in lines}) == 1


def test_a_line_of_the_same_time_is_not_appended_twice(tmp_path: Path) -> None:
    path = str(tmp_path / "config.csv")
    scores = {"valid": {"AUC": 0.5}}
    assert record.append_result(path, "run_expid.py", "A", "shop", scores, when="20260101-000000")
    assert not record.append_result(path, "run_expid.py", "A", "shop", scores, when="20260101-000000")
    assert record.append_result(path, "run_expid.py", "B", "shop", scores, when="20260101-000000")
    assert record.append_result(path, "run_expid.py", "A", "shop", scores, when="20260101-000001")
    first, second, third = Path(path).read_text().splitlines()
    assert first.startswith(" 20260101-000000,[command] python run_expid.py,[exp_id] A,")
    assert second == first.replace("] A,", "] B,") and third == first.replace("000000,", "000001,")


def test_a_result_is_one_line_whatever_the_command_holds(tmp_path: Path) -> None:
    path = tmp_path / "config.csv"
    command = "run_expid.py --set note=two\nlines\r\x85 --expid \udcff"
    record.append_result(str(path), command, "A", "shop", {"valid": {"AUC": float("nan")}, "test": {"AUC": None}})
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) == 1 and text.endswith("\n")
    assert "python run_expid.py --set note=two lines" in text and "--expid \\udcff,[exp_id] A" in text
    assert text.endswith("[val] AUC: nan,[test] AUC: nan\n")


def test_the_environment_names_versions_commit_and_hardware(root: Path, tmp_path: Path) -> None:
    found = record.environment(str(root))
    assert {"python", "torch", "fuxictr", "numpy", "polars"} <= found["versions"].keys()
    assert found["hardware"]["cpus"] >= 1
    assert record.git_commit(str(tmp_path / "absent")) is None
    assert record.peak_memory()["resident_mib"] > 10
