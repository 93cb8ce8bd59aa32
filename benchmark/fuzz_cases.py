"""Files, ways to damage them, and what reading them again comes to; ``python fuzz_cases.py`` is the process that reads.

It answers one json line for each json line: a reader that ends the process or hangs is then the driver's to notice.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from model_zoo.errors import UserError
from model_zoo.experiment.config import load_config
from model_zoo.experiment.schema import validate
from model_zoo.pipeline.dataset import read_items
from model_zoo.pipeline.download import SUMS, check_sums, record_sums
from model_zoo.pipeline.feature_map import build_feature_map
from model_zoo.pipeline.histories import read_histories
from model_zoo.pipeline.pretrained_vectors import read_vectors
from model_zoo.pipeline.splits import SplitReader, joined
from model_zoo.pipeline.streaming import StreamedSplit
from model_zoo.pipeline.synthetic import SyntheticSpec, generate
from model_zoo.pipeline.synthetic_files import dataset_config, write

SPEC = SyntheticSpec(
    users=60, items=80, categories=6, image_dim=4, themes=3, rows=(400, 100, 100), history_mean=20, history_max=60,
    session_length=5,
)  # fmt: skip
EXPERIMENT = """\
# the shortest experiment
Base:
  metrics: [gAUC, AUC, logloss]
  monitor: {gAUC: 1, AUC: 1}
  group_id: user_index
  task: binary_classification

TWIN_fuzz:
  model: TWIN
  dataset_id: data
  embedding_dim: 8
  dnn_hidden_units: [16]
  attention_dim: 8
  num_heads: 2
  topk: 4
  short_seq_len: 4
  learning_rate: 1.e-3
  batch_size: 128
  max_len: 16
"""
PARQUET = {"train": "train.parquet", "valid": "valid.parquet", "test": "test.parquet",
           "user_info": "user_info.parquet", "item_info": "item_info.parquet"}  # fmt: skip
#: kind of file to its path in the folder
KINDS = {**PARQUET, "h5": "vectors.h5", "npz": "vectors.npz", "yaml": "config/dataset_config.yaml",
         "checkpoint": "twin.model"}  # fmt: skip
#: how the parquet files are written, one way a case
WRITERS = ("zstd", "plain", "snappy, pages of version 2", "polars", "plain, page checksums")
DAMAGES = ("bit", "bytes", "zeros", "cut", "swap")

Arrays = dict[str, Any]


def make_files(folder: Path) -> None:
    """A sound file of each kind; the parquet ones in a folder for each of `WRITERS`, with their sums."""
    write(generate(SPEC), folder / "data")
    for number, writer in enumerate(WRITERS):
        place = folder / f"{number}"
        place.mkdir()
        for name in PARQUET.values():
            _write_table(pq.read_table(folder / "data" / name), place / name, writer)
        record_sums("fuzz", place)
    config = folder / "config"
    config.mkdir()
    (config / "model_config.yaml").write_text(EXPERIMENT)
    (config / "dataset_config.yaml").write_text(dataset_config(SPEC, folder / "data"))
    random = np.random.default_rng(0)
    key, value = np.arange(1, SPEC.items), random.standard_normal((SPEC.items - 1, 6)).astype(np.float32)
    np.savez(folder / "vectors.npz", key=key, value=value)
    with h5py.File(folder / "vectors.h5", "w") as file:
        file["key"], file["value"] = key, value
    _model(str(config)).save_weights(str(folder / "twin.model"))


def damaged(content: bytes, how: str, random: np.random.Generator) -> bytes:
    """The content with one wound, half of them in the first or last 600 bytes, where file formats keep their structure."""
    size = len(content)
    edge = random.random() < 0.5
    place = int(random.integers(size))
    if edge:
        reach = min(size, 600)
        place = int(random.choice([random.integers(reach), size - 1 - random.integers(reach)]))
    found = bytearray(content)
    if how == "bit":
        found[place] ^= 1 << int(random.integers(8))
    elif how == "bytes":
        for other in {place, *(int(place + step) % size for step in random.integers(-40, 40, 4))}:
            found[other] = int(random.integers(256))
    elif how == "zeros":
        stretch = int(random.integers(1, 65))
        found[place : place + stretch] = bytes(len(found[place : place + stretch]))
    elif how == "cut":
        return content[:place]
    else:  # a block that a file system wrote elsewhere
        stretch, other = int(random.integers(8, 257)), int(random.integers(size))
        block = found[other : other + stretch]
        found[place : place + len(block)] = block
        return bytes(found[:size])
    return bytes(found)


def read(kind: str, path: str, config: str, streamed: bool) -> Arrays:
    """What a run reads of the file."""
    feature_map = build_feature_map(_params(config)) if kind in PARQUET else None
    if kind in ("train", "valid", "test"):
        lengths = np.full(SPEC.users, 10**6)
        reader = SplitReader(path, kind, feature_map, lengths, SPEC.items)
        if streamed:
            split = joined(list(StreamedSplit.open(reader, 2**24).parts()))
        else:
            split = reader.read()
        assert split.group is not None
        return {"user": split.user_index, "item": split.item_index, "length": split.seq_len, "label": split.label,
                "group": split.group, **split.context}  # fmt: skip
    if kind == "user_info":
        from model_zoo.pipeline.parquet_files import row_groups

        histories = read_histories(path, SPEC.items, row_groups(path) if streamed else None)
        return {"items": histories.items, "offsets": histories.offsets}
    if kind == "item_info":
        return dict(read_items(path, feature_map))
    if kind in ("h5", "npz"):
        vectors, known = read_vectors(path, "item_id", SPEC.items, 6)
        return {"vectors": vectors.numpy(), "known": known.numpy()}
    if kind == "yaml":
        return _validated(str(Path(path).parent))
    model = _model(config)
    model.load_weights(path)
    return {name: value.numpy() for name, value in model.state_dict().items()}


def outcome(kind: str, path: str, config: str, streamed: bool, expected: Arrays) -> tuple[str, str]:
    """What reading comes to: one of `fuzz.OUTCOMES`, and the words."""
    try:
        found = read(kind, path, config, streamed)
    except UserError as error:
        said = str(error)
        return ("clear error", said) if said and len(said) < 2_000 else ("traceback", f"no sentence: {said[:200]}")
    except (MemoryError, KeyboardInterrupt, SystemExit) as error:
        return "crash", type(error).__name__
    except BaseException as error:  # a panic of polars is no Exception
        import traceback

        return "traceback", f"{type(error).__name__}: {error} at {traceback.format_tb(error.__traceback__)[-1]}"[:600]
    if kind == "yaml":
        return ("read correctly", "") if found == expected else ("values changed", "")
    if found.keys() != expected.keys():
        return "schema changed", "columns"
    for name, column in expected.items():
        if found[name].dtype != column.dtype or found[name].shape[1:] != column.shape[1:]:
            return "schema changed", name
        if len(found[name]) != len(column) and name != "items":  # the number of events is content of lists
            return "schema changed", f"rows of {name}"
    same = all(np.array_equal(found[name], column, equal_nan=True) for name, column in expected.items())
    return ("read correctly", "") if same else ("values changed", "")


def changes_found(folder: Path, name: str, content: bytes, work: Path) -> bool:
    """Whether sums recorded beside a sound file tell of the damage."""
    for other in (*PARQUET.values(), SUMS):
        target = work / other
        if other == name:
            target.write_bytes(content)
        else:
            shutil.copyfile(folder / other, target)
    return bool(check_sums(work))


def case(folder: Path, kind: str, number: int, work: Path) -> tuple[str, str, str]:
    """Case ``number`` of a kind: its outcome, the words, and how the file was damaged."""
    random = np.random.default_rng([list(KINDS).index(kind), number])
    how = DAMAGES[number % len(DAMAGES)]
    writer = number // len(DAMAGES) % len(WRITERS)
    streamed = bool(number // (len(DAMAGES) * len(WRITERS)) % 2)
    home = folder / f"{writer}" if kind in PARQUET else folder
    sound = home / KINDS[kind]
    config = folder / "config"
    content = damaged(sound.read_bytes(), how, random)
    what = f"{how}, {WRITERS[writer]}" if kind in PARQUET else how
    if kind == "yaml":
        target = work / "config" / "dataset_config.yaml"
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(config / "model_config.yaml", target.parent / "model_config.yaml")
    else:
        target = work / sound.name
    target.write_bytes(content)
    expected = _expected(kind, str(sound), str(config))
    found, words = outcome(kind, str(target), str(config), streamed, expected)
    if kind in PARQUET and found in ("values changed", "schema changed") and changes_found(home, sound.name, content, work):
        found += ", sums tell"
    return found, words, what


def main() -> None:
    """Read requests ``{"kind", "number"}`` from stdin; arguments: the folder of sound files, a folder to work in."""
    folder, work = Path(sys.argv[1]), Path(sys.argv[2])
    _model(str(folder / "config"))
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer = case(folder, request["kind"], request["number"], work)
        print(json.dumps(answer), flush=True)


def _write_table(table: pa.Table, path: Path, writer: str) -> None:
    rows = max(20, table.num_rows // 4)
    if writer == "polars":
        pl.from_arrow(table).write_parquet(path, row_group_size=rows)  # type: ignore[union-attr]
    elif writer == "zstd":
        pq.write_table(table, path, row_group_size=rows, compression="zstd")
    elif writer.startswith("plain"):
        checksums = writer.endswith("checksums")
        pq.write_table(
            table, path, row_group_size=rows, compression="none", use_dictionary=False, write_page_checksum=checksums
        )
    else:
        pq.write_table(table, path, row_group_size=rows, compression="snappy", data_page_version="2.0")


def _validated(config: str) -> dict[str, Any]:
    made = load_config(config, "TWIN_fuzz")
    made.set("model_id", "TWIN_fuzz", "--expid")
    params = validate(made)
    build_feature_map(params)
    return params


_params = cache(_validated)


@cache
def _model(config: str) -> Any:
    from model_zoo.experiment.run import build_model

    params = _params(config)
    return build_model(params, build_feature_map(params), None)


@cache
def _expected(kind: str, path: str, config: str) -> Arrays:
    found = read(kind, path, config, False)
    return found if kind == "yaml" else {name: np.array(column) for name, column in found.items()}


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
