"""The benchmark scripts at their smallest: what they write, and that they go on where they stopped."""

import argparse
import json
import subprocess
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from model_zoo.pipeline.synthetic import SyntheticSpec, generate
from model_zoo.pipeline.synthetic_files import dataset_config, write

SMALL = SyntheticSpec(
    users=40, items=500, categories=20, image_dim=64, themes=4, rows=(400, 10, 10), history_mean=60, history_max=120,
    session_length=6,
)  # fmt: skip
LENGTH = 20


@pytest.fixture
def flops(monkeypatch: pytest.MonkeyPatch, root: Path) -> ModuleType:
    """``benchmark/flops.py``."""
    monkeypatch.syspath_prepend(str(root / "benchmark"))
    import flops

    return flops


@pytest.fixture
def zoo(monkeypatch: pytest.MonkeyPatch, root: Path) -> ModuleType:
    """``benchmark/zoo.py``."""
    monkeypatch.syspath_prepend(str(root / "benchmark"))
    import zoo

    return zoo


# ---- benchmark/flops.py --------------------------------------------------------------------------------------------------


def test_flops_of_mos_and_rivals(flops: ModuleType, tmp_path: Path) -> None:
    flops.write_data(tmp_path, SMALL, LENGTH)
    options = argparse.Namespace(batch=8, length=LENGTH, any_length=False, batches=2, steps=1, timed=1, set=[])
    small = "TWIN:embedding_dim=8,dnn_hidden_units=[8],attention_dim=8"
    rows = flops.compare(small, options, str(tmp_path))
    rivals = [(rival, s) for s in ("literal", "budget_matched") for rival in ("GShard", "DSelectK", "ExpertChoice")]
    assert [(row["method"], row["setting"]) for row in rows] == [("plain", ""), ("MoS", ""), *rivals] * 2
    assert [row["state"] for row in rows] == ["start"] * 8 + ["trained"] * 8
    plain, mos, gshard, dselect, chosen, *matched = rows[:8]
    for row in rows:
        assert row["training"] > row["prediction"] > 0 and row["seconds"] > 0
    # every history has all of its LENGTH items, and windows start every 4 of them
    assert mos["tokens_every"] == 2 * (LENGTH + (LENGTH - 8) // 4 + 1)
    assert dselect["tokens_every"] == 5 * LENGTH  # a selector at its start leaves no expert out
    assert chosen["tokens_every"] == 5 * 8 and chosen["pairs_every"] == 5 * 8**2  # C = 2 * 20 / 5
    assert matched[1]["tokens_every"] == 10 * LENGTH
    assert mos["tokens_serving"] < mos["tokens_every"]
    assert mos["prediction_extra"] == mos["prediction"] - plain["prediction"]

    compared = flops.comparisons(rows)
    assert len(compared) == 12
    first = compared[0]["ratios"]
    assert first["counted, block"] == mos["prediction"] / gshard["prediction"]
    assert first["experts, T"] == mos["tokens_every"] / gshard["tokens_every"]
    text = flops.document(rows, options)
    assert "| formula | any | budget_matched | even | **0.531** | 0.625 |" in text
    assert "| formula | any | literal | even | 1.062 | 1.250 |" in text
    assert f"| {small} | ExpertChoice | literal | start | " in text


def test_the_claim_holds_where_every_state_does(flops: ModuleType) -> None:
    def one(backbone: str, state: str, ratio: float) -> dict[str, Any]:
        ratios = {name: ratio for name in flops.RATIOS}
        return {"backbone": backbone, "method": "GShard", "setting": "literal", "state": state, "ratios": ratios}

    good = [one("A", "start", 0.53), one("A", "trained", 0.2)]
    mixed = [one("B", "start", 0.53), one("B", "trained", 0.6)]
    missing = [one("C", "start", float("nan"))]
    assert "| literal | GShard | all |" in flops.claim_table(good)
    assert "| literal | GShard | A | A |" in flops.claim_table([*good, *mixed, *missing])
    assert "| literal | GShard | none |" in flops.claim_table(mixed)
    assert flops.cell(0.54) == "**0.540**" and flops.cell(0.55) == "0.550"


def test_data_of_full_histories(flops: ModuleType, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    flops.write_data(tmp_path, SMALL, LENGTH)
    lengths = pq.read_table(tmp_path / "train.parquet")["seq_len"].to_pylist()
    assert 0 < len(lengths) < SMALL.rows[0] and min(lengths) >= LENGTH


# ---- benchmark/zoo.py ----------------------------------------------------------------------------------------------------

EXPERIMENTS = """\
Base: {metrics: [gAUC, AUC, logloss], monitor: AUC, group_id: user_index, seed: 3}
MoS_TWIN_smoke:
  {model: MoS_TWIN, dataset_id: data, embedding_dim: 4, dnn_hidden_units: [4], attention_dim: 4, batch_size: 64,
   max_len: 8, epochs: 1, phase1_epochs: 2, kmeans_tokens: 500}
"""


def test_zoo_reads_a_real_run(zoo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(SMALL, rows=(200, 60, 60))
    write(generate(spec), tmp_path / "data")
    (tmp_path / "model_config.yaml").write_text(EXPERIMENTS)
    (tmp_path / "dataset_config.yaml").write_text(dataset_config(spec, tmp_path / "data"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "out"
    assert zoo.main(["--models", "MoS_TWIN", "--config", str(tmp_path), "--out", str(out), "--set", "seed=5"]) == 0
    row = json.loads((out / "zoo.json").read_text())["models"]["MoS_TWIN"]
    assert row["epochs"] == {"phase1": 2, "phase2": 1, "phase3": 1}
    assert set(row["test"]) == {"gAUC", "AUC", "logloss"}
    assert row["seed"] == 5
    assert row["peak_mib"] > 100 and row["seconds"]["total"] > row["seconds"]["fit"] > 0
    counts = row["parameters"]
    assert counts["total"] == counts["embedding"] + counts["block"] + counts["head"] > counts["experts"] > 0
    machine, line = [line for line in (out / "ZOO.md").read_text().splitlines() if line.startswith(("- ", "| MoS"))]
    assert "torch" in machine and "CPUs" in machine
    assert f"| {row['test']['AUC']:.4f} | {row['test']['gAUC']:.4f} |" in line and " | 2+1+1 | " in line
    assert not list(tmp_path.glob("**/*.model"))  # checkpoints go with the run's folder


def test_zoo_goes_on_where_it_stopped(
    zoo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def run(command: list[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
        """What ``run_expid.py`` does for the script: a record in ``model_root``, or an exit code and a line on stderr."""
        model = command[command.index("--expid") + 1].removesuffix("_smoke")
        ran.append(model)
        if model == "DIN":
            return subprocess.CompletedProcess(command, 2, "", "a warning\nerror: what was wrong\n")
        folder = Path(command[command.index("--set") + 1].removeprefix("model_root=")) / "data" / model / "now"
        folder.mkdir(parents=True)
        record = {
            "model": model, "history": [{"phase": "train", "epoch": 1}], "scores": {"final": {"test": ROW["test"]}},
            "seconds": ROW["seconds"], "peak_memory": {"resident_mib": 1234.0}, "parameters": ROW["parameters"], "seed": 1,
            "git_commit": None, "versions": {"torch": "2"},
            "hardware": {"cpus": 2, "machine": "x", "system": "Linux", "torch_threads": 1},
        }  # fmt: skip
        (folder / "metrics.json").write_text(json.dumps(record))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    call = ["--out", str(tmp_path), "--models", "MoS_TWIN", "DIN", "SDIM"]
    assert zoo.main(call) == 1
    assert "DIN: failed: exit code 2, 0 record(s): error: what was wrong" in capsys.readouterr().out
    assert ran == ["MoS_TWIN", "DIN", "SDIM"]
    assert list(json.loads((tmp_path / "zoo.json").read_text())["models"]) == ["MoS_TWIN", "SDIM"]
    ran.clear()
    assert zoo.main([*call, "TWIN"]) == 1
    assert ran == ["DIN", "TWIN"]  # what failed is tried again, what has a row is not
    ran.clear()
    assert zoo.main([*call, "--again", "--jobs", "2"]) == 1
    assert sorted(ran) == ["DIN", "MoS_TWIN", "SDIM"]
    table = [line for line in (tmp_path / "ZOO.md").read_text().splitlines() if line.startswith("|")]
    names = [line.split(" | ")[0] for line in table]
    assert names == ["| model", "| ---", "| TWIN", "| SDIM", "| MoS_TWIN"]  # the registry's order
    assert all(line.count("|") == table[0].count("|") for line in table)


ROW: dict[str, Any] = {
    "test": {"AUC": 0.6, "gAUC": 0.5, "logloss": 0.4}, "epochs": {"train": 1}, "seconds": {"fit": 1.0, "total": 2.0},
    "peak_mib": 1234.0, "parameters": dict.fromkeys(("total", "embedding", "block", "head", "experts"), 1000),
    "machine": "one",
}  # fmt: skip


def test_zoo_tells_machines_apart(zoo: ModuleType) -> None:
    text = zoo.document({"DIN": ROW, "TWIN": {**ROW, "machine": "two"}})
    assert "- two: TWIN" in text and "- one: DIN" in text
    assert "| DIN | 0.6000 | 0.5000 | 0.4000 | 1 | 1.0 | 2.0 | 1,234 | 1,000 |" in text
    assert "- one\n" in zoo.document({"DIN": ROW})
