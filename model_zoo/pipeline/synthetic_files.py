"""Synthetic data as LongCTR's files, and the command line that makes them."""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from model_zoo.errors import DataError, UserError
from model_zoo.pipeline.histories import SEQUENCE
from model_zoo.pipeline.synthetic import PRESETS, SPLITS, SyntheticData, SyntheticSpec, ceiling_auc, generate

TIME_COL = "full_time_seq"
TRUTH_FILE = "truth.npz"


def write(data: SyntheticData, out_dir: Path) -> None:
    """Write the five parquet files and ``truth.npz`` to ``out_dir``; all are complete before the first is put in place.

    ``truth.npz``: ``item_theme`` [items] (-1 for row 0), ``session_id`` and ``theme`` [E] (of the session), ``offsets``
    [users + 1] and ``<split>_click_probability``. Raises DataError when the folder cannot be written.
    """
    spec, items = data.spec, data.items
    index = np.arange(spec.items, dtype=np.int32)
    image = pa.FixedSizeListArray.from_arrays(pa.array(items.image.ravel()), spec.image_dim)
    offsets = pa.array(data.offsets.astype(np.int32))
    tables = {
        "user_info": {
            "user_index": np.arange(spec.users, dtype=np.int32),
            SEQUENCE: pa.ListArray.from_arrays(offsets, pa.array(data.history)),
            TIME_COL: pa.ListArray.from_arrays(offsets, pa.array(data.time)),
        },
        "item_info": {
            "item_index": index,
            "item_id": index,
            "cate_id": items.cate_id,
            f"image_emb_dim{spec.image_dim}": image,
        },
    }
    columns = ("user_index", "item_index", "seq_len", "is_click")
    truth: dict[str, Any] = {f"{split}_click_probability": rows.click_probability for split, rows in data.rows.items()}
    truth.update(item_theme=items.theme, session_id=data.session_id, theme=data.session_theme, offsets=data.offsets)
    for split, rows in data.rows.items():
        tables[split] = {name: getattr(rows, name) for name in columns}
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=".", suffix=".partial", dir=out_dir))
        try:
            for name, table in tables.items():
                path = unfinished / f"{name}.parquet"
                pq.write_table(pa.table(table), path, compression="zstd", write_page_checksum=True)
            np.savez_compressed(unfinished / TRUTH_FILE, **truth)
            for path in sorted(unfinished.iterdir()):
                os.replace(path, out_dir / path.name)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise DataError(f"{out_dir} cannot be written ({error.strerror or error}); choose another --out.") from None


def dataset_config(spec: SyntheticSpec, folder: Path) -> str:
    """The entry of a dataset_config yaml file for a data set written to ``folder``."""
    files = [f"{name}_data: {folder / name}.parquet" for name in SPLITS]
    files += [f"{name}: {folder / name}.parquet" for name in ("user_info", "item_info")]
    width, image = spec.image_dim, f"image_emb_dim{spec.image_dim}"
    meta = ("user_index", "item_index", "seq_len")
    columns = [f"name: {name}, active: True, dtype: int, type: meta" for name in meta]
    for name, size in (("item_id", spec.items), ("cate_id", spec.categories)):
        columns.append(f"name: {name}, active: True, dtype: int, type: categorical, source: item, vocab_size: {size}")
    columns.append(
        f"name: {image}, active: True, dtype: float, type: embedding, source: item, embedding_dim: {width}, "
        'feature_encoder: "nn.Identity()"'
    )
    lines = [f"data_root: {folder.parent}/", "data_format: parquet", *files, f"time_col: {TIME_COL}"]
    lines += ["rebuild_dataset: False", "feature_cols:"]
    lines += [f"    - {{{column}}}" for column in columns] + ["label_col: {name: is_click, dtype: float}"]
    return "\n".join([f"{folder.resolve().name}:", *(f"    {line}" for line in lines)])


def main(argv: Sequence[str] | None = None) -> int:
    """``--out DIR [--preset NAME]`` and one option per field of SyntheticSpec; returns 2 for bad values."""
    parser = argparse.ArgumentParser(description="Generate session-hopping users in LongCTR's layout.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the files to")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="microvideo", help="values not given as options")
    for field in fields(SyntheticSpec):
        option = f"--{field.name.replace('_', '-')}"
        if field.name == "rows":
            parser.add_argument(option, type=int, nargs=3, metavar=("TRAIN", "VALID", "TEST"))
        elif field.type is bool:
            parser.add_argument(option, action=argparse.BooleanOptionalAction)
        else:
            parser.add_argument(option, type=float if field.type is float else int)
    args = parser.parse_args(argv)
    given = {field.name: getattr(args, field.name) for field in fields(SyntheticSpec)}
    given = {name: tuple(value) if name == "rows" else value for name, value in given.items() if value is not None}
    preset = PRESETS[args.preset]
    if "history_max" in given:  # a shorter cut alone must not clash with the preset's mean
        given.setdefault("history_mean", min(preset.history_mean, max(given["history_max"] / 2, 1)))
    begun = time.perf_counter()
    try:
        spec = replace(preset, **given)
        data = generate(spec)
        write(data, args.out)
    except (UserError, MemoryError) as error:
        too_large = "The synthetic data does not fit into memory; lower --users, --items, --rows or --history-mean."
        print(f"error: {too_large if isinstance(error, MemoryError) else error}", file=sys.stderr)
        return 2
    seconds = time.perf_counter() - begun
    print(f"{args.out}: {spec.users} users, {spec.items} items, {len(data.history)} events, {spec.themes} themes")
    for split, rows in data.rows.items():
        rate = rows.is_click.mean() if len(rows.is_click) else float("nan")
        print(f"{split}: {len(rows.is_click)} rows, click rate {rate:.4f}, ceiling AUC {ceiling_auc(data, split):.4f}")
    print(f"all rows: ceiling AUC {ceiling_auc(data):.4f}; {seconds:.1f} seconds\n")
    print(dataset_config(spec, args.out))
    return 0
