"""Compare runs: means over seeds, paired differences to the plain backbone, ranks, beside the paper and LongCTR.

``python benchmark/compare.py checkpoints --out benchmark/results/x.md`` reads records below folders, and tables that
``benchmark/collect.py`` wrote, and writes the document and, beside it, ``x.csv``.
"""

from __future__ import annotations

import argparse
import os
import sys

from collect import problems
from compare_tables import document, to_csv
from comparison import compare
from leaderboard import from_csv

from model_zoo.errors import ConfigError, answered
from model_zoo.experiment.collect import Row, collect
from model_zoo.experiment.record import write_whole


def read(sources: list[str]) -> tuple[list[Row], list[str]]:
    """Runs of folders and tables, and what was left out."""
    tables = [source for source in sources if os.path.isfile(source)]
    folders = [source for source in sources if source not in tables]
    found = collect(folders)
    rows = found.rows + [row for table in tables for row in from_csv(table)]
    if not rows:
        raise ConfigError(f"{', '.join(sources)}: no finished run; name folders of runs, or a table of them")
    return rows, [problem for problem in problems(found) if not problem.startswith("duplicates")]


def with_scores(rows: list[Row], metrics: list[str], split: str) -> tuple[list[Row], list[str]]:
    """The runs that have all of the metrics on the split, and a line on each of the others.

    Raises:
        ConfigError: none has.
    """
    lacking = {row.path: [metric for metric in metrics if metric not in row.scores.get(split, {})] for row in rows}
    usable = [row for row in rows if not lacking[row.path]]
    if not usable:
        known = sorted({metric for row in rows for metric in row.scores.get(split, {})})
        advice = f"choose from {', '.join(known)}" if known else "see --split"
        raise ConfigError(f"--metric {' '.join(metrics)}: no run has these on {split}; {advice}")
    return usable, [f"{path}: no {', '.join(names)} on {split}" for path, names in lacking.items() if names]


@answered
def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after a mistake of the user's."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("runs", nargs="+", metavar="RUNS_OR_CSV", help="folder with runs below it, or a collected table")
    options.add_argument("--metric", nargs="+", default=["AUC", "gAUC"], metavar="NAME", help="default: AUC gAUC")
    options.add_argument("--split", choices=["test", "valid"], default="test", help="default: %(default)s")
    options.add_argument("--by", choices=["model", "expid"], default="model",
                         help="a line for each model (default), or for each experiment: variants of a model")  # fmt: skip
    options.add_argument("--level", type=float, default=0.95, help="of the intervals (default: %(default)s)")
    options.add_argument("--out", metavar="FILE.md", help="where the document goes, its csv beside it (default: stdout)")
    chosen = options.parse_args(argv)
    if not 0 < chosen.level < 1:
        raise ConfigError(f"--level {chosen.level:g}: must be between 0 and 1; 0.95 is usual")
    if chosen.out and not chosen.out.endswith(".md"):
        raise ConfigError(f"--out {chosen.out}: must end with .md; the csv goes beside it")
    metrics = list(dict.fromkeys(chosen.metric))
    rows, left_out = read(chosen.runs)
    rows, lacking = with_scores(rows, metrics, chosen.split)
    found = compare(rows, metrics, chosen.split, chosen.level, chosen.by == "expid")
    text = document(found, _command(chosen), left_out + lacking, chosen.level)
    if not chosen.out:
        print(text, end="")
        return 0
    os.makedirs(os.path.dirname(os.path.abspath(chosen.out)), exist_ok=True)
    table = chosen.out.removesuffix(".md") + ".csv"
    if any(os.path.realpath(source) == os.path.realpath(table) for source in chosen.runs):
        raise ConfigError(f"--out {chosen.out}: its csv would replace {table}, which is read here; choose another name")
    write_whole(chosen.out, text)
    write_whole(table, to_csv(found))
    print(f"{len(rows)} runs compared in {chosen.out} and {table}, {len(left_out) + len(lacking)} left out")
    return 0


def _command(chosen: argparse.Namespace) -> str:
    """The call, without the places of files."""
    parts = ["python benchmark/compare.py", *(os.path.basename(os.path.normpath(source)) for source in chosen.runs)]
    parts += ["--metric", *chosen.metric] if chosen.metric != ["AUC", "gAUC"] else []
    parts += [f"--{name} {getattr(chosen, name)}" for name, usual in (("split", "test"), ("by", "model"), ("level", 0.95))
              if getattr(chosen, name) != usual]  # fmt: skip
    return " ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
