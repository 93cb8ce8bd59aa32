"""Synthetic data sets that differ in hopping strength alone: made once below one folder, each with what it was made of."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from model_zoo.errors import ConfigError, DataError
from model_zoo.experiment.record import write_json
from model_zoo.files import write_whole
from model_zoo.pipeline.histories import digest
from model_zoo.pipeline.metrics import evaluate_metrics
from model_zoo.pipeline.synthetic import PRESETS, SPLITS, SyntheticSpec, generate
from model_zoo.pipeline.synthetic_files import TRUTH_FILE, dataset_config, write

#: beside the data: the values that they were drawn from
SPEC_FILE = "spec.json"
CONFIG_FILE = "hopping_study.yaml"
#: the files of a set, by their keys in records
FILES = {**{name: name for name in ("item_info", "user_info")}, **{f"{split}_data": split for split in SPLITS}}


@dataclass(frozen=True)
class HoppingSet:
    """One set.

    Attributes:
        switches: of the session's theme, per 100 events.
        folder: where it lies; its name is the data set's id.
    """

    switches: float
    spec: SyntheticSpec
    folder: Path

    @property
    def dataset_id(self) -> str:
        """Its name in ``dataset_config``."""
        return self.folder.name

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """As records of runs on it have it."""
        return {key: digest(str(self.folder / f"{name}.parquet")) for key, name in FILES.items()}

    def ceiling(self, metrics: Sequence[str]) -> dict[str, float]:
        """What scoring test rows by their true click probability would reach, and their click rate."""
        rows = pq.read_table(self.folder / "test.parquet", columns=["user_index", "is_click"])
        clicks = rows["is_click"].to_numpy()
        with np.load(self.folder / TRUTH_FILE) as truth:
            best = evaluate_metrics(clicks, truth["test_click_probability"], metrics, rows["user_index"].to_numpy())
        return {**{f"ceiling {metric}": best[metric] for metric in metrics}, "click rate": float(clicks.mean())}


def make_sets(folder: str, switches: Sequence[float], preset: str) -> list[HoppingSet]:
    """Every set of a study, the weakest hopping first; those that are there already are left as they are.

    Raises:
        ConfigError: strengths out of range.
        DataError: a set's folder holds something else, or cannot be written.
    """
    if bad := [value for value in switches if not 0 <= value <= 100]:
        raise ConfigError(f"--switches {bad[0]:g}: of 100 events, from 0 to 100 can begin a session")
    found = []
    for value in sorted(set(switches)):
        spec = replace(PRESETS[preset], session_length=100 / value if value else math.inf, paired=True)
        one = HoppingSet(value, spec, Path(os.path.abspath(folder), f"hopping_{value:g}"))
        if not _is_there(one):
            print(f"{one.folder}: made", flush=True)
            one.folder.mkdir(parents=True, exist_ok=True)
            write_json(str(one.folder / SPEC_FILE), _described(spec))
            write(generate(spec), one.folder)
        found.append(one)
    return found


def write_config(config: str, sets: Sequence[HoppingSet]) -> None:
    """Describe the sets in ``<config>/dataset_config``.

    Raises:
        ConfigError: the folder has one file for all data sets, which would hide another.
    """
    single = os.path.join(config, "dataset_config.yaml")
    if os.path.exists(single):
        raise ConfigError(f"--config {config}: {single} would hide the sets' file; move it into {config}/dataset_config/")
    os.makedirs(os.path.join(config, "dataset_config"), exist_ok=True)
    text = "\n".join(dataset_config(one.spec, one.folder) for one in sets)
    write_whole(Path(config, "dataset_config", CONFIG_FILE), text + "\n")


def _is_there(one: HoppingSet) -> bool:
    """Whether all of a set's files are there.

    Raises:
        DataError: some are, but of another set.
    """
    files = [*(f"{name}.parquet" for name in FILES.values()), TRUTH_FILE]
    there = [name for name in files if (one.folder / name).exists()]
    try:
        known: Any = json.loads((one.folder / SPEC_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = None
    advice = "choose another --data, or delete that folder"
    if not isinstance(known, dict):
        if there:
            raise DataError(f"{one.folder}: holds {there[0]}, but no {SPEC_FILE} that says what it was made of; {advice}")
        return False
    wanted = _described(one.spec)
    changed = [f"{key} {known.get(key)}, not {value}" for key, value in wanted.items() if known.get(key) != value]
    if changed:
        raise DataError(f"{one.folder}: was made with {'; '.join(changed)}; {advice}")
    return there == files


def _described(spec: SyntheticSpec) -> dict[str, Any]:
    """As json has it; a session_length without end is null."""
    length = None if math.isinf(spec.session_length) else spec.session_length
    return {**asdict(spec), "rows": list(spec.rows), "session_length": length}
