"""Folders of finished runs for tests, without their training."""

import json
from pathlib import Path
from typing import Any

import torch

from model_zoo.experiment.record import write_json, write_yaml
from model_zoo.experiment.run import build_model
from model_zoo.pipeline.dataset import load_dataset
from model_zoo.pipeline.feature_map import build_feature_map


def record(model: str = "TWIN", seed: int = 1, auc: float = 0.7, **changes: Any) -> dict[str, Any]:
    """A record without a router."""
    scores = {"AUC": auc, "gAUC": auc - 0.1, "logloss": 1 - auc}
    history = [
        {"phase": phase, "epoch": 1, "step": 10, "train_loss": 0.6, "learning_rate": 1e-3, "valid": scores, "best": True,
         "gradient_norm": {"mean": 2.0}, "warnings": {}, "routing": routing}
        for phase, routing in (("phase1", {}), ("phase2", {"item": {"share": [0.25, 0.75]}}))
    ]  # fmt: skip
    return {
        "format": 2, "expid": f"{model}_x", "dataset_id": "set", "model": model, "seed": seed,
        "config": {"model": model, "max_len": 50, "monitor": "AUC"}, "finished": f"20260101-00000{seed}",
        "scores": {"final": {"valid": scores, "test": scores}}, "history": history, **changes,
    }  # fmt: skip


def put(folder: Path, found: dict[str, Any]) -> Path:
    """A run folder with that record."""
    run = folder / f"{found['model']}-{found['seed']}-{len(list(folder.glob('*')))}"
    run.mkdir(parents=True)
    (run / "metrics.json").write_text(json.dumps(found))
    return run


def untrained_run(params: dict[str, Any], folder: Path) -> Path:
    """A finished run's folder below ``folder``, its model as it was initialised."""
    torch.manual_seed(params["seed"])
    feature_map = build_feature_map(params)
    dataset = load_dataset(feature_map, params)
    model = build_model(params, feature_map, dataset)
    run = folder / f"{params['model']}-{params['seed']}"
    run.mkdir(parents=True)
    model.save_weights(str(run / "x.model"))
    write_yaml(str(run / "config.yaml"), {params["model_id"]: params})
    found = record(params["model"], params["seed"], config=params, expid=params["model_id"], dataset_id="tiny")
    write_json(str(run / "metrics.json"), {**found, "checkpoint": "x.model", "data_fingerprint": dataset.fingerprint()})
    return run
