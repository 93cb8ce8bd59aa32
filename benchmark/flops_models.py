"""The models that ``benchmark/flops.py`` compares: built, started, trained a little, and measured on a batch."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from typing import Any

from torch import Tensor, nn
from train_step import experiment

from model_zoo.batch import Batch
from model_zoo.compat import seed_everything
from model_zoo.experiment.flops import block_flops, route
from model_zoo.experiment.flops_counter import Flops
from model_zoo.experiment.flops_formula import analytic_flops
from model_zoo.experiment.run import build_model, make_loaders
from model_zoo.pipeline.dataset import load_dataset
from model_zoo.pipeline.feature_map import build_feature_map
from model_zoo.pipeline.loader import SequenceLoader
from model_zoo.sequential_ctr import SequentialCTR
from model_zoo.three_phase import ThreePhaseCTR

RIVALS = ["GShard", "DSelectK", "ExpertChoice"]
SETTINGS = {"literal": "", "budget_matched": "_budget"}


@dataclass(frozen=True)
class Entry:
    """One model of a comparison."""

    backbone: str
    method: str
    setting: str
    model: SequentialCTR
    loader: SequenceLoader


def entries(backbone: str, overrides: list[str], folder: str) -> list[Entry]:
    """The plain backbone, MoS, and the rivals in both settings."""
    name, _, own = backbone.partition(":")
    wanted = [("plain", "", f"{name}_microvideo"), ("MoS", "", f"MoS_{name}_microvideo")]
    wanted += [(r, s, f"{r}_{name}_microvideo{end}") for s, end in SETTINGS.items() for r in RIVALS]
    settings = [experiment(expid, [*overrides, *(own.split(",") if own else [])], folder) for *_, expid in wanted]
    feature_map = build_feature_map(settings[0])
    dataset = load_dataset(feature_map, settings[0])
    found = []
    for (method, setting, _), params in zip(wanted, settings, strict=True):
        seed_everything(params["seed"])
        model = build_model(params, feature_map, dataset)
        found.append(Entry(backbone, method, setting, model, make_loaders(dataset, params)["train"]))
    return found


def start(entry: Entry) -> None:
    """MoS as it enters joint training from an untrained backbone; the others start as they are."""
    if isinstance(entry.model, ThreePhaseCTR):
        entry.model.start_experts(entry.loader)
        enter(entry.model, "phase3")


def enter(model: ThreePhaseCTR, name: str) -> None:
    """Put a phase in force."""
    model.enter(next(phase for phase in model.phases(1) if phase.name == name))


def train(model: SequentialCTR, batches: list[Batch]) -> list[float]:
    """Seconds of a training step on each batch."""
    model._batch_index, model._max_gradient_norm = 0, 10.0
    model.train()
    seconds = []
    for batch in batches:
        started = time.perf_counter()
        model.train_step(batch)
        seconds.append(time.perf_counter() - started)
    return seconds


def few_steps(entry: Entry, batches: list[Batch], steps: int) -> None:
    """``steps`` training steps in each of MoS's phases; three times as many of the others."""
    step = cycle(batches)
    if not isinstance(entry.model, ThreePhaseCTR):
        train(entry.model, list(islice(step, 3 * steps)))
        return
    for name in ("phase1", "phase2", "phase3"):
        if name == "phase2":
            entry.model.start_experts(entry.loader)
        enter(entry.model, name)
        train(entry.model, list(islice(step, steps)))


def measure(entry: Entry, batch: Batch) -> dict[str, Any]:
    """Operations per row: counted, and by formula where there are experts."""
    report = block_flops(entry.model, batch)
    counted = {part: getattr(report, part) for part in ("embedding", "block", "head")}
    row: dict[str, Any] = {
        "backbone": entry.backbone, "method": entry.method, "setting": entry.setting, "model": type(entry.model).__name__,
        "prediction": report.block.prediction.total / report.rows,
        "training": report.block.training.total / report.rows,
        "counted": {
            part: {kind: per_row(getattr(flops, kind), report.rows) for kind in ("prediction", "training")}
            for part, flops in counted.items()
        },
    }  # fmt: skip
    if entry.method == "plain":
        return row
    if isinstance(entry.model, ThreePhaseCTR):
        row["by_formula"] = formula_ratios(entry.model)

    def squared(block: nn.Module, lengths: Tensor) -> Tensor:
        return lengths**2

    def linear(block: nn.Module, lengths: Tensor) -> Tensor:
        return lengths

    routed = route(entry.model, batch)
    for name, cost in (("experts", None), ("pairs", squared), ("tokens", linear)):
        spent = analytic_flops(routed, cost)
        row |= {
            f"{name}_shared": spent.shared / report.rows,
            f"{name}_every": spent.every_expert / report.rows,
            f"{name}_serving": spent.serving_experts / report.rows,
        }
    row["routed_lengths"] = {branch.name: branch.lengths.double().mean(0).tolist() for branch in routed.branches}
    return row


def per_row(flops: Flops, rows: int) -> dict[str, float]:
    """Operations of one row."""
    return {kind: count / rows for kind, count in asdict(flops).items()}


def step_seconds(compared: list[Entry], batches: list[Batch]) -> list[float]:
    """Median seconds of a training step of each model, the models alternating on every batch, the first one not timed."""
    seconds = [[train(entry.model, [batch])[0] for entry in compared] for batch in batches]
    return [statistics.median(column) for column in zip(*seconds[1:], strict=True)]


def formula_ratios(model: ThreePhaseCTR) -> dict[str, tuple[float, float]]:
    """The paper's cost of MoS's experts over its rivals', evenly routed: of blocks quadratic and linear in their tokens.

    ``sum_routers (k N / stride)^2 / n`` against ``(k N)^2 / n``, and against twice k and n of the rivals.
    """
    mos = model.mos
    assert mos.item_router is not None and mos.window_router is not None
    pairs = tokens = 0.0
    for router, stride in ((mos.item_router, 1), (mos.window_router, mos.window_stride)):
        pairs += (router.topk / stride) ** 2 / router.codebook.num_themes
        tokens += router.topk / stride
    k, n = mos.item_router.topk, mos.item_router.codebook.num_themes
    return {"literal": (pairs * n / k**2, tokens / k), "budget_matched": (pairs * n / (2 * k**2), tokens / (2 * k))}
