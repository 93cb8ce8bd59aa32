"""Synthetic data sets from no hopping to strong, each with the same items, users and rows; what differs is how long a
session lasts.

The sets are made where they are missing; ``--run`` trains what is missing, one run after the other, and goes on where it
was stopped. A mixture's gain is over the plain backbone of the same seed. Themes are recovered as far as the item router's
nearest theme of each item agrees with the true one: adjusted mutual information, 1 for the same partition, 0 by chance.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

import figures_style as style
from figures_data import Runs, finished_runs, latest, mean_scores, path_of, shown
from figures_strength_picture import draw
from figures_train import train_points
from hopping_sets import HoppingSet, make_sets, write_config
from machine import ROOT

from model_zoo.analysis.themes import recovery
from model_zoo.analysis.trained_run import load_trained
from model_zoo.errors import ConfigError, DataError
from model_zoo.experiment.collect import Row
from model_zoo.experiment.config import load_config
from model_zoo.experiment.report import table
from model_zoo.experiment.statistics import paired_difference, spread
from model_zoo.pipeline.synthetic import PRESETS

METRICS = ["AUC", "gAUC"]
CONFIG_HELP = "folder for the sets' dataset_config, and for experiments of your own, if any (default: config/ below --data)"


def options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    own = os.path.join("checkpoints", "hopping_study")
    parser.add_argument("runs", nargs="*", metavar="FOLDER", default=[os.path.join(ROOT, own)],
                        help=f"folders of runs; --run writes to the first (default: {own})")  # fmt: skip
    parser.add_argument("--data", default=os.path.join(ROOT, "data", "hopping_study"), metavar="DIR",
                        help="the sets' folders lie in it (default: data/hopping_study)")  # fmt: skip
    parser.add_argument("--switches", type=float, nargs="+", default=[0, 1, 3, 8, 20, 40], metavar="N",
                        help="of the session's theme, per 100 events; 0: one session (default: %(default)s)")  # fmt: skip
    parser.add_argument("--preset", choices=sorted(PRESETS), default="hopping", help="sizes (default: %(default)s)")
    parser.add_argument("--expids", nargs="+", default=["TWIN_study", "MoS_TWIN_study"], metavar="EXPID",
                        help="backbones and mixtures over them (default: %(default)s)")  # fmt: skip
    parser.add_argument("--run", action="store_true", help="train what is missing of --expids and --seeds")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="to train (default: %(default)s)")
    parser.add_argument("--max-len", type=int, default=100, help="newest items of a history (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for every run; repeatable")
    parser.add_argument("--gpu", type=int, default=-1)


def command(chosen: argparse.Namespace) -> None:
    """Make the sets, train if asked to, print the table, write numbers and picture."""
    chosen.config = chosen.config or os.path.join(chosen.data, "config")
    sets = make_sets(chosen.data, chosen.switches, chosen.preset)
    write_config(chosen.config, sets)
    if chosen.run:
        _train(sets, chosen)
    elif not os.path.isdir(chosen.runs[0]):
        raise ConfigError(f"{chosen.runs[0]}: no such folder of runs; the sets are made, --run trains on them")
    runs = finished_runs(chosen.runs)
    rows = [row for one in sets for row in _rows_of(one, runs, chosen)]
    if not rows:
        raise ConfigError(f"{', '.join(chosen.runs)}: no finished run of {' or '.join(chosen.expids)}, length "
                          f"{chosen.max_len}, on these sets; train some with --run")  # fmt: skip
    files = style.Files(chosen.out, "hopping-strength")
    names = [one.dataset_id for one in sets]
    files.numbers(rows, **{"data sets": names, "preset": chosen.preset, "max_len": chosen.max_len, "split": "test"})
    print(_table(rows))
    print(files.picture(draw(rows, METRICS, f"synthetic users ({chosen.preset}), histories of {chosen.max_len}, test")))


def _train(sets: Sequence[HoppingSet], chosen: argparse.Namespace) -> None:
    plan = []
    for one in sets:
        for expid in chosen.expids:
            changes = [f"dataset_id={one.dataset_id}", f"max_len={chosen.max_len}"]
            config = load_config(chosen.config, expid, [*chosen.set, *changes], os.path.join(ROOT, "config"))
            if config.problems:
                raise ConfigError("; ".join(config.problems))
            plan.append((expid, "", changes))
    train_points(plan, chosen)


def _rows_of(one: HoppingSet, runs: Runs, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """A row of figures for each experiment with finished runs on a set."""
    lines = _lines(one, runs, chosen)
    plain = {line[0].backbone: line for line in reversed(lines.values()) if not line[0].method}
    best = one.ceiling(METRICS) if lines else {}
    found = []
    for expid, line in lines.items():
        first = line[0]
        row = {"switches": one.switches, "data set": one.dataset_id, "line": expid, "model": first.model}
        row |= {"method": first.method, "backbone": first.backbone, **mean_scores(line, "test", METRICS), **best}
        if first.method and first.backbone in plain:
            row |= _gain(line, plain[first.backbone])
        if first.method == "MoS":
            row |= _recovery(line, chosen.runs)
        found.append(row)
    return found


def _lines(one: HoppingSet, runs: Runs, chosen: argparse.Namespace) -> dict[str, list[Row]]:
    """Finished runs on a set by experiment; an experiment without any is said.

    Raises:
        ConfigError: an experiment has runs of several settings.
        DataError: a run is of other files.
    """
    lines = {}
    for expid in chosen.expids:
        where = (one.dataset_id, expid, chosen.max_len)
        rows = [row for row in runs.rows if (row.dataset, row.expid, row.max_len) == where]
        for row in rows:
            if runs.records[row.path]["data_fingerprint"] != one.fingerprint:
                raise DataError(f"{path_of(row, chosen.runs)}: was trained on other files than those in {one.folder}; "
                                "name another folder of runs, or delete this run")  # fmt: skip
        if len({row.config for row in rows}) > 1:
            raise ConfigError(f"{expid} has runs of several settings on {one.dataset_id}; name a folder with those of one")
        if rows:
            lines[expid] = latest(rows)
        else:
            print(f"{expid}: no finished run of length {chosen.max_len} on {one.dataset_id}; --run trains it")
    return lines


def _gain(runs: Sequence[Row], base: Sequence[Row]) -> dict[str, Any]:
    """Difference to the plain backbone for each metric, with its interval."""
    found: dict[str, Any] = {}
    for metric in METRICS:
        mine, its = ({row.seed: row.scores["test"][metric] for row in part if metric in row.scores.get("test", {})}
                     for part in (runs, base))  # fmt: skip
        gain = paired_difference(mine, its)
        if gain is not None:
            found |= {f"gain {metric}": gain.mean, f"gain {metric} low": gain.low, f"gain {metric} high": gain.high,
                      "pairs": gain.pairs, "note": gain.note}  # fmt: skip
    return found


def _recovery(runs: Sequence[Row], folders: list[str]) -> dict[str, Any]:
    """Mean over runs of how well their themes are the true ones."""
    found = [recovery(load_trained(path_of(row, folders))) for row in runs]
    mine, chance, kmeans = (spread([getattr(one, name) for one in found]) for name in ("router", "chance", "kmeans"))
    return {"themes": mine.mean, "themes sd": mine.sd, "themes by chance": chance.mean, "themes by k-means": kmeans.mean,
            "k-means of": found[0].vectors}  # fmt: skip


def _table(rows: Sequence[dict[str, Any]]) -> str:
    header = ["switches", "", "runs", *METRICS, *(f"ceiling {m}" for m in METRICS), *(f"gain {m}" for m in METRICS),
              "themes found", "by k-means", "by chance"]  # fmt: skip
    lines = []
    for row in rows:
        ceilings = [f"{100 * row[f'ceiling {metric}']:.2f}" for metric in METRICS]
        themes = [f"{row[name]:.3f}" if name in row else "" for name in ("themes", "themes by k-means", "themes by chance")]
        lines.append([f"{row['switches']:g}", row["line"], str(row["runs"]), *(shown(row, metric) for metric in METRICS),
                      *ceilings, *(_interval(row, f"gain {metric}") for metric in METRICS), *themes])  # fmt: skip
    notes = sorted({row["note"] for row in rows if row.get("note")})
    return "\n".join([table(header, lines), *notes])


def _interval(row: dict[str, Any], name: str) -> str:
    if name not in row:
        return ""
    low, high = row[f"{name} low"], row[f"{name} high"]
    reach = "" if low is None else f" ({100 * low:+.2f} to {100 * high:+.2f})"
    return f"{100 * row[name]:+.2f}{reach}"
