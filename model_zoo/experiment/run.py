"""One experiment from a validated config: data, model, training, scores, record."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from model_zoo.allocator import keep_freed_memory
from model_zoo.collapse import routing_report
from model_zoo.compat import seed_everything
from model_zoo.determinism import deterministic_errors, use_deterministic_kernels
from model_zoo.errors import ConfigError, DataError, UserError
from model_zoo.experiment import record, report
from model_zoo.experiment.config import Config
from model_zoo.experiment.exposure import exposure
from model_zoo.experiment.paths import resolve_paths
from model_zoo.experiment.record_flops import count_flops
from model_zoo.experiment.slices import Slicer
from model_zoo.experiment.trackers import Trackers
from model_zoo.experiment.unfinished import (
    CONFIG_FILE,
    LOCK_FILE,
    LOG_FILE,
    RECORD_FILE,
    STATE_FILE,
    Run,
    identity,
    newest_run,
    saved_state,
)
from model_zoo.files import locked
from model_zoo.interrupts import Stopped, held
from model_zoo.phased_training import PhasedCTR
from model_zoo.pipeline.baselines import popularity_baselines
from model_zoo.pipeline.dataset import CTRDataset, check_labels, load_dataset
from model_zoo.pipeline.feature_map import build_feature_map
from model_zoo.pipeline.loader import SequenceLoader
from model_zoo.pipeline.pretrained_vectors import load_pretrained
from model_zoo.pipeline.resident import ResidentHistories, ResidentLoader, resident_splits
from model_zoo.registry import get_model
from model_zoo.resume import StateSaver
from model_zoo.sequential_ctr import SequentialCTR
from model_zoo.three_phase import ThreePhaseCTR

logger = logging.getLogger("model_zoo")


def build_model(params: dict[str, Any], feature_map: Any, dataset: CTRDataset | None) -> SequentialCTR:
    """The experiment's model, its item table beside it.

    Raises:
        ConfigError: a value that the model's constructor refuses.
    """
    pretrained = load_pretrained(feature_map, params["embedding_dim"])
    items = dataset.item_features() if dataset else None
    try:
        return get_model(params["model"])(feature_map, item_features=items, pretrained=pretrained, **params)
    except UserError:
        raise
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(f"{params['model_id']}: {error}") from None


def check_device(gpu: int) -> None:
    """Refuse a GPU that is not there."""
    if gpu < 0:
        return
    if not torch.cuda.is_available():
        raise ConfigError(f"--gpu {gpu}: torch {torch.__version__} finds no CUDA device; leave --gpu out to run on the CPU")
    if gpu >= torch.cuda.device_count():
        raise ConfigError(f"--gpu {gpu}: there are {torch.cuda.device_count()} CUDA device(s), numbered from 0")


def run(
    config: Config, params: dict[str, Any], root: str, config_dir: str, resume: Run | bool = False
) -> dict[str, Any]:
    """Train and score; returns what ``metrics.json`` holds.

    Args:
        resume: go on with this run, or with the newest one of the experiment and seed if there is one.
    """
    started = time.perf_counter()
    keep_freed_memory()
    check_device(params["gpu"])
    if params["deterministic"]:
        logger.info(use_deterministic_kernels(_device(params)))
    resolve_paths(params, root)
    earlier = resume if isinstance(resume, Run) else newest_run(params, config.expid) if resume else None
    table = os.path.join(params["model_root"], f"{os.path.basename(os.path.normpath(config_dir))}.csv")
    if earlier is not None and (result := earlier.record()) is not None:
        logger.info("%s: finished already; leave out --resume to run the experiment again", earlier.folder)
        return finish(earlier.folder, result, table)
    seed_everything(params["seed"])
    feature_map = build_feature_map(params)
    dataset = load_dataset(feature_map, params)
    check_labels(dataset, [*params["metrics"], *_monitored(params["monitor"])])
    fingerprint = dataset.fingerprint()
    model = build_model(params, feature_map, dataset)
    loaders = make_loaders(dataset, params)
    check_eval_steps(model, len(loaders["train"]), params)
    if earlier is not None:
        folder = earlier.folder
    else:
        folder = record.new_run_folder(params["model_root"], params["dataset_id"], params["model_id"], params["seed"])
        record.write_yaml(os.path.join(folder, CONFIG_FILE), {config.expid: params})
    with locked(os.path.join(folder, LOCK_FILE), wait=False), _logged(os.path.join(folder, LOG_FILE)):
        model.place_checkpoints(folder)
        report.announce(params, dataset, model, time.perf_counter() - started)
        interval = params["checkpoint_minutes"], params["checkpoint_steps"]
        model.saver = saver = StateSaver(os.path.join(folder, STATE_FILE), identity(fingerprint), *interval)
        if earlier is not None and (state := saved_state(earlier, saver.identity)) is not None:
            model.resume_from = state
            saver.go_on_from(state)
            report.announce_resume(folder, saver.resumes[-1])
        try:
            with deterministic_errors() if params["deterministic"] else nullcontext():
                result = train_and_score(model, dataset, loaders, params, folder, config.expid)
        except Stopped as stop:
            logger.warning("stopped by %s; go on with: python run_expid.py --resume %s", stop.signal.name, folder)
            raise
        result |= {
            "expid": config.expid,
            "dataset_id": params["dataset_id"],
            "model": params["model"],
            "seed": params["seed"],
            "config": params,
            "command": " ".join(sys.argv),
            "finished": time.strftime("%Y%m%d-%H%M%S"),
            "history": model.history,
            "parameters": model.parameter_counts(),
            "data_fingerprint": fingerprint,
            "resumes": saver.resumes,
            "peak_memory": record.peak_memory(),
            "checkpoint": os.path.basename(model.checkpoint),
            "format": record.FORMAT_VERSION,
            "log": LOG_FILE,
            "model_config": model.config,
            "flops": count_flops(model, dataset, params["max_len"]),
            **record.environment(root),
        }
        result["seconds"]["total"] = time.perf_counter() - started + saver.seconds_before
        with held():
            record.write_json(os.path.join(folder, RECORD_FILE), result)
            return finish(folder, result, table)


def train_and_score(
    model: SequentialCTR, dataset: CTRDataset, loaders: dict[str, SequenceLoader], params: dict[str, Any], folder: str,
    expid: str,
) -> dict[str, Any]:  # fmt: skip
    """The training, watched by the run's trackers, and the final model's scores; with the seconds of the first."""
    assert model.saver is not None
    with Trackers(params["trackers"], folder, expid, model.history) as trackers:
        trackers.start(params)
        model.listeners.append(trackers)
        seed_everything(params["seed"])
        model.fit(
            loaders["train"],
            epochs=params["epochs"],
            validation_data=loaders["valid"],
            max_gradient_norm=params["max_gradient_norm"],
        )
        seconds = {"fit": model.saver.seconds}
        model.saver.write(model, "done")
        result = score(model, dataset, loaders, params)
        trackers.finish(result["scores"]["final"])
    return {**result, "seconds": seconds}


def finish(folder: str, result: dict[str, Any], table: str) -> dict[str, Any]:
    """What follows a run's record, and may be repeated: its line in the results table, its training state gone."""
    final = result["scores"]["final"]
    record.append_result(
        table, result["command"], result["expid"], result["dataset_id"], final, when=result["finished"]
    )
    state = os.path.join(folder, STATE_FILE)
    if os.path.exists(state):
        os.remove(state)
    report.summary(result, folder, table)
    return result


def check_eval_steps(model: SequentialCTR, batches: int, params: dict[str, Any]) -> None:
    """Refuse evaluations that a phase is too short to reach.

    Raises:
        ConfigError: ``eval_steps`` is longer than a whole phase.
    """
    epochs = params["epochs"]
    in_phases = isinstance(model, PhasedCTR) and model.in_phases
    plan = [phase.epochs for phase in model.phases(epochs)] if in_phases else [epochs]
    steps = min(plan) * batches
    if (params.get("eval_steps") or 0) > steps:
        raise ConfigError(
            f"eval_steps: {params['eval_steps']}: must be at most {steps}, the steps of the shortest phase; lower it, or "
            "leave it out for one evaluation an epoch"
        )


def make_loaders(dataset: CTRDataset, params: dict[str, Any]) -> dict[str, SequenceLoader]:
    """A loader per split; only training is shuffled.

    Raises:
        DataError: BatchNorm would train on one row.
        ConfigError: streamed data are wanted on the device whole.
    """
    if params.get("batch_norm") and min(params["batch_size"], len(dataset.splits["train"])) < 2:
        raise DataError(f"{dataset.splits['train'].path}: batch_norm needs at least two rows a batch")
    device = _device(params)
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
    slicer = Slicer.of(dataset, params.get("category_col"))
    metrics = list(dict.fromkeys([*params["metrics"], *_monitored(params["monitor"])]))
    scores: dict[str, Any] = {}
    slices: dict[str, Any] = {"definitions": slicer.definitions}

    def evaluate(name: str) -> None:
        scores[name], slices[name] = {}, {}
        for split in splits:
            prediction, label, group = model.predict_split(loaders[split])
            scores[name][split] = model.evaluate_metrics(label, prediction, metrics, group)
            slices[name][split] = slicer.scores(split, prediction, label, group)

    evaluate("final")
    result: dict[str, Any] = {
        "baselines": {name: popularity_baselines(dataset, name, params["metrics"]) for name in splits}
    }
    if isinstance(model, ThreePhaseCTR) and model.expert_modules():
        result["codebook_usage"] = model.codebook_usage(loaders["valid"])
        result["exposure"] = exposure(model, loaders[splits[-1]], dataset, slicer.category)
    elif routing := routing_report(model, loaders["valid"]):
        result["routing"] = routing
    if isinstance(model, PhasedCTR) and model.in_phases and model.expert_modules():
        model.load_backbone()
        evaluate("phase1")
        model.load_final()
    return {"scores": scores, "slices": slices, **result}


def _device(params: dict[str, Any]) -> torch.device:
    return torch.device("cuda", params["gpu"]) if params["gpu"] >= 0 else torch.device("cpu")


def _monitored(monitor: str | dict[str, float]) -> list[str]:
    return [monitor] if isinstance(monitor, str) else list(monitor)


@contextmanager
def _logged(path: str) -> Iterator[None]:
    """Inside, everything logged goes to the run's own file, too."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
