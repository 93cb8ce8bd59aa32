"""The benchmark scripts at their smallest: what they write, and that they go on where they stopped."""

import argparse
import json
import subprocess
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from model_zoo.compat import FUXICTR_VERSION
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

    compared = flops.tables.comparisons(rows)
    assert len(compared) == 12
    first = compared[0]["ratios"]
    assert first["counted, block"] == mos["prediction"] / gshard["prediction"]
    assert first["experts, T"] == mos["tokens_every"] / gshard["tokens_every"]
    text = flops.tables.document(rows, options)
    assert "| formula | any | budget_matched | even | **0.531** | 0.625 |" in text
    assert "| formula | any | literal | even | 1.062 | 1.250 |" in text
    assert f"| {small} | ExpertChoice | literal | start | " in text


def test_the_claim_holds_where_every_state_does(flops: ModuleType) -> None:
    def one(backbone: str, state: str, ratio: float) -> dict[str, Any]:
        ratios = {name: ratio for name in flops.tables.RATIOS}
        return {"backbone": backbone, "method": "GShard", "setting": "literal", "state": state, "ratios": ratios}

    good = [one("A", "start", 0.53), one("A", "trained", 0.2)]
    mixed = [one("B", "start", 0.53), one("B", "trained", 0.6)]
    missing = [one("C", "start", float("nan"))]
    assert "| literal | GShard | all |" in flops.tables.claim_table(good)
    assert "| literal | GShard | A | A |" in flops.tables.claim_table([*good, *mixed, *missing])
    assert "| literal | GShard | none |" in flops.tables.claim_table(mixed)
    assert flops.tables.cell(0.54) == "**0.540**" and flops.tables.cell(0.55) == "0.550"


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
    text = zoo.document({"DIN": ROW, "SDIM": ROW, "TWIN": {**ROW, "machine": "two"}})
    assert "- one: all other models\n- two: TWIN\n" in text
    assert "| DIN | 0.6000 | 0.5000 | 0.4000 | 1 | 1.0 | 2.0 | 1,234 | 1,000 |" in text
    assert "- one\n" in zoo.document({"DIN": ROW})


# ---- benchmark/speed.py --------------------------------------------------------------------------------------------------

TINY_RUN = [
    "--threads", "1", "--repeats", "1", "--lengths", str(LENGTH), "--batch", "8", "--set", "embedding_dim=8",
    "--set", "dnn_hidden_units=[8]", "--set", "attention_dim=8", "--set", "topk=4", "--set", "short_seq_len=9",
    "--set", "kmeans_tokens=500",
]  # fmt: skip
#: LongCTR's two modules as far as the benchmark uses them, around our model in compat mode
FAKE_LOADER = """\
import numpy as np
import torch
import pyarrow.parquet as pq
from torch.utils.data import DataLoader


class Table:
    def __init__(self, path):
        table = pq.read_table(path)
        self.column_index = {name: place for place, name in enumerate(table.column_names)}
        self.darray = np.stack([table[name].to_numpy() for name in table.column_names], axis=1)

    def __len__(self):
        return len(self.darray)

    def __getitem__(self, row):
        return self.darray[row]


class LongCTRDataLoader(DataLoader):
    def __init__(self, feature_map, path, user_info, item_info, batch_size, shuffle, num_workers, max_len):
        histories = pq.read_table(user_info)["full_item_seq"].to_pylist()
        items = pq.read_table(item_info).to_pydict()
        table = Table(path)
        self.item_columns = [name for name in items if name in feature_map.features and name != "item_index"]

        def collate(rows):
            rows = np.stack(rows)
            columns = {name: torch.from_numpy(rows[:, place]) for name, place in table.column_index.items()}
            index = []
            for user, length, target in zip(columns["user_index"], columns["seq_len"], columns["item_index"]):
                index += [*histories[user][:length][-max_len:], int(target)]
            features = {name: torch.tensor([items[name][i] for i in index]) for name in self.item_columns}
            return columns, features, torch.ones(len(rows), max_len)

        super().__init__(table, batch_size, shuffle, collate_fn=collate)
"""
FAKE_MODEL = """\
from model_zoo.registry import get_model


def TWIN(feature_map, **params):
    return get_model("TWIN")(feature_map, **{**params, "longctr_compat": True})
"""


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch, root: Path) -> ModuleType:
    """``benchmark/speed.py``, every case measured in this process."""
    monkeypatch.syspath_prepend(str(root / "benchmark"))
    import speed
    import speed_kinds

    monkeypatch.setattr(speed, "_launch", lambda case: (speed.measure(case), 7.0))
    monkeypatch.setattr(speed_kinds, "METRIC_ROWS", 200)
    monkeypatch.setattr(speed_kinds, "METRIC_GROUPS", 5)
    monkeypatch.setattr(speed_kinds, "SCAN_SHAPE", (2, 3, 4, 2))
    return speed


@pytest.fixture(scope="module")
def long_histories(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """A folder with a data set, every impression after at least LENGTH items, under ``LENGTH``."""
    folder = tmp_path_factory.mktemp("speed")
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(root / "benchmark"))
        import flops

        flops.write_data(folder / str(LENGTH), replace(SMALL, rows=(400, 60, 10)), LENGTH)
    return folder


@pytest.mark.skipif(FUXICTR_VERSION == "2.3.9", reason="its logloss needs a scikit-learn before 1.5 to compare with")
def test_speed_without_longctr(
    speed: ModuleType, long_histories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from speed_report import TITLES

    call = [*TINY_RUN, "--data", str(long_histories), "--out", str(tmp_path), "--models", "TWIN"]
    ours = ["loader", "step", "evaluate", "epoch", "memory", "score", "metrics"]
    assert speed.main([*call, "GShard_TWIN", "--cases", "loader", "step"]) == 0, capsys.readouterr().out
    assert speed.main([*call, "--cases", *ours]) == 0, capsys.readouterr().out
    cases = json.loads((tmp_path / "speed.json").read_text())["cases"]
    assert [row["kind"] for row in cases.values()] == ours
    for row in cases.values():
        others = {"loader": ["ours"], "metrics": ["ours", "FuxiCTR"], "step": ["TWIN", "GShard_TWIN"]}
        assert list(row["values"]) == others.get(row["kind"], ["TWIN"])
        assert all(len(found) == 1 and found[0] > 0 for found in row["values"].values())
        assert row["notes"] == {} and "1 thread(s)" in row["machine"] and row["longctr_commit"] is None
    step, metrics = (row for row in cases.values() if row["kind"] in ("step", "metrics"))
    assert step["difference"] is None and metrics["difference"] < 1e-12
    text = (tmp_path / "SPEED.md").read_text()
    assert f"topk=4, short_seq_len=9, kmeans_tokens=500) | {LENGTH} | 8 | cpu | " in text and "equal to 1e-12: " in text
    assert all(f"## {title}" in text for kind, title in TITLES.items() if kind != "scan")
    capsys.readouterr()
    assert speed.main([*call, "--cases", *ours, "scan"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("[8/8] scan cpu ")  # the others have their rows


def test_speed_beside_a_checkout(
    speed: ModuleType, long_histories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkout = tmp_path / "LongCTR"
    (checkout / "TWIN").mkdir(parents=True)
    (checkout / "longctr_dataloader.py").write_text(FAKE_LOADER)
    (checkout / "TWIN" / "TWIN.py").write_text(FAKE_MODEL)
    call = [*TINY_RUN, "--data", str(long_histories), "--out", str(tmp_path), "--longctr", str(checkout)]
    call += ["--set", "net_dropout=0", "--models", "TWIN"]
    assert speed.main([*call, "MoS_TWIN:topk_item=1", "GRU4Rec", "--cases", "step"]) == 0, capsys.readouterr().out
    assert speed.main([*call, "--cases", "loader", "evaluate", "epoch", "memory", "score"]) == 0, capsys.readouterr().out
    cases = json.loads((tmp_path / "speed.json").read_text())["cases"]
    found = {(row["kind"], row["backbone"]): list(row["values"]) for row in cases.values()}
    assert found == {
        ("step", "TWIN"): ["TWIN", "MoS_TWIN:topk_item=1", "LongCTR"],
        ("step", "GRU4Rec"): ["GRU4Rec"],
        ("loader", ""): ["ours", "LongCTR"],
        **{(kind, "TWIN"): ["TWIN", "LongCTR"] for kind in ("evaluate", "epoch", "memory", "score")},
    }
    assert all(row["notes"] == {} for row in cases.values())
    assert [row["difference"] < 1e-6 for row in cases.values() if row["difference"] is not None] == [True]
    assert "same weights: TWIN 20 " in (tmp_path / "SPEED.md").read_text()


def test_speed_says_why_a_model_has_no_figure(
    speed: ModuleType, long_histories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = [*TINY_RUN, "--data", str(long_histories), "--out", str(tmp_path), "--cases", "step"]
    assert speed.main([*call, "--models", "TWIN", "MoS_TWIN:topk_item=9"]) == 1
    (row,) = json.loads((tmp_path / "speed.json").read_text())["cases"].values()
    assert list(row["values"]) == ["TWIN"] and "topk_item" in row["notes"]["MoS_TWIN:topk_item=9"]
    assert "MoS_TWIN:topk_item=9: ConfigError: " in (tmp_path / "SPEED.md").read_text()
    capsys.readouterr()


def test_speed_refuses_a_folder_that_is_no_checkout(
    speed: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert speed.main(["--longctr", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert told == (
        f"error: --longctr {tmp_path}: longctr_dataloader.py is not there; give a checkout of "
        "https://github.com/reczoo/LongCTR\n"
    )
    (tmp_path / "longctr_dataloader.py").write_text("import a_package_that_is_not_installed")
    assert speed.main(["--longctr", str(tmp_path)]) == 2
    assert "pip install a_package_that_is_not_installed" in capsys.readouterr().err
    (tmp_path / "longctr_dataloader.py").write_text("")
    assert speed.main(["--longctr", str(tmp_path)]) == 2
    assert "has no LongCTRDataLoader" in capsys.readouterr().err
    assert speed.main(["--models", "TWIM"]) == 2
    assert "error: --models TWIM: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_speed_groups_models_by_what_they_are_compared_with(speed: ModuleType) -> None:
    pooled = "TransAct:concat_max_pool=True"
    assert speed.groups([pooled, "TransAct", f"MoS_{pooled},topk_item=1", "GShard_TransAct:dcn_hidden_units=[8,4]"]) == {
        pooled: ["TransAct", "MoS_TransAct:topk_item=1"],
        "TransAct": ["TransAct"],
        "TransAct:dcn_hidden_units=[8,4]": ["GShard_TransAct"],
    }
    assert all(len(models) == 3 for models in speed.groups(speed.default_models()).values())


def test_speed_judges_medians_by_their_goals(speed: ModuleType) -> None:
    import speed_report

    row: dict[str, Any] = {
        "kind": "step", "backbone": "TWIN", "length": 200, "batch": 1024, "device": "cpu", "unit": "s", "notes": {},
        "difference": None, "machine": "one", "settings": [],
        "values": {"TWIN": [0.1, 0.1, 9.0], "MoS_TWIN": [0.25], "GShard_TWIN": [0.3], "LongCTR": [1.8]},
    }  # fmt: skip
    twin, mos, gshard = speed_report.lines_of(row)
    assert twin == ["TWIN", "200", "1024", "cpu", "100 ms", "1.8 s", "18x", "-", ">= 18x LongCTR: reached"]
    assert mos[4:8] == ["250 ms", "1.8 s", "7.2x", "2.5"]
    assert mos[8] == ">= 4x LongCTR: reached; >= 0.5x TWIN: **missed** (0.4x); >= 1x GShard_TWIN: reached"
    assert gshard[8] == ""
    on_gpu = {**row, "device": "cuda", "batch": 8192, "values": {"TWIN": [0.005], "MoS_TWIN": [0.007], "LongCTR": [0.1]}}
    assert [line[8] for line in speed_report.lines_of(on_gpu)] == ["<= 5.6 ms: reached", "<= 6 ms: **missed** (7 ms)"]
    loader = {**row, "kind": "loader", "backbone": "", "batch": 8192, "unit": "s/row", "values": {"ours": [1e-7]}}
    assert speed_report.lines_of(loader)[0][4:7] == ["10,000,000", "-", "-"]
    shares = speed_report.loader_shares({"a": on_gpu, "b": loader})
    assert [line[4:] for line in shares] == [["16.4%", "< 5%: **missed**"], ["11.7%", "< 5%: **missed**"]]
    equal = {**loader, "kind": "metrics", "unit": "s", "length": 0, "values": {"ours": [0.1], "FuxiCTR": [20.0]}}
    assert speed_report.lines_of({**equal, "difference": 1e-15})[0][8].endswith("reached")
    assert speed_report.lines_of({**equal, "difference": 1e-9})[0][8].endswith("**missed** (200x)")


@pytest.mark.slow
def test_speed_in_a_process_of_its_own(
    root: Path, monkeypatch: pytest.MonkeyPatch, long_histories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(root / "benchmark"))
    import speed

    call = [*TINY_RUN, "--data", str(long_histories), "--out", str(tmp_path), "--cases", "memory", "--models", "TWIN"]
    assert speed.main(call) == 0, capsys.readouterr().out
    (row,) = json.loads((tmp_path / "speed.json").read_text())["cases"].values()
    assert row["unit"] == "MiB" and row["values"]["TWIN"][0] > 100
