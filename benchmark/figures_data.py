"""Where the figures get their data: data sets by name, run folders, records."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from machine import ROOT

from model_zoo.compat import FeatureMap
from model_zoo.errors import ConfigError
from model_zoo.experiment.collect import Row, collect, duplicates
from model_zoo.experiment.config import dataset_section
from model_zoo.experiment.paths import resolve_paths
from model_zoo.experiment.statistics import spread
from model_zoo.experiment.unfinished import CONFIG_FILE
from model_zoo.pipeline.dataset import dataset_files, read_items
from model_zoo.pipeline.feature_map import build_feature_map
from model_zoo.pipeline.histories import Histories, read_histories
from model_zoo.registry import get_model


@dataclass(frozen=True)
class DataSet:
    """Items and histories; no splits."""

    feature_map: FeatureMap
    item_columns: dict[str, Any]
    histories: Histories
    user_info: str


def data_set(name: str, config_dir: str | None) -> DataSet:
    """The items and histories of a data set of ``dataset_config``.

    Raises:
        ConfigError: there is none of that name.
        DataError: its files are missing or wrong.
    """
    own = os.path.join(ROOT, "config")
    section = dataset_section(name, config_dir or own, own, "--dataset")
    params = {**section.values, "dataset_id": name}
    resolve_paths(params, ROOT)
    feature_map = build_feature_map(params)
    files = dataset_files(params)
    item_columns = read_items(files["item_info"], feature_map)
    num_items = len(next(iter(item_columns.values())))
    histories = read_histories(files["user_info"], num_items, time_col=params.get("time_col"))
    return DataSet(feature_map, item_columns, histories, files["user_info"])


def run_folder(path: str) -> str:
    """The path of one run's folder.

    Raises:
        ConfigError: it is not one; names those below it.
    """
    if os.path.exists(os.path.join(path, CONFIG_FILE)):
        return path
    if not os.path.isdir(path):
        raise ConfigError(f"{path}: no such folder; give a run's, <model_root>/<dataset>/<expid>/<time>-seed<n>")
    below = sorted(where for where, _, files in os.walk(path) if CONFIG_FILE in files)
    hint = f"there is {below[-1]}" if below else "there is none below it"
    raise ConfigError(f"{path}: is not the folder of one run ({CONFIG_FILE} is not in it); {hint}")


@dataclass(frozen=True)
class Runs:
    """Finished runs and, by a row's path, their records."""

    rows: list[Row]
    records: dict[str, dict[str, Any]]


def finished_runs(folders: list[str]) -> Runs:
    """Finished runs below folders; what cannot be used is said.

    Raises:
        ConfigError: there is none.
    """
    found = collect(folders)
    for path, reason in found.unusable:
        print(f"left out {path}: {reason}")
    if not found.rows:
        raise ConfigError(f"{', '.join(folders)}: no finished run below; train some with run_expid.py")
    return Runs(found.rows, {row.path: record for row, record in zip(found.rows, found.records, strict=True)})


def on_one_data_set(rows: list[Row], name: str | None) -> list[Row]:
    """The rows on a data set.

    Raises:
        ConfigError: there is none, or no name was given and there are several data sets.
    """
    names = sorted({row.dataset for row in rows})
    if name is None and len(names) > 1:
        raise ConfigError(f"the runs are on several data sets; choose one of {', '.join(names)} with --dataset")
    if name is not None and name not in names:
        raise ConfigError(f"--dataset {name}: no run is on it; they are on {', '.join(names)}")
    return [row for row in rows if row.dataset == (name or names[0])]


def path_of(row: Row, folders: list[str]) -> str:
    """The folder of a row that `finished_runs` found below ``folders``."""
    tried = [os.path.join(os.path.dirname(os.path.realpath(folder)), row.path) for folder in folders]
    return next((path for path in tried if os.path.isdir(path)), tried[0])


def method_settings(record: dict[str, Any]) -> dict[str, Any]:
    """n, k and s of a run: experts, themes or experts kept per token, window stride; empty for a plain backbone.

    Of MoS with as many item as window experts, n is ``5`` and in ``shown`` ``5+5``; a rival under ``budget_matched`` has
    twice its n and k.
    """
    try:
        model = get_model(record["model"])
    except KeyError:
        raise ConfigError(f"{record['model']}: is not a model of this package; name runs of such models") from None
    if model.method is None:
        return {}
    keys = model.backbone.configuration(model.method, record["config"])
    if "n_item_experts" in keys:
        n, k = ((keys[f"{what}_item{end}"], keys[f"{what}_window{end}"]) for what, end in (("n", "_experts"), ("topk", "")))
        return {"n": max(n), "shown": f"n {n[0]}+{n[1]}, k {k[0]}+{k[1]}, s {keys['window_stride']}"}
    times = 2 if keys.get("expert_budget") == "budget_matched" else 1
    n, k = times * keys.get("n_experts", 0), times * keys.get("topk_experts", 0)
    return {"n": n, "shown": f"n {n}, k {k}"}


def mean_scores(rows: list[Row], split: str, metrics: list[str]) -> dict[str, Any]:
    """Mean and standard deviation over runs of each metric, and how many there are; a metric without values is left out."""
    found: dict[str, Any] = {"runs": len(rows)}
    for metric in metrics:
        values = [row.scores[split][metric] for row in rows if metric in row.scores.get(split, {})]
        if values:
            one = spread(values)
            found |= {metric: one.mean, f"{metric} sd": one.sd}
    return found


def latest(rows: list[Row]) -> list[Row]:
    """One run of each configuration and seed, the last one; the others are said."""
    for group in duplicates(rows):
        print(f"{group[-1].path}: taken; {len(group) - 1} earlier run(s) of the same configuration and seed left out")
        rows = [row for row in rows if row not in group[:-1]]
    return rows


def shown(scores: dict[str, Any], metric: str) -> str:
    """A metric of `mean_scores` in percent, with its standard deviation if there is one; empty if it is not there."""
    if metric not in scores:
        return ""
    sd = scores[f"{metric} sd"]
    return f"{100 * scores[metric]:.2f}" + ("" if sd is None else f" ± {100 * sd:.2f}")
