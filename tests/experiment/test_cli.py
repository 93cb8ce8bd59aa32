"""``run_expid.py`` as its user meets it: answers, refusals, what a run leaves, and runs that repeat."""

import csv
import json
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import yaml

from model_zoo.checkpoint import read_weights

Command = Callable[..., Any]


def assert_refused(answer: Any, message: str) -> None:
    """Exit code 2 and one line on stderr."""
    assert answer.code == 2, answer
    assert answer.err.startswith("error: ") and answer.err.count("\n") == 1 and answer.err.endswith("\n")
    assert message in answer.err and "Traceback" not in answer.out + answer.err


# ---- answers without training ----------------------------------------------------------------------------------------


def test_help_shows_every_option(run_expid: Command) -> None:
    answer = run_expid("--help")
    assert answer.code == 0 and answer.err == ""
    for option in ("--config", "--expid", "--gpu", "--seed", "--set", "--dry-run"):
        assert option in answer.out


def test_an_unknown_expid_is_answered_before_torch_is_imported(run_expid: Command, tmp_path: Path) -> None:
    answer = run_expid("--expid", "MoS_TWIN_kuairand_sampel", cwd=tmp_path)
    assert_refused(answer, "expid 'MoS_TWIN_kuairand_sampel' is not in ")
    assert "nearest: MoS_TWIN_kuairand_sample" in answer.err and answer.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_option_is_answered_with_code_2(cli: Command) -> None:
    for arguments in (("--gpu", "first"), ("--epochs", "3"), ("--seed", "1.5")):
        answer = cli(*arguments)
        assert answer.code == 2 and "usage: run_expid.py" in answer.err


def test_a_gpu_that_is_not_there_is_refused(run_expid: Command, tiny_config: Path, tmp_path: Path) -> None:
    arguments = (
        "--config",
        tiny_config,
        "--expid",
        "TWIN_tiny",
        "--gpu",
        0,
        "--set",
        f"model_root={tmp_path / 'runs'}",
    )
    answer = run_expid(*arguments)
    assert_refused(answer, "--gpu 0: torch ")
    assert "finds no CUDA device; leave --gpu out to run on the CPU" in answer.err
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_shows_everything_and_writes_nothing(run_expid: Command, tiny_config: Path, tmp_path: Path) -> None:
    arguments = ("--config", tiny_config, "--expid", "MoS_TWIN_tiny", "--dry-run", "--seed", 3, "--set", "epochs=4")
    answer = run_expid(*arguments, "--set", f"model_root={tmp_path / 'runs'}")
    assert answer.code == 0 and answer.err == ""
    lines = answer.out.splitlines()
    models = tiny_config / "model_config.yaml"
    shown = {line.split()[0]: line.split() for line in lines if line.startswith("  ")}
    assert shown["epochs"][1:] == ["4", "--set"] and shown["seed"][1:] == ["3", "--seed"]
    assert shown["window_size"][1:] == ["4", f"{models}:{line_of(models, 'window_size')}"]
    assert shown["attention_dim"][1:] == ["16", f"{models}:{line_of(models, 'attention_dim')}"]
    assert shown["embedding_regularizer"][1] == "1e-05" and shown["max_gradient_norm"][1:] == ["10.0", "default"]
    assert any(
        re.fullmatch(r"parameters: embedding [\d,]+, block .*, total [\d,]+, experts [\d,]+", line) for line in lines
    )
    assert re.search(r"train_data: .*train\.parquet: 1,500 rows, 0\.\d MiB", answer.out)
    assert not (tmp_path / "runs").exists()


def line_of(path: Path, key: str) -> int:
    return next(
        n for n, line in enumerate(path.read_text().splitlines(), start=1) if line.strip().startswith(f"{key}:")
    )


def test_a_dry_run_without_the_data_shows_the_rest_and_is_refused(
    cli: Command, tiny_config: Path, tmp_path: Path
) -> None:
    absent = tmp_path / "absent.parquet"
    answer = cli("--config", tiny_config, "--expid", "TWIN_tiny", "--dry-run", "--set", f"valid_data={absent}")
    assert_refused(answer, f"{absent}: no such file; see data/README.md")
    assert "parameters: embedding" in answer.out and f"valid_data: {absent}: missing" in answer.out


# ---- refusals --------------------------------------------------------------------------------------------------------

SETTINGS = {
    "max_lenn=3": "--set: unknown key 'max_lenn' for model TWIN; did you mean 'max_len'?",
    "epochs=many": "--set: epochs: 'many': input should be a valid integer",
    "epochs": "--set epochs: write it as key=value",
    "dataset_id=tinny": "dataset_id 'tinny' is not in",
    "model=TWINN": "no model 'TWINN'; nearest: TWIN",
    "optimizer=adamm": "optimizer: 'adamm': not one of adam, ",
    "loss=entropy": "loss: 'entropy': not one of binary_crossentropy, ",
    "dnn_activations=rulu": "dnn_activations: 'rulu': write relu, or the name of a layer in torch.nn",
    "embedding_regularizer=strong": "embedding_regularizer: 'strong': write a number, l1(x), l2(x) or l1_l2(x,y)",
    "attention_dropout=2": "attention_dropout: 2: must be at least 0 and below 1",
    "num_heads=3": "attention_dim (16) must be a multiple of num_heads (3)",
    "eval_steps=1000": "eval_steps: 1000: must be at most 6, the steps of the shortest phase",
    "group_id=sesion": "train.parquet: no column 'sesion'; it has user_index",
    "batch_size=1": "train.parquet: batch_norm needs at least two rows a batch",
    "use_features=[nope]": "use_features: nope not among feature_cols of tiny",
    "feature_cols=[{name: item_id}]": "feature_cols: item_id: type must be one of",
    "feature_specs=[{name: image_emb_dim16, embedding_dim: 5}]": "is not a vector of 5 numbers; most rows hold 16: set",
    "feature_specs=[{name: item_id, vocab_size: 9}]": "column 'item_id', row 9: 9 is outside 0..8; raise the column's",
    "feature_specs=[{name: cate_id, pretrained_emb: no.h5}]": "no.h5: no such file (pretrained_emb of feature",
    "item_info=/": "/: not a readable parquet file",
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_bad_setting_is_one_sentence_and_leaves_nothing(
    cli: Command, tiny_config: Path, tmp_path: Path, setting: str
) -> None:
    arguments = ("--config", tiny_config, "--expid", "TWIN_tiny", "--set", f"model_root={tmp_path / 'runs'}")
    assert_refused(cli(*arguments, "--set", setting), SETTINGS[setting])
    assert not (tmp_path / "runs").exists()


def test_a_place_where_no_run_can_be_written_is_refused(cli: Command, tiny_config: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    answer = cli("--config", tiny_config, "--expid", "TWIN_tiny", "--set", f"model_root={tmp_path / 'runs'}")
    assert_refused(answer, "cannot be made (Not a directory); choose another model_root")


def test_a_folder_without_configs_is_refused(cli: Command, tmp_path: Path) -> None:
    assert_refused(cli("--config", tmp_path), f"{tmp_path}: holds neither model_config.yaml nor model_config/*.yaml")


def test_missing_data_is_refused_and_nothing_is_written(cli: Command, tiny_config: Path, tmp_path: Path) -> None:
    arguments = ("--config", tiny_config, "--expid", "TWIN_tiny", "--set", f"model_root={tmp_path / 'runs'}")
    answer = cli(*arguments, "--set", f"user_info={tmp_path / 'absent.parquet'}")
    assert_refused(answer, f"{tmp_path / 'absent.parquet'}: no such file; see data/README.md for how to get or build")
    assert not (tmp_path / "runs").exists()


Change = Callable[[pl.DataFrame], pl.DataFrame]
FILES: dict[str, tuple[str, Change, str]] = {
    "item outside the table": (
        "train_data",
        lambda table: table.with_columns(item_index=pl.lit(301, pl.Int32)),
        "column 'item_index', row 0: 301: item_info holds items 1..300 (1500 such rows)",
    ),
    "seq_len beyond": (
        "train_data",
        lambda table: table.with_columns(seq_len=pl.col("seq_len") + 1000),
        "column 'seq_len', row 0: ",
    ),
    "labels of one class": (
        "valid_data",
        lambda table: table.with_columns(is_click=pl.lit(0)),
        "every label is 0; AUC needs clicks and non-clicks",
    ),
    "groups of one class": (
        "test_data",
        lambda table: table.with_columns(is_click=(pl.col("user_index") % 2).cast(pl.Int8)),
        "every group of 'user_index' has labels of one class, so gAUC is undefined",
    ),
    "an empty split": ("valid_data", lambda table: table[:0], "no rows; the valid split needs at least one impression"),
    "NaN": (
        "item_info",
        lambda table: table.with_columns(
            image_emb_dim16=pl.col("image_emb_dim16").arr.to_list().list.eval(pl.element() * np.nan)
        ),
        "column 'image_emb_dim16', row 0: [nan, nan",
    ),
    "no padding row": ("item_info", lambda table: table[1:], "column 'item_index' has no 0; add the padding row"),
    "a missing column": (
        "user_info",
        lambda table: table.rename({"full_item_seq": "full_item_seqs"}),
        "no column 'full_item_seq' (did you mean 'full_item_seqs'?)",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_bad_data_is_one_sentence_and_leaves_nothing(
    cli: Command, tiny_config: Path, tiny_folder: Path, tmp_path: Path, case: str
) -> None:
    key, change, message = FILES[case]
    changed = tmp_path / f"{key}.parquet"
    change(pl.read_parquet(tiny_folder / f"{key.removesuffix('_data')}.parquet")).write_parquet(changed)
    arguments = ("--config", tiny_config, "--expid", "TWIN_tiny", "--set", f"model_root={tmp_path / 'runs'}")
    assert_refused(cli(*arguments, "--set", f"{key}={changed}"), f"{changed}: {message}")
    assert not (tmp_path / "runs").exists()


def test_an_interrupt_is_no_traceback(cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("model_zoo.experiment.cli._main", interrupted)
    answer = cli()
    assert answer.code == 130 and answer.err == "interrupted\n"


# ---- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def finished(
    run_expid: Command, tiny_config: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path, dict[str, Any]]:
    """A whole run of MoS_TWIN_tiny from another working directory: its answer, its folder, its metrics."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "config_of_mine").symlink_to(tiny_config)
    arguments = ("--config", "config_of_mine", "--expid", "MoS_TWIN_tiny", "--set", f"model_root={elsewhere / 'runs'}")
    answer = run_expid(*arguments, cwd=elsewhere)
    assert answer.code == 0, answer
    [folder] = (elsewhere / "runs" / "tiny" / "MoS_TWIN_tiny").iterdir()

    def refuse(constant: str) -> Any:
        raise AssertionError(f"{constant} is not json")

    return answer, folder, json.loads((folder / "metrics.json").read_text(), parse_constant=refuse)


def test_a_run_leaves_its_files_and_no_others(finished: Any) -> None:
    _, folder, _ = finished
    assert re.fullmatch(r"\d{8}-\d{6}-seed7", folder.name)
    checkpoints = [f"MoS_TWIN_tiny.{phase}.model" for phase in ("phase1", "phase2", "phase3")]
    expected = ["MoS_TWIN_tiny.model", *checkpoints, "config.yaml", "metrics.csv", "metrics.json", "run.lock", "run.log"]
    expected += ["tensorboard"] if find_spec("tensorboard") else []
    assert sorted(path.name for path in folder.iterdir()) == expected
    runs = folder.parents[2]
    assert sorted(path.name for path in runs.iterdir()) == ["config_of_mine.csv", "tiny"]
    assert sorted(path.name for path in runs.parent.iterdir()) == ["config_of_mine", "runs"]


def test_the_record_holds_scores_versions_and_data(finished: Any, tiny_folder: Path) -> None:
    _, _, found = finished
    assert (found["expid"], found["model"], found["dataset_id"], found["seed"]) == (
        "MoS_TWIN_tiny",
        "MoS_TWIN",
        "tiny",
        7,
    )
    for part in ("final", "phase1"):
        for split in ("valid", "test"):
            scores = found["scores"][part][split]
            assert list(scores) == ["gAUC", "AUC", "logloss"] and all(0 < value < 2 for value in scores.values())
    assert list(found["baselines"]["test"]) == ["item popularity", "item CTR"]
    assert {"python", "torch", "fuxictr", "numpy"} <= found["versions"].keys() and "git_commit" in found
    files = ["item_info", "user_info", "train_data", "valid_data", "test_data"]
    assert list(found["data_fingerprint"]) == files
    assert all(re.fullmatch(r"[0-9a-f]{32}", digest) for digest in found["data_fingerprint"].values())
    assert found["peak_memory"]["resident_mib"] > 50 and found["seconds"]["total"] >= found["seconds"]["fit"] > 0
    assert found["parameters"]["total"] > found["parameters"]["experts"] > 0
    assert [entry["phase"] for entry in found["history"]] == ["phase1", "phase2", "phase3"]
    assert all(
        {"epoch", "step", "train_loss", "valid", "seconds", "best"} <= entry.keys() for entry in found["history"]
    )
    assert set(found["codebook_usage"]) == {"item", "window"}
    assert found["config"]["train_data"] == str(tiny_folder / "train.parquet")


def test_the_final_scores_are_those_of_the_last_phases_best_epoch(finished: Any) -> None:
    _, _, found = finished
    best = [entry for entry in found["history"] if entry["phase"] == "phase3" and entry["best"]][-1]
    first = next(entry for entry in found["history"] if entry["phase"] == "phase1")
    assert found["scores"]["final"]["valid"] == pytest.approx(best["valid"], abs=1e-12)
    assert found["scores"]["phase1"]["valid"] == pytest.approx(first["valid"], abs=1e-12)


def test_the_saved_config_is_the_merged_one(finished: Any) -> None:
    _, folder, found = finished
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert list(saved) == ["MoS_TWIN_tiny"] and saved["MoS_TWIN_tiny"] == found["config"]
    assert saved["MoS_TWIN_tiny"]["embedding_regularizer"] == 1e-5


def test_the_console_and_the_log_tell_the_same_story(finished: Any) -> None:
    answer, folder, found = finished
    log = (folder / "run.log").read_text()
    for line in ("phase1 epoch 1: loss ", "phase3 epoch 1: loss ", "item popularity", "against its own backbone"):
        assert line in log and line in answer.out
    for split in ("valid", "test"):
        for value in found["scores"]["final"][split].values():
            assert f"{value:.6f}" in answer.out
    assert f"run folder: {folder}" in answer.out and answer.err == ""


def test_the_results_table_has_longctrs_line(finished: Any) -> None:
    _, folder, found = finished
    [line] = (folder.parents[2] / "config_of_mine.csv").read_text().splitlines()
    [fields] = csv.reader([line])
    assert [field.split("]")[0] for field in fields[1:]] == [
        "[command",
        "[exp_id",
        "[dataset_id",
        "[train",
        "[val",
        "[test",
    ]
    scores = found["scores"]["final"]
    for field, split in ((fields[5], "valid"), (fields[6], "test")):
        shown = dict(part.split(": ") for part in field.split("] ")[1].split(" - "))
        assert {name: float(value) for name, value in shown.items()} == pytest.approx(scores[split], abs=5e-7)


def test_the_checkpoints_are_whole_and_the_final_one_is_phase_3s(finished: Any) -> None:
    _, folder, _ = finished
    states = {
        name: read_weights(folder / f"MoS_TWIN_tiny{name}.model").state
        for name in ("", ".phase1", ".phase2", ".phase3")
    }
    assert all(torch.equal(states[""][key], value) for key, value in states[".phase3"].items())
    assert all(state.keys() == states[""].keys() for state in states.values())
    assert not all(torch.equal(states[".phase1"][key], value) for key, value in states[".phase3"].items())


QUICK = ("--set", "max_len=8", "--set", "kmeans_tokens=200", "--set", "batch_size=500")


def test_runs_repeat_and_the_seed_changes_them(cli: Command, tiny_config: Path, tmp_path: Path) -> None:
    found = []
    for number, seed in enumerate((7, 7, 8)):
        runs = tmp_path / str(number)
        arguments = ("--config", tiny_config, "--expid", "MoS_TWIN_tiny", "--seed", seed, *QUICK)
        torch.rand(number + 1)  # what was drawn before a run must not matter
        answer = cli(*arguments, "--set", f"model_root={runs}")
        assert answer.code == 0, answer.err
        [path] = runs.glob("tiny/*/*/metrics.json")
        metrics = json.loads(path.read_text())
        assert metrics["seed"] == seed and path.parent.name.endswith(f"seed{seed}")
        losses = [(entry["train_loss"], entry["valid"]) for entry in metrics["history"]]
        found.append((metrics["scores"], losses, metrics["codebook_usage"]))
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_phase_1_is_the_plain_backbones_run_of_the_same_seed(
    cli: Command, finished: Any, tiny_config: Path, tmp_path: Path
) -> None:
    arguments = ("--config", tiny_config, "--expid", "TWIN_tiny", "--set", f"model_root={tmp_path}")
    assert cli(*arguments).code == 0
    [path] = tmp_path.glob("tiny/*/*/metrics.json")
    plain, first = json.loads(path.read_text())["scores"]["final"], finished[2]["scores"]["phase1"]
    # equal weights; the two runs are two processes on one thread each, whose evaluation sums alike
    assert {split: pytest.approx(scores, abs=1e-9) for split, scores in plain.items()} == first


def test_a_rival_s_record_says_how_its_router_treats_the_tokens(
    cli: Command, tiny_config: Path, tmp_path: Path
) -> None:
    arguments = ("--config", tiny_config, "--expid", "TWIN_tiny", "--set", "model=GShard_TWIN")
    answer = cli(*arguments, "--set", f"model_root={tmp_path}")
    assert answer.code == 0, answer.err
    [path] = tmp_path.glob("tiny/*/*/metrics.json")
    routing = json.loads(path.read_text())["routing"]
    assert sum(routing["share"]) == pytest.approx(1) and len(routing["served_rows"]) == len(routing["share"]) == 5
    assert f"{routing['fallback_rate']:.1%} of rows left to the shared expert" in answer.out + answer.err


def test_a_plain_backbone_runs_without_a_test_split_or_groups(cli: Command, tiny_config: Path, tmp_path: Path) -> None:
    settings = [
        "test_data=null",
        "group_id=null",
        "metrics=[AUC]",
        "monitor=AUC",
        "max_len=8",
        f"model_root={tmp_path}",
    ]
    arguments = [part for setting in settings for part in ("--set", setting)]
    answer = cli("--config", tiny_config, "--expid", "TWIN_tiny", *arguments)
    assert answer.code == 0, answer.err
    [path] = tmp_path.glob("tiny/*/*/metrics.json")
    assert list(json.loads(path.read_text())["scores"]["final"]) == ["valid"]
