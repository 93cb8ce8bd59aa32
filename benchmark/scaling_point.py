"""One point of ``benchmark/scaling.py``: a model of given sizes, its training step's seconds, and its memory.

Memory is counted from PyTorch's own record of its CPU allocations (``torch.profiler`` with ``profile_memory``): what
parameters, buffers and optimizer state hold between steps, and the most that a step holds beside them. A process's peak
resident memory would count libraries as well, and buffers that the C library keeps for later; it never falls, so every
point would need a process of its own, and small models would drown in it. Not counted is what a kernel allocates
without PyTorch's allocator.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, Literal

import torch
from flops_models import enter, train
from torch.profiler import ProfilerActivity, profile
from train_step import experiment

from model_zoo.batch import Batch, ItemFeatures
from model_zoo.compat import seed_everything
from model_zoo.pipeline.feature_map import build_feature_map
from model_zoo.registry import get_model
from model_zoo.sequential_ctr import SequentialCTR
from model_zoo.three_phase import ThreePhaseCTR

# the profiler's own messages, one a trace
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

MIB = 2**20
#: ``cpu`` is this process's own time over all threads, which other processes on the machine disturb less
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
#: experts per token, or all if there are fewer
TOPK = 2
#: tokens that start a codebook: fewer than in training, for no step's cost depends on them
KMEANS_TOKENS = 16_384
EXPERT_KEYS = {
    "MoS": (("n_item_experts", "n_window_experts"), ("topk_item", "topk_window")),
    "GShard": (("n_experts",), ("topk_experts",)),
}


def method_of(model: str) -> str:
    """``MoS`` or ``GShard``, or ``plain``."""
    return next((method for method in EXPERT_KEYS if model.startswith(f"{method}_")), "plain")


@cache
def settings(model: str, experts: int) -> dict[str, Any]:
    """Validated parameters: ``<model>_microvideo``, a rival's with as many experts as both of MoS's routers."""
    expid = f"{model}_microvideo" + ("_budget" if method_of(model) == "GShard" else "")
    counts, topks = EXPERT_KEYS.get(method_of(model), ((), ()))
    overrides = [f"{key}={experts}" for key in counts] + [f"{key}={min(TOPK, experts)}" for key in topks]
    if method_of(model) == "MoS":
        overrides.append(f"kmeans_tokens={KMEANS_TOKENS}")
    return experiment(expid, overrides, None)


def item_table(features: dict[str, dict[str, Any]], items: int) -> ItemFeatures:
    """Features of ``items`` items (padding included): ids as rows are numbered, others drawn uniformly or normally."""
    columns: dict[str, torch.Tensor] = {}
    for name, spec in features.items():
        if spec["type"] == "embedding":
            columns[name] = torch.randn(items, spec["embedding_dim"])
        elif spec["vocab_size"] == items:
            columns[name] = torch.arange(items)
        else:
            columns[name] = torch.randint(1, spec["vocab_size"], (items,))
    return ItemFeatures(columns)


def draw(rows: int, length: int, items: int) -> Batch:
    """Impressions after full histories; items drawn uniformly, a fifth of the labels 1."""
    number = torch.arange(rows)
    history = torch.randint(1, items, (rows, length), dtype=torch.int32)
    target = torch.randint(1, items, (rows,), dtype=torch.int32)
    return Batch(history, target, {}, (number % 5 == 0).float(), number, number)


def build(params: dict[str, Any], items: int, batch: Batch) -> SequentialCTR:
    """The model over ``items`` items, as it trains: MoS in its joint phase, codebooks by k-means of ``batch``."""
    columns = [{**c, "vocab_size": items} if c["name"] == "item_id" else c for c in params["feature_cols"]]
    feature_map = build_feature_map({**params, "feature_cols": columns})
    described = {name: spec for name, spec in feature_map.features.items() if spec.get("source") == "item"}
    model = get_model(params["model"])(feature_map, item_features=item_table(described, items), **params)
    if isinstance(model, ThreePhaseCTR):
        model.start_experts([batch])
        enter(model, "phase3")
    return model


def measure(
    model_name: str, batch_size: int, repeats: int, clock: Literal["wall", "cpu"], *, length: int, experts: int, items: int
) -> dict[str, float]:
    """Time and memory of a training step of one model.

    Args:
        model_name: registered name.
        batch_size: rows.
        repeats: timed steps; one before them is not timed, one after them is traced for memory.
        clock: of `CLOCKS`.
        length: items of every history.
        experts: per router of MoS; a rival has twice as many.
        items: rows of the item table, padding included.

    Returns:
        ``seconds``: the median step's; ``standing_mib``: held between steps; ``step_mib``: the most a step holds beside.
    """
    params = {**settings(model_name, experts), "max_len": length}
    seed_everything(params["seed"])
    batch = draw(batch_size, length, items)
    model = build(params, items, batch)
    train(model, [batch])
    now, seconds = CLOCKS[clock], []
    for _ in range(repeats):
        started = now()
        train(model, [batch])
        seconds.append(now() - started)
    step = peak_bytes(lambda: train(model, [batch])) / MIB
    return {"seconds": statistics.median(seconds), "standing_mib": standing_bytes(model) / MIB, "step_mib": step}


def standing_bytes(model: SequentialCTR) -> int:
    """Bytes of parameters, buffers (the item table's too) and optimizer state."""
    held = [*model.parameters(), *model.buffers(), *_state(model.optimizer)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
    return sum(storages.values())


def _state(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def peak_bytes(step: Callable[[], object]) -> int:
    """The most bytes that a call holds beside what it found."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "trace.json")
        trace.export_chrome_trace(path)
        with open(path, encoding="utf-8") as file:
            events = [event for event in json.load(file)["traceEvents"] if event.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak
