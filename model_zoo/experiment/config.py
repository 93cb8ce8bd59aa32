"""FuxiCTR's flat yaml configs: base, experiment, data set and ``--set`` merged, with where each key came from."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import yaml

from model_zoo.errors import ConfigError
from model_zoo.experiment.sections import BASE, NOT_YAML, Section, config_files, read_sections
from model_zoo.faults import Place, shown

__all__ = [
    "BASE", "Config", "Section", "dataset_section", "experiment_ids", "load_config", "parse_override", "read_sections",
]  # fmt: skip


@dataclass
class Config:
    """Merged parameters of one experiment.

    Attributes:
        expid: the experiment id.
        values: key to value.
        origin: key to ``file:line``, or the option that set it.
        inner: the same for entries of lists and keys inside them.
        experiment: ``file:line`` of the experiment.
        dataset: ``file:line`` of its data set; None if there is no such data set, or none was looked for.
        problems: what was wrong while merging, a line each; `schema.validate` refuses a config that has any.
    """

    expid: str
    values: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    inner: dict[Place, str] = field(default_factory=dict)
    experiment: str | None = None
    dataset: str | None = None
    problems: list[str] = field(default_factory=list)

    def set(self, key: str, value: Any, origin: str) -> None:
        """Put one value in place of what was there."""
        self.values[key] = value
        self.origin[key] = origin
        self.inner = {place: where for place, where in self.inner.items() if place[0] != key}

    def update(self, section: Section) -> None:
        """Merge a section over what is there."""
        for key, value in section.values.items():
            self.set(key, value, f"{section.path}:{section.lines[(key,)]}")
        self.inner |= {place: f"{section.path}:{line}" for place, line in section.lines.items() if len(place) > 1}

    def where(self, place: Place) -> str | None:
        """``file:line`` of a value, or of what holds it; None for a default."""
        for end in range(len(place), 1, -1):
            if place[:end] in self.inner:
                return self.inner[place[:end]]
        return self.origin.get(str(place[0]))


def load_config(
    config_dir: str, expid: str, overrides: Iterable[str] = (), datasets_dir: str | None = None
) -> Config:
    """Merge ``Base``, the experiment, its data set and the overrides, later ones winning.

    A data set that does not exist, and overrides that cannot be read, are left to `schema.validate` in the config's
    ``problems``, so that they are said together with what else is wrong.

    Args:
        config_dir: holds ``model_config.yaml`` or ``model_config/*.yaml``, and ``dataset_config`` alike.
        overrides: ``key=value`` with a yaml value.
        datasets_dir: where data sets are described if ``config_dir`` describes none, as LongCTR's folders of one model; and
            experiments, if it describes data sets alone.

    Raises:
        ConfigError: no such directory or expid (with the nearest names), broken yaml.
    """
    models_dir = _models_folder(config_dir, datasets_dir)
    models = read_sections(models_dir, "model_config")
    config = Config(expid)
    experiments = {name: section for name, section in models if name != BASE}
    if expid not in experiments:
        raise ConfigError(_unknown("expid", expid, experiments, models_dir))
    section = experiments[expid]
    config.experiment = f"{section.path}:{section.line}"
    bases = [base for name, base in models if name == BASE]
    own = [base for base in bases if base.path == section.path] or bases
    if own:
        config.update(own[-1])
    config.update(section)
    given: dict[str, Any] = {}
    for text in overrides:
        try:
            key, value = parse_override(text)
            given[key] = value
        except ConfigError as error:
            config.problems.append(str(error))
    described, datasets = _described(config_dir, datasets_dir)
    dataset_id = given.get("dataset_id", config.values.get("dataset_id"))
    if isinstance(dataset_id, str) and dataset_id in datasets:
        config.dataset = f"{datasets[dataset_id].path}:{datasets[dataset_id].line}"
        config.update(datasets[dataset_id])
        config.set("dataset_id", dataset_id, config.origin.get("dataset_id", section.path))
    for key, value in given.items():
        config.set(key, value, "--set")
    if config.dataset is None:
        config.problems.append(_no_data_set(config, datasets, described))
    return config


def dataset_section(dataset_id: str, config_dir: str, other: str, asked_by: str) -> Section:
    """A data set's entry.

    Args:
        other: where data sets are described if ``config_dir`` describes none.
        asked_by: the option that named it.

    Raises:
        ConfigError: there is none of that name (with the nearest names), broken yaml.
    """
    described, datasets = _described(config_dir, other)
    if dataset_id not in datasets:
        raise ConfigError(_unknown(asked_by, dataset_id, datasets, described))
    return datasets[dataset_id]


def _described(config_dir: str, other: str | None) -> tuple[str, dict[str, Section]]:
    """Where data sets are described, and their entries."""
    described = config_dir if other is None or config_files(config_dir, "dataset_config") else other
    return described, dict(read_sections(described, "dataset_config"))


def _models_folder(config_dir: str, other: str | None) -> str:
    """Where experiments are described: in ``other`` if ``config_dir`` describes data sets alone."""
    alone = config_files(config_dir, "dataset_config") and not config_files(config_dir, "model_config")
    return other if other is not None and alone else config_dir


def _no_data_set(config: Config, datasets: Iterable[str], config_dir: str) -> str:
    """Why there is no data set."""
    dataset_id = config.values.pop("dataset_id", None)
    where = config.origin.pop("dataset_id", config.experiment)
    if dataset_id is None:
        return f"{where}: {config.expid} has no dataset_id; add `dataset_id: <name in dataset_config>`"
    if not isinstance(dataset_id, str):
        return f"{where}: dataset_id: {shown(dataset_id)}: must be text; put it in quotes"
    return f"{where}: {_unknown('dataset_id', dataset_id, datasets, config_dir)}"


def experiment_ids(config_dir: str) -> list[str]:
    """Every experiment id of a config directory."""
    return [name for name, _ in read_sections(config_dir, "model_config") if name != BASE]


def parse_override(text: str) -> tuple[str, Any]:
    """``key=value`` as a key and its yaml value.

    Raises:
        ConfigError: no ``=``, or a value that is not yaml.
    """
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise ConfigError(f"--set {text}: write it as key=value")
    try:
        return key.strip(), yaml.safe_load(value)
    except NOT_YAML:
        raise ConfigError(f"--set {text}: '{value}' is not a yaml value") from None


def _unknown(what: str, name: str, known: Iterable[str], config_dir: str) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
    hint = f"nearest: {', '.join(near)}" if near else f"known: {', '.join(sorted(known)[:12])}"
    return f"{what} '{name}' is not in {config_dir}; {hint}"
