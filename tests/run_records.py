"""Records of runs that never ran, in the folders that `run_expid.py` makes."""

import json
from pathlib import Path
from typing import Any

import yaml

from model_zoo.experiment import record

MICRO = "MicroVideo1.7M_x2"


def result(model: str, seed: int, auc: float, gauc: float = 0.6, dataset: str = MICRO, **config: Any) -> dict[str, Any]:
    """A record of today's format; its validation figures are the test ones plus 0.01."""
    test = {"gAUC": gauc, "AUC": auc, "logloss": 0.5}
    settings = {"model": model, "dataset_id": dataset, "model_id": f"{model}_x", "seed": seed, "max_len": 200,
                "monitor": {"gAUC": 1.0, "AUC": 1.0}, "train_data": "/somewhere/train.parquet"}  # fmt: skip
    return {
        "format": record.FORMAT_VERSION, "expid": f"{model}_x", "dataset_id": dataset, "model": model, "seed": seed,
        "config": {**settings, **config}, "model_config": {"head": config.get("head", "dnn")},
        "scores": {"final": {"valid": {name: value + 0.01 for name, value in test.items()}, "test": test}},
        "data_fingerprint": {"test_data": "00ff"}, "finished": f"20260101-0000{seed:02d}", "seconds": {"total": 60.04},
        "peak_memory": {"resident_mib": 512.0, "cuda_mib": 2048.0}, "parameters": {"total": 1000},
        "flops": {"prediction": {"total": 5e6}}, "git_commit": "abc", "resumes": [], "history": [],
    }  # fmt: skip


def save(root: Path, *records: dict[str, Any]) -> Path:
    """Run folders as `run_expid.py` makes them."""
    for found in records:
        for number in range(1000):
            folder = root / found["dataset_id"] / found["expid"] / f"{number:03d}-seed{found['seed']}"
            if not folder.exists():
                break
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps(found))
        (folder / "config.yaml").write_text(yaml.safe_dump({found["expid"]: found["config"]}))
    return root
