"""The committed KuaiRand sample is what its README says, and the builder does what a hand computation does."""

from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from model_zoo.errors import DataError
from model_zoo.pipeline import kuairand

SAMPLE = Path(__file__).resolve().parents[1] / "data" / "kuairand_sample"
SPLITS = ("train", "valid", "test")
CONTEXT = ("tab", "hour", "weekday", *kuairand.USER_FEATURES)
ROW_SCHEMA = {
    "user_index": pl.Int32,
    "item_index": pl.Int32,
    "seq_len": pl.Int16,
    "is_click": pl.Int8,
    "user_id": pl.Int32,
    **{name: pl.Int8 for name in CONTEXT},
    "time_ms": pl.Int64,
}
ITEM_SCHEMA = {
    "item_index": pl.Int32,
    "item_id": pl.Int32,
    "author_id": pl.Int32,
    "tag": pl.Int8,
    "duration_bucket": pl.Int8,
}


@pytest.fixture(scope="module")
def sample() -> dict[str, pl.DataFrame]:
    return {name: pl.read_parquet(SAMPLE / f"{name}.parquet") for name in ("user_info", "item_info", *SPLITS)}


@pytest.fixture(scope="module")
def rows(sample: dict[str, pl.DataFrame]) -> pl.DataFrame:
    return pl.concat([sample[name] for name in SPLITS])


def test_the_files_fit_the_budget() -> None:
    assert sum(path.stat().st_size for path in SAMPLE.iterdir()) <= 5_000_000


def test_schemas_and_no_empty_values(sample: dict[str, pl.DataFrame]) -> None:
    assert sample["user_info"].schema == {"user_index": pl.Int32, "full_item_seq": pl.List(pl.Int32)}
    assert sample["item_info"].schema == ITEM_SCHEMA
    for name in SPLITS:
        assert sample[name].schema == ROW_SCHEMA
    assert all(sum(frame.null_count().row(0)) == 0 for frame in sample.values())


def test_tables_are_indexed_by_position_and_row_0_is_padding(sample: dict[str, pl.DataFrame]) -> None:
    items, users = sample["item_info"], sample["user_info"]
    assert items.row(0) == (0,) * items.width
    assert items["item_index"].to_list() == items["item_id"].to_list() == list(range(items.height))
    assert users["user_index"].to_list() == list(range(users.height))


def test_every_id_is_used_and_0_is_left_to_padding(sample: dict[str, pl.DataFrame], rows: pl.DataFrame) -> None:
    items = sample["item_info"]
    seen = pl.concat([rows["item_index"], sample["user_info"]["full_item_seq"].explode()]).unique().sort()
    assert seen.to_list() == items["item_index"].to_list()[1:]
    dense = [rows[name] for name in ("user_id", *CONTEXT)] + [items[name][1:] for name in ("author_id", "tag")]
    for column in dense:
        assert column.unique().sort().to_list() == list(range(1, column.n_unique() + 1)), column.name
    assert items["duration_bucket"][1:].is_between(1, len(kuairand.DURATION_EDGES_S) + 2).all()
    assert (rows["user_id"] == rows["user_index"] + 1).all()
    assert set(rows["is_click"]) == {0, 1}


def test_splits_follow_each_other_in_time(sample: dict[str, pl.DataFrame]) -> None:
    assert all(sample[name]["time_ms"].is_sorted() for name in SPLITS)
    assert sample["train"]["time_ms"][-1] < sample["valid"]["time_ms"][0]
    assert sample["valid"]["time_ms"][-1] < sample["test"]["time_ms"][0]
    assert sample["train"]["user_index"].n_unique() == sample["user_info"].height


def test_a_history_ends_with_the_clicks_strictly_before_the_row(
    sample: dict[str, pl.DataFrame], rows: pl.DataFrame
) -> None:
    """Recomputed from ``time_ms`` by search instead of counting: including the row's own instant would differ."""
    clicks = rows.filter(pl.col("is_click") == 1).sort("user_index", "time_ms", "item_index")
    histories = sample["user_info"]["full_item_seq"]
    clicks_of = np.bincount(clicks["user_index"], minlength=len(histories))
    start = histories.list.len().to_numpy().astype(np.int64) - clicks_of
    assert start.min() >= kuairand.MIN_HISTORY

    tails = [history[first:] for history, first in zip(histories.to_list(), start)]
    assert [item for tail in tails for item in tail] == clicks["item_index"].to_list()

    user, moment = rows["user_index"].to_numpy(), instant(rows)
    clicks_of_earlier_users = np.cumsum(clicks_of) - clicks_of
    before = np.searchsorted(instant(clicks), moment, side="left") - clicks_of_earlier_users[user]
    assert np.array_equal(rows["seq_len"].to_numpy(), start[user] + before)


def instant(frame: pl.DataFrame) -> np.ndarray:
    """One number per row that orders by user, then time: 2022's times in ms since the first of April fit in 33 bits."""
    return (frame["user_index"].cast(pl.Int64) * 2**33 + frame["time_ms"] - at(4, 1)).to_numpy()


def test_the_readme_states_the_counts(sample: dict[str, pl.DataFrame]) -> None:
    readme = (SAMPLE / "README.md").read_text(encoding="utf-8")
    counts = [frame.height for name, frame in sample.items() if name != "item_info"] + [sample["item_info"].height - 1]
    assert all(f"{count:,}" in readme for count in counts)
    assert all(f"{sample[name]['is_click'].to_numpy().mean():.3f}" in readme for name in SPLITS)


def at(month: int, day: int, hour: int = 0, millisecond: int = 0) -> int:
    moment = datetime(2022, month, day, hour, tzinfo=timezone(timedelta(hours=8)))
    return int(moment.timestamp()) * 1000 + millisecond


def tiny_raw() -> dict[str, pl.DataFrame]:
    """Users 3 and 7 are kept; 5 has no train impression, 9 too short a history."""
    train_end, recorded_until = at(5, 1, millisecond=-1), at(4, 24)
    val = [
        (3, 40, recorded_until, 1, 1),  # not after the recorded watches: dropped, and video 40 with it
        (9, 10, at(4, 27), 0, 1),
        (9, 20, at(4, 28), 0, 1),
        (3, 10, at(4, 29, 8), 1, 6),
        (7, 20, train_end, 1, 1),
        (7, 20, train_end, 1, 1),  # the same event logged twice
        (7, 30, train_end, 0, 1),
    ]
    test = [
        (7, 30, at(5, 1), 1, 4),
        (5, 40, at(5, 2), 1, 1),
        (5, 10, at(5, 2, 1), 1, 1),
        (3, 30, at(5, 4, millisecond=-1), 0, 1),
        (7, 10, at(5, 4), 0, None),
    ]
    watches = [(5, [10, 20, 30, 40]), (7, [10, 20, 10]), (3, [30, 20, 10]), (9, [10])]
    items = [(40, 1, "1", 5e3), (30, 900, "7", 6e5), (20, 100, "unknown", None), (10, 900, "39,68", 8e3)]
    users = [(3, "full_active", "730+", 4), (7, "UNKNOWN", "366-730", None), (5, "full_active", "730+", 1)]
    sequences = [(user, recorded_until, list_) for user, list_ in watches]
    records: dict[str, list[Any]] = {
        "val": val,
        "test": test,
        "user_sequences": sequences,
        "item_features": items,
        "user_features": users,
    }
    frames = {}
    for stem, table in records.items():
        name = f"{stem}.parquet"
        frames[name] = pl.DataFrame(table, schema=kuairand.RAW_COLUMNS[name], orient="row")
    return frames


def test_the_builder_agrees_with_a_hand_computation() -> None:
    raw = tiny_raw()
    log = kuairand.impressions(raw)
    users = kuairand.rank_users(log, raw["user_sequences.parquet"], min_impressions=2, min_history=2)
    assert users["user_id"].to_list() == [3, 7]
    built = kuairand.build(raw, log, users)
    assert built["user_info"].rows() == [(0, [3, 2, 1, 1]), (1, [1, 2, 1, 2, 3])]
    assert built["item_info"].rows() == [(0, 0, 0, 0, 0), (1, 1, 2, 2, 2), (2, 2, 1, 3, 15), (3, 3, 2, 1, 14)]
    expected = {
        "train": [
            (0, 1, 3, 1, 1, 3, 9, 5, 1, 2, 1, at(4, 29, 8)),
            (1, 2, 3, 1, 2, 1, 24, 6, 2, 1, 2, at(5, 1, millisecond=-1)),
            (1, 3, 3, 0, 2, 1, 24, 6, 2, 1, 2, at(5, 1, millisecond=-1)),
        ],
        "valid": [
            (1, 3, 4, 1, 2, 2, 1, 7, 2, 1, 2, at(5, 1)),
            (0, 3, 4, 0, 1, 1, 24, 2, 1, 2, 1, at(5, 4, millisecond=-1)),
        ],
        "test": [(1, 1, 5, 0, 2, 4, 1, 3, 2, 1, 2, at(5, 4))],
    }
    table: list[Any]
    for name, table in expected.items():
        assert_frame_equal(built[name], pl.DataFrame(table, schema=ROW_SCHEMA, orient="row"))


def many_users(count: int = 60) -> dict[str, pl.DataFrame]:
    raw = tiny_raw()
    videos = [10, 20, 30, 40]
    log = [(u, videos[(u + k) % 4], at(4, 25) + 60_000 * k + u, (u + k) % 2, 1) for u in range(count) for k in range(6)]
    watches = [(u, at(4, 24), [videos[(u * k) % 4] for k in range(5 + u % 3)]) for u in range(count)]
    records: dict[str, list[Any]] = {"val.parquet": log, "user_sequences.parquet": watches}
    columns = kuairand.RAW_COLUMNS
    return raw | {name: pl.DataFrame(table, schema=columns[name], orient="row") for name, table in records.items()}


def test_a_smaller_budget_drops_the_users_ranked_last() -> None:
    raw = many_users()
    whole, files = kuairand.fit_to_size(raw, 5_000_000)
    assert whole["user_info"].height == 60
    budget = sum(len(data) for data in files.values()) - 200
    fewer, files = kuairand.fit_to_size(raw, budget)
    kept = fewer["user_info"].height
    assert 0 < kept < 60 and sum(len(data) for data in files.values()) <= budget
    starts = whole["train"].unique("user_index").sort("user_index")["seq_len"].to_list()
    assert starts == sorted(starts, reverse=True)
    with pytest.raises(DataError, match="raise --max-mb"):
        kuairand.fit_to_size(raw, 100)


def write(raw: dict[str, pl.DataFrame], folder: Path) -> Path:
    folder.mkdir()
    for name, frame in raw.items():
        frame.write_parquet(folder / name)
    return folder


def test_the_command_writes_the_same_bytes_twice(tmp_path: Path) -> None:
    raw = write(many_users(), tmp_path / "raw")
    for out in ("a", "b"):
        assert kuairand.main(["--raw", str(raw), "--out", str(tmp_path / out), "--max-mb", "5"]) == 0
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def repeat_user(frame: pl.DataFrame) -> pl.DataFrame:
    return pl.concat([frame, frame.head(1)])


@pytest.mark.parametrize(
    ("name", "spoil", "words"),
    [
        ("test.parquet", None, "test.parquet is missing"),
        ("val.parquet", lambda f: f.drop("tab"), "no column 'tab'"),
        ("val.parquet", lambda f: f.with_columns(pl.col("time_ms").cast(pl.String)), "'time_ms' is String"),
        ("val.parquet", lambda f: f.with_columns(is_click=pl.lit(2, pl.Int64)), "'is_click'"),
        ("test.parquet", lambda f: f.with_columns(user_id=pl.lit(None, pl.Int64)), "'user_id' has empty values"),
        ("user_sequences.parquet", repeat_user, "repeats a user_id"),
        ("item_features.parquet", lambda f: f.filter(pl.col("video_id") != 20), "lacks video_id 20"),
        ("val.parquet", lambda f: f.clear(), "no raw user"),
    ],
)
def test_bad_raw_files_are_one_sentence_and_exit_code_2(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    spoil: Callable[[pl.DataFrame], pl.DataFrame] | None,
    words: str,
) -> None:
    raw = many_users(6)
    if spoil is None:
        del raw[name]
    else:
        raw[name] = spoil(raw[name])
    folder = write(raw, tmp_path / "raw")
    assert kuairand.main(["--raw", str(folder), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_not_parquet_is_named(tmp_path: Path) -> None:
    folder = write(many_users(6), tmp_path / "raw")
    (folder / "test.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match=r"test.parquet cannot be read as parquet"):
        kuairand.read_raw(folder)
