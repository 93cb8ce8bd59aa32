"""The tables of ``benchmark/flops.py``: ratios of MoS to its rivals by every count, where the claim holds, and costs."""

from __future__ import annotations

import argparse
import math
from typing import Any

from machine import ROOT, markdown

from model_zoo.experiment.record import environment

#: at most this ratio counts as the paper's 53 %
CLAIM = 0.54
RATIOS = {
    "experts, T^2": "pairs_every", "experts, T": "tokens_every", "experts": "experts_every",
    "serving experts": "experts_serving", "counted, beyond plain": "prediction_extra",
    "... training": "training_extra", "counted, block": "prediction", "... training step": "training", "step": "seconds",
}  # fmt: skip


def comparisons(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """MoS over each rival of the same backbone and state, by every count of `RATIOS`."""
    mine = {(row["backbone"], row["state"]): row for row in rows if row["method"] == "MoS"}
    found = []
    for row in rows:
        if row["method"] not in ("plain", "MoS"):
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
