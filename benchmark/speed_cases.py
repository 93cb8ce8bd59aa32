"""A case of `speed.py`: its data and models on both sides, and how they are timed."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import torch
from flops_models import enter
from speed_longctr import WORKERS, LongCTR
from train_step import experiment

from model_zoo.allocator import keep_freed_memory, return_freed_memory
from model_zoo.compat import seed_everything
from model_zoo.experiment.run import build_model, make_loaders
from model_zoo.pipeline.dataset import load_dataset
from model_zoo.pipeline.feature_map import build_feature_map
from model_zoo.pipeline.synthetic import MICROVIDEO, SyntheticSpec
from model_zoo.registry import get_model, model_keys
from model_zoo.sequential_ctr import SequentialCTR
from model_zoo.three_phase import ThreePhaseCTR

#: the shape that the goals are stated for; a model gets those of the keys that it has
SHAPE = [
    "embedding_dim=64", "dnn_hidden_units=[1024,512,256]", "attention_dim=256", "topk=20", "short_seq_len=50",
    "num_hashes=8", "hash_bits=4",
]  # fmt: skip
OURS, REFERENCE = "ours", "LongCTR"
#: what is not ours
OTHERS = (REFERENCE, "mambapy", "FuxiCTR")
Run = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One measurement: ``models`` (and LongCTR's model of ``backbone``) beside each other.

    Attributes:
        kind: a key of `speed_kinds.KINDS`.
        backbone: name of the plain model, settings behind a colon: ``TransAct:concat_max_pool=True``.
        models: names, own settings behind a colon: ``MoS_TWIN:topk_item=1,topk_window=1``; `REFERENCE` for LongCTR's.
        length: history items; 0 if the case has none.
        folder: where the data set of this length is.
        settings: overrides of every experiment.
        repeats: measurements of each.
        limit: seconds after which a model is not repeated again.
        clock: ``wall``, or ``cpu`` for processor seconds, those of worker processes included.
    """

    kind: str
    backbone: str = ""
    models: tuple[str, ...] = ()
    length: int = 0
    batch: int = 0
    device: str = "cpu"
    folder: str = ""
    longctr: str | None = None
    settings: tuple[str, ...] = ()
    repeats: int = 5
    limit: float = 120.0
    threads: int = 1
    clock: str = "wall"

    @property
    def key(self) -> str:
        """What a record is kept under."""
        sizes = [f"{name}={size}" for name, size in (("L", self.length), ("B", self.batch)) if size]
        other = [self.clock] if self.clock != "wall" else []
        return " ".join([self.kind, *filter(None, [self.backbone]), *sizes, self.device, *other, *self.settings])

    @property
    def theirs(self) -> bool:
        """Whether LongCTR's is measured, too."""
        return REFERENCE in self.models

    def to_json(self) -> str:
        """For `from_json` in another process."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Case:
        """The case that `to_json` wrote."""
        values: dict[str, Any] = json.loads(text)
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return Case(**{**values, **lists})


def spec_of(length: int) -> SyntheticSpec:
    """MicroVideo's shape, histories long enough for ``length`` and as many events in all."""
    mean = max(MICROVIDEO.history_mean, 2 * length)
    users = int(MICROVIDEO.users * MICROVIDEO.history_mean / mean)
    return replace(MICROVIDEO, users=users, history_mean=mean, history_max=max(MICROVIDEO.history_max, 4 * length))


class Bench:
    """The data set of a case, and the models of both sides, built when asked for."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.plain, _, own = case.backbone.partition(":")
        self.plain = self.plain or "TWIN"
        self.shared = own.split(",") if own else []
        self.base = self.params(self.plain)
        self.feature_map = build_feature_map(self.base)
        self.dataset = load_dataset(self.feature_map, self.base)
        self.loaders = make_loaders(self.dataset, self.base)
        self.longctr = LongCTR(case.longctr) if case.theirs and case.longctr else None

    def params(self, model: str) -> dict[str, Any]:
        """The experiment of a model at the case's shape."""
        name, _, own = model.partition(":")
        found, keys = get_model(name), model_keys(name)
        wanted = [*SHAPE, *self.shared, *self.case.settings, *(own.split(",") if own else [])]
        wanted = [setting for setting in wanted if setting.partition("=")[0] in keys]
        rival = found.method is not None and not issubclass(found, ThreePhaseCTR)
        expid = f"{name}_microvideo" + ("_budget" if rival else "")
        sizes = [f"batch_size={self.case.batch}", f"max_len={self.case.length}"]
        params = _experiment(expid, (*sizes, *_merged(wanted)), self.case.folder)
        return {**params, "gpu": -1 if self.case.device == "cpu" else 0, "verbose": 0, "metrics": ["AUC", "logloss"]}

    def ours(self, model: str, **settings: Any) -> SequentialCTR:
        """Our model, MoS in its joint phase with its codebooks started."""
        params = {**self.params(model), **settings}
        seed_everything(params["seed"])
        built = build_model(params, self.feature_map, self.dataset)
        if isinstance(built, ThreePhaseCTR):
            built.start_experts(self.loaders["train"])
            enter(built, "phase3")
        built._batch_index, built._epoch_index, built._max_gradient_norm = 0, 0, 10.0
        return built

    def theirs(self) -> Any:
        """LongCTR's model of the same settings."""
        assert self.longctr is not None
        seed_everything(self.base["seed"])
        return self.longctr.model(self.plain, self.feature_map, self.base)

    def their_loader(self, split: str, rows: int, workers: int = WORKERS) -> Any:
        """LongCTR's loader over the split's first rows."""
        assert self.longctr is not None
        return self.longctr.loader(self.feature_map, self.base, split, rows, workers)

    def rows(self, split: str, batches: int) -> tuple[int, int]:
        """How many rows and batches of a split are taken if ``batches`` are wanted."""
        rows = min(batches * self.case.batch, len(self.dataset.splits[split]))
        return rows, math.ceil(rows / self.case.batch)


@cache
def _experiment(expid: str, settings: tuple[str, ...], folder: str) -> dict[str, Any]:
    """`train_step.experiment`, whose configuration files take longer to read than a small case takes to run."""
    return experiment(expid, list(settings), folder)


def _merged(settings: list[str]) -> list[str]:
    """``key=value`` settings, the last of a key winning."""
    return list({setting.partition("=")[0]: setting for setting in settings}.values())


# ---- timing --------------------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """Numbers of each model, smaller is better, and why one has none.

    ``difference``: largest difference of predictions (of metrics) between ours and the reference's.
    """

    unit: str
    values: dict[str, list[float]]
    notes: dict[str, str]
    difference: float | None = None


def alternate(case: Case, runs: dict[str, Callable[[], Run]], unit: str, per: float = 1.0) -> Result:
    """Time each run ``case.repeats`` times after a warm-up, one after the other and again.

    Ours with the C library's allocator as ``run_expid.py`` sets it, others as their own scripts leave it.

    Args:
        runs: by name, a function that prepares and returns what is timed.
        per: the seconds are divided by this.
    """
    ready: dict[str, Run] = {}
    values: dict[str, list[float]] = {name: [] for name in runs}
    spent = dict.fromkeys(runs, 0.0)
    notes: dict[str, str] = {}
    for repeat in range(case.repeats + 1):
        for name, prepare in runs.items():
            # one measurement besides the warm-up there always is
            if name in notes or (repeat > 1 and spent[name] > case.limit):
                continue
            try:
                (return_freed_memory if name in OTHERS else keep_freed_memory)()
                if name not in ready:
                    ready[name] = prepare()
                seconds = timed(ready[name], case)
            except Exception as error:  # whatever it is: the others are still measured, and the record says why
                notes[name] = f"{type(error).__name__}: {error}".splitlines()[0]
                values[name] = []
                ready.pop(name, None)
                continue
            spent[name] += seconds
            if repeat:
                values[name].append(seconds / per)
    return Result(unit, {name: found for name, found in values.items() if found}, notes)


def timed(run: Run, case: Case) -> float:
    """Seconds of a call by the case's clock, until the device is done.

    Steps and scores are timed as the second of two in a row: what ran before, under another allocator, is not their cost.
    """
    if case.kind in ("step", "score"):
        run()
    now = time.perf_counter if case.clock == "wall" else _processor_seconds
    if case.device != "cpu":
        torch.cuda.synchronize()
    start = now()
    run()
    if case.device != "cpu":
        torch.cuda.synchronize()
    return now() - start


def _processor_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    return sum(os.times()[:4])
