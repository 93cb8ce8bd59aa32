"""The sections of FuxiCTR's yaml files, with the line of everything in them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from glob import glob
from typing import Any, TypeVar

import yaml

from model_zoo.errors import ConfigError
from model_zoo.faults import Place, refusal

T = TypeVar("T")

BASE = "Base"
#: what the yaml reader raises for text that is no yaml: also values such as the date 2024-13-45, or brackets without end
NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)
MERGE = "tag:yaml.org,2002:merge"
#: entries of a list, and keys in them, have places; what is deeper has that of what holds it
DEPTH = 3


@dataclass(frozen=True)
class Section:
    """One top-level entry of a yaml file.

    Attributes:
        path: the file.
        line: where it begins.
        values: its keys' values.
        lines: the line of each key, of each entry of a list, and of each key in such an entry.
    """

    path: str
    line: int
    values: dict[str, Any]
    lines: dict[Place, int]


def read_sections(config_dir: str, kind: str) -> list[tuple[str, Section]]:
    """All sections of ``<kind>.yaml`` or ``<kind>/*.yaml``, by name.

    Raises:
        ConfigError: no such file, broken yaml, a key or name given twice.
    """
    paths = config_files(config_dir, kind)
    if not paths:
        raise ConfigError(f"{config_dir}: holds neither {kind}.yaml nor {kind}/*.yaml; give its folder with --config")
    sections: list[tuple[str, Section]] = []
    seen: dict[str, str] = {}
    for path in paths:
        for name, section in _read_file(path):
            if name in seen and (name != BASE or seen[name] == path):
                where = f"{path}:{section.line}"
                raise ConfigError(f"{where}: '{name}' is defined in {seen[name]} already; rename one of them")
            seen[name] = path
            sections.append((name, section))
    return sections


def config_files(config_dir: str, kind: str) -> list[str]:
    """``<kind>.yaml``, or all of ``<kind>/*.yaml``."""
    single = os.path.join(config_dir, f"{kind}.yaml")
    return [single] if os.path.exists(single) else sorted(glob(os.path.join(config_dir, kind, "*.yaml")))


def read_mapping(path: str, what: str) -> Section:
    """A yaml file as one section, its keys with their lines.

    Args:
        what: the file is to map, for the message.

    Raises:
        ConfigError: unreadable, or not a mapping, or bad keys.
    """

    def whole(loader: yaml.SafeLoader, root: yaml.Node | None) -> Section:
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{path}: must map {what}")
        _refuse(path, _bad_keys("the file", root, set()))
        return _section(path, loader, root, root)

    return _parsed(path, whole)


def _read_file(path: str) -> list[tuple[str, Section]]:
    """The top-level mappings of one yaml file, merge keys applied, bad keys refused."""

    def named(loader: yaml.SafeLoader, root: yaml.Node | None) -> list[tuple[str, Section]]:
        if root is None:
            return []
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{path}: must map names to settings")
        _refuse(path, _bad_names(root))
        return [(str(loader.construct_object(name)), _section(path, loader, name, node)) for name, node in root.value]

    return _parsed(path, named)


def _parsed(path: str, read: Callable[[yaml.SafeLoader, yaml.Node | None], T]) -> T:
    """What ``read`` makes of a yaml file's one document."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a readable text file ({error})") from None
    try:
        loader = yaml.SafeLoader(text)
        return read(loader, loader.get_single_node())
    except NOT_YAML as error:
        raise ConfigError(_not_yaml(path, text, error)) from None


def _refuse(path: str, faults: Iterable[tuple[int, str]]) -> None:
    bad = [f"{path}:{line}: {what}" for line, what in faults]
    if bad:
        raise refusal(bad)


def _section(path: str, loader: yaml.SafeLoader, name: yaml.Node, node: yaml.MappingNode) -> Section:
    _merge(node, {})
    values = loader.construct_object(node, deep=True)
    return Section(path, name.start_mark.line + 1, values, dict(_lines(node, ())))


def _merge(node: yaml.Node, ready: dict[int, bool]) -> None:
    """Put what merge keys name in their place, at any depth: a mapping's own keys win, then the first that is named.

    PyYAML's own way of doing so, and what a call of it leaves behind, changes from version to version.

    Args:
        ready: by id, the nodes that are done (True) or under way.

    Raises:
        yaml.constructor.ConstructorError: a merge key names no mapping, or one that it stands in.
    """
    if id(node) in ready or not isinstance(node, yaml.CollectionNode):
        return
    ready[id(node)] = False
    for child in node.value if isinstance(node, yaml.SequenceNode) else [value for _, value in node.value]:
        _merge(child, ready)
    if isinstance(node, yaml.MappingNode):
        pairs: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for source in _sources(node):
            if not isinstance(source, yaml.MappingNode) or not ready[id(source)]:
                what = "one that it stands in" if isinstance(source, yaml.MappingNode) else "another thing"
                fault = f"<< must name a mapping, or a list of them, not {what}"
                raise yaml.constructor.ConstructorError(None, None, fault, node.start_mark)
            for key, value in source.value:
                pairs.setdefault(key.value, (key, value))
        pairs.update({key.value: (key, value) for key, value in node.value if key.tag != MERGE})
        node.value = list(pairs.values())
    ready[id(node)] = True


def _sources(node: yaml.MappingNode) -> Iterator[yaml.Node]:
    """What a mapping's merge keys name, one by one."""
    for key, value in node.value:
        if key.tag == MERGE:
            yield from value.value if isinstance(value, yaml.SequenceNode) else [value]


def _lines(node: yaml.Node, place: Place) -> Iterator[tuple[Place, int]]:
    """The line of everything in a node down to `DEPTH`."""
    if len(place) == DEPTH:
        return
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*place, key.value), key.start_mark.line + 1
            yield from _lines(value, (*place, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield (*place, number), value.start_mark.line + 1
            yield from _lines(value, (*place, number))


def _not_yaml(path: str, text: str, error: Exception) -> str:
    """File, line and problem of what the yaml reader raised."""
    where, problem = path, " ".join(str(error).split())
    if isinstance(error, yaml.MarkedYAMLError) and error.problem:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else path
        problem = f"{error.problem} {error.context or ''}".strip()
        if mark and error.context_mark and error.context_mark.line != mark.line:
            problem += f", which begins on line {error.context_mark.line + 1}"
    elif isinstance(error, yaml.reader.ReaderError):
        where = f"{path}:{text.count(chr(10), 0, error.position) + 1}"
        problem = f"the character {chr(error.character)!r} cannot stand in yaml; take it out"
    if "'\\t'" in problem:
        problem += "; indent with spaces, not with tabs"
    return f"{where}: not valid yaml: {problem}"


def _bad_names(root: yaml.MappingNode) -> Iterator[tuple[int, str]]:
    """Line and fault of every section that is no mapping, and of every bad key in the others."""
    checked: set[int] = set()
    for name, node in root.value:
        if isinstance(node, yaml.MappingNode):
            yield from _bad_keys(str(name.value), node, checked)
        else:
            yield node.start_mark.line + 1, f"'{name.value}' must map keys to values"


def _bad_keys(name: str, node: yaml.MappingNode, checked: set[int]) -> Iterator[tuple[int, str]]:
    """Keys that stand twice, and keys that yaml does not read as text (``on``, ``1``), at any depth.

    Args:
        checked: ids of nodes that were looked at: an alias is not looked at again, when its merge keys have been applied.
    """
    if id(node) in checked:
        return
    checked.add(id(node))
    seen: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.tag not in ("tag:yaml.org,2002:str", MERGE):
            given = f"'{key.value}'" if isinstance(key, yaml.ScalarNode) else "a list or mapping"
            yield line, f"'{name}' has {given} for a key, which is not text; put it in quotes"
            continue
        if key.value in seen and key.value != "<<":
            yield line, f"'{name}' sets '{key.value}' twice (also on line {seen[key.value]}); take one of them out"
        seen[key.value] = line
        for child in value.value if isinstance(value, yaml.SequenceNode) else [value]:
            if isinstance(child, yaml.MappingNode):
                yield from _bad_keys(f"{name}: {key.value}", child, checked)
