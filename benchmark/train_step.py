"""A MoS model's train step beside its plain backbone's: same batches, alternating, medians and their ratio.

``python benchmark/train_step.py --expid MoS_TWIN_microvideo`` times the experiment's settings on synthetic data of the
MicroVideo shape; with ``--data`` on the experiment's own files.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from model_zoo.compat import seed_everything
from model_zoo.experiment.config import load_config
from model_zoo.experiment.run import build_model, make_loaders, resolve_paths
from model_zoo.experiment.schema import validate
from model_zoo.pipeline.dataset import load_dataset
from model_zoo.pipeline.feature_map import build_feature_map
from model_zoo.pipeline.synthetic import MICROVIDEO, generate
from model_zoo.pipeline.synthetic_files import write

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def experiment(expid: str, overrides: list[str], folder: str | None) -> dict[str, Any]:
    """Validated parameters of an experiment, its files replaced by those in ``folder``."""
    config = load_config(os.path.join(ROOT, "config"), expid, overrides)
    config.set("model_id", expid, "")
    config.set("gpu", -1, "")
    params = validate(config)
    if folder:
        for key, name in (("train_data", "train"), ("valid_data", "valid"), ("test_data", "test")):
            params[key] = os.path.join(folder, f"{name}.parquet")
        for key in ("user_info", "item_info"):
            params[key] = os.path.join(folder, f"{key}.parquet")
    resolve_paths(params, ROOT)
    return params


def compare(expid: str, overrides: list[str], folder: str | None, batches: int) -> list[dict[str, Any]]:
    """Median step seconds of each phase and of the plain backbone, interleaved batch by batch."""
    params = experiment(expid, overrides, folder)
    feature_map = build_feature_map(params)
    dataset = load_dataset(feature_map, params)
    loader = make_loaders(dataset, params)["train"]
    loaded = [batch for batch, _ in zip(loader, range(batches), strict=False)]
    rows = []
    for name in ("phase1", "phase2", "phase3"):
        seed_everything(params["seed"])
        mixture = build_model(params, feature_map, dataset)
        plain = build_model({**params, "model": mixture.backbone.name}, feature_map, dataset)
        phase = next(phase for phase in mixture.phases(1) if phase.name == name)  # type: ignore[attr-defined]
        if "experts" in phase.trains:
            mixture.start_experts(loader)  # type: ignore[attr-defined]
        mixture.enter(phase)  # type: ignore[attr-defined]
        seconds: dict[str, list[float]] = {"mixture": [], "plain": []}
        for batch in loaded:
            for key, model in (("mixture", mixture), ("plain", plain)):
                model._batch_index, model._max_gradient_norm = 0, 10.0
                model.train()
                start = time.perf_counter()
                model.train_step(batch)
                seconds[key].append(time.perf_counter() - start)
        warm = {key: values[2:] for key, values in seconds.items()}
        rows.append({
            "phase": name,
            "mixture_seconds": statistics.median(warm["mixture"]),
            "plain_seconds": statistics.median(warm["plain"]),
            "ratio": statistics.median(a / b for a, b in zip(warm["mixture"], warm["plain"], strict=True)),
        })  # fmt: skip
    return rows


def main() -> None:
    """Print one line per phase and k, and a json record."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--expid", default="MoS_TWIN_microvideo")
    options.add_argument("--data", action="store_true", help="the experiment's own files instead of synthetic ones")
    options.add_argument("--batches", type=int, default=12)
    options.add_argument("--topk", type=int, nargs="+", default=[1, 2])
    options.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if not arguments.data:
            write(generate(MICROVIDEO), Path(folder))
        for k in arguments.topk:
            overrides = [*arguments.set, f"topk_item={k}", f"topk_window={k}"]
            for row in compare(arguments.expid, overrides, None if arguments.data else folder, arguments.batches):
                print(
                    f"k={k} {row['phase']}: {row['mixture_seconds'] * 1e3:.0f} ms, plain backbone "
                    f"{row['plain_seconds'] * 1e3:.0f} ms, ratio {row['ratio']:.2f}"
                )
                print(json.dumps({"expid": arguments.expid, "k": k, "threads": torch.get_num_threads(), **row}))


if __name__ == "__main__":
    main()
