"""The builder of EBNeRD's data sets: made-up raw files against tables written by hand, and a slow recomputation."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from model_zoo.errors import DataError
from model_zoo.experiment.config import read_sections
from model_zoo.pipeline import ebnerd
from model_zoo.pipeline.feature_map import build_feature_map
from model_zoo.pipeline.histories import read_histories
from model_zoo.pipeline.validation import validate_dataset

ROOT = Path(__file__).resolve().parents[1]
Raw = dict[str, pl.DataFrame]
Spoil = Callable[[pl.DataFrame], pl.DataFrame]
#: the types of EBNeRD's own files, narrower than what is built
TIMES, IDS = pl.Datetime("us"), pl.List(pl.Int32)
BEHAVIORS = {
    "impression_id": pl.UInt32,
    "user_id": pl.UInt32,
    "impression_time": TIMES,
    "article_ids_inview": IDS,
    "article_ids_clicked": IDS,
    "device_type": pl.Int8,
    "is_sso_user": pl.Boolean,
    "gender": pl.Int8,
    "postcode": pl.Int8,
    "age": pl.Int8,
    "is_subscriber": pl.Boolean,
    "read_time": pl.Float32,
}
HISTORY = {"user_id": pl.UInt32, "impression_time_fixed": pl.List(TIMES), "article_id_fixed": IDS}
ROW = (
    "user_index item_index seq_len label user_id device_type is_sso_user gender postcode age is_subscriber hour weekday "
    "age_hours ts impression_id"
).split()


def at(day: int, hour: int = 0, minute: int = 0, second: int = 0) -> datetime:
    return datetime(2023, 5, day, hour, minute, second)


def stamp(moment: datetime) -> int:
    return int((moment - datetime(1970, 1, 1)).total_seconds())


def tiny_raw() -> Raw:
    """Users 30 (index 1) and 9 (index 0) have impressions, user 77 only a history; articles 5, 10, 20, 40, 50."""
    last = at(27, 6, 59, 59)
    train = [
        (2, 30, at(18, 12), [20, 10], [20], 2, True, 1, 4, 30, False, 1.0),
        (1, 9, at(19, 9), [10, 40], [], 1, False, None, None, None, True, None),
    ]
    later = [
        (3, 30, at(27, 7), [40, 20], [40, 20], 2, True, 1, 4, 30, False, 1.0),
        (4, 30, last, [20], [20], 2, True, 1, 4, 30, False, 1.0),
        (5, 30, at(27, 7, 0, 1), [], [], 2, True, 1, 4, 30, False, 1.0),
    ]
    first_history = [
        (77, [at(1)], [99]),
        (30, [at(10, 8), at(10, 8), at(18, 12)], [10, 5, 50]),
    ]
    second_history = [(30, [at(10, 8), at(18, 12), at(18, 12, 0, 30)], [10, 50, 20])]
    return {
        "train/behaviors.parquet": pl.DataFrame(train, BEHAVIORS, orient="row"),
        "validation/behaviors.parquet": pl.DataFrame(later, BEHAVIORS, orient="row"),
        "train/history.parquet": pl.DataFrame(first_history, HISTORY, orient="row"),
        "validation/history.parquet": pl.DataFrame(second_history, HISTORY, orient="row"),
    }


def write(raw: Raw, folder: Path) -> Path:
    for name, frame in raw.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        frame.write_parquet(folder / name)
    return folder


def built(raw: Raw, folder: Path) -> Raw:
    return ebnerd.build(ebnerd.read_raw(write(raw, folder)))


def test_tiny_files_give_the_tables_of_a_hand_computation(tmp_path: Path) -> None:
    found = built(tiny_raw(), tmp_path)
    # articles 5, 10, 20, 40, 50 are 1..5; 18 May 12:00:00 is a click on 20 and, after it, a read of 50
    items = [2, 1, 3, 5, 3, 3, 4, 3]
    times = [at(10, 8), at(10, 8), at(18, 12), at(18, 12), at(18, 12, 0, 30), at(27, 6, 59, 59), at(27, 7), at(27, 7)]
    users = [(0, [], []), (1, items, [stamp(moment) for moment in times])]
    schema: Any = {"user_index": pl.Int64, "full_item_seq": pl.List(pl.Int32), "full_time_seq": pl.List(pl.Int64)}
    assert_frame_equal(found["user_info"], pl.DataFrame(users, schema, orient="row"))
    numbers = list(range(6))
    assert_frame_equal(found["item_info"], pl.DataFrame({"item_index": numbers, "article_id": numbers}))

    who, other = (2, 3, 2, 2, 5, 31, 1), (1, 2, 1, 0, 0, 0, 2)
    later, last, noon, day = stamp(at(27, 7)), stamp(at(27, 6, 59, 59)), stamp(at(18, 12)), stamp(at(19, 9))
    tables = {
        "train": [
            (1, 3, 2, 1, *who, 13, 4, 1, noon, 2),
            (1, 2, 2, 0, *who, 13, 4, bucket(196), noon, 2),  # read on 10 May at 8
            (0, 2, 0, 0, *other, 10, 5, bucket(217), day, 1),
            (0, 4, 0, 0, *other, 10, 5, 1, day, 1),
        ],
        "valid": [(1, 3, 5, 1, *who, 7, 6, bucket(211 - 1 / 3600), last, 4)],
        "test": [(1, 4, 6, 1, *who, 8, 6, bucket(190), later, 3), (1, 3, 6, 1, *who, 8, 6, bucket(211), later, 3)],
    }
    for split, rows in tables.items():
        assert_frame_equal(found[split], pl.DataFrame(rows, dict.fromkeys(ROW, pl.Int64), orient="row"))


def bucket(hours: float) -> int:
    return 1 + math.floor(4 * math.log(1 + hours))


def many_raw(seed: int = 3) -> Raw:
    """40 users, 30 articles, times that meet within a second and across users."""
    random = np.random.default_rng(seed)
    names = 100 + 7 * random.permutation(30)

    def some(count: int) -> list[int]:
        return [int(name) for name in random.choice(names, count)]

    raw: Raw = {}
    for split, start in (("train", at(18, 7)), ("validation", at(25, 7))):
        rows: list[Any] = []
        for number in range(160):
            moment = start + timedelta(seconds=3600 * int(random.integers(160)) + int(random.integers(3)))
            view = list(dict.fromkeys(some(6)))
            person = (1, False, None, 2, None, True, 0.0)
            rows.append((number, 500 - int(random.integers(40)), moment, view, view[: int(random.integers(3))], *person))
        users = random.choice(40, 30, replace=False)
        past = [sorted(start - timedelta(hours=int(h)) for h in random.integers(1, 90, n)) for n in range(30)]
        history = [(500 - int(user), moments, some(len(moments))) for user, moments in zip(users, past)]
        raw[f"{split}/behaviors.parquet"] = pl.DataFrame(rows, BEHAVIORS, orient="row")
        raw[f"{split}/history.parquet"] = pl.DataFrame(history, HISTORY, orient="row")
    return raw


def test_histories_hold_each_event_once_and_only_what_was_before(tmp_path: Path) -> None:
    raw = many_raw()
    found = built(raw, tmp_path)
    happened: dict[int, set[tuple[int, int]]] = {}
    for name, frame in raw.items():
        for row in frame.iter_rows(named=True):
            if "behaviors" in name:
                pairs = [(row["impression_time"], article) for article in row["article_ids_clicked"]]
            else:
                pairs = list(zip(row["impression_time_fixed"], row["article_id_fixed"]))
            happened.setdefault(row["user_id"], set()).update((stamp(moment), article) for moment, article in pairs)
    shown = pl.concat([raw["train/behaviors.parquet"], raw["validation/behaviors.parquet"]])
    user_ids = sorted(set(shown["user_id"]))
    articles = {a for user in user_ids for _, a in happened[user]} | set(shown["article_ids_inview"].explode())
    names = [0, *sorted(articles)]
    histories = found["user_info"].rows()
    assert len(histories) == len(user_ids) and found["item_info"].height == len(names)
    for index, items, times in histories:
        assert times == sorted(times)
        pairs = [(moment, names[item]) for moment, item in zip(times, items)]
        assert len(pairs) == len(set(pairs)) and set(pairs) == happened[user_ids[index]]
    expected: dict[str, list[tuple[int, ...]]] = {split: [] for split in ebnerd.SPLITS}
    for row in shown.iter_rows(named=True):
        moment, user = row["impression_time"], user_ids.index(row["user_id"])
        split = "train" if moment < at(25, 7) else "valid" if moment < at(27, 7) else "test"
        before = sum(time < stamp(moment) for time in histories[user][2])
        for article in row["article_ids_inview"]:
            expected[split].append((user, names.index(article), before, int(article in row["article_ids_clicked"])))
    for split, rows in expected.items():
        assert found[split].select("user_index", "item_index", "seq_len", "label").rows() == rows


def test_later_events_change_no_earlier_row_but_its_length(tmp_path: Path) -> None:
    """Nothing of the second week reaches the rows of the first, nor the part of a history that they see."""
    raw = many_raw()
    week = built(raw, tmp_path / "both")
    last = raw["validation/behaviors.parquet"]
    raw["validation/behaviors.parquet"] = last.with_columns(article_ids_clicked=pl.col("article_ids_inview"))
    other = built(raw, tmp_path / "other")
    assert_frame_equal(week["train"], other["train"])
    seen = week["train"].group_by("user_index").agg(pl.col("seq_len").max())
    for user, length in seen.iter_rows():
        for name in ("full_item_seq", "full_time_seq"):
            assert week["user_info"][name][user][:length].to_list() == other["user_info"][name][user][:length].to_list()


def with_articles(frame: pl.DataFrame) -> Raw:
    return {**tiny_raw(), ebnerd.ARTICLES: frame}


def test_categories_are_numbered_and_0_where_there_is_none(tmp_path: Path) -> None:
    described = pl.DataFrame(
        [(50, 118), (20, 414), (10, 118), (5, None), (7, 1)], {"article_id": pl.Int32, "category": pl.Int16}, orient="row"
    )
    found = built(with_articles(described), tmp_path)  # article 40 is not described, 7 not used
    assert found["item_info"]["category"].to_list() == [0, 0, 1, 2, 0, 1]
    assert ebnerd.vocabularies(found)["category"] == 3


def test_the_command_writes_files_that_the_data_set_with_times_describes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, out = write(many_raw(), tmp_path / "raw"), tmp_path / "out"
    for folder in (out, tmp_path / "again"):
        assert ebnerd.main(["--raw", str(raw), "--out", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "vocab_size: article_id 31," in said and ", weekday 8," in said
    assert {path.stem for path in out.iterdir()} == {*ebnerd.SPLITS, "user_info", "item_info"}
    assert all(path.read_bytes() == (tmp_path / "again" / path.name).read_bytes() for path in out.iterdir())

    sections = {name: section.values for name, section in read_sections(str(ROOT / "config"), "dataset_config")}
    timed, plain = sections["Ebnerd_demo_times"], sections["Ebnerd_demo"]
    assert timed == {**plain, "time_col": ebnerd.TIMES}
    keys = ("train_data", "valid_data", "test_data", "user_info", "item_info")
    assert all(timed[key] == f"./data/Ebnerd_demo/{key.removesuffix('_data')}.parquet" for key in keys)
    params = {**timed, **{key: str(out / Path(timed[key]).name) for key in keys}, "dataset_id": "x"}
    assert not [line for line in validate_dataset(build_feature_map(params), params).lines() if line.startswith("error")]
    histories = read_histories(params["user_info"], 31, time_col=timed["time_col"])
    assert histories.times is not None and len(histories.times) == len(histories.items)


def longer(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.with_columns(article_id_fixed=pl.col("article_id_fixed").list.concat(pl.lit(5, pl.Int32)))


def put(**values: object) -> Spoil:
    """One value in a whole column."""
    return lambda frame: frame.with_columns(**{name: pl.lit(value) for name, value in values.items()})


CLICKS, READS = "train/behaviors.parquet", "train/history.parquet"


@pytest.mark.parametrize(
    ("name", "spoil", "words"),
    [
        ("validation/history.parquet", None, "history.parquet is missing; point --raw at the folder that holds train/"),
        (CLICKS, lambda f: f.drop("age"), "no column 'age'"),
        (CLICKS, put(impression_time="noon"), "'impression_time' is String; it must be Datetime"),
        (CLICKS, put(is_sso_user=1), "'is_sso_user' is Int32; it must be Boolean"),
        (CLICKS, lambda f: f.with_columns(user_id=pl.lit(None, pl.UInt32)), "'user_id' has empty values"),
        (CLICKS, lambda f: f.with_columns(article_ids_inview=pl.lit([1, None], IDS)), "'article_ids_inview' has empty"),
        (READS, put(article_id_fixed=["a"]), "'article_id_fixed' is List(String)"),
        (READS, longer, "more articles than times"),
        (READS, lambda f: pl.concat([f, f]), "'user_id' has one value twice"),
        (ebnerd.ARTICLES, lambda f: f.drop("category"), "no column 'category'"),
        (ebnerd.ARTICLES, lambda f: pl.concat([f, f]), "'article_id' has one value twice"),
        (CLICKS, lambda f: f.clear(), "train/behaviors.parquet has no impression, for train"),
        ("validation/behaviors.parquet", lambda f: f[[0]], "no impression before 2023-05-27 07:00:00, for valid"),
        ("validation/behaviors.parquet", lambda f: f[[1]], "no impression from 2023-05-27 07:00:00 on, for test"),
    ],
)
def test_bad_raw_files_are_one_sentence_and_exit_code_2(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    spoil: Spoil | None,
    words: str,
) -> None:
    raw = with_articles(pl.DataFrame({"article_id": [5], "category": [1]}))
    if spoil is None:
        del raw[name]
    else:
        raw[name] = spoil(raw[name])
    folder = write(raw, tmp_path / "raw")
    assert ebnerd.main(["--raw", str(folder), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_impressions_without_any_event_are_refused(tmp_path: Path) -> None:
    raw = tiny_raw()
    for name in raw:
        if "history" in name:
            raw[name] = raw[name].clear()
        else:
            raw[name] = raw[name].with_columns(article_ids_clicked=pl.lit([], IDS))
    with pytest.raises(DataError, match="neither a click nor a history"):
        built(raw, tmp_path)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = write(many_raw(), tmp_path / "raw")
    (tmp_path / "file").write_text("")
    assert ebnerd.main(["--raw", str(raw), "--out", str(tmp_path / "file" / "out")]) == 2
    assert "file/out: cannot be written" in capsys.readouterr().err
