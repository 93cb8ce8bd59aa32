"""Build ``data/kuairand_sample`` from a raw slice of KuaiRand-Pure (Gao et al., CIKM 2022).

A sequence is the list of long watches recorded before the first impression, then the user's clicks in time order.
``seq_len`` counts the clicks strictly before a row's ``time_ms``: nothing that happens at the same instant is seen.
"""

import argparse
import io
import sys
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path

import polars as pl

from model_zoo.errors import DataError

UTC_OFFSET = timedelta(hours=8)  # the log's `date` and `hourmin` are rounded, so local time is taken from time_ms
VALID_FROM = datetime(2022, 5, 1, tzinfo=timezone(UTC_OFFSET))
TEST_FROM = datetime(2022, 5, 4, tzinfo=timezone(UTC_OFFSET))
MIN_IMPRESSIONS = 5
MIN_HISTORY = 5
DURATION_EDGES_S = (8, 11, 16, 23, 32, 45, 64, 91, 128, 181, 256, 362, 512)  # half-octaves, in seconds
USER_FEATURES = ("user_active_degree", "register_days_range", "onehot_feat1")

_INT, _TEXT = pl.Int64(), pl.String()
_IMPRESSIONS: dict[str, pl.DataType] = {c: _INT for c in ("user_id", "video_id", "time_ms", "is_click", "tab")}
RAW_COLUMNS: dict[str, dict[str, pl.DataType]] = {
    "val.parquet": _IMPRESSIONS,
    "test.parquet": _IMPRESSIONS,
    "user_sequences.parquet": {"user_id": _INT, "last_time_ms": _INT, "long_watch_seq": pl.List(_INT)},
    "item_features.parquet": {"video_id": _INT, "author_id": _INT, "tag": _TEXT, "video_duration": pl.Float64()},
    "user_features.parquet": {"user_id": _INT, **dict(zip(USER_FEATURES, (_TEXT, _TEXT, _INT), strict=True))},
}
_KEYS = {"user_sequences.parquet": "user_id", "item_features.parquet": "video_id", "user_features.parquet": "user_id"}
_MAY_BE_NULL = {"tag", "video_duration", "author_id", "tab", *USER_FEATURES}


def read_raw(folder: Path) -> dict[str, pl.DataFrame]:
    """The five raw files, only the columns in ``RAW_COLUMNS``, under their file names.

    Raises DataError when a file or column is missing, or has a wrong type, a forbidden null or a repeated key.
    """
    frames = {}
    for name, columns in RAW_COLUMNS.items():
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path} is missing; point --raw at the folder that holds {', '.join(RAW_COLUMNS)}.")
        try:
            frame = pl.read_parquet(path)
        except (pl.exceptions.PolarsError, OSError) as error:
            raise DataError(f"{path} cannot be read as parquet; fetch the file again.") from error
        for column, dtype in columns.items():
            if column not in frame.columns:
                raise DataError(f"{path} has no column {column!r}; use an unmodified raw file.")
            if frame.schema[column] != dtype and not (dtype.is_integer() and frame.schema[column].is_integer()):
                raise DataError(f"{path} column {column!r} is {frame.schema[column]}; it must be {dtype}.")
            if column not in _MAY_BE_NULL and frame[column].null_count():
                raise DataError(f"{path} column {column!r} has empty values; remove those rows.")
        key = _KEYS.get(name)
        if key is not None and frame[key].n_unique() != frame.height:
            raise DataError(f"{path} repeats a {key}; keep one row for each.")
        frames[name] = frame.select(pl.col(column).cast(dtype) for column, dtype in columns.items())
    return frames


def impressions(raw: dict[str, pl.DataFrame]) -> pl.DataFrame:
    """``user_id, video_id, time_ms, is_click, tab``: one row per (user, video, instant) after the user's watches.

    The log repeats about 3 % of its rows; a repeat would put one click into a history twice. Sorted by time.
    Raises DataError for a click that is not 0 or 1.
    """
    rows = pl.concat([raw["val.parquet"], raw["test.parquet"]])
    if not rows["is_click"].is_in([0, 1]).all():
        raise DataError("val.parquet or test.parquet column 'is_click' holds more than 0 and 1; use the raw files.")
    rows = rows.group_by("user_id", "video_id", "time_ms").agg(pl.col("is_click").max(), pl.col("tab").min())
    ends = raw["user_sequences.parquet"].select("user_id", "last_time_ms")
    rows = rows.join(ends, on="user_id").filter(pl.col("time_ms") > pl.col("last_time_ms")).drop("last_time_ms")
    return rows.sort("time_ms", "user_id", "video_id")


def rank_users(
    rows: pl.DataFrame, sequences: pl.DataFrame, min_impressions: int = MIN_IMPRESSIONS, min_history: int = MIN_HISTORY
) -> pl.DataFrame:
    """``user_id, long_watch_seq`` of the users worth keeping: longest ``long_watch_seq`` first, then smallest id.

    Later clicks do not count: they are labels, and would make the kept users click more than users do.
    """
    if min_history < 1:
        raise ValueError("min_history must be at least 1: a batch of empty histories has nothing to attend to")
    in_train = pl.col("time_ms") < _ms(VALID_FROM)
    active = rows.group_by("user_id").agg(rows=pl.len(), train_rows=in_train.sum())
    active = active.filter((pl.col("rows") >= min_impressions) & (pl.col("train_rows") >= 1))
    kept = sequences.join(active, on="user_id").with_columns(length=pl.col("long_watch_seq").list.len())
    kept = kept.filter(pl.col("length") >= min_history).sort(["length", "user_id"], descending=[True, False])
    return kept.select("user_id", "long_watch_seq")


def build(raw: dict[str, pl.DataFrame], rows: pl.DataFrame, users: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """The frames ``user_info, item_info, train, valid, test`` for ``users`` (row i becomes ``user_index`` i).

    Every categorical column is 1.. in sorted order of the raw value, a missing value last; 0 is padding.
    Raises DataError when a kept video is not described in ``item_features.parquet``.
    """
    users = users.with_row_index("user_index").with_columns(pl.col("user_index").cast(pl.Int32))
    rows = rows.join(users.select("user_id", "user_index"), on="user_id")
    watched = users.select("user_index", video_id="long_watch_seq").explode("video_id").with_row_index("place")
    items = _item_table(raw["item_features.parquet"], pl.concat([rows["video_id"], watched["video_id"]]))
    index = items.select("video_id", "item_index")
    rows = rows.join(index, on="video_id").sort("time_ms", "user_index", "item_index")

    watched = watched.join(index, on="video_id").sort("place").select("user_index", "item_index")
    clicks = rows.filter(pl.col("is_click") == 1).select("user_index", "item_index")
    sequence = pl.concat([watched, clicks]).group_by("user_index", maintain_order=True).agg(full_item_seq="item_index")

    instants = rows.group_by("user_index", "time_ms").agg(clicks=pl.col("is_click").sum()).sort("user_index", "time_ms")
    before = (pl.col("clicks").cum_sum() - pl.col("clicks")).over("user_index")
    lengths = users.select("user_index", "user_id", start=pl.col("long_watch_seq").list.len())
    profile = lengths.join(raw["user_features.parquet"], on="user_id", how="left")
    profile = profile.with_columns(_codes(profile[name]) for name in USER_FEATURES).drop("user_id")
    rows = rows.join(instants.select("user_index", "time_ms", before=before), on=["user_index", "time_ms"])
    rows = rows.join(profile, on="user_index").sort("time_ms", "user_index", "item_index")

    local = pl.from_epoch(pl.col("time_ms"), time_unit="ms") + UTC_OFFSET
    table = rows.select(
        "user_index",
        "item_index",
        (pl.col("start") + pl.col("before")).cast(pl.Int16).alias("seq_len"),
        pl.col("is_click").cast(pl.Int8),
        (pl.col("user_index") + 1).alias("user_id"),
        _codes(rows["tab"]),
        (local.dt.hour() + 1).cast(pl.Int8).alias("hour"),
        local.dt.weekday().cast(pl.Int8).alias("weekday"),
        *USER_FEATURES,
        "time_ms",
    )
    valid_from, test_from, time = _ms(VALID_FROM), _ms(TEST_FROM), pl.col("time_ms")
    return {
        "user_info": sequence.sort("user_index"),
        "item_info": _with_padding_row(items.drop("video_id")),
        "train": table.filter(time < valid_from),
        "valid": table.filter((time >= valid_from) & (time < test_from)),
        "test": table.filter(time >= test_from),
    }


def fit_to_size(raw: dict[str, pl.DataFrame], max_bytes: int) -> tuple[dict[str, pl.DataFrame], dict[str, bytes]]:
    """The frames and their parquet bytes for as many ranked users as fit ``max_bytes``; DataError if none does."""
    rows = impressions(raw)
    users = rank_users(rows, raw["user_sequences.parquet"])
    if users.is_empty():
        raise DataError(f"no raw user has {MIN_IMPRESSIONS} impressions and {MIN_HISTORY} watches; use a larger slice.")
    while not users.is_empty():
        frames = build(raw, rows, users)
        files = {f"{name}.parquet": to_parquet(frame) for name, frame in frames.items()}
        size = sum(len(data) for data in files.values())
        if size <= max_bytes:
            return frames, files
        users = users.head(int(users.height * min(0.98, max_bytes / size)))
    raise DataError(f"not one user fits into {max_bytes} bytes; raise --max-mb.")


def to_parquet(frame: pl.DataFrame) -> bytes:
    """``frame`` as zstd-compressed parquet."""
    buffer = io.BytesIO()
    frame.write_parquet(buffer, compression="zstd", compression_level=19)
    return buffer.getvalue()


def main(argv: Sequence[str] | None = None) -> int:
    """``--raw DIR --out DIR --max-mb 5``: write the five files and print their sizes; returns 2 for bad input."""
    parser = argparse.ArgumentParser(description="Build the KuaiRand-Pure sample in LongCTR's layout.")
    parser.add_argument("--raw", type=Path, required=True, help=f"folder with {', '.join(RAW_COLUMNS)}")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the five parquet files to")
    parser.add_argument("--max-mb", type=float, default=5.0, help="largest total size, in units of 10^6 bytes")
    args = parser.parse_args(argv)
    try:
        frames, files = fit_to_size(read_raw(args.raw), int(args.max_mb * 1_000_000))
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (args.out / name).write_bytes(data)
        print(f"{name}: {frames[Path(name).stem].height} rows, {len(data)} bytes")
    return 0


def _item_table(features: pl.DataFrame, video_ids: pl.Series) -> pl.DataFrame:
    videos = pl.DataFrame({"video_id": video_ids.unique().sort()})
    unknown = videos.join(features, on="video_id", how="anti")
    if not unknown.is_empty():
        raise DataError(f"item_features.parquet lacks video_id {unknown['video_id'][0]}; use the files of one slice.")
    items = videos.join(features, on="video_id").sort("video_id").with_row_index("item_index", offset=1)
    seconds, edges = pl.col("video_duration") / 1000, DURATION_EDGES_S
    bucket = pl.lit(1) + sum((seconds >= edge).cast(pl.Int8) for edge in edges)  # null stays null
    tag = items["tag"].str.split(",").list.first().cast(pl.Int64, strict=False)  # the word `unknown` becomes null
    return items.select(
        "video_id",
        pl.col("item_index").cast(pl.Int32),
        pl.col("item_index").cast(pl.Int32).alias("item_id"),
        _codes(items["author_id"], pl.Int32()),
        _codes(tag),
        bucket.fill_null(len(edges) + 2).cast(pl.Int8).alias("duration_bucket"),
    )


def _codes(values: pl.Series, dtype: pl.DataType = pl.Int8()) -> pl.Series:
    """1.. in sorted order of the values present; null, ``unknown`` and ``UNKNOWN`` share the id after the last."""
    if values.dtype == pl.String():
        values = values.set(values.str.to_lowercase() == "unknown", None)
    known = values.drop_nulls().n_unique()
    return values.rank("dense").fill_null(known + 1).cast(dtype)


def _with_padding_row(items: pl.DataFrame) -> pl.DataFrame:
    return pl.concat([pl.DataFrame({name: [0] for name in items.columns}, schema=items.schema), items], rechunk=True)


def _ms(moment: datetime) -> int:
    return int(moment.timestamp()) * 1000
