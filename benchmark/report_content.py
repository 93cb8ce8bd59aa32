"""What the report page shows, as plain values: runs, their comparison, pictures."""

from __future__ import annotations

import base64
import csv
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from collect import repeated
from compare_tables import to_csv
from comparison import Comparison, mean_ranks
from reference_figures import footnotes

from model_zoo.errors import ConfigError
from model_zoo.experiment.collect import Row, collect, duplicates
from model_zoo.experiment.statistics import trust
from model_zoo.experiment.trackers import total_steps

#: columns of `compare_tables.to_csv` that are numbers
NUMBERS = {"mean", "sd", "rank", "difference", "low", "high", "wilcoxon_p", "longctr"}
WHOLE = {"max_len", "seeds", "tried", "pairs"}
UNFINISHED = "not finished; go on with run_expid.py --resume, or remove it"
PNG = b"\x89PNG\r\n\x1a\n"
Value = dict[str, Any]


@dataclass(frozen=True)
class FinishedRun:
    """A run, its record, and where it lies."""

    row: Row
    record: Value
    folder: str


def read_runs(folders: list[str]) -> tuple[list[FinishedRun], list[tuple[str, str]]]:
    """Every finished run below the folders, and what cannot be shown with the reason.

    Raises:
        ConfigError: a folder is not there.
    """
    runs: dict[str, FinishedRun] = {}
    left_out: dict[tuple[str, str], None] = {}
    for given in folders:
        found = collect([given])
        place = os.path.dirname(os.path.realpath(given))
        for row, record in zip(found.rows, found.records, strict=True):
            folder = os.path.normpath(os.path.join(place, row.path))
            runs.setdefault(folder, FinishedRun(row, record, folder))
        left_out |= dict.fromkeys(found.unusable)
        left_out |= dict.fromkeys((path, UNFINISHED) for path in found.unfinished)
    return list(runs.values()), list(left_out)


def content(
    runs: list[FinishedRun],
    compared: Comparison,
    figures: list[Value],
    views: Mapping[str, Any],
    left_out: list[tuple[str, str]],
) -> Value:
    """The page's values.

    Args:
        compared: the same runs.
        figures: from `embedded_figures`.
        views: run folder to router view, or to the reason why there is none.
    """
    table = comparison(compared)
    theirs = any(line["paper"] or line["longctr"] is not None for line in table)
    return {
        "split": compared.split,
        "metrics": compared.metrics,
        "runs": [run_content(run, views.get(run.folder)) for run in runs],
        "comparison": table,
        "ranks": [
            {
                "max_len": length, "head": head, "backbone": ranked.backbone, "datasets": ranked.datasets,
                "left_out": ranked.left_out, "ranks": ranked.ranks, "models": list(ranked.methods),
            }
            for (length, head), backbones in mean_ranks(compared.places, compared.metrics).items()
            for ranked in backbones
        ],
        "notes": compared.notes + [repeated(group) for group in duplicates(run.row for run in runs)],
        "footnotes": [note["text"] for note in footnotes().values()] if theirs else [],
        "figures": figures,
        "left_out": left_out,
    }  # fmt: skip


def comparison(compared: Comparison) -> list[Value]:
    """A line for each place, model and metric: `compare_tables.to_csv`'s, with how far its interval can be trusted."""
    lines = []
    for text in csv.DictReader(io.StringIO(to_csv(compared))):
        line: Value = dict(text)
        line |= {name: float(line[name]) if line[name] else None for name in NUMBERS}
        line |= {name: int(line[name]) if line[name] else None for name in WHOLE}
        line["trust"] = trust(line["pairs"], float(line["level"])) if line["pairs"] else ""
        lines.append(line)
    return lines


def run_content(run: FinishedRun, view: Value | str | None) -> Value:
    """One run; what its record lacks is left out or None."""
    row, record = run.row, run.record
    usage = record.get("codebook_usage") or ({"experts": record["routing"]} if record.get("routing") else {})
    return {
        "model": row.model, "method": row.method, "backbone": row.backbone, "dataset": row.dataset, "data": row.data,
        "max_len": row.max_len, "head": row.head, "expid": row.expid, "seed": row.seed, "config_digest": row.config,
        "scores": row.scores, "monitor": row.monitor, "monitored": row.monitored, "parameters": row.parameters,
        "flops": row.flops, "seconds": row.seconds, "peak_mib": row.peak_mib, "finished": row.finished,
        "git_commit": row.git_commit, "path": row.path, "config": record["config"],
        "phase1": record["scores"].get("phase1"), "baselines": record["baselines"],
        "history": history(record["history"]), "routers": {name: _scalars(of) for name, of in _mapping(usage).items()},
        "view": view if isinstance(view, dict) else None, "no_view": view if isinstance(view, str) else None,
    }  # fmt: skip


def history(entries: Any) -> list[Value]:
    """Evaluations of a run, with the steps made since it began."""
    known = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    try:
        steps = total_steps(known)
    except (KeyError, TypeError):  # a record that another program wrote
        steps = list(range(1, len(known) + 1))
    return [
        {
            "phase": str(entry.get("phase", "train")), "epoch": entry.get("epoch"), "step": step,
            "loss": entry.get("train_loss"), "rate": entry.get("learning_rate"), "best": bool(entry.get("best")),
            "valid": _scalars(entry.get("valid")), "norm": _mapping(entry.get("gradient_norm")).get("mean"),
            "warnings": list(_mapping(entry.get("warnings")).values()),
            "load": {name: _mapping(of).get("share") for name, of in _mapping(entry.get("routing")).items()},
        }
        for entry, step in zip(known, steps, strict=True)
    ]  # fmt: skip


def embedded_figures(folder: str) -> list[Value]:
    """The pictures of a folder and those below it, by name, as data URIs.

    Raises:
        ConfigError: there is no such folder, no picture in it, or one that is no png.
    """
    paths = [os.path.join(where, name) for where, _, names in os.walk(folder) for name in names if name.endswith(".png")]
    if not paths:
        missing = "no *.png in it" if os.path.isdir(folder) else "no such folder"
        raise ConfigError(f"--figures {folder}: {missing}; make pictures with benchmark/figures.py --out {folder}")
    figures = []
    for path in sorted(paths):
        try:
            with open(path, "rb") as file:
                picture = file.read()
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror or error}); move it away") from None
        if not picture.startswith(PNG):
            raise ConfigError(f"{path}: not a png picture; make it again, or move it away")
        name = os.path.relpath(path, folder).removesuffix(".png")
        title = " · ".join(part.replace("_", " ") for part in name.split(os.sep))
        figures.append({"title": title, "source": f"data:image/png;base64,{base64.b64encode(picture).decode()}"})
    return figures


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _scalars(value: Any) -> dict[str, float]:
    numbers = ((name, one) for name, one in _mapping(value).items() if isinstance(one, int | float))
    return {name: one for name, one in numbers if not isinstance(one, bool)}
