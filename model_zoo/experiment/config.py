"""FuxiCTR's flat yaml configs: base, experiment, data set and ``--set`` merged, with where each key came from."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from glob import glob
from typing import Any

import yaml

from model_zoo.errors import ConfigError

BASE = "Base"


@dataclass
class Config:
    """Merged parameters of one experiment.

    Attributes:
        expid: the experiment id.
        values: key to value.
        origin: key to ``file:line``, or the option that set it.
    """

    expid: str
    values: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)

    def set(self, key: str, value: Any, origin: str) -> None:
        """Put one value in place of what was there."""
        self.values[key] = value
        self.origin[key] = origin

    def update(self, section: Section) -> None:
        """Merge a section over what is there."""
        for key, value in section.values.items():
            self.set(key, value, f"{section.path}:{section.lines[key]}")


@dataclass(frozen=True)
class Section:
    """One top-level entry of a yaml file: its keys, and the line of each."""

    path: str
    values: dict[str, Any]
    lines: dict[str, int]


def load_config(
    config_dir: str, expid: str, overrides: Iterable[str] = (), datasets_dir: str | None = None
) -> Config:
    """Merge ``Base``, the experiment, its data set and the overrides, later ones winning.

    Args:
        config_dir: holds ``model_config.yaml`` or ``model_config/*.yaml``, and ``dataset_config`` alike.
        overrides: ``key=value`` with a yaml value.
        datasets_dir: where data sets are described if ``config_dir`` describes none, as LongCTR's folders of one model.

    Raises:
        ConfigError: no such directory, expid or data set (with the nearest names), broken yaml, malformed override.
    """
    models = read_sections(config_dir, "model_config")
    config = Config(expid)
    section = _find(expid, [s for s in models if s[0] != BASE], "expid", config_dir)
    bases = [base for name, base in models if name == BASE]
    own = [base for base in bases if base.path == section.path] or bases
    if own:
        config.update(own[-1])
    config.update(section)
    given = dict(parse_override(text) for text in overrides)
    dataset_id = given.get("dataset_id", config.values.get("dataset_id"))
    if not isinstance(dataset_id, str):
        raise ConfigError(f"{section.path}: {expid} has no dataset_id; add `dataset_id: <name in dataset_config>`")
    described = config_dir if datasets_dir is None or _files(config_dir, "dataset_config") else datasets_dir
    datasets = read_sections(described, "dataset_config")
    config.update(_find(dataset_id, datasets, "dataset_id", described))
    for key, value in given.items():
        config.set(key, value, "--set")
    config.set("dataset_id", dataset_id, config.origin.get("dataset_id", section.path))
    return config


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
    except yaml.YAMLError:
        raise ConfigError(f"--set {text}: '{value}' is not a yaml value") from None


def read_sections(config_dir: str, kind: str) -> list[tuple[str, Section]]:
    """All sections of ``<kind>.yaml`` or ``<kind>/*.yaml``, by name.

    Raises:
        ConfigError: no such file, broken yaml, a key or name given twice.
    """
    paths = _files(config_dir, kind)
    if not paths:
        raise ConfigError(f"{config_dir}: holds neither {kind}.yaml nor {kind}/*.yaml; give its folder with --config")
    sections: list[tuple[str, Section]] = []
    seen: dict[str, str] = {}
    for path in paths:
        for name, section in _read_file(path):
            if name in seen and (name != BASE or seen[name] == path):
                raise ConfigError(f"{path}: '{name}' is defined in {seen[name]} already; rename one of them")
            seen[name] = path
            sections.append((name, section))
    return sections


def _files(config_dir: str, kind: str) -> list[str]:
    single = os.path.join(config_dir, f"{kind}.yaml")
    return [single] if os.path.exists(single) else sorted(glob(os.path.join(config_dir, kind, "*.yaml")))


def _read_file(path: str) -> list[tuple[str, Section]]:
    """The top-level mappings of one yaml file, merge keys applied, duplicate keys refused."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a readable text file ({error})") from None
    try:
        loader = yaml.SafeLoader(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid yaml: {' '.join(str(error).split())}") from None
    try:
        root = loader.get_single_node()
        if root is None:
            return []
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{path}: must map names to settings")
        sections = []
        checked: set[int] = set()
        for name_node, node in root.value:
            name = str(loader.construct_object(name_node))
            if not isinstance(node, yaml.MappingNode):
                raise ConfigError(f"{path}:{node.start_mark.line + 1}: '{name}' must map keys to values")
            if id(node) not in checked:  # an alias of a section seen before has its merge keys applied
                _refuse_bad_keys(path, name, node)
                checked.add(id(node))
            loader.flatten_mapping(node)
            lines = {key.value: key.start_mark.line + 1 for key, _ in node.value}
            values = loader.construct_object(node, deep=True)
            sections.append((name, Section(path, values, lines)))
        return sections
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: not valid yaml: {reason}") from None
    finally:
        loader.dispose()


def _refuse_bad_keys(path: str, name: str, node: yaml.MappingNode) -> None:
    """Refuse keys that stand twice, and keys that yaml does not read as text (``on``, ``1``), at any depth."""
    seen: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
            shown = f"'{key.value}'" if isinstance(key, yaml.ScalarNode) else "a list or mapping"
            raise ConfigError(f"{path}:{line}: '{name}' has {shown} for a key, which is not text; put it in quotes")
        if key.value in seen and key.value != "<<":
            raise ConfigError(f"{path}:{line}: '{name}' sets '{key.value}' twice (also on line {seen[key.value]})")
        seen[key.value] = line
        if key.value != "<<":
            for child in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if isinstance(child, yaml.MappingNode):
                    _refuse_bad_keys(path, f"{name}: {key.value}", child)


def _find(name: str, sections: list[tuple[str, Section]], what: str, config_dir: str) -> Section:
    found = dict(sections)
    if name in found:
        return found[name]
    near = difflib.get_close_matches(name, found, n=3, cutoff=0.3)
    hint = f"nearest: {', '.join(near)}" if near else f"known: {', '.join(sorted(found)[:12])}"
    raise ConfigError(f"{what} '{name}' is not in {config_dir}; {hint}")
