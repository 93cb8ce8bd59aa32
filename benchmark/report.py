"""Write one self-contained page of runs: leaderboard, comparison, figures, and of each run its curves and router view.

``python benchmark/report.py checkpoints --figures benchmark/results --out report.html`` reads every finished run below the
folders. The page needs no network and no other file. A router view is computed from a run's checkpoint and data once, and
kept beside it; by default of the run of each model, data set and length that is best on validation.
"""

from __future__ import annotations

import argparse
import os
import sys

from comparison import LESS_IS_BETTER, compare
from report_content import FinishedRun, content, embedded_figures, read_runs
from report_html import page

from model_zoo.analysis.router_view import has_view, router_view
from model_zoo.errors import ConfigError, UserError, answered
from model_zoo.experiment.unfinished import CONFIG_FILE
from model_zoo.files import write_whole

#: metrics that come first, in this order
FIRST = ("AUC", "gAUC", "logloss")


def metrics_of(runs: list[FinishedRun], split: str, wanted: list[str] | None) -> list[str]:
    """The metrics to show: those asked for, or all that any run has.

    Raises:
        ConfigError: no run has one of those asked for, or any at all.
    """
    known = {name for run in runs for name in run.row.scores.get(split, {})}
    if not known:
        raise ConfigError(f"--split {split}: no run has scores on {split}; choose the other split")
    missing = [name for name in wanted or [] if name not in known]
    if missing:
        raise ConfigError(f"--metric {' '.join(missing)}: no run has it on {split}; choose from {', '.join(sorted(known))}")
    if wanted:
        return list(dict.fromkeys(wanted))
    return sorted(known, key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name))


def views_of(runs: list[FinishedRun], which: str) -> dict[str, dict[str, object] | str]:
    """Router view, or the reason why there is none, by run folder.

    Args:
        which: ``best`` on validation of each model, data set, length and head, ``all``, ``kept`` ones only, or ``none``.
    """
    best: dict[tuple[object, ...], FinishedRun] = {}
    for run in runs:
        row = run.row
        key = (row.dataset, row.max_len, row.head, row.model)
        if key not in best or _merit(run) > _merit(best[key]):
            best[key] = run
    chosen = {id(run) for run in (best.values() if which == "best" else runs if which == "all" else [])}
    found: dict[str, dict[str, object] | str] = {}
    for run in runs:
        if not run.row.method:
            continue
        if which == "none" or not (id(run) in chosen or has_view(run.folder)):
            found[run.folder] = "Not computed for this run: make the page with --router all."
            continue
        if not has_view(run.folder) and not os.path.exists(os.path.join(run.folder, CONFIG_FILE)):
            found[run.folder] = "Only the record of this run is here; a page made where its folder is shows more."
            continue
        try:
            found[run.folder] = router_view(run.folder)
        except Exception as error:  # whatever it is, it must not cost the page
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            found[run.folder] = reason
            print(f"no router view of {run.row.path}: {reason}", file=sys.stderr)
    return found


def _merit(run: FinishedRun) -> tuple[float, str]:
    monitored = run.row.monitored
    return (float("-inf") if monitored is None else monitored, run.row.finished)


@answered
def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after a mistake of the user's."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("runs", nargs="+", metavar="RUNS", help="folder with runs below it, such as checkpoints")
    options.add_argument("--out", default="report.html", metavar="FILE", help="the page (default: %(default)s)")
    options.add_argument("--figures", metavar="DIR", help="folder with pictures (*.png) to put into the page")
    options.add_argument("--split", choices=["test", "valid"], default="test", help="of the scores (default: %(default)s)")
    options.add_argument("--metric", nargs="+", metavar="NAME", help="default: all that the runs have")
    options.add_argument(
        "--router", choices=["best", "all", "kept", "none"], default="best",
        help="runs whose router view is computed; kept: none, those there are are shown (default: %(default)s)",
    )  # fmt: skip
    options.add_argument("--level", type=float, default=0.95, help="of the intervals (default: %(default)s)")
    options.add_argument("--title", default="CTR experiments", help="of the page (default: %(default)s)")
    chosen = options.parse_args(argv)
    if not 0 < chosen.level < 1:
        raise ConfigError(f"--level {chosen.level:g}: must be between 0 and 1; 0.95 is usual")
    runs, left_out = read_runs(chosen.runs)
    metrics = metrics_of(runs, chosen.split, chosen.metric) if runs else []
    figures = embedded_figures(chosen.figures) if chosen.figures else []
    compared = compare([run.row for run in runs], metrics, chosen.split, chosen.level)
    views = views_of(runs, chosen.router)
    found = content(runs, compared, figures, views, left_out)
    title = chosen.title.encode(errors="replace").decode()  # a command line may hold bytes that are no text
    found |= {"title": title, "level": chosen.level, "less": [name for name in metrics if name in LESS_IS_BETTER]}
    text = page(found)
    os.makedirs(os.path.dirname(os.path.abspath(chosen.out)), exist_ok=True)
    write_whole(chosen.out, text)
    size = len(text.encode()) / 2**20
    print(f"{chosen.out}: {len(runs)} runs, {len(figures)} figures, {len(left_out)} left out, {size:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
