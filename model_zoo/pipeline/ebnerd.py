"""Build ``data/Ebnerd_demo`` from the raw files of EBNeRD (Kruse et al., RecSys Challenge 2024), times of events included.

A history is what a user read or clicked before the impression's second, oldest first. The raw histories of the second
week list most clicks of the first week again, at the moment when the article was opened; both events are kept.
"""

import argparse
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import polars as pl
import pyarrow as pa

from model_zoo.errors import DataError, answered
from model_zoo.files import unwritten, write_whole_with
from model_zoo.pipeline.columns import BEYOND_INT64, Integers
from model_zoo.pipeline.kuairand import to_parquet
from model_zoo.pipeline.parquet_files import read_table

TEST_FROM = datetime(2023, 5, 27, 7)  # the raw files' own clock; `validation` begins two days before
SPLITS = ("train", "valid", "test")
TIMES = "full_time_seq"
PROFILE = ("device_type", "is_sso_user", "gender", "postcode", "age", "is_subscriber")

_INT, _FLAG, _TIME = pl.Int64(), pl.Boolean(), pl.Datetime("us")
_IMPRESSIONS: dict[str, pl.DataType] = {
    "user_id": _INT,
    "impression_id": _INT,
    "impression_time": _TIME,
    "article_ids_inview": pl.List(_INT),
    "article_ids_clicked": pl.List(_INT),
    **dict(zip(PROFILE, (_INT, _FLAG, _INT, _INT, _INT, _FLAG), strict=True)),
}
_HISTORY: dict[str, pl.DataType] = {
    "user_id": _INT,
    "article_id_fixed": pl.List(_INT),
    "impression_time_fixed": pl.List(_TIME),
}
ARTICLES = "articles.parquet"
RAW_COLUMNS: dict[str, dict[str, pl.DataType]] = {
    "train/behaviors.parquet": _IMPRESSIONS,
    "train/history.parquet": _HISTORY,
    "validation/behaviors.parquet": _IMPRESSIONS,
    "validation/history.parquet": _HISTORY,
    ARTICLES: {"article_id": _INT, "category": _INT},
}
_KEYS = {**{name: "user_id" for name in RAW_COLUMNS if name.endswith("history.parquet")}, ARTICLES: "article_id"}
_MAY_BE_NULL = {"category", *PROFILE}


def read_raw(folder: Path) -> dict[str, pl.DataFrame]:
    """The raw files, only the columns in ``RAW_COLUMNS``, under their names there; ``articles.parquet`` may be absent.

    Raises:
        DataError: another file or a column is missing, or has a wrong type, a forbidden null or a repeated key; a history
            has not one time for each article.
    """
    found = {name: folder / name for name in RAW_COLUMNS}
    if not found[ARTICLES].exists():
        del found[ARTICLES]
    for path in found.values():
        if not path.is_file():
            raise DataError(f"{path} is missing; point --raw at the folder that holds {', '.join(found)}.")
    return {name: _read(path, RAW_COLUMNS[name], _KEYS.get(name)) for name, path in found.items()}


def impressions(raw: dict[str, pl.DataFrame]) -> pl.DataFrame:
    """All impressions in the files' order, with ``split`` (train, valid, test) and ``ts``, their second.

    Raises:
        DataError: a split has none.
    """
    time = pl.col("impression_time")
    later = pl.when(time < TEST_FROM).then(pl.lit("valid")).otherwise(pl.lit("test"))
    parts = [
        raw["train/behaviors.parquet"].with_columns(split=pl.lit("train")),
        raw["validation/behaviors.parquet"].with_columns(split=later),
    ]
    rows = pl.concat(parts).with_columns(ts=time.dt.epoch("s"))
    present = set(rows["split"])
    for split, name in (("train", "train"), ("valid", "validation"), ("test", "validation")):
        if split not in present:
            side = {"valid": f" before {TEST_FROM}", "test": f" from {TEST_FROM} on"}.get(split, "")
            raise DataError(f"{name}/behaviors.parquet has no impression{side}, for {split}; use the unmodified raw files.")
    return rows


def events(raw: dict[str, pl.DataFrame], rows: pl.DataFrame) -> pl.DataFrame:
    """``user_id, ts, article``: the events of the users who have impressions, each once, by user and time.

    Args:
        rows: `impressions`. Within a second their clicks come first, in the files' order, then what the histories list.
    """
    found = [rows.select("user_id", "ts", article="article_ids_clicked").explode("article")]
    for name in ("train/history.parquet", "validation/history.parquet"):
        read = raw[name].join(rows.select("user_id").unique(), on="user_id", how="semi")
        read = read.select("user_id", ts="impression_time_fixed", article="article_id_fixed").explode("ts", "article")
        found.append(read.with_columns(pl.col("ts").dt.epoch("s")))
    known = pl.concat(found).drop_nulls()  # an empty list explodes to null
    return known.unique(maintain_order=True, keep="first").sort("user_id", "ts", maintain_order=True)


def build(raw: dict[str, pl.DataFrame]) -> dict[str, pl.DataFrame]:
    """The frames ``user_info, item_info, train, valid, test`` of `read_raw`'s files.

    Users and articles are numbered in the order of their raw ids, users from 0, articles from 1. A row is an article in
    view, in the raw files' order, and keeps its ``ts`` and ``impression_id``, which no model reads. A feature's code is
    its raw value plus one, 0 where it is missing; ``hour`` is 1..24, ``weekday`` 1 (Monday)..7; ``category`` is 1.. in
    the order of the raw codes. ``age_hours`` is 1 + floor(4 ln(1 + h)), h hours after the article's first event or view.

    Raises:
        DataError: a split has no impression, or the files hold no event.
    """
    shown = impressions(raw)
    known = events(raw, shown)
    if known.is_empty():
        raise DataError("The raw files hold neither a click nor a history; use the unmodified raw files.")
    users = shown["user_id"].unique().sort().to_numpy()
    owner, viewer = (np.searchsorted(users, frame["user_id"].to_numpy()) for frame in (known, shown))
    starts = np.searchsorted(owner, np.arange(len(users) + 1))  # where each user's events begin

    begin = int(min(known["ts"].min(), shown["ts"].min()))  # type: ignore[arg-type, type-var]
    span = int(max(known["ts"].max(), shown["ts"].max())) - begin + 1  # type: ignore[arg-type, type-var]
    event_place, row_place = (  # one number orders by user, then time
        who * span + (frame["ts"].to_numpy() - begin) for who, frame in ((owner, known), (viewer, shown))
    )
    shown = shown.with_columns(
        user_index=pl.Series(viewer),
        seq_len=pl.Series(np.searchsorted(event_place, row_place, side="left") - starts[viewer]),
    )
    rows = shown.rename({"article_ids_inview": "article"}).explode("article").drop_nulls("article")
    seen = pl.concat([known.select("article", "ts"), rows.select("article", "ts")])
    first = seen.group_by("article").agg(pl.col("ts").min()).sort("article")
    articles = first["article"].to_numpy()
    row_item = np.searchsorted(articles, rows["article"].to_numpy())
    age = (rows["ts"].to_numpy() - first["ts"].to_numpy()[row_item]) / 3600
    table = rows.select(
        "split",
        "user_index",
        pl.Series("item_index", row_item + 1),
        "seq_len",
        pl.col("article").is_in(pl.col("article_ids_clicked")).cast(pl.Int64).alias("label"),
        (pl.col("user_index") + 1).alias("user_id"),
        *(pl.col(name).cast(pl.Int64).add(1).fill_null(0) for name in PROFILE),
        (pl.col("impression_time").dt.hour().cast(pl.Int64) + 1).alias("hour"),
        pl.col("impression_time").dt.weekday().cast(pl.Int64).alias("weekday"),
        pl.Series("age_hours", np.floor(4 * np.log1p(age)).astype(np.int64) + 1),
        "ts",
        "impression_id",
    )
    return {
        "user_info": _histories(known, np.searchsorted(articles, known["article"].to_numpy()) + 1, starts),
        "item_info": _items(articles, raw.get(ARTICLES)),
        **{split: table.filter(pl.col("split") == split).drop("split") for split in SPLITS},
    }


def vocabularies(frames: dict[str, pl.DataFrame]) -> dict[str, int]:
    """What ``vocab_size`` each feature of `build`'s frames needs."""
    rows = pl.concat([frames[split].select("user_id", *PROFILE, "hour", "weekday", "age_hours") for split in SPLITS])
    columns = {**frames["item_info"].drop("item_index").to_dict(), **rows.to_dict()}
    return {name: int(cast(int, column.max())) + 1 for name, column in columns.items()}


@answered
def main(argv: Sequence[str] | None = None) -> int:
    """``--raw DIR --out DIR``: write the five files, print what they hold; returns 2 for bad input."""
    parser = argparse.ArgumentParser(description="Build an EBNeRD data set, times included, in LongCTR's layout.")
    parser.add_argument("--raw", type=Path, required=True, help="folder with train/ and validation/")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the five parquet files to")
    args = parser.parse_args(argv)
    frames = build(read_raw(args.raw))
    files = {f"{name}.parquet": to_parquet(frame) for name, frame in frames.items()}
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritten(args.out, error) from None
    for name, data in files.items():
        write_whole_with(args.out / name, partial(_put, data))
        print(f"{name}: {frames[Path(name).stem].height} rows, {len(data)} bytes")
    print("vocab_size:", ", ".join(f"{name} {size}" for name, size in vocabularies(frames).items()))
    return 0


def _put(data: bytes, file: BinaryIO) -> None:
    file.write(data)


def _read(path: Path, columns: dict[str, pl.DataType], key: str | None) -> pl.DataFrame:
    frame = read_table(str(path), list(columns))
    for column, dtype in columns.items():
        found = frame.schema[column]
        if not _fits(found, dtype):
            raise DataError(f"{path} column {column!r} is {found}; it must be {dtype}.")
        if column not in _MAY_BE_NULL and _has_null(frame[column]):
            raise DataError(f"{path} column {column!r} has empty values; remove those rows.")
    if key is not None and frame[key].n_unique() != frame.height:
        raise DataError(f"{path} column {key!r} has one value twice; keep one row for each.")
    if "article_id_fixed" in columns:
        lengths = [frame[name].list.len() for name in ("article_id_fixed", "impression_time_fixed")]
        if (lengths[0] != lengths[1]).any():
            raise DataError(f"{path} has a user with more articles than times, or fewer; use the unmodified raw files.")
    return frame.select(pl.col(column).cast(dtype) for column, dtype in columns.items())


def _fits(found: pl.DataType, wanted: pl.DataType) -> bool:
    if isinstance(wanted, pl.List):
        return isinstance(found, pl.List) and _fits(_inner(found), _inner(wanted))
    if isinstance(wanted, pl.Datetime):
        return isinstance(found, pl.Datetime) and found.time_zone is None
    return found == wanted or (wanted.is_integer() and found.is_integer() and found not in BEYOND_INT64)


def _inner(dtype: pl.List) -> pl.DataType:
    return dtype.inner if isinstance(dtype.inner, pl.DataType) else dtype.inner()


def _has_null(values: pl.Series) -> bool:
    if values.null_count() or not isinstance(values.dtype, pl.List):
        return bool(values.null_count())
    return bool((values.list.drop_nulls().list.len() != values.list.len()).any())


def _histories(known: pl.DataFrame, items: Integers, starts: Integers) -> pl.DataFrame:
    """``user_info``: events ``starts[u]:starts[u + 1]`` are user u's."""
    offsets = pa.array(starts.astype(np.int32))
    columns = {"full_item_seq": pa.array(items.astype(np.int32)), TIMES: known["ts"].to_arrow()}
    lists = {name: pa.ListArray.from_arrays(offsets, values) for name, values in columns.items()}
    return cast(pl.DataFrame, pl.from_arrow(pa.table({"user_index": np.arange(len(starts) - 1), **lists})))


def _items(articles: Integers, described: pl.DataFrame | None) -> pl.DataFrame:
    """``item_info``, with ``category`` if the articles are described; 0 for those that are not, or have none."""
    index = np.arange(len(articles) + 1)
    table = pl.DataFrame({"item_index": index, "article_id": index})
    if described is None:
        return table
    ids = pl.DataFrame({"item_index": index[1:], "article_id": articles})
    category = ids.join(described, on="article_id", how="left").sort("item_index")["category"]
    codes = category.rank("dense").cast(pl.Int64).fill_null(0)
    return table.with_columns(category=pl.concat([pl.Series([0], dtype=pl.Int64), codes]))
