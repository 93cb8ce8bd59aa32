"""An epoch over a file several times the bound on memory."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from conftest import in_groups

EPOCHS = """
import sys
from model_zoo.pipeline.dataset import load_dataset
from model_zoo.pipeline.feature_map import build_feature_map
from model_zoo.pipeline.loader import SequenceLoader

folder = sys.argv[1]
columns = [{"name": n, "type": "meta"} for n in ("user_index", "item_index", "seq_len")]
columns += [{"name": "item_id", "type": "categorical", "source": "item", "vocab_size": 9}]
columns += [{"name": f"number{i}", "type": "numeric"} for i in range(8)]
for train, limit in (("small", None), ("small", 16), ("big", 16), ("big", None)):
    params = {"dataset_id": "big", "feature_cols": columns, "label_col": {"name": "click"}, "embedding_dim": 4,
              "item_info": f"{folder}/item_info", "user_info": f"{folder}/user_info", "train_data": f"{folder}/{train}",
              "valid_data": f"{folder}/small", "memory_limit_mib": limit, "data_root": folder}
    dataset = load_dataset(build_feature_map(params), params)
    rows = sum(len(batch) for batch in SequenceLoader(dataset, "train", 8192, 10, shuffle=True))
    peak = next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(rows, peak)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads its peak from /proc")
def test_memory_keeps_to_its_bound(tmp_path: Path, root: Path) -> None:
    """A file of 92 MiB of columns (66 as arrays) is read beside a bound of 16."""
    rows, random = 1_000_000, np.random.default_rng(0)
    frame = pl.DataFrame(
        {
            "user_index": np.zeros(rows, np.int64),
            "item_index": random.integers(1, 9, rows),
            "seq_len": random.integers(0, 5, rows),
            "click": random.integers(0, 2, rows),
            **{f"number{i}": random.random(rows) for i in range(8)},
        }
    )
    in_groups(frame, tmp_path / "big.parquet", 10_000, compression="none")
    frame[:1000].write_parquet(tmp_path / "small.parquet")
    pl.DataFrame({"item_index": range(9), "item_id": range(9)}).write_parquet(tmp_path / "item_info.parquet")
    pl.DataFrame({"user_index": [0], "full_item_seq": [[1, 2, 3, 4]]}).write_parquet(tmp_path / "user_info.parquet")
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1"}
    command = [sys.executable, "-c", EPOCHS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=True)
    read, peaks = zip(*(map(int, line.split()) for line in done.stdout.splitlines()))
    assert read == (1000, 1000, rows, rows)
    bounded, free = peaks[2] - peaks[1], peaks[3] - peaks[1]
    # 16 MiB, and what the parquet reader, the allocators and the batches under way keep; without a bound, all columns
    assert bounded < 16 + 32 < 92 < free, peaks
