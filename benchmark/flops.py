"""Operations and train-step times of MoS beside its rivals: where does "53 % of the operations" hold?

``python benchmark/flops.py`` builds ``MoS_<backbone>_microvideo`` and its rivals with as many experts as one of MoS's
routers (``literal``) and as both (``budget_matched``), on synthetic data of MicroVideo's shape whose histories have all
``--length`` items. They are measured when routers have just been started (MoS's codebooks by k-means), and after a few
training steps. A backbone may be given other settings: ``TransAct:transformer_layers=2,batch_size=32``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from train_step import ROOT, experiment

from model_zoo.batch import Batch
from model_zoo.compat import seed_everything
from model_zoo.experiment.flops import Flops, analytic_flops, block_flops, route
from model_zoo.experiment.record import environment, write_json, write_whole
from model_zoo.experiment.run import build_model, make_loaders
from model_zoo.pipeline.dataset import load_dataset
from model_zoo.pipeline.feature_map import build_feature_map
from model_zoo.pipeline.loader import SequenceLoader
from model_zoo.pipeline.synthetic import MICROVIDEO, SyntheticSpec, generate
from model_zoo.pipeline.synthetic_files import write
from model_zoo.sequential_ctr import SequentialCTR
from model_zoo.three_phase import ThreePhaseCTR

#: the second TransAct computes every position, at a cost quadratic in them; the slow ones have smaller batches
BACKBONES = ["TWIN", "SDIM", "TransAct", "TransAct:concat_max_pool=True,batch_size=16", "Mamba4Rec:batch_size=32"]
RIVALS = ["GShard", "DSelectK", "ExpertChoice"]
SETTINGS = {"literal": "", "budget_matched": "_budget"}
#: at most this ratio counts as the paper's 53 %
CLAIM = 0.54
RATIOS = {
    "experts, T^2": "pairs_every", "experts, T": "tokens_every", "experts": "experts_every",
    "serving experts": "experts_serving", "counted, beyond plain": "prediction_extra",
    "... training": "training_extra", "counted, block": "prediction", "... training step": "training", "step": "seconds",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One model of a comparison."""

    backbone: str
    method: str
    setting: str
    model: SequentialCTR
    loader: SequenceLoader


def write_data(folder: Path, spec: SyntheticSpec, shortest: int) -> None:
    """The data set's files; only impressions after at least ``shortest`` items are kept."""
    data = generate(spec)
    rows = {}
    for split, table in data.rows.items():
        kept = table.seq_len >= shortest
        rows[split] = type(table)(*(column[kept] for column in vars(table).values()))
    write(replace(data, rows=rows), folder)


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


def compare(backbone: str, options: argparse.Namespace, folder: str) -> list[dict[str, Any]]:
    """Every model over one backbone, in both states."""
    overrides = [f"batch_size={options.batch}", f"max_len={options.length}", *options.set]
    compared = entries(backbone, overrides, folder)
    batches = [batch for batch in islice(compared[0].loader, max(options.batches, options.timed + 1))]
    rows = []
    for state in ("start", "trained"):
        for entry in compared:
            if state == "start":
                start(entry)
            else:
                few_steps(entry, batches, options.steps)
        measured = [measure(entry, batches[0]) | {"state": state} for entry in compared]
        plain = measured[0]
        seconds = step_seconds(compared, batches[: options.timed + 1])
        for row, own in zip(measured, seconds, strict=True):
            row |= {"seconds": own, **{f"{kind}_extra": row[kind] - plain[kind] for kind in ("prediction", "training")}}
        rows += measured
    return rows


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """A markdown table."""
    cells = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def comparisons(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """MoS over each rival of the same backbone and state, by every count of `RATIOS`."""
    mine = {(row["backbone"], row["state"]): row for row in rows if row["method"] == "MoS"}
    found = []
    for row in rows:
        if row["method"] in RIVALS:
            own = mine[row["backbone"], row["state"]]
            ratios = {name: own[key] / row[key] if row[key] else math.nan for name, key in RATIOS.items()}
            found.append({**{key: row[key] for key in ("backbone", "method", "setting", "state")}, "ratios": ratios})
    return found


def ratio_table(compared: list[dict[str, Any]], formula: dict[str, tuple[float, float]]) -> str:
    """Every comparison, the formula's values first; bold where MoS costs at most `CLAIM` of the rival."""
    lines = [["formula", "any", setting, "even", *map(cell, ratios), *[""] * 7] for setting, ratios in formula.items()]
    for one in compared:
        shown = [one[key] for key in ("backbone", "method", "setting", "state")]
        lines.append([*shown, *map(cell, one["ratios"].values())])
    return markdown(["backbone", "rival", "setting", "state", *RATIOS], lines)


def claim_table(compared: list[dict[str, Any]]) -> str:
    """The backbones over which MoS costs at most `CLAIM` of a rival in every state, by setting, rival and count."""
    lines = []
    for setting, rival in dict.fromkeys((one["setting"], one["method"]) for one in compared):
        mine = [one for one in compared if (one["setting"], one["method"]) == (setting, rival)]
        backbones = list(dict.fromkeys(one["backbone"] for one in mine))
        shown = []
        for name in RATIOS:
            fails = {one["backbone"] for one in mine if not one["ratios"][name] <= CLAIM}
            holds = [backbone for backbone in backbones if backbone not in fails]
            shown.append("all" if not fails else ", ".join(holds) or "none")
        lines.append([setting, rival, *shown])
    return markdown(["setting", "rival", *RATIOS], lines)


def cell(ratio: float) -> str:
    """A ratio, bold where the claim holds."""
    return f"**{ratio:.3f}**" if ratio <= CLAIM else f"{ratio:.3f}"


def cost_table(rows: list[dict[str, Any]], length: int) -> str:
    """What each model costs per row: readings of tokens in units of the history, millions of operations, milliseconds."""
    lines = []
    for row in rows:
        routed = row["method"] != "plain"
        formula = ("tokens_every", length), ("tokens_serving", length), ("experts_every", 1e6), ("experts_serving", 1e6)
        shown = [f"{row[key] / unit:.2f}" if routed else "" for key, unit in formula]
        parts = [row["counted"][part]["training"] for part in ("embedding", "head")]
        shown += [f"{row[kind] / 1e6:.2f}" for kind in ("prediction", "training")]
        shown += [f"{sum(part.values()) / 1e6:.2f}" for part in parts]
        lines.append([row["backbone"], row["method"], row["setting"], row["state"], *shown, f"{row['seconds'] * 1e3:.0f}"])
    header = ["backbone", "method", "setting", "state", "tokens read / L", "... by serving experts", "experts, formula"]
    header += ["... serving", "block, prediction", "block, training", "embedding, training", "head, training", "step ms"]
    return markdown(header, lines)


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


TITLE = """# Operations of MoS and its rivals

Histories of {length} items{any_length}, synthetic data of MicroVideo's shape, {batch} rows a batch. A backbone's settings
are `<backbone>_microvideo`'s but for those named beside it. The paper has MoS at 53 % of the operations of a mixture of
experts with a shared expert. By each count, that holds (ratio at most {claim}, in both states) over these backbones:

{table}

- **T^2**, **T**: the paper's own count, all experts run, of a block whose cost is the square of its tokens, or their
  number; the first lines are the formula's values for even routing, the others have measured routed lengths.
- **experts**, **serving experts**: the backbone's operations if every position is computed as in LongCTR, of all experts,
  and of those alone whose answer has a weight (MoS and its rivals run no others here).
- **counted**: operations that run here, matrix products and all else, in prediction and in training (forward and
  backward): beyond the plain backbone's, and of the whole block (shared expert, routers and experts).
- **step**: median seconds of a training step of the whole model, the models alternating on {machine}.

`literal`: rivals have as many experts, and experts per token, as one of MoS's two routers; `budget_matched`: as both.
`start`: routers as they start, MoS's codebooks by k-means of an untrained backbone. `trained`: after {steps} training
steps in each of MoS's phases, three times as many of the others. What depends on an item or on weights alone is computed
once a batch, so that counted operations per row fall as batches grow.
"""


def document(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """The tables with what is needed to read them."""
    found, compared = environment(ROOT), comparisons(rows)
    hardware = found["hardware"]
    machine = f"{hardware['cpus']} {hardware['machine']} CPUs, {hardware['torch_threads']} threads"
    title = TITLE.format(
        length=options.length, any_length=" at most" if options.any_length else "", batch=options.batch, claim=CLAIM,
        steps=options.steps, machine=f"{machine}, torch {found['versions']['torch']}", table=claim_table(compared),
    )  # fmt: skip
    ratios = ratio_table(compared, next(row["by_formula"] for row in rows if row["method"] == "MoS"))
    costs = cost_table(rows, options.length)
    return f"{title}\n## Ratios\n\n{ratios}\n\n## Costs per row, millions of operations\n\n{costs}"


def main(argv: list[str] | None = None) -> None:
    """Print the tables and one json line per model and state."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--backbones", nargs="+", default=BACKBONES, metavar="NAME[:KEY=VALUE,...]")
    options.add_argument("--length", type=int, default=200, help="items of every history (default: %(default)s)")
    options.add_argument("--any-length", action="store_true", help="histories as long as they are, cut at --length")
    options.add_argument("--batch", type=int, default=128, help="rows per batch (default: %(default)s)")
    options.add_argument("--batches", type=int, default=10, help="distinct training batches (default: %(default)s)")
    options.add_argument("--steps", type=int, default=3, help="training steps per phase (default: %(default)s)")
    options.add_argument("--timed", type=int, default=3, help="timed steps per model (default: %(default)s)")
    options.add_argument("--users", type=int, default=2_000, help="of the synthetic data (default: %(default)s)")
    options.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for every model; repeatable")
    options.add_argument("--out", metavar="DIR", help="write FLOPS.md and flops.json there, after each backbone")
    chosen = options.parse_args(argv)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        needed = 4 * chosen.batch * max(chosen.batches, chosen.timed + 1)
        longer = {"history_mean": max(300, 2 * chosen.length), "history_max": max(1_200, 4 * chosen.length)}
        spec = replace(MICROVIDEO, users=chosen.users, rows=(max(needed, 10_000), 100, 100), **longer)
        write_data(Path(folder), spec, 1 if chosen.any_length else chosen.length)
        for backbone in chosen.backbones:
            started = time.perf_counter()
            rows += compare(backbone, chosen, folder)
            print(f"{backbone}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
            if chosen.out:
                save(rows, chosen)
    print(f"{document(rows, chosen)}\n")
    for row in rows:
        print(json.dumps(row))


def save(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Both files, each whole."""
    os.makedirs(options.out, exist_ok=True)
    write_whole(os.path.join(options.out, "FLOPS.md"), document(rows, options) + "\n")
    write_json(os.path.join(options.out, "flops.json"), {"options": vars(options), "rows": rows, **environment(ROOT)})


if __name__ == "__main__":
    main()
