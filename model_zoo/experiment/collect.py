"""Records of many runs as rows that can be compared: found, checked, identified."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from model_zoo.errors import ConfigError
from model_zoo.experiment.grid_ids import DIGEST_BYTES, LEFT_OUT, digest
from model_zoo.experiment.paths import NAME_KEYS, PATH_KEYS
from model_zoo.experiment.record import RecordError, read_record
from model_zoo.experiment.unfinished import CONFIG_FILE, RECORD_FILE
from model_zoo.registry import BACKBONES, METHODS

#: where data are and what they are called; the fingerprint of their files tells which they are
DATA_KEYS = {*PATH_KEYS, *NAME_KEYS}


@dataclass(frozen=True)
class Row:
    """One finished run.

    Attributes:
        path: its folder, as seen from the parent of the folder that was searched.
        config: digest of its configuration, equal for runs that differ in nothing but the seed (`config_digest`).
        data: digest of its data files; empty if not recorded.
        head: ``dot``, a score from history and target alone, or ``dnn``, any other, which reads context features.
        scores: split to metric to value, of the final model; no value that is not finite.
        monitor: what chose its checkpoint, such as ``AUC + gAUC``; less is better after ``min:``.
        monitored: that figure on validation, greater is better; None if unknown.
    """

    path: str
    model: str
    dataset: str
    max_len: int | None
    head: str
    expid: str
    seed: int
    config: str
    data: str
    scores: Mapping[str, Mapping[str, float]]
    monitor: str
    monitored: float | None
    parameters: int | None = None
    flops: float | None = None
    seconds: float | None = None
    peak_mib: float | None = None
    finished: str = ""
    git_commit: str = ""

    @property
    def method(self) -> str:
        """``MoS`` of ``MoS_TWIN``; empty for a plain backbone."""
        return split_model(self.model)[0]

    @property
    def backbone(self) -> str:
        """``TWIN`` of ``MoS_TWIN``, and of ``TWIN``."""
        return split_model(self.model)[1]

    @property
    def identity(self) -> tuple[str, ...]:
        """Equal for runs of the same model, data, configuration and seed."""
        return (self.dataset, self.data, self.model, self.config, str(self.seed))


@dataclass(frozen=True)
class Collected:
    """What lies below some folders.

    Attributes:
        rows: finished runs, in an order that depends on nothing but them.
        unusable: path and reason of each record that cannot be used.
        unfinished: folders of runs without a record.
        records: the rows' records, in the same order.
    """

    rows: list[Row]
    unusable: list[tuple[str, str]]
    unfinished: list[str]
    records: list[dict[str, Any]] = field(repr=False)


def split_model(name: str) -> tuple[str, str]:
    """Method and backbone of a model's name; no method for a plain backbone."""
    method, _, backbone = name.partition("_")
    return (method, backbone) if backbone and (backbone in BACKBONES or method in METHODS) else ("", name)


def collect(folders: Iterable[str]) -> Collected:
    """Every run below the given folders; one that two of them lead to is taken once.

    Raises:
        ConfigError: a folder is not there.
    """
    found: dict[str, str] = {}
    for folder in folders:
        if not os.path.isdir(folder):
            raise ConfigError(f"{folder}: no such folder; name folders that runs were written to, such as checkpoints")
        place = os.path.dirname(os.path.realpath(folder))
        for run in _runs_below(os.path.realpath(folder)):
            found.setdefault(run, os.path.relpath(run, place))
    usable, unusable, unfinished = [], [], []
    for run, shown in sorted(found.items(), key=lambda item: (item[1], item[0])):
        path = os.path.join(run, RECORD_FILE)
        if not os.path.exists(path):
            unfinished.append(shown)
            continue
        try:
            record = read_record(path)
            usable.append((row_of(record, shown), record))
        except RecordError as error:
            unusable.append((shown, str(error).removeprefix(f"{path}: ")))
    usable.sort(key=lambda pair: _order(pair[0]))
    return Collected([row for row, _ in usable], unusable, unfinished, [record for _, record in usable])


def duplicates(rows: Iterable[Row]) -> list[list[Row]]:
    """Runs of one configuration and seed, where there are several, the latest last."""
    groups = defaultdict(list)
    for row in rows:
        groups[row.identity].append(row)
    return [sorted(group, key=lambda row: (row.finished, row.path)) for group in groups.values() if len(group) > 1]


def merits(rows: Iterable[Row]) -> dict[str, tuple[int, float, str]]:
    """Which of a model's configurations stands for it: the greatest; test scores have no part in it.

    Returns:
        Digest of each to its seeds, their mean figure on validation (0 and -inf if a seed has none) and, to decide between
        equals, the digest.
    """
    figures: dict[str, dict[int, float | None]] = defaultdict(dict)
    for row in rows:
        figures[row.config][row.seed] = row.monitored
    found = {}
    for config, by_seed in figures.items():
        known = [figure for figure in by_seed.values() if figure is not None]
        sound = len(known) == len(by_seed)
        found[config] = (len(known), sum(known) / len(known), config) if sound else (0, float("-inf"), config)
    return found


def row_of(record: Mapping[str, Any], path: str) -> Row:
    """A record's row.

    Args:
        record: as `record.read_record` returns it.
        path: of the run, as it is to be shown.
    """
    config = record["config"]
    scores = {split: _numbers(values) for split, values in record["scores"]["final"].items()}
    monitor, monitored = _monitored(config, scores.get("valid", {}))
    counted = record["flops"].get("prediction") if record["flops"] else None
    fingerprint = record["data_fingerprint"]
    head = record["model_config"].get("head", config.get("head"))
    return Row(
        path=path,
        model=record["model"],
        dataset=record["dataset_id"],
        max_len=_whole(config.get("max_len")),
        head="dot" if head == "dot" else "dnn",
        expid=record["expid"],
        seed=record["seed"],
        config=config_digest({**config, "model": record["model"]}),
        data=_digest(fingerprint) if fingerprint else "",
        scores=scores,
        monitor=monitor,
        monitored=monitored,
        parameters=_whole(record["parameters"].get("total")),
        flops=_numbers(counted).get("total"),
        seconds=_numbers(record["seconds"]).get("total"),
        peak_mib=max(_numbers(record["peak_memory"]).values(), default=None),
        finished=record["finished"] or os.path.basename(path).partition("-seed")[0],
        git_commit=record["git_commit"] or "",
    )


def config_digest(config: Mapping[str, Any]) -> str:
    """Equal for configurations that compute the same, the seed, the names, and the places of data apart.

    See `grid_ids.canonical`. Of a model that is not registered here, a default that is given counts as a setting.
    """
    own = {key: value for key, value in config.items() if key not in DATA_KEYS}
    try:
        return digest(own)
    except KeyError:
        return _digest({key: value for key, value in own.items() if key not in LEFT_OUT})


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).hexdigest()


def _numbers(values: Any) -> dict[str, float]:
    """Of a mapping, the values that are finite numbers; nothing of anything else."""
    items = values.items() if isinstance(values, dict) else ()
    numbers = ((name, v) for name, v in items if isinstance(v, float | int) and not isinstance(v, bool))
    return {name: float(value) for name, value in numbers if math.isfinite(value)}


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _monitored(config: Mapping[str, Any], valid: Mapping[str, float]) -> tuple[str, float | None]:
    """What early stopping looked at, in words, and its value on validation, signed so that greater is better."""
    monitor = config.get("monitor")
    weights = {monitor: 1.0} if isinstance(monitor, str) else _numbers(monitor)
    shown = " + ".join(name if weights[name] == 1 else f"{weights[name]:g} {name}" for name in sorted(weights))
    least = config.get("monitor_mode") == "min"
    known = bool(weights) and weights.keys() <= valid.keys()
    value = sum(weight * valid[name] for name, weight in weights.items()) if known else None
    return ("min: " if least else "") + shown, -value if value is not None and least else value


def _runs_below(folder: str) -> list[str]:
    """Folders with a run's config or record."""
    return [where for where, _, files in os.walk(folder) if RECORD_FILE in files or CONFIG_FILE in files]


def _order(row: Row) -> tuple[Any, ...]:
    names = (row.dataset, row.max_len or 0, row.head, row.backbone, row.method)
    return (*names, row.expid, row.config, row.seed, row.finished, row.path)
