"""A grid's runs: every configuration checked before any runs, named by its content, with the seeds that it runs with."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from model_zoo.errors import ConfigError
from model_zoo.experiment.backends.process import make_folder
from model_zoo.experiment.config import Config, experiment_ids, load_config
from model_zoo.experiment.grid_file import Space
from model_zoo.experiment.grid_ids import canonical, digest
from model_zoo.experiment.record import write_yaml
from model_zoo.experiment.schema import validate
from model_zoo.faults import nearest, refusal, shown

#: more lines than this of what is wrong with a grid do not help
MISTAKES_SHOWN = 30


@dataclass(frozen=True)
class Point:
    """One configuration with one seed.

    Attributes:
        expid: base name and digest of the content: the same in any grid and in any order of its keys.
        label: the same with FuxiCTR's running number between, which ``--tag`` looks in.
        seed: of its run.
        params: validated; ``model_id`` is the expid.
        given: the keys that are no defaults.
        tuned: its values of the keys that differ within the grid.
        config_dir: where the experiment is described already; None if `write_config` has to.
    """

    expid: str
    label: str
    seed: int
    params: dict[str, Any]
    given: frozenset[str]
    tuned: dict[str, Any]
    config_dir: str | None = None

    @property
    def key(self) -> tuple[str, int]:
        """What no two runs of a grid share."""
        return self.expid, self.seed

    def __str__(self) -> str:
        """Id, seed and what is tuned."""
        tuned = " ".join(f"{key}={shown(value)}" for key, value in self.tuned.items())
        return f"{self.label} seed {self.seed}{f': {tuned}' if tuned else ''}"


@dataclass(frozen=True)
class Grid:
    """All runs.

    Attributes:
        name: names the results.
        points: no two the same.
        repeated: how many more points have the configuration and seed of another.
    """

    name: str
    points: list[Point]
    repeated: int

    def tagged(self, tag: str | None) -> Grid:
        """The runs whose id contains a text.

        Raises:
            ConfigError: there are none.
        """
        if tag is None:
            return self
        points = [point for point in self.points if tag in point.label or tag in point.expid]
        if not points:
            known = [point.label for point in self.points]
            raise ConfigError(f"--tag {tag}: is in none of the {len(known)} ids{nearest(tag, known) or f', as {known[0]}'}")
        return Grid(self.name, points, self.repeated)


class Points:
    """Points under way to a grid: checked one by one, what is wrong with any of them said at once.

    Args:
        root: the repository; given, the data files must be there, too.
    """

    def __init__(self, root: str | None) -> None:
        self.root = root
        self.found: dict[tuple[str, int], Point] = {}
        self.problems: list[str] = []
        self.repeated = 0

    def add(
        self, config: Config, stem: str | None, number: int, tuned: Iterable[str], seeds: Sequence[int] | None,
        config_dir: str | None = None,
    ) -> list[Point]:  # fmt: skip
        """The configuration's points, one a seed (default: its own); those that are there already, too.

        Args:
            stem: what the id begins with; None: it is the config's own.
            tuned: the keys that differ within the grid.
        """
        config.expid = stem or config.expid
        config.set("model_id", config.expid, "the grid")
        try:
            params = validate(config, self.root)
        except ConfigError as error:
            first, *more = str(error).removeprefix(f"{config.expid}: ").split("\n  ")
            self.problems += more or [first]
            return []
        content = digest(params)
        expid = f"{stem}_{content}" if stem else config.expid
        label = f"{stem}_{number:03d}_{content}" if stem else config.expid
        values = {key: params.get(key, config.values.get(key)) for key in tuned if key != "seed"}
        added = []
        for seed in dict.fromkeys(seeds or [params["seed"]]):
            point = Point(
                expid, label, seed, {**params, "seed": seed, "model_id": expid},
                frozenset(config.values), values, config_dir,
            )  # fmt: skip
            there = self.found.setdefault(point.key, point)
            if canonical(there.params) != canonical(params):
                self.problems.append(
                    f"{there.label} and {label} share the id {expid} but differ in {_difference(there.params, params)}; "
                    "change one of their values, or run them as two grids"
                )
            self.repeated += there is not point
            added.append(there)
        return added

    def grid(self, name: str) -> Grid:
        """What was added.

        Raises:
            ConfigError: what is wrong with any of the points, each mistake once.
        """
        if self.problems:
            # what is wrong with a key is so with each of its values, which have lines of their own
            said = list({re.sub(r"^.*?:\d+: ", "", line): line for line in reversed(self.problems)}.values())[::-1]
            more = len(said) - MISTAKES_SHOWN
            raise refusal([*said[:MISTAKES_SHOWN], *([f"... and {more} more"] if more > 0 else [])], name)
        return Grid(name, list(self.found.values()), self.repeated)


def points_of(space: Space, seeds: Sequence[int] | None = None, root: str | None = None) -> Grid:
    """All combinations of a space's values, on each of its data sets, numbered as FuxiCTR does.

    Args:
        seeds: instead of the file's.
        root: the repository; given, the data files must be there, too.

    Raises:
        ConfigError: what is wrong with any of them; a range, of which there is no grid.
    """
    if space.ranges:
        named = [f"{found.where}: {key}: a range of numbers" for key, found in space.ranges.items()]
        raise refusal([f"{text} needs --search optuna; for a grid, list the numbers" for text in named])
    points, number = Points(root), 0
    axes = {key: values for key, values in space.axes.items() if key != "seed" or seeds is None}
    tuned = [key for key, values in axes.items() if len(values) > 1]
    for base in space.bases:
        for values in product(*axes.values()):
            number += 1
            config = space.config(base, dict(zip(axes, values, strict=True)))
            points.add(config, space.stem(config), number, tuned, seeds)
    return points.grid(space.name)


def points_in(
    config_dir: str, datasets_dir: str, tag: str | None = None, seeds: Sequence[int] | None = None, root: str | None = None
) -> Grid:
    """Experiments of a config directory, under their own ids; a folder of recorded ones is only read.

    Args:
        datasets_dir: where data sets are described if ``config_dir`` describes none.
        tag: only those whose id contains it.

    Raises:
        ConfigError: what is wrong with any of them; no experiment.
    """
    points = Points(root)
    expids = experiment_ids(config_dir)
    chosen = [expid for expid in expids if tag is None or tag in expid]
    if not chosen:
        near = nearest(tag, expids) if expids else "; it holds no experiment"
        raise ConfigError(f"--tag {tag}: is in none of the {len(expids)} ids of {config_dir}{near}")
    for number, expid in enumerate(chosen, 1):
        points.add(load_config(config_dir, expid, (), datasets_dir), None, number, [], seeds, config_dir)
    return points.grid(os.path.basename(os.path.abspath(config_dir)))


def write_config(point: Point, folder: str) -> str:
    """A config directory, shared by the points of a grid, in which ``run_expid.py --expid`` finds the point.

    Raises:
        FileError: it cannot be written.
    """
    if point.config_dir is not None:
        return point.config_dir
    for kind, name in (("model_config", point.expid), ("dataset_config", point.params["dataset_id"])):
        path = os.path.join(folder, kind, f"{name}.yaml")
        make_folder(os.path.dirname(path))
        values = dict(_written(point)) if kind == "model_config" else {}
        write_yaml(path, {name: values})
    return folder


def _written(point: Point) -> Iterator[tuple[str, Any]]:
    """What the point gives, its data set's description included, as this may be tuned, too."""
    for key in sorted(point.given | {"seed"}):
        if key in point.params and key not in ("model_id", "gpu"):
            yield key, point.params[key]


def _difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    texts = canonical(one), canonical(other)
    return ", ".join(sorted(key for key in {*texts[0], *texts[1]} if texts[0].get(key) != texts[1].get(key)))

