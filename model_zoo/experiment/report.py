"""What a run says: before training, at its end, and for ``--dry-run``."""

from __future__ import annotations

import logging
import os
from typing import Any

from model_zoo.errors import DataError
from model_zoo.experiment.config import Config
from model_zoo.experiment.exposure import exposure_rows
from model_zoo.experiment.paths import PATH_KEYS
from model_zoo.experiment.slices import slice_rows
from model_zoo.pipeline.dataset import CTRDataset
from model_zoo.pipeline.parquet_files import row_count
from model_zoo.registry import get_model
from model_zoo.sequential_ctr import SequentialCTR

logger = logging.getLogger("model_zoo")


def announce(params: dict[str, Any], dataset: CTRDataset, model: SequentialCTR, seconds: float) -> None:
    """One paragraph: model, parameters, data."""
    counts = ", ".join(f"{name} {count:,}" for name, count in model.parameter_counts().items())
    rows = ", ".join(f"{name} {len(split):,}" for name, split in dataset.splits.items())
    lengths = dataset.histories.lengths
    logger.info("%s on %s, seed %d, %s", params["model_id"], params["dataset_id"], params["seed"], model.device)
    logger.info("parameters: %s", counts)
    logger.info(
        "data: rows %s; %s users, %s items, history mean %.0f, longest %d; loaded in %.1f s",
        rows, f"{len(lengths):,}", f"{dataset.num_items - 1:,}", lengths.mean(), lengths.max(), seconds,
    )  # fmt: skip


def announce_resume(folder: str, place: dict[str, Any]) -> None:
    """Where a stopped run goes on."""
    at = {"start": f"the beginning of {place['phase']}", "done": "its scoring"}.get(
        place["stage"], f"{place['phase']} epoch {place['epoch']}, after step {place['step']}"
    )
    logger.info("resumed at %s: %s", at, folder)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Plain text columns, the first left-aligned, the others right-aligned."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def summary(result: dict[str, Any], folder: str, results_table: str) -> None:
    """The closing table: phases, scores, baselines, codebooks, files."""
    metrics = list(result["scores"]["final"]["valid"])
    splits = list(result["scores"]["final"])
    header = ["", "epochs", "seconds", *(f"{split} {name}" for split in splits for name in metrics)]
    rows = []
    phases = list(dict.fromkeys(entry["phase"] for entry in result["history"]))
    for phase in phases:
        entries = [entry for entry in result["history"] if entry["phase"] == phase]
        best = [entry for entry in entries if entry["best"]] or entries
        seconds = sum(entry["seconds"] + entry["eval_seconds"] for entry in entries)
        known = result["scores"].get(phase) or ({"valid": best[-1]["valid"]} if len(phases) > 1 else {})
        if phase == phases[-1]:
            known = result["scores"]["final"]
        shown = [_figure(known.get(split, {}).get(name)) for split in splits for name in metrics]
        rows.append([phase, str(entries[-1]["epoch"]), f"{seconds:.1f}", *shown])
    for name in result["baselines"][splits[0]]:
        shown = [_figure(result["baselines"][split][name].get(metric)) for split in splits for metric in metrics]
        rows.append([name, "", "", *shown])
    text = [table(header, rows)]
    if "phase1" in result["scores"]:
        text.append(_verdict(result, splits[-1]))
    for router, usage in result.get("codebook_usage", {}).items():
        share = " ".join(f"{value:.3f}" for value in usage["share"])
        text.append(
            f"{router} codebook, first validation batches: share of tokens {share}; entropy {usage['entropy']:.2f} of 1; "
            f"top-1 margin {usage['margin']:.3f}; an expert reads {usage['routed']:.2f} of a history"
        )
    if routing := result.get("routing"):
        share = " ".join(f"{value:.3f}" for value in routing["share"])
        text.append(
            f"router, first validation batches: share of readings {share}; {routing['unread_rate']:.1%} of tokens "
            f"unread; {routing['fallback_rate']:.1%} of rows left to the shared expert; "
            f"{routing['experts_per_row']:.2f} experts a row"
        )
    if slices := result.get("slices"):
        text.append(f"by parts of {splits[-1]}; {slices['definitions']['sessions']}")
        text.append(table(*slice_rows(slices, splits[-1])))
    if exposure := result.get("exposure"):
        text.append(
            f"what themes are read for, by {exposure['by']}: the {exposure['head']} most frequent of "
            f"{exposure['categories']} are the head, which holds half of the history tokens"
        )
        text.append(table(*exposure_rows(exposure)))
    text.append(
        f"{result['seconds']['total']:.0f} s in all, peak memory {result['peak_memory']['resident_mib']:.0f} MiB\n"
        f"run folder: {folder}\nresults:    {results_table}"
    )
    logger.info("\n%s", "\n".join(text))


def _verdict(result: dict[str, Any], split: str) -> str:
    """Did the method help, in one line."""
    final, backbone = result["scores"]["final"][split], result["scores"]["phase1"][split]
    changes = [
        f"{name} {final[name] - backbone[name]:+.6f}"
        for name in final
        if name not in ("logloss", "binary_crossentropy")
    ]
    verdict = f"against its own backbone (phase 1) on {split}: {', '.join(changes)}"
    short = result["config"].get("phase1_epochs")
    if short is not None:
        plain = get_model(result["model"]).backbone.name
        return f"{verdict} (phase 1 was cut to {short} epoch(s): for a fully trained backbone run {plain} itself)"
    return f"{verdict} (a second round of training included)"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"


def dry_run(config: Config, params: dict[str, Any], model: SequentialCTR) -> str:
    """The merged config with origins, parameter counts and data sizes.

    Raises:
        DataError: a data file is missing or unreadable (after everything else was shown).
    """
    width = max(len(key) for key in params)
    lines = [f"{config.expid}: merged configuration"]
    for key in sorted(params):
        value = f"{len(params[key])} features" if key == "feature_cols" else params[key]
        lines.append(f"  {key.ljust(width)}  {value!s:<40} {config.origin.get(key, 'default')}")
    lines.append("parameters: " + ", ".join(f"{name} {count:,}" for name, count in model.parameter_counts().items()))
    missing = []
    for key in PATH_KEYS:
        path = params.get(key)
        if not path:
            continue
        if not os.path.exists(path):
            missing.append(path)
            lines.append(f"{key}: {path}: missing")
            continue
        lines.append(f"{key}: {path}: {row_count(path):,} rows, {os.path.getsize(path) / 2**20:.1f} MiB")
    print("\n".join(lines))
    if missing:
        raise DataError(f"{missing[0]}: no such file; see data/README.md for how to get or build the data set")
    return "\n".join(lines)
