"""Whom a mixture helps: its gain over the plain backbone in each slice of the rows, seed by seed.

``python benchmark/slices.py checkpoints`` reads the slices of records (history length, sessions, item popularity). Of a
model's configurations the one with the most seeds is taken, of these the best on validation, as ``compare.py`` does.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from comparison import Place, named
from machine import markdown

from model_zoo.errors import ConfigError, answered
from model_zoo.experiment.collect import Row, collect, merits
from model_zoo.experiment.record import write_whole
from model_zoo.experiment.statistics import paired_difference

#: kind of slice, first and last value
Slice = tuple[str, float, float]
Values = dict[Slice, dict[int, float]]


def tables(rows: Iterable[Row], records: Iterable[dict[str, Any]], metric: str, split: str) -> Iterator[tuple[str, str]]:
    """Title and table of each backbone at each place where a mixture and the plain backbone share a seed."""
    found: dict[tuple[Place, str], dict[str, list[tuple[Row, dict[str, Any]]]]] = defaultdict(lambda: defaultdict(list))
    for row, record in zip(rows, records, strict=True):
        found[(row.dataset, row.max_len, row.head), row.backbone][row.model].append((row, record))
    for (place, backbone), models in found.items():
        sizes: dict[Slice, int] = {}
        values = {model: _values(_chosen(pairs), metric, split, sizes) for model, pairs in models.items()}
        plain = values.pop(backbone, {})
        mixtures = [model for model in models if model in values and any(_gain(values[model], plain, at) for at in sizes)]
        if not mixtures:
            continue
        lines = []
        for at in sizes:
            kind, low, high = at
            known = list(plain.get(at, {}).values())
            mean = f"{100 * sum(known) / len(known):.2f}" if known else "-"
            cells = [_gain(values[model], plain, at) or "-" for model in mixtures]
            lines.append([kind, f"{low:g} to {high:g}", f"{sizes[at]:,}", mean, *cells])
        header = ["slice", "from .. to", "rows", backbone, *(f"{model} gains" for model in mixtures)]
        yield f"{backbone} on {named(place)}: {metric} on {split}, in percent", markdown(header, lines)


def _chosen(pairs: list[tuple[Row, dict[str, Any]]]) -> dict[int, dict[str, Any]]:
    """Seed to record of the configuration that stands for a model."""
    merit = merits(row for row, _ in pairs)
    best = max(merit, key=lambda config: merit[config])
    return {row.seed: record for row, record in pairs if row.config == best}


def _values(records: dict[int, dict[str, Any]], metric: str, split: str, sizes: dict[Slice, int]) -> Values:
    """Slice to seed to value; ``sizes`` takes the rows of each."""
    found: Values = defaultdict(dict)
    for seed, record in records.items():
        for kind, parts in ((record.get("slices") or {}).get("final") or {}).get(split, {}).items():
            for part in parts:
                at = (kind, part["from"], part["to"])
                sizes[at] = part["rows"]
                if part.get(metric) is not None:
                    found[at][seed] = part[metric]
    return found


def _gain(mine: Values, plain: Values, at: Slice) -> str:
    """Mean difference in points, with its interval if there is one; empty without a common seed."""
    gain = paired_difference(mine.get(at, {}), plain.get(at, {}))
    if gain is None:
        return ""
    reach = "" if gain.low is None or gain.high is None else f" [{100 * gain.low:+.2f}, {100 * gain.high:+.2f}]"
    return f"{100 * gain.mean:+.2f}{reach}"


@answered
def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after a mistake of the user's."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("runs", nargs="+", metavar="RUNS", help="folder with runs below it")
    options.add_argument("--metric", default="AUC", choices=["AUC", "gAUC"], help="default: %(default)s")
    options.add_argument("--split", choices=["test", "valid"], default="test", help="default: %(default)s")
    options.add_argument("--out", metavar="FILE.md", help="where the tables go (default: stdout)")
    chosen = options.parse_args(argv)
    found = collect(chosen.runs)
    parts = list(tables(found.rows, found.records, chosen.metric, chosen.split))
    if not parts:
        raise ConfigError(f"{', '.join(chosen.runs)}: below it no mixture and its plain backbone have slices with "
                          f"{chosen.metric} on {chosen.split} and a seed in common; train both with the same --seed")
    head = "Means over seeds; gains are over the plain backbone of the same seed, [low, high] the 95 % bootstrap interval."
    text = "\n\n".join(["# Gains by slice", head, *(f"## {title}\n\n{table}" for title, table in parts)]) + "\n"
    if not chosen.out:
        print(text, end="")
        return 0
    os.makedirs(os.path.dirname(os.path.abspath(chosen.out)), exist_ok=True)
    write_whole(chosen.out, text)
    print(f"{len(parts)} tables in {chosen.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
