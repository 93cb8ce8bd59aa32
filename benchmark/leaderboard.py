"""Runs as csv: BARS's leaderboard columns first, then what identifies a run; and LongCTR's names of folders."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable
from typing import Any

from model_zoo.errors import ConfigError
from model_zoo.experiment.collect import Row

REFERENCE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "reference")
#: as in BARS's docs/CTR/leaderboard/*.csv of sequence models; the three metrics are those on test
BARS = ["Year", "Publication", "Model", "Paper URL", "gAUC", "AUC", "Logloss", "Running Steps", "Contributor"]
SHOWN = {"gAUC": "gAUC", "AUC": "AUC", "logloss": "Logloss"}
TEXTS = ["dataset", "head", "expid", "config", "data", "monitor", "finished", "git_commit"]
WHOLE = ["max_len", "seed", "parameters"]
NUMBERS = ["monitored", "flops", "seconds", "peak_mib"]
OWN = ["dataset", "max_len", "head", "expid", "seed", "config", "data", "monitor", "monitored", "parameters", "flops",
       "seconds", "peak_mib", "finished", "git_commit", "run"]  # fmt: skip
#: columns without which a table cannot be compared
NEEDED = ["Model", "dataset", "max_len", "head", "expid", "seed", "config"]
_SCORE = re.compile(r"(test|valid) (\S.*)")


def read_table(path: str) -> list[dict[str, str]]:
    """The rows of a csv file, plain or packed.

    Raises:
        ConfigError: it cannot be read as csv.
    """
    try:
        if path.endswith(".gz"):
            import gzip

            with gzip.open(path, "rt", encoding="utf-8", newline="") as packed:
                return list(csv.DictReader(packed))
        with open(path, encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error}); name a table or a folder of runs") from None
    except (csv.Error, UnicodeDecodeError, EOFError):
        raise ConfigError(f"{path}: not a csv file; make it with benchmark/collect.py") from None


def folder_name(row: Row) -> str:
    """``<Model>/<Model>_<dataset>``, the data set in small letters as LongCTR and BARS write it."""
    return f"{row.model}/{row.model}_{row.dataset.lower()}"


def to_csv(rows: Iterable[Row], contributor: str = "") -> str:
    """The leaderboard: a line a run, in the given order."""
    rows = list(rows)
    papers = {paper["name"]: paper for paper in read_table(os.path.join(REFERENCE, "publications.csv"))}
    extra = sorted({(split, name) for row in rows for split in row.scores for name in row.scores[split]})
    extra = [(split, name) for split, name in extra if split != "test" or name not in SHOWN]
    header = [*BARS, *(f"{split} {name}" for split, name in extra), *OWN]
    text = io.StringIO()
    table = csv.DictWriter(text, header, lineterminator="\n")
    table.writeheader()
    for row in rows:
        paper = papers.get(row.method or row.backbone, {})
        test = row.scores.get("test", {})
        line: dict[str, Any] = {
            "Year": paper.get("year", ""), "Publication": paper.get("publication", ""), "Model": row.model,
            "Paper URL": paper.get("paper_url", ""), "Running Steps": folder_name(row), "Contributor": contributor,
            **{shown: test.get(name) for name, shown in SHOWN.items()},
            **{f"{split} {name}": row.scores.get(split, {}).get(name) for split, name in extra},
            **{name: getattr(row, name) for name in (*TEXTS, *WHOLE, *NUMBERS)}, "run": row.path,
        }  # fmt: skip
        table.writerow({key: _shown(key, value) for key, value in line.items()})
    return text.getvalue()


def from_csv(path: str) -> list[Row]:
    """The runs of a file that `to_csv` wrote.

    Raises:
        ConfigError: it is unreadable, lacks columns, or has a value that is no number where one belongs.
    """
    lines = read_table(path)
    missing = [name for name in NEEDED if lines and name not in lines[0]]
    if missing or not lines:
        what = f"lacks the columns {', '.join(missing)}" if missing else "holds no runs"
        raise ConfigError(f"{path}: {what}; make it with: python benchmark/collect.py RUNS --out {path}")
    return [_row(path, number, line) for number, line in enumerate(lines, 2)]


def _row(path: str, number: int, line: dict[str, str]) -> Row:
    def value(column: str, kind: type) -> Any:
        text = line.get(column) or ""
        try:
            return kind(text) if text else None
        except ValueError:
            raise ConfigError(f"{path}, line {number}, column {column}: {text!r:.40} is no number; mend it") from None

    scores: dict[str, dict[str, float]] = {}
    for column in line:
        found = _SCORE.fullmatch(column or "")
        if (found or column in SHOWN.values()) and (score := value(column, float)) is not None:
            names = {shown: name for name, shown in SHOWN.items()}
            split, name = found.groups() if found else ("test", names[column])
            scores.setdefault(split, {})[name] = score
    if not line["Model"] or value("seed", int) is None:
        raise ConfigError(f"{path}, line {number}: lacks the model or the seed; mend it, or leave the line out")
    texts: dict[str, Any] = {name: line.get(name) or "" for name in TEXTS}
    numbers: dict[str, Any] = {name: value(name, int) for name in WHOLE} | {name: value(name, float) for name in NUMBERS}
    return Row(path=line.get("run") or f"{path}, line {number}", model=line["Model"], scores=scores, **texts, **numbers)


def _shown(column: str, value: Any) -> str:
    """Metrics to 10 digits after the point, in which runs can be told apart; times and sizes as whole as they are used."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.1f}" if column in ("seconds", "peak_mib", "flops") else f"{value:.10f}"
    return str(value)
