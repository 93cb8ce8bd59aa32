"""Shared fixtures: the tiny synthetic data set with a config directory that trains on it, the golden tiny data set, and
``run_expid.py`` as a subprocess or in this process."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch

from model_zoo.pipeline.dataset import CTRDataset, load_dataset
from model_zoo.pipeline.feature_map import build_feature_map
from model_zoo.pipeline.synthetic import TINY, generate
from model_zoo.pipeline.synthetic_files import dataset_config, write

ROOT = Path(__file__).resolve().parents[1]
#: the TINY preset with fewer rows: a run takes a few seconds
SPEC = replace(TINY, rows=(1_500, 400, 400))
GOLDEN_TINY = ROOT / "tests" / "golden" / "tiny"

TINY_EXPERIMENTS = """\
Base:
  model_root: ./checkpoints/
  metrics: [gAUC, AUC, logloss]
  monitor: {gAUC: 1, AUC: 1}
  monitor_mode: max
  early_stop_patience: 2
  group_id: user_index
  shuffle: True
  seed: 7
  task: binary_classification

TWIN_tiny: &tiny
  model: TWIN
  dataset_id: tiny
  embedding_dim: 16
  dnn_hidden_units: [32]
  attention_dim: 16
  num_heads: 2
  topk: 8
  short_seq_len: 8
  batch_norm: True
  embedding_regularizer: 1e-5
  learning_rate: 1.e-2
  batch_size: 256
  max_len: 24
  epochs: 1

MoS_TWIN_tiny:
  <<: *tiny
  model: MoS_TWIN
  n_item_experts: 4
  n_window_experts: 4
  topk_item: 2
  topk_window: 2
  codebook_dim: 8
  window_size: 4
  window_stride: 2
  kmeans_tokens: 2000
"""

#: feature_cols that give the golden files' feature maps: "A" item features only, "B" with context features
META_COLS = [{"name": name, "active": True, "dtype": "int", "type": "meta"} for name in ("user_index", "item_index")]
META_COLS.append({"name": ["seq_len"], "active": True, "dtype": "int", "type": "meta"})
ITEM_COLS = [
    {"name": "item_id", "active": True, "dtype": "int", "type": "categorical", "source": "item", "vocab_size": 60},
    {"name": "cate_id", "active": True, "dtype": "int", "type": "categorical", "source": "item", "vocab_size": 6},
]
IMAGE_COL = {
    "name": "image_emb_dim8", "active": True, "dtype": "float", "type": "embedding", "source": "item",
    "embedding_dim": 8,
}  # fmt: skip
CONTEXT_COLS = [
    {"name": "user_id", "active": True, "dtype": "int", "type": "categorical", "vocab_size": 42},
    {"name": "gender", "active": False, "dtype": "int", "type": "categorical", "vocab_size": 3},
    {"name": "tags", "active": True, "dtype": "int", "type": "sequence", "max_len": 3, "vocab_size": 6},
]
FEATURE_COLS = {
    "A": [*META_COLS, *ITEM_COLS, {**IMAGE_COL, "feature_encoder": "nn.Identity()"}],
    "B": [*META_COLS, *CONTEXT_COLS, *ITEM_COLS, IMAGE_COL],
}


def in_groups(frame: pl.DataFrame, path: Path | str, rows: int, **options: Any) -> None:
    """Write a parquet file in row groups of so many rows; polars keeps to a size since 1.41 only."""
    pq.write_table(frame.to_arrow(), path, row_group_size=rows, **options)


class Answer(NamedTuple):
    """What a command left."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The tests' shapes are too small to gain from threads, and threads that wait for a busy core cost seconds."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The TINY synthetic data set, as files."""
    folder = tmp_path_factory.mktemp("data") / "tiny"
    write(generate(SPEC), folder)
    return folder


@pytest.fixture(scope="session")
def tiny_config(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config directory with ``TWIN_tiny`` and ``MoS_TWIN_tiny`` on it: LongCTR's two flat files, which name no times."""
    folder = tmp_path_factory.mktemp("tiny_config")
    (folder / "model_config.yaml").write_text(TINY_EXPERIMENTS)
    described = dataset_config(SPEC, tiny_folder).replace("    time_col: full_time_seq\n", "")
    (folder / "dataset_config.yaml").write_text(described)
    return folder


@pytest.fixture(scope="session")
def tiny_params(tiny_config: Path) -> Callable[..., dict[str, Any]]:
    """``tiny_params(expid, **changes)``: the validated parameters of one of those experiments."""

    def make(expid: str = "TWIN_tiny", **changes: Any) -> dict[str, Any]:
        from model_zoo.experiment.config import load_config
        from model_zoo.experiment.schema import validate

        config = load_config(str(tiny_config), expid)
        config.set("model_id", expid, "--expid")
        for key, value in changes.items():
            config.set(key, value, "test")
        return validate(config)

    return make


@pytest.fixture(scope="session")
def tiny_dataset(tiny_params: Callable[..., dict[str, Any]]) -> CTRDataset:
    """The TINY synthetic data set, loaded."""
    params = tiny_params()
    return load_dataset(build_feature_map(params), params)


@pytest.fixture(scope="session")
def golden_params() -> Callable[..., dict[str, Any]]:
    """``golden_params(kind)``: data parameters of the golden tiny data set, whose one split serves as all three."""

    def make(kind: str = "B", **changes: Any) -> dict[str, Any]:
        files = {f"{name}_data": str(GOLDEN_TINY / "train.parquet") for name in ("train", "valid", "test")}
        files |= {name: str(GOLDEN_TINY / f"{name}.parquet") for name in ("user_info", "item_info")}
        label = {"name": "is_click", "dtype": "float"}
        return {
            "dataset_id": "tiny", "feature_cols": FEATURE_COLS[kind], "label_col": label, "group_id": "user_index",
            "embedding_dim": 8, **files, **changes,
        }  # fmt: skip

    return make


@pytest.fixture(scope="session")
def golden_tiny(golden_params: Callable[..., dict[str, Any]]) -> CTRDataset:
    """The golden tiny data set with all its features (kind B)."""
    params = golden_params()
    return load_dataset(build_feature_map(params), params)


@pytest.fixture(scope="session")
def run_expid() -> Callable[..., Answer]:
    """``run_expid(*arguments, cwd=None)``: ``python run_expid.py`` as a user calls it."""

    def run(*arguments: object, cwd: Path | None = None) -> Answer:
        command = [sys.executable, str(ROOT / "run_expid.py"), *map(str, arguments)]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=cwd or ROOT, env=environment, timeout=300)
        return Answer(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], kept_logging: None, kept_registry: None) -> Callable[..., Answer]:
    """``cli(*arguments, root=...)``: the same in this process; any exception but a clean exit reaches the test."""
    from model_zoo.experiment.cli import main

    def run(*arguments: object, root: Path = ROOT) -> Answer:
        capsys.readouterr()
        try:
            code = main(str(root), [str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        written = capsys.readouterr()
        return Answer(code, written.out, written.err)

    return run


@pytest.fixture
def kept_logging() -> Iterator[None]:
    """The root logger's handlers and level as they were, after a command set up its own."""
    logger = logging.getLogger()
    handlers, level = logger.handlers[:], logger.level
    yield
    logger.handlers[:], logger.level = handlers, level


@pytest.fixture
def kept_registry() -> Iterator[None]:
    """The registry's models as they were, after a test that registered more."""
    from model_zoo import registry

    backbones, methods = dict(registry.BACKBONES), dict(registry.METHODS)
    yield
    for kept, known in ((backbones, registry.BACKBONES), (methods, registry.METHODS)):
        if known.keys() != kept.keys():
            known.clear()
            known.update(kept)
            registry.get_model.cache_clear()


@pytest.fixture(scope="session")
def golden_arrays() -> dict[str, np.ndarray]:
    """``golden/loader.npz``: the tensors that LongCTR's loader makes of the golden tiny data set."""
    with np.load(ROOT / "tests" / "golden" / "loader.npz", allow_pickle=False) as arrays:
        return dict(arrays)
