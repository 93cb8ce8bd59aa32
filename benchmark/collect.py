"""Collect the records of runs into one csv in BARS's leaderboard columns.

``python benchmark/collect.py checkpoints --out benchmark/results/x.csv`` takes every run below the folders, a line each, in
an order that depends on nothing but the runs. What is left out, and why, is said on stderr. With ``--folders DIR``, the
runs' result lines and configs are laid out as LongCTR's and BARS's benchmark folders are: ``<Model>/<Model>_<dataset>/``.
With ``--records DIR``, their records are copied there without the places of this machine: enough for ``compare.py`` and
``report.py`` to be called again by anybody.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import defaultdict
from typing import Any

from leaderboard import folder_name, to_csv

from model_zoo.errors import ConfigError, answered
from model_zoo.experiment.collect import Collected, Row, collect, duplicates
from model_zoo.experiment.paths import PATH_KEYS
from model_zoo.experiment.record import result_line, write_whole, write_yaml
from model_zoo.experiment.unfinished import RECORD_FILE

#: keys of a config that name places of the machine it ran on
PLACES = {*PATH_KEYS, "data_root", "model_root"}


def lay_out(found: Collected, folder: str) -> None:
    """``<Model>/<Model>_<dataset>/``: a file of result lines for each length, and the config of each experiment."""
    lines: dict[str, list[str]] = defaultdict(list)
    configs: dict[str, dict[str, Any]] = {}
    for row, record in zip(found.rows, found.records, strict=True):
        place = os.path.join(folder, folder_name(row))
        line = result_line(row.finished, _command(row), row.expid, row.dataset, row.scores)
        lines[os.path.join(place, f"{os.path.basename(place)}_{row.max_len}.csv")].append(line)
        configs[os.path.join(place, f"{row.expid}_{row.config}_seed{row.seed}.yaml")] = {row.expid: _placeless(record)}
    for path, content in lines.items():
        os.makedirs(os.path.dirname(path), exist_ok=True)
        write_whole(path, "\n".join(content) + "\n")
    for path, config in configs.items():
        write_yaml(path, config)


def publish(found: Collected, folder: str) -> None:
    """``<dataset>/<experiment>/<run>/metrics.json``: the records, without the places of this machine."""
    for row, record in zip(found.rows, found.records, strict=True):
        place = os.path.join(folder, row.dataset, row.expid, os.path.basename(row.path))
        os.makedirs(place, exist_ok=True)
        public = {**record, "config": _placeless(record), "command": _command(row)}
        write_whole(os.path.join(place, RECORD_FILE), json.dumps(public, separators=(",", ":")) + "\n")


def _command(row: Row) -> str:
    return f"run_expid.py --expid {row.expid} --seed {row.seed}"


def _placeless(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record["config"].items() if key not in PLACES}


def problems(found: Collected) -> list[str]:
    """What a user should know of: runs left out, and runs that are there more than once."""
    said = [f"unusable: {path}: {reason}" for path, reason in found.unusable]
    said += [f"not finished: {path}; go on with run_expid.py --resume, or remove it" for path in found.unfinished]
    return said + [repeated(group) for group in duplicates(found.rows)]


def repeated(group: list[Row]) -> str:
    """Runs of one config and seed, in a line: whether they came to the same."""
    same = all(row.scores == group[0].scores for row in group)
    result = "with equal scores" if same else "with different scores (another version, device or thread count?)"
    places = ", ".join(row.path for row in group)
    return f"duplicates: {group[0].expid}, seed {group[0].seed}, ran {len(group)} times {result}: {places}"


@answered
def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after a mistake of the user's."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("runs", nargs="+", metavar="RUNS", help="folder with runs below it, such as checkpoints")
    options.add_argument("--out", metavar="FILE.csv", help="where the table goes (default: stdout)")
    options.add_argument("--folders", metavar="DIR", help="also lay out result lines and configs there, as LongCTR does")
    options.add_argument("--records", metavar="DIR", help="also copy the records there, without places of this machine")
    options.add_argument("--contributor", default="", help="what BARS's column of that name says")
    chosen = options.parse_args(argv)
    found = collect(chosen.runs)
    for problem in problems(found):
        print(problem, file=sys.stderr)
    if not found.rows:
        raise ConfigError(f"{', '.join(chosen.runs)}: no finished run below; name the folder that runs were written to")
    text = to_csv(found.rows, chosen.contributor)
    if chosen.out:
        os.makedirs(os.path.dirname(os.path.abspath(chosen.out)), exist_ok=True)
        write_whole(chosen.out, text)
        print(f"{len(found.rows)} runs in {chosen.out}, {len(found.unusable)} unusable, "
              f"{len(found.unfinished)} not finished")  # fmt: skip
    else:
        print(text, end="")
    if chosen.folders:
        lay_out(found, chosen.folders)
    if chosen.records:
        publish(found, chosen.records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
