"""The validator finds each fault, all of them at once; and what follows `seq_len` is never read."""

import hashlib
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
from conftest import in_groups

from model_zoo.errors import DataError
from model_zoo.experiment.validate_data import main
from model_zoo.pipeline.dataset import CTRDataset, load_dataset
from model_zoo.pipeline.download import FILES, SUMS
from model_zoo.pipeline.feature_map import build_feature_map
from model_zoo.pipeline.histories import Histories
from model_zoo.pipeline.leakage import OwnEvents
from model_zoo.pipeline.loader import SequenceLoader, longctr_batch
from model_zoo.pipeline.resident import ResidentLoader
from model_zoo.pipeline.streaming import StreamedSplit
from model_zoo.pipeline.validation import validate_dataset
from model_zoo.pipeline.validation_report import CHECKS, Report
from model_zoo.pipeline.validation_rows import Repeats

USERS, ITEMS, EVENTS = 20, 25, 20
COLUMNS: list[dict[str, Any]] = [
    {"name": "item_id", "type": "categorical", "source": "item", "vocab_size": ITEMS},
    {"name": "price", "type": "numeric", "source": "item"},
    {"name": "hour", "type": "categorical", "vocab_size": 25},
]
Frames = dict[str, pl.DataFrame]


def sound() -> Frames:
    """Every event of a user is a click, shown beside another item that was not clicked; the splits follow each other."""
    random = np.random.default_rng(1)
    histories = np.stack([random.permutation(np.arange(1, ITEMS))[:EVENTS] for _ in range(USERS)])
    rows = [
        {"user_index": user, "item_index": int(item), "seq_len": place, "is_click": int(item == histories[user, place]),
         "hour": 1 + place, "ts": 100 * place + user}
        for place in range(EVENTS) for user in range(USERS)
        for item in (histories[user, place], histories[(user + 1) % USERS, place])
    ]  # fmt: skip
    table = pl.DataFrame(rows).filter((pl.col("is_click") == 1) | pl.col("item_index").is_in([1, 2, 3]).not_())
    table = table.unique(["user_index", "item_index", "seq_len"], maintain_order=True)
    index = np.arange(ITEMS)
    return {
        "train": table.filter(pl.col("seq_len") < 14),
        "valid": table.filter(pl.col("seq_len").is_between(14, 16)),
        "test": table.filter(pl.col("seq_len") > 16),
        "user_info": pl.DataFrame({"user_index": np.arange(USERS), "full_item_seq": histories.tolist()}),
        "item_info": pl.DataFrame({"item_index": index, "item_id": index, "price": index / 2.0}),
    }


@pytest.fixture
def params(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """``params(frames, rows)`` writes the frames, in row groups of so many rows."""

    def write(frames: Frames, rows: int = 10**6, **changes: Any) -> dict[str, Any]:
        for name, frame in frames.items():
            in_groups(frame, tmp_path / f"{name}.parquet", rows)
        files = {f"{name}_data": str(tmp_path / f"{name}.parquet") for name in ("train", "valid", "test")}
        files |= {name: str(tmp_path / f"{name}.parquet") for name in ("item_info", "user_info")}
        label = {"name": "is_click"}
        return {"dataset_id": "data", "feature_cols": COLUMNS, "label_col": label, "data_root": str(tmp_path),
                "group_id": "user_index", **files, **changes}  # fmt: skip

    return write


def checked(params: dict[str, Any], **options: Any) -> Report:
    return validate_dataset(build_feature_map(params), params, ["gAUC", "AUC"], **options)


def at(frame: pl.DataFrame, column: str, rows: list[int], value: Any) -> pl.DataFrame:
    """The frame with another value in some rows of a column."""
    values = frame[column].to_list()
    for row in rows:
        values[row] = value
    return frame.with_columns(pl.Series(column, values, strict=False))


def faults(report: Report) -> list[tuple[str, str, str]]:
    return [(check, *entry) for check, found in report.findings.items() for entry in found
            if entry[0] in ("warning", "error")]  # fmt: skip


def test_sound_data_have_no_findings_and_code_0(params: Any) -> None:
    report = checked(params(sound()))
    assert not faults(report) and report.exit_code == 0
    assert [check for check, found in report.findings.items() for level, _ in found if level == "not checked"] == [
        "checksums"
    ]
    lines = "\n".join(report.lines())
    assert all(check in lines for check in CHECKS) and lines.endswith("0 errors, 0 warnings")
    assert "train: the target of 100.0% of 280 clicks is the event behind the history, of 0.0% the newest" in lines


def duplicate(frame: pl.DataFrame) -> pl.DataFrame:
    return pl.concat([frame, frame[:3]])


#: a change of one file, and of it: the check, the level, and the words
BROKEN: dict[str, tuple[str, Callable[[pl.DataFrame], pl.DataFrame], str, str, str]] = {
    "column gone": ("train", lambda f: f.drop("hour"), "columns", "error", "no column 'hour'"),
    "column of words": ("valid", lambda f: f.with_columns(hour=pl.lit("x")), "columns", "error", "'hour' holds String"),
    "no list": ("user_info", lambda f: f.with_columns(full_item_seq=1), "columns", "error", "must hold lists, not"),
    "item twice": ("item_info", lambda f: at(f, "item_index", [4], 3), "item_index", "error", "has 3 twice"),
    "no padding": ("item_info", lambda f: f[1:], "item_index", "error", "has no 0; add the padding row"),
    "items unsorted": ("item_info", lambda f: f.reverse(), "item_index", "warning", "but LongCTR goes by position"),
    "padding not 0": ("item_info", lambda f: at(f, "price", [0], 3.0), "item features", "warning", "'price' of the"),
    "nan": ("item_info", lambda f: at(f, "price", [5, 7], float("nan")), "item features", "error", "row 5: nan is NaN"),
    "vocabulary": ("item_info", lambda f: at(f, "item_id", [6], 99), "item features", "error", "row 6: 99 is outside"),
    "user twice": ("user_info", lambda f: at(f, "user_index", [4], 3), "user_index", "error", "has 3 twice"),
    "users from 1": ("user_info", lambda f: f.with_columns(pl.col("user_index") + 1), "user_index", "error", "starts at 1"),
    "users unsorted": ("user_info", lambda f: f.reverse(), "user_index", "warning", "rows are not in order"),
    "no such event": ("user_info", lambda f: at(f, "full_item_seq", [3], [1, 77]), "histories", "error",
                      "user_index 3, position 1: item 77 is not in item_info"),
    "padding event": ("user_info", lambda f: at(f, "full_item_seq", [3], [0] * 20), "histories", "error", "(20 such)"),
    "null history": ("user_info", lambda f: at(f, "full_item_seq", [3], None), "histories", "error", "row 3: None is null"),
    "no such item": ("test", lambda f: at(f, "item_index", [2], 25), "rows", "error", "row 2: 25: item_info holds"),
    "no such user": ("test", lambda f: at(f, "user_index", [2, 4], 20), "rows", "error", "row 2: 20: user_info holds"),
    "negative length": ("train", lambda f: at(f, "seq_len", [1], -1), "seq_len", "error", "row 1: -1: a length cannot be"),
    "too long": ("train", lambda f: at(f, "seq_len", [8], 21), "seq_len", "error", "row 8: 21: beyond the user's history"),
    "label": ("train", lambda f: at(f, "is_click", [1, 6], 2), "labels", "error", "row 1: 2.0: labels must be 0 or 1 (2"),
    "one label": ("valid", lambda f: f.with_columns(is_click=0), "labels", "error", "every label is 0"),
    "null label": ("valid", lambda f: at(f, "is_click", [3], None), "labels", "error", "row 3: None is null"),
    "one label a user": ("valid", lambda f: f.with_columns(is_click=pl.col("user_index") % 2), "groups", "error", "gAUC"),
    "null group": ("valid", lambda f: at(f, "user_index", [3], None), "groups", "error", "give every row a group"),
    "context": ("test", lambda f: at(f, "hour", [0], 25), "context features", "error", "row 0: 25 is outside 0..24"),
    "no rows": ("valid", lambda f: f[:0], "rows", "error", "no rows; the valid split needs at least one"),
    "empty histories": ("train", lambda f: f.with_columns(seq_len=0), "empty histories", "warning", "train: 100.0% of"),
    "cold": ("train", lambda f: f.filter(pl.col("item_index") < 9), "cold items", "warning", "is never a target in train"),
    "twice": ("valid", duplicate, "duplicates", "warning", "(3 such rows)"),
    "no such time": ("valid", lambda f: at(f, "ts", [1], None), "time order", "error", "row 1: None is null"),
    "length shrinks": ("train", lambda f: at(f, "ts", [0], 1300), "time order", "error", "seq_len is smaller than in"),
    "valid early": ("valid", lambda f: at(f, "ts", [0], 1), "time order", "warning", "begins at 'ts' 1, before train ends"),
    "own event": ("train", lambda f: f.with_columns(pl.col("seq_len") + 1), "own events", "error",
                  "train: the history's newest event is the target of 100% of the clicks"),
    "whole history": ("test", lambda f: f.with_columns(seq_len=20), "own events", "error", "seq_len counts later events"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_each_fault_is_found_with_its_place(name: str, params: Any) -> None:
    table, change, check, level, words = BROKEN[name]
    frames = sound()
    frames[table] = change(frames[table])
    report = checked(params(frames, 150))
    found = [text for at_check, at_level, text in faults(report) if (at_check, at_level) == (check, level)]
    assert any(words in text for text in found), report.lines()
    assert report.exit_code == (2 if level == "error" else report.exit_code) > 0


def test_all_faults_are_told_at_once_with_their_counts(params: Any) -> None:
    """Also two kinds in one column, and faults in other columns of the same rows."""
    frames = sound()
    train = at(at(at(frames["train"], "hour", [0, 1], 99), "hour", [2], None), "seq_len", [0, 40], -1)
    train = at(at(train, "item_index", [0, 30, 60], 0), "is_click", [0], None)
    users = at(at(frames["user_info"], "full_item_seq", [2], [1, 0]), "full_item_seq", [7, 8], None)
    frames |= {"train": train, "user_info": users, "item_info": at(frames["item_info"], "price", [9], float("inf"))}
    whole, parts = (checked(params(frames, rows)) for rows in (10**6, 7))
    assert faults(whole) == faults(parts)
    told = "\n".join(text for _, level, text in faults(whole) if level == "error")
    for words in (
        "'hour', row 0: 99 is outside 0..24; raise the column's vocab_size (2 such)",
        "'hour', row 2: None is null; fill it or drop the row (1 such)",
        "'seq_len', row 0: -1: a length cannot be negative (2 such)",
        "'item_index', row 0: 0: item_info holds items 1..24 (3 such)",
        "'is_click', row 0: None is null",
        "user_index 2, position 1: item 0 is the padding item; take it out of the history (1 such)",
        "row 7: None is null (write an empty list) (2 such)",
        "'price', row 9: inf is NaN, infinite or beyond float32 (1 such)",
    ):
        assert words in told, told
    assert ("not checked", "mend user_info and item_info first") in whole.findings["own events"]


def test_every_missing_or_damaged_file_is_told(params: Any) -> None:
    given = params(sound())
    Path(given["train_data"]).unlink()
    damaged = Path(given["item_info"])
    damaged.write_bytes(damaged.read_bytes()[:-20])
    report = checked(given)
    assert [text.split(":")[0] for _, text in report.findings["files"]] == [given["item_info"], given["train_data"]]
    assert not report.sound("files") and report.exit_code == 2


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_page_is_a_finding_among_others(name: str, params: Any, tmp_path: Path) -> None:
    """The footer is sound; the last row group's first column begins with a header that is not."""
    given = params(sound(), 60)
    path = tmp_path / name
    footer = pq.read_metadata(path)
    chunk = footer.row_group(footer.num_row_groups - 1).column(0)
    content = bytearray(path.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    content[start : start + 6] = b"\xff" * 6
    path.write_bytes(content)
    report = checked(given)
    assert report.findings["files"][0][0] == "error" and str(path) in report.findings["files"][0][1]
    assert report.exit_code == 2 and "not checked" in [level for level, _ in report.findings["own events"]]


def test_the_same_row_in_two_splits_is_an_error_with_times_and_a_warning_without(params: Any) -> None:
    frames = sound()
    frames["test"] = pl.concat([frames["test"], frames["valid"][5:7]])
    report = checked(params(frames))
    (level, text), = report.findings["split overlap"]  # fmt: skip
    assert level == "error" and "stands in valid too, with its user, item, seq_len and ts (2 such rows)" in text
    untimed = {name: frame.drop("ts", strict=False) for name, frame in frames.items()}
    report = checked(params(untimed))
    assert [level for level, _ in report.findings["split overlap"]] == ["warning"] and report.exit_code == 1
    assert [level for level, _ in report.findings["time order"]] == ["not checked"]


def test_a_column_of_times_may_be_named_and_hold_dates(params: Any) -> None:
    frames = sound()
    for name in ("train", "valid", "test"):
        frames[name] = frames[name].with_columns(shown=pl.col("ts").cast(pl.Datetime)).drop("ts")
    frames["train"] = frames["train"][::-1]
    assert not faults(checked(params(frames), time_column="shown"))
    late = frames["train"]["shown"][0]
    frames["train"] = at(frames["train"], "shown", [5], late.replace(year=1980))
    assert [check for check, *_ in faults(checked(params(frames), time_column="shown"))] == ["time order"] * 3
    found = faults(checked(params(frames), time_column="hour_of_day"))
    assert found[0][0] == "columns" and "no column 'hour_of_day'" in found[0][2]


def test_users_in_small_ranges_and_mapped_histories_give_the_same_report(params: Any) -> None:
    frames = sound()
    frames["valid"] = pl.concat([duplicate(frames["valid"]), frames["train"][:2], frames["valid"][100:102]])
    given = params(frames, 50)
    assert checked(given, limit=1).lines() == checked(given).lines()
    assert len(faults(checked(given))) >= 3


def test_repeats_are_those_that_comparing_all_rows_finds() -> None:
    random = np.random.default_rng(3)
    names = ["train", "valid", "test"]
    frames = {
        name: pl.DataFrame({key: random.integers(0, 4, size) for key in ("user", "item", "seq_len", "time")})
        .with_columns(row=pl.Series(np.arange(size)), label=0)
        for name, size in zip(names, (60, 40, 50))
    }  # fmt: skip
    found = Repeats()
    found.add(frames)
    rows = [(place, row) for place, name in enumerate(names)
            for row in frames[name].select("user", "item", "seq_len", "time").rows()]  # fmt: skip
    expected: dict[Any, int] = {}
    for number, (place, row) in enumerate(rows):
        first = next(earlier for earlier, other in rows if other == row)
        if first < place:
            expected[names[first], names[place]] = expected.get((names[first], names[place]), 0) + 1
        if (place, row) in rows[:number]:
            expected[names[place]] = expected.get(names[place], 0) + 1
    ordered = sorted(row for _, row in rows)
    by_time = sorted(((user, time, length) for user, _, length, time in ordered))
    expected["time"] = sum(a[0] == b[0] and b[2] < a[2] for a, b in pairwise(by_time))
    assert {key: count for key, (count, *_) in found.found.items()} == expected


def test_own_events_are_those_that_a_look_at_each_click_finds() -> None:
    random = np.random.default_rng(4)
    sequences = [random.integers(1, 6, size).tolist() for size in (0, 5, 9, 1, 7)]
    histories = Histories(
        np.concatenate(sequences).astype(np.int32), np.cumsum([0, *map(len, sequences)], dtype=np.int64)
    )
    user = random.integers(0, 5, 80)
    length = np.array([random.integers(0, len(sequences[u]) + 1) for u in user])
    item = random.integers(1, 6, 80)
    found = OwnEvents()
    found.add(histories, user, item, length)
    clicks = pl.DataFrame({"user": user, "item": item, "seq_len": length})
    for users in ((0, 2), (2, 5)):
        found.add_places(histories, users, clicks.filter(pl.col("user").is_between(*users, closed="left")))
    expected = OwnEvents()
    for u, i, n in zip(user, item, length):
        before, behind = sequences[u][:n], sequences[u][n:]
        expected.clicks += 1
        expected.following += behind[:1] == [i]
        expected.newest += before[-1:] == [i]
        expected.later += i in behind
        expected.past += i in before and i not in behind
    assert found == expected and min(vars(found).values()) > 0


def test_what_cannot_be_told_of_own_events_is_said_to_be_so() -> None:
    assert OwnEvents(clicks=49, newest=49).finding()[0] == "not checked"
    assert OwnEvents(clicks=100, newest=90, following=90, later=95).finding()[0] == "not checked"
    assert OwnEvents(clicks=100, newest=90, following=10).finding()[0] == "error"
    assert OwnEvents(clicks=100, following=1, later=2, past=30).finding()[0] == "not checked"
    assert OwnEvents(clicks=100, following=80, later=95, past=5).finding()[0] == "warning"


def test_a_run_warns_of_histories_that_hold_the_click_itself(params: Any, caplog: pytest.LogCaptureFixture) -> None:
    frames = sound()
    given = params(frames)
    load_dataset(build_feature_map(given), given)
    assert not caplog.text
    frames["train"] = frames["train"].with_columns(pl.col("seq_len") + 1)
    given = params(frames, memory_limit_mib=8)
    load_dataset(build_feature_map(given), given)
    assert "seq_len seems to count the click itself" in caplog.text and "train.parquet" in caplog.text


def test_recorded_sums_are_compared_by_the_validator_and_by_a_run(params: Any, tmp_path: Path) -> None:
    given = params(sound())
    files = [tmp_path / name for name in FILES]
    sums = {
        path.name: {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()} for path in files
    }
    (tmp_path / SUMS).write_text(json.dumps({"repository": "x", "files": sums}))
    load_dataset(build_feature_map(given), given)
    assert checked(given).sound("checksums")
    path = Path(given["valid_data"])
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)
    (level, text), = checked(given).findings["checksums"]  # fmt: skip
    assert level == "error" and "valid.parquet has changed" in text
    with pytest.raises(DataError, match=r"valid\.parquet"):
        load_dataset(build_feature_map(given), given)


def test_pretrained_vectors_are_checked_and_part_of_the_fingerprint(params: Any, tmp_path: Path) -> None:
    keys, width = np.arange(1, ITEMS), 4
    np.savez(tmp_path / "image.npz", key=keys, value=np.ones((ITEMS - 1, width)))
    known = [{**COLUMNS[0], "pretrained_emb": str(tmp_path / "image.npz")}, *COLUMNS[1:]]
    given = params(sound(), feature_cols=known)
    assert [level for level, _ in checked(given).findings["pretrained"]] == ["not checked"]
    given["embedding_dim"] = width
    assert not faults(checked(given))
    before = load_dataset(build_feature_map(given), given).fingerprint()
    np.savez(tmp_path / "image.npz", key=keys, value=np.full((ITEMS - 1, width), np.nan))
    (check, level, text), = faults(checked(given))  # fmt: skip
    assert (check, level) == ("pretrained", "error") and "image.npz: 'value' holds a NaN" in text
    after = load_dataset(build_feature_map(given), given).fingerprint()
    assert [name for name in before if before[name] != after[name]] == ["pretrained_emb of item_id"]
    (tmp_path / "image.npz").unlink()
    assert "no such file" in faults(checked(given))[0][2]
    load_dataset(build_feature_map(given), given).fingerprint()


# ---- the command line -------------------------------------------------------------------------------------------------


def test_the_command_prints_the_report_and_answers_with_a_code(
    params: Any, tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {key: value for key, value in params(sound()).items() if key != "dataset_id"}
    (tmp_path / "dataset_config.yaml").write_text(json.dumps({"shop": given}))
    command = ["--config", str(tmp_path), "--memory-mib", "1"]
    assert main(str(root), ["shop", *command]) == 0
    assert "0 errors, 0 warnings" in capsys.readouterr().out
    sound()["user_info"].reverse().write_parquet(tmp_path / "user_info.parquet")
    assert main(str(root), ["shop", *command]) == 1
    (tmp_path / "test.parquet").unlink()
    assert main(str(root), ["shop", *command]) == 2
    out = capsys.readouterr().out
    assert "no such file" in out and "LongCTR goes by position" in out
    assert main(str(root), ["shp", *command]) == 2
    assert "; nearest: shop" in capsys.readouterr().err


def test_an_experiment_brings_its_metrics_and_group(
    tiny_config: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(str(root), ["tiny", "--config", str(tiny_config), "--expid", "TWIN_tiny"]) in (0, 1)
    assert "ok           groups" in capsys.readouterr().out
    assert main(str(root), ["tiny", "--config", str(tiny_config), "--expid", "TWIN_tny"]) == 2
    assert "TWIN_tiny" in capsys.readouterr().err


# ---- what follows seq_len ----------------------------------------------------------------------------------------------


def test_no_loader_reads_events_from_seq_len_on(params: Any) -> None:
    """Rows whose histories end at event 8 at the latest give the same batches when all later events are others."""
    cut = 8
    frames = sound()
    for name in ("train", "valid", "test"):
        frames[name] = sound()["train"].filter(pl.col("seq_len") <= cut)
    histories = frames["user_info"]["full_item_seq"].to_list()
    future = [[*events[:cut], *reversed(events[cut:]), 1, 2, 3] for events in histories]
    other = {**frames, "user_info": frames["user_info"].with_columns(full_item_seq=pl.Series(future))}

    def batches(given: Frames) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        for limit in (None, 8):
            settings = params(given, 50, memory_limit_mib=limit)
            dataset = load_dataset(build_feature_map(settings), settings)
            assert isinstance(dataset.splits["train"], StreamedSplit) == bool(limit)
            kind = "streamed" if limit else "in memory"
            found[kind] = read(SequenceLoader(dataset, "train", 32, 6, shuffle=True))
            found[f"{kind}, ahead"] = read(SequenceLoader(dataset, "train", 32, 50, prefetch=2))
            if not limit:
                found["resident"] = read(ResidentLoader(dataset, "train", 32, 50, device="cpu"))
                found["tuples"] = tuples(dataset)
        return found

    def read(loader: SequenceLoader) -> list[Any]:
        return [(batch.history, batch.target, batch.label, batch.rows) for batch in loader]

    def tuples(dataset: CTRDataset) -> list[Any]:
        made = (longctr_batch(dataset, "train", np.arange(60), length, padding)  # type: ignore[arg-type]
                for length in (6, 50) for padding in ("pre", "post"))  # fmt: skip
        return [(*batch.values(), *items.values(), mask) for batch, items, mask in made]

    before, after = batches(frames), batches(other)
    assert before.keys() == after.keys() and len(before) == 6
    for kind, made in before.items():
        assert len(made) == len(after[kind]) > 1
        for ours, theirs in zip(made, after[kind]):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs)), kind
