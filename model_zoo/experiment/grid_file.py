"""LongCTR's tuner yaml files: a base experiment, data sets, and the values that each key is to take."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from model_zoo.errors import ConfigError
from model_zoo.experiment.config import Config, load_config, parse_override
from model_zoo.experiment.sections import Section, read_mapping
from model_zoo.faults import nearest, refusal, shown

GRID_KEYS = ("base_config", "base_expid", "dataset_id", "dataset_config", "tuner_space")
RANGE_KEYS = {"low", "high", "log", "step"}
#: what stands for "say it in the tuner file" in LongCTR's base experiments
UNSET = "TBD"


@dataclass(frozen=True)
class Range:
    """Numbers between two, both included, for a search that draws them: an extension of LongCTR's files.

    Attributes:
        log: drawn evenly in the logarithm.
        step: between neighbours; None: any number, or any whole one.
        where: ``file:line``.
    """

    low: float
    high: float
    log: bool
    step: float | None
    where: str


@dataclass(frozen=True)
class Space:
    """A tuner file, read.

    Attributes:
        name: the file's, without its ending; names the results.
        path: the file.
        bases: a config for each data set, without the space.
        axes: key to its values, each with its ``file:line``; in the order that FuxiCTR numbers by.
        ranges: key to numbers to draw from.
        expid: the base experiment.
        fixed_name: the base experiment's name says its data set, too.
    """

    name: str
    path: str
    bases: tuple[Config, ...]
    axes: dict[str, list[tuple[Any, str]]]
    ranges: dict[str, Range]
    expid: str
    fixed_name: bool

    def config(self, base: Config, values: dict[str, tuple[Any, str]]) -> Config:
        """One configuration of the space: its data set's base with these values, each with its place."""
        config = replace(
            base, values=dict(base.values), origin=dict(base.origin), inner=dict(base.inner), problems=[*base.problems]
        )
        for key, (value, where) in values.items():
            config.set(key, value, where)
        return config

    def stem(self, config: Config) -> str:
        """What a configuration's id begins with: the base experiment's name or, as in FuxiCTR, model and data set."""
        if self.fixed_name and "model" not in self.axes:
            return self.expid
        return f"{config.values.get('model')}_{config.values.get('dataset_id')}"


def read_space(path: str, root: str, overrides: Iterable[str] = ()) -> Space:
    """A tuner file.

    Args:
        root: the repository; a ``base_config`` is looked for from the working directory, from there, and beside the file.
        overrides: ``key=value`` of the space, a value or a list of them as in the file, in place of what the file has.

    Raises:
        ConfigError: unreadable, an unknown key, an empty space, no such base or data set; all that is wrong at once.
    """
    section = read_mapping(path, f"{', '.join(GRID_KEYS)} to their values")
    given: dict[str, Any] = {}
    problems: list[str] = []
    for text in overrides:
        try:
            key, value = parse_override(text)
            given[key] = value
        except ConfigError as error:
            problems.append(str(error))
    if "dataset_id" in given:  # wherever the file names its data sets
        section.values.pop("dataset_id", None)
    problems += [
        f"{path}:{section.lines[(key,)]}: unknown key '{key}' of a tuner file{nearest(key, GRID_KEYS)}"
        for key in section.values
        if key not in GRID_KEYS
    ]
    axes, ranges, wrong = _space(section, given)
    problems += wrong
    bases: list[Config] = []
    expid = section.values.get("base_expid")
    if not isinstance(expid, str):
        problems.append(f"{path}: base_expid: {shown(expid)}: must name an experiment of base_config")
    else:
        try:
            bases = _bases(section, axes, root)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise refusal(problems)
    assert isinstance(expid, str)
    order = list(bases[0].values)
    axes = dict(sorted(axes.items(), key=lambda axis: order.index(axis[0]) if axis[0] in order else len(order)))
    fixed_name = [_own_dataset(section, root)] == [base.values["dataset_id"] for base in bases]
    name = os.path.splitext(os.path.basename(path))[0]
    return Space(name, path, tuple(bases), axes, ranges, expid, fixed_name)


def _space(
    section: Section, given: dict[str, Any]
) -> tuple[dict[str, list[tuple[Any, str]]], dict[str, Range], list[str]]:
    """Axes, ranges and what is wrong with them; a value that is no list is an axis of one."""
    space = section.values.get("tuner_space")
    line = section.lines.get(("tuner_space",))
    where = f"{section.path}:{line}" if line else section.path
    if not isinstance(space, dict) or not space:
        return {}, {}, [f"{where}: tuner_space: {shown(space)}: is empty; give at least one key and its values"]
    axes: dict[str, list[tuple[Any, str]]] = {}
    ranges: dict[str, Range] = {}
    problems = []
    for key, value in {**space, **given}.items():
        place = ("tuner_space", key)
        lines = {} if key in given else section.lines
        where = "--set" if key in given else f"{section.path}:{lines.get(place, line)}"
        if isinstance(value, list):
            if not value:
                problems.append(f"{where}: {key}: [] holds no value, so the space is empty; give at least one")
            numbers = [lines.get((*place, number)) for number in range(len(value))]
            axes[key] = [(each, f"{section.path}:{at}" if at else where) for each, at in zip(value, numbers, strict=True)]
        elif isinstance(value, dict) and value.keys() >= {"low", "high"} and value.keys() <= RANGE_KEYS:
            ranges[key] = found = Range(
                value["low"], value["high"], value.get("log", False), value.get("step"), where
            )
            if fault := _range_fault(found):
                problems.append(f"{where}: {key}: {shown(value)}: {fault}")
        else:
            axes[key] = [(value, where)]
    return axes, ranges, problems


def _range_fault(found: Range) -> str | None:
    numbers = [found.low, found.high, *([] if found.step is None else [found.step])]
    if any(isinstance(number, bool) or not isinstance(number, int | float) for number in numbers):
        return "low, high and step must be numbers (write 1.e-4, with a dot)"
    if not isinstance(found.log, bool):
        return "log must be True or False"
    if not found.low < found.high:
        return "low must be below high"
    if found.log and (found.low <= 0 or found.step is not None):
        return "with log, low must be above 0, and there is no step"
    return "step must be above 0" if found.step is not None and found.step <= 0 else None


def _bases(section: Section, axes: dict[str, list[tuple[Any, str]]], root: str) -> list[Config]:
    """The base experiment on each data set.

    Raises:
        ConfigError: no such folder, experiment or data set; a data set named in two places.
    """
    path = section.path
    ids, where = section.values.get("dataset_id"), f"{path}:{section.lines.get(('dataset_id',))}"
    if "dataset_id" in axes:
        if ids is not None:
            raise ConfigError(f"{where}: dataset_id is in tuner_space, too; take one of them out")
        where = axes["dataset_id"][0][1]
        ids = [value for value, _ in axes.pop("dataset_id")]
    if ids is None:
        ids, where = _own_dataset(section, root), path
        if ids in (None, UNSET):
            raise ConfigError(f"{path}: no dataset_id; add `dataset_id: <name in dataset_config>`")
    ids = ids if isinstance(ids, list) else [ids]
    if not ids or not all(isinstance(each, str) for each in ids):
        raise ConfigError(f"{where}: dataset_id: {shown(ids)}: must be the name of a data set, or a list of such")
    twice = sorted({each for each in ids if ids.count(each) > 1})
    if twice:
        raise ConfigError(f"{where}: dataset_id: {', '.join(twice)} twice; take one of them out")
    return [_base(section, root, each, where) for each in ids]


def _base(section: Section, root: str, dataset_id: str, where: str) -> Config:
    """The base experiment on a data set that the file itself, the base's folder or the repository describes."""
    described = section.values.get("dataset_config")
    datasets = os.path.join(root, "config")
    if isinstance(described, str):
        folder_of_data = _found(described, section.path, root)
        if folder_of_data is None:
            line = section.lines[("dataset_config",)]
            raise ConfigError(f"{section.path}:{line}: dataset_config: {described}: no such folder")
        datasets = folder_of_data
    looked_up = UNSET if isinstance(described, dict) else dataset_id
    config = _loaded(section, root, [f"dataset_id={json.dumps(looked_up)}"], datasets)
    if isinstance(described, dict):
        if not isinstance(described.get(dataset_id), dict):
            known = nearest(dataset_id, map(str, described)) or f"; it has {', '.join(map(str, described))}"
            raise ConfigError(f"{where}: dataset_id '{dataset_id}' is not in the file's dataset_config{known}")
        config.problems.clear()
        config.dataset = f"{section.path}:{section.lines[('dataset_config', dataset_id)]}"
        for key, value in described[dataset_id].items():
            config.set(key, value, f"{section.path}:{section.lines[('dataset_config', dataset_id, key)]}")
    config.problems = [text.replace("--set:", f"{where}:", 1) for text in config.problems]
    config.set("dataset_id", dataset_id, where)
    return config


def _base_folder(section: Section, root: str) -> str:
    named = section.values.get("base_config", os.path.dirname(section.path) or ".")
    folder = _found(named, section.path, root) if isinstance(named, str) else None
    if folder is None:
        line = section.lines.get(("base_config",))
        raise ConfigError(
            f"{section.path}:{line}: base_config: {shown(named)}: no such folder here, in the repository or beside the file"
        )
    return folder


def _own_dataset(section: Section, root: str) -> Any:
    """The data set of the base experiment itself."""
    return _loaded(section, root, [], os.path.join(root, "config")).values.get("dataset_id", UNSET)


def _loaded(section: Section, root: str, overrides: list[str], datasets: str) -> Config:
    """The base experiment.

    Raises:
        ConfigError: it, or its folder, is not there or wrong.
    """
    folder, expid = _base_folder(section, root), section.values["base_expid"]
    try:
        return load_config(folder, expid, overrides, datasets)
    except ConfigError as error:
        raise ConfigError(f"{section.path}:{section.lines[('base_expid',)]}: base_expid: {error}") from None


def _found(folder: str, path: str, root: str) -> str | None:
    """A folder from the working directory, from the repository, or from where the tuner file is."""
    places = [os.path.normpath(os.path.join(base, folder)) for base in ("", root, os.path.dirname(path))]
    return next((place for place in places if os.path.isdir(place)), None)
