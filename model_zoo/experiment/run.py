"""One experiment from a validated config: data, model, training, scores, record."""

from __future__ import annotations

import logging
import os
import sys
import time
from itertools import islice
from typing import Any

import torch

from model_zoo.allocator import keep_freed_memory
from model_zoo.compat import get_activation, get_regularizer, seed_everything
from model_zoo.errors import ConfigError, DataError, UserError
from model_zoo.experiment import record, report
from model_zoo.experiment.config import Config
from model_zoo.layers.routing_usage import mean_routing_stats
from model_zoo.layers.shared_expert_moe import SharedExpertMoE
from model_zoo.pipeline.baselines import popularity_baselines
from model_zoo.pipeline.dataset import CTRDataset, check_labels, load_dataset, with_extension
from model_zoo.pipeline.feature_map import build_feature_map
from model_zoo.pipeline.loader import SequenceLoader
from model_zoo.pipeline.pretrained_vectors import load_pretrained
from model_zoo.pipeline.resident import ResidentHistories, ResidentLoader, resident_splits
from model_zoo.registry import get_model, model_keys
from model_zoo.sequential_ctr import SequentialCTR
from model_zoo.three_phase import ThreePhaseCTR

logger = logging.getLogger("model_zoo")

PATH_KEYS = ("train_data", "valid_data", "test_data", "user_info", "item_info")


def resolve_paths(params: dict[str, Any], root: str) -> None:
    """Make the data paths absolute: relative to the working directory if the file is there, else to the repository."""
    for key in PATH_KEYS:
        path = params.get(key)
        if path:
            here, there = (with_extension(os.path.normpath(os.path.join(base, path))) for base in (os.getcwd(), root))
            params[key] = here if os.path.exists(here) else there
    for key, default in (("model_root", "checkpoints"), ("data_root", "data")):
        params[key] = os.path.normpath(os.path.join(root, params.get(key) or default))


def build_model(params: dict[str, Any], feature_map: Any, dataset: CTRDataset | None) -> SequentialCTR:
    """The experiment's model, its item table beside it.

    Raises:
        ConfigError: a value that the model's constructor refuses.
    """
    check_names(params)
    pretrained = load_pretrained(feature_map, params["embedding_dim"])
    items = dataset.item_features() if dataset else None
    try:
        return get_model(params["model"])(feature_map, item_features=items, pretrained=pretrained, **params)
    except UserError:
        raise
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(f"{params['model_id']}: {error}") from None


def check_names(params: dict[str, Any]) -> None:
    """Refuse names that FuxiCTR would look up in vain, some of them only at the first training step.

    Raises:
        ConfigError: an activation that ``torch.nn`` lacks, or a regulariser that is none.
    """
    for key in model_keys(params["model"]):
        if not key.endswith(("activation", "activations")) or params.get(key) is None:
            continue
        for name in params[key] if isinstance(params[key], list) else [params[key]]:
            try:
                get_activation(name, 1)
            except (AttributeError, NotImplementedError):
                raise ConfigError(f"{key}: {name!r}: write relu, or the name of a layer in torch.nn") from None
    for units, *lists in (("dnn_hidden_units", "dnn_activations", "net_dropout"),
                          ("dcn_hidden_units", "hidden_activations", "net_dropout"),
                          ("mlp1_hidden_units", "mlp1_hidden_activations", "mlp1_dropout"),
                          ("mlp2_hidden_units", "mlp2_hidden_activations", "mlp2_dropout")):  # fmt: skip
        for key in lists:
            if params.get(units) and isinstance(params.get(key), list) and len(params[key]) != len(params[units]):
                raise ConfigError(f"{key} has {len(params[key])} entries for the {len(params[units])} layers of {units}")
    for key in ("embedding_regularizer", "net_regularizer"):
        try:
            get_regularizer(params.get(key) or None)
        except (NotImplementedError, ValueError):
            raise ConfigError(f"{key}: {params[key]!r}: write a number, l1(x), l2(x) or l1_l2(x,y)") from None


def check_device(gpu: int) -> None:
    """Refuse a GPU that is not there."""
    if gpu < 0:
        return
    if not torch.cuda.is_available():
        raise ConfigError(f"--gpu {gpu}: torch {torch.__version__} finds no CUDA device; leave --gpu out to run on the CPU")
    if gpu >= torch.cuda.device_count():
        raise ConfigError(f"--gpu {gpu}: there are {torch.cuda.device_count()} CUDA device(s), numbered from 0")


def run(config: Config, params: dict[str, Any], root: str, config_dir: str) -> dict[str, Any]:
    """Train and score; returns what ``metrics.json`` holds."""
    started = time.perf_counter()
    keep_freed_memory()
    check_device(params["gpu"])
    resolve_paths(params, root)
    seed_everything(params["seed"])
    feature_map = build_feature_map(params)
    dataset = load_dataset(feature_map, params)
    check_labels(dataset, [*params["metrics"], *_monitored(params["monitor"])])
    fingerprint = dataset.fingerprint()
    model = build_model(params, feature_map, dataset)
    loaders = make_loaders(dataset, params)
    check_eval_steps(model, len(loaders["train"]), params)
    folder = record.new_run_folder(params["model_root"], params["dataset_id"], params["model_id"], params["seed"])
    handler = _log_to(os.path.join(folder, "run.log"))
    try:
        record.write_yaml(os.path.join(folder, "config.yaml"), {config.expid: params})
        model.place_checkpoints(folder)
        report.announce(params, dataset, model, time.perf_counter() - started)
        seed_everything(params["seed"])
        fit_started = time.perf_counter()
        model.fit(
            loaders["train"],
            epochs=params["epochs"],
            validation_data=loaders["valid"],
            max_gradient_norm=params["max_gradient_norm"],
        )
        fit_seconds = time.perf_counter() - fit_started
        result = score(model, dataset, loaders, params)
        result |= {
            "expid": config.expid,
            "dataset_id": params["dataset_id"],
            "model": params["model"],
            "seed": params["seed"],
            "config": params,
            "history": model.history,
            "parameters": model.parameter_counts(),
            "data_fingerprint": fingerprint,
            "seconds": {"fit": fit_seconds, "total": time.perf_counter() - started},
            "peak_memory": record.peak_memory(),
            "checkpoint": os.path.basename(model.checkpoint),
            **record.environment(root),
        }
        record.write_json(os.path.join(folder, "metrics.json"), result)
        table = os.path.join(params["model_root"], f"{os.path.basename(os.path.normpath(config_dir))}.csv")
        record.append_result(table, " ".join(sys.argv), config.expid, params["dataset_id"], result["scores"]["final"])
        report.summary(result, folder, table)
        return result
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


def check_eval_steps(model: SequentialCTR, batches: int, params: dict[str, Any]) -> None:
    """Refuse evaluations that a phase is too short to reach.

    Raises:
        ConfigError: ``eval_steps`` is longer than a whole phase.
    """
    epochs = params["epochs"]
    plan = [phase.epochs for phase in model.phases(epochs)] if isinstance(model, ThreePhaseCTR) else [epochs]
    steps = min(plan) * batches
    if (params.get("eval_steps") or 0) > steps:
        raise ConfigError(f"eval_steps: {params['eval_steps']}: must be at most {steps}, the steps of the shortest phase")


def make_loaders(dataset: CTRDataset, params: dict[str, Any]) -> dict[str, SequenceLoader]:
    """A loader per split; only training is shuffled.

    Raises:
        DataError: BatchNorm would train on one row.
        ConfigError: streamed data are wanted on the device whole.
    """
    if params.get("batch_norm") and min(params["batch_size"], len(dataset.splits["train"])) < 2:
        raise DataError(f"{dataset.splits['train'].path}: batch_norm needs at least two rows a batch")
    device = torch.device("cuda", params["gpu"]) if params["gpu"] >= 0 else torch.device("cpu")
    resident = resident_splits(dataset, device, params["data_on_device"])
    histories = ResidentHistories.of(dataset.histories, device) if resident else None

    def loader(name: str) -> SequenceLoader:
        order = {"shuffle": name == "train" and params["shuffle"], "seed": params["seed"], "training": name == "train"}
        where = (dataset, name, params["batch_size"], params["max_len"])
        if name in resident:
            return ResidentLoader(*where, device=device, histories=histories, **order)
        return SequenceLoader(*where, device=device, prefetch=params["prefetch"], **order)

    return {name: loader(name) for name in dataset.splits}


def score(
    model: SequentialCTR, dataset: CTRDataset, loaders: dict[str, SequenceLoader], params: dict[str, Any]
) -> dict[str, Any]:
    """Scores of the final model and of phase 1's backbone, of popularity, and how the routers spread tokens."""
    splits = [name for name in ("valid", "test") if name in loaders]
    scores = {"final": {name: model.evaluate(loaders[name]) for name in splits}}
    result: dict[str, Any] = {
        "baselines": {name: popularity_baselines(dataset, name, params["metrics"]) for name in splits}
    }
    if isinstance(model, ThreePhaseCTR) and model.expert_modules():
        result["codebook_usage"] = model.codebook_usage(loaders["valid"])
        model.load_weights(model.phase_checkpoint("phase1"))
        scores["phase1"] = {name: model.evaluate(loaders[name]) for name in splits}
        model.load_weights(model.final_checkpoint)
    elif routing := routing_report(model, loaders["valid"]):
        result["routing"] = routing
    return {"scores": scores, **result}


@torch.no_grad()
def routing_report(model: SequentialCTR, batches: SequenceLoader, max_batches: int = 16) -> dict[str, Any]:
    """How a rival method's routers, in evaluation, treat the first batches of a split; empty without such a router."""
    layers = [layer for layer in model.method_layers() if isinstance(layer, SharedExpertMoE)]
    if not layers:
        return {}
    model.eval()
    return mean_routing_stats(layers[0].routing_stats(model._read(batch)[2]) for batch in islice(batches, max_batches))


def _monitored(monitor: str | dict[str, float]) -> list[str]:
    return [monitor] if isinstance(monitor, str) else list(monitor)


def _log_to(path: str) -> logging.Handler:
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger().addHandler(handler)
    return handler
