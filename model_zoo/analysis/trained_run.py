"""A finished run brought back: its data and its model with the final weights."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from model_zoo.errors import ConfigError, DataError
from model_zoo.experiment.run import build_model
from model_zoo.experiment.schema import validate
from model_zoo.experiment.unfinished import Run
from model_zoo.pipeline.dataset import CTRDataset, load_dataset
from model_zoo.pipeline.feature_map import build_feature_map
from model_zoo.sequential_ctr import SequentialCTR


@dataclass(frozen=True)
class TrainedRun:
    """A run's config, data, and model in evaluation mode on the CPU."""

    params: dict[str, Any]
    dataset: CTRDataset
    model: SequentialCTR


def load_trained(folder: str) -> TrainedRun:
    """The model of a finished run, beside the data that it was trained on.

    Raises:
        ConfigError: the folder holds no finished run, or its checkpoint is missing or of another config.
        DataError: the data are not there, or not those of the run.
    """
    run = Run.read(folder)
    record = run.record()
    if record is None:
        raise ConfigError(f"{folder}: the run is not finished; go on with run_expid.py --resume {folder}")
    config = run.config()
    config.set("gpu", -1, "analysis")
    params = validate(config)
    dataset = load_dataset(build_feature_map(params), params)
    before, now = record.get("data_fingerprint") or {}, dataset.fingerprint()
    if changed := sorted(name for name, digest in before.items() if now.get(name) != digest):
        raise DataError(f"{folder}: {', '.join(changed)} changed since the run was made; put the files back")
    model = build_model(params, dataset.feature_map, dataset)
    model.load_weights(os.path.join(folder, record.get("checkpoint") or f"{run.expid}.model"))
    model.eval()
    return TrainedRun(params, dataset, model)
