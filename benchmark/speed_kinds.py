"""The kinds of measurement of `speed.py`, each on a `Case` in this process, ours and LongCTR's alternating."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import torch
from metrics import METRICS
from selective_scan import arguments, scan
from speed_cases import OURS, REFERENCE, Bench, Case, Result, Run, alternate
from speed_longctr import WORKERS, largest_difference, train_steps

from model_zoo.experiment.record import peak_memory
from model_zoo.pipeline.metrics import evaluate_metrics

EPOCH_BATCHES = 8
LOADER_BATCHES = 6
METRIC_ROWS, METRIC_GROUPS = 1_000_000, 11_000
SCAN_SHAPE = (128, 200, 256, 16)
#: what the workers of LongCTR's loader may hold, of the memory that is free
MEMORY_SHARE = 0.6


def measure_loader(case: Case) -> Result:
    """Seconds per row of a pass of the loader alone."""
    bench = Bench(case)
    row_bytes = (case.length + 1) * sum(
        column.nbytes / len(column) * (2 if column.itemsize < 8 and column.ndim == 1 else 1)
        for column in bench.dataset.item_columns.values()
    )
    # a worker holds a batch twice while it hands it over
    fitting = int(MEMORY_SHARE * free_bytes() / (2 * row_bytes * case.batch))
    rows, batches = bench.rows("train", max(min(LOADER_BATCHES, fitting), 1))

    def ours() -> Run:
        return lambda: [None for _ in islice(bench.loaders["train"], batches)]

    def theirs() -> Run:
        loader = bench.their_loader("train", rows, min(WORKERS, batches))
        return lambda: [None for _ in loader]

    runs: dict[str, Callable[[], Run]] = {OURS: ours, **({REFERENCE: theirs} if bench.longctr else {})}
    return alternate(case, runs, "s/row", rows)


def measure_step(case: Case) -> Result:
    """Seconds of a train step on batches that are there already; equal rows on both sides."""
    bench = Bench(case)
    order = np.random.default_rng(0).permutation(len(bench.dataset.splits["train"]))
    parts = [order[start * case.batch : (start + 1) * case.batch] for start in range(min(case.repeats + 1, 3))]
    checked: dict[str, Any] = {}

    def stepper(model: Any, batches: list[Any]) -> Run:
        turn = iter(range(10**9))
        return lambda: train_steps(model, [batches[next(turn) % len(batches)]])

    def ours(name: str) -> Callable[[], Run]:
        return lambda: stepper(bench.ours(name), [bench.loaders["train"].batch(rows) for rows in parts])

    def theirs() -> Run:
        assert bench.longctr is not None
        model = bench.theirs()
        loader = bench.their_loader("train", len(order), 0)
        checked["theirs"], checked["batch"] = model, bench.longctr.batches(loader, [parts[0][:32]])[0]
        return stepper(model, bench.longctr.batches(loader, parts))

    result = alternate(case, _runs(case, ours, theirs), "s")
    if REFERENCE in result.values:
        result.difference = largest_difference(bench.ours(bench.plain, longctr_compat=True), **checked)
    return result


def measure_evaluate(case: Case) -> Result:
    """Seconds per row of loading and evaluating (AUC and logloss) the validation split."""
    bench = Bench(case)
    rows, batches = bench.rows("valid", 2 * EPOCH_BATCHES)

    def ours(name: str) -> Callable[[], Run]:
        def prepare() -> Run:
            model = bench.ours(name)
            return lambda: model.evaluate(islice(bench.loaders["valid"], batches), ["AUC", "logloss"])

        return prepare

    def theirs() -> Run:
        model, loader = bench.theirs(), bench.their_loader("valid", rows)
        return lambda: model.evaluate(loader, ["AUC", "logloss"])

    return alternate(case, _runs(case, ours, theirs), "s/row", rows)


def measure_epoch(case: Case) -> Result:
    """Seconds per row of loading and training."""
    bench = Bench(case)
    rows, batches = bench.rows("train", EPOCH_BATCHES)
    return alternate(case, _runs(case, *_epochs(bench, rows, batches)), "s/row", rows)


def measure_memory(case: Case) -> Result:
    """Peak MiB of this process through an epoch of the one model that ``case.models`` names."""
    bench = Bench(case)
    rows, batches = bench.rows("train", EPOCH_BATCHES)
    runs = _runs(case, *_epochs(bench, rows, batches))
    (name, prepare), = runs.items()
    prepare()()
    peak = peak_memory()
    return Result("MiB", {name: [peak["resident_mib" if case.device == "cpu" else "cuda_mib"]]}, {})


def _epochs(bench: Bench, rows: int, batches: int) -> tuple[Callable[[str], Callable[[], Run]], Callable[[], Run]]:
    """An epoch-like pass over ``rows`` rows of ours, and of LongCTR's."""

    def ours(name: str) -> Callable[[], Run]:
        def prepare() -> Run:
            model = bench.ours(name)
            return lambda: train_steps(model, bench.loaders["train"], batches)

        return prepare

    def theirs() -> Run:
        model, loader = bench.theirs(), bench.their_loader("train", rows)
        return lambda: train_steps(model, loader)

    return ours, theirs


def measure_score(case: Case) -> Result:
    """Seconds of scoring ``case.batch`` candidates for one user; LongCTR's forward on as many rows of that user."""
    bench = Bench(case)
    split = bench.dataset.splits["valid"]
    items = np.random.default_rng(0).integers(1, bench.dataset.item_features().num_items, case.batch).astype(np.int32)
    history = bench.loaders["valid"].batch(np.arange(1)).history[0].cpu()
    device = "cpu" if case.device == "cpu" else "cuda"

    def ours(name: str) -> Callable[[], Run]:
        def prepare() -> Run:
            model: Any = bench.ours(name).eval()
            candidates = torch.from_numpy(items)
            return lambda: model.score(history, candidates).to("cpu")

        return prepare

    def theirs() -> Run:
        assert bench.longctr is not None
        model = bench.theirs().eval()
        columns, features, mask = bench.longctr.candidates(bench.their_loader("valid", len(split), 0), 0, items)
        features = {name: column.to(device) for name, column in features.items()}

        @torch.no_grad()
        def forward() -> None:
            model((columns, dict(features), mask))["y_pred"].to("cpu")

        return forward

    return alternate(case, _runs(case, ours, theirs), "s")


def measure_scan(case: Case) -> Result:
    """Seconds of the selective scan, forward and backward, beside mambapy's."""
    given = arguments(*SCAN_SHAPE, case.device)
    runs: dict[str, Callable[[], Run]] = {OURS: lambda: lambda: _scan_step(scan, given)}
    if "mambapy" in case.models:
        runs["mambapy"] = lambda: lambda: _scan_step(mambapy_scan, given)
    result = alternate(case, runs, "s")
    if "mambapy" in result.values:
        small = [t.detach()[:4] if t.ndim == 3 else t.detach() for t in given]
        result.difference = float((scan(*small) - mambapy_scan(*small)).abs().max())
    return result


def _scan_step(form: Callable[..., torch.Tensor], given: list[torch.Tensor]) -> None:
    torch.autograd.grad(form(*given).sum(), given)


def mambapy_scan(*given: torch.Tensor) -> torch.Tensor:
    """mambapy's scan on our arguments: the step's softplus and the gate are outside of it."""
    from mambapy.mamba import MambaBlock

    u, delta, A, B, C, D, z, bias = given
    step = torch.nn.functional.softplus(delta + bias)
    return MambaBlock.selective_scan(None, u, step, A, B, C, D) * torch.nn.functional.silu(z)


def measure_metrics(case: Case) -> Result:
    """Seconds of gAUC, AUC and logloss beside FuxiCTR's."""
    from fuxictr.metrics import evaluate_metrics as theirs

    rng = np.random.default_rng(0)
    group = rng.integers(0, METRIC_GROUPS, METRIC_ROWS)
    prediction = rng.beta(2, 5, METRIC_ROWS)
    label = (rng.random(METRIC_ROWS) < prediction).astype(np.float32)
    found: dict[str, dict[str, float]] = {}

    def evaluated(name: str, evaluate: Callable[..., dict[str, float]]) -> None:
        found[name] = evaluate(label, prediction, METRICS, group)

    runs: dict[str, Callable[[], Run]] = {OURS: lambda: lambda: evaluated(OURS, evaluate_metrics)}
    if "FuxiCTR" in case.models:
        runs["FuxiCTR"] = lambda: lambda: evaluated("FuxiCTR", theirs)
    result = alternate(case, runs, "s")
    if "FuxiCTR" in result.values:
        result.difference = max(abs(found[OURS][name] - found["FuxiCTR"][name]) for name in METRICS)
    return result


def _runs(
    case: Case, ours: Callable[[str], Callable[[], Run]], theirs: Callable[[], Run]
) -> dict[str, Callable[[], Run]]:
    """The case's models in order."""
    return {name: theirs if name == REFERENCE else ours(name) for name in case.models}


def free_bytes() -> float:
    """Memory that is free, where the system tells it."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") if hasattr(os, "sysconf") else 8 * 2**30


KINDS: dict[str, Callable[[Case], Result]] = {
    "loader": measure_loader, "step": measure_step, "evaluate": measure_evaluate, "epoch": measure_epoch,
    "memory": measure_memory, "score": measure_score, "scan": measure_scan, "metrics": measure_metrics,
}  # fmt: skip


def measure(case: Case) -> Result:
    """Measure a case in this process."""
    torch.set_num_threads(case.threads)
    return KINDS[case.kind](case)
