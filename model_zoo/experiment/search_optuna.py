"""Optuna's search over a tuner file's space: a list is a choice, a range numbers between two; resumable by its storage."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from model_zoo.errors import ConfigError
from model_zoo.experiment.config import Config
from model_zoo.experiment.grid import Point, Points
from model_zoo.experiment.grid_file import Range, Space
from model_zoo.experiment.tuner_jobs import Job, State

if TYPE_CHECKING:
    import optuna

MISSING = "--search optuna needs the package optuna; install it with: pip install -e '.[optuna]'"


@dataclass
class _Trial:
    """A trial under way: it ends with the last of its jobs, one a seed."""

    study: optuna.Study
    number: int
    jobs: list[Job]


class OptunaSource:
    """Trials of one study for each data set, every one a configuration with all its seeds.

    A trial's value is the mean of the monitor over its seeds. A study is known by the grid's name, its space and its
    seeds: started again, it goes on; trials that were under way when it was stopped are gone on with.

    Args:
        trials: of each study, those of earlier calls included.
        storage: an SQLAlchemy address.
        seeds: of every configuration; default: that of the file or the base.
        root: the repository.

    Raises:
        ConfigError: optuna is not installed, the storage cannot be used, nothing is to be chosen, or a configuration
            that takes one value of a key and the first of all others is wrong.
    """

    def __init__(self, space: Space, trials: int, storage: str, seeds: Sequence[int] | None, root: str) -> None:
        self.space, self.trials, self.root = space, trials, root
        self.problems: list[str] = []
        self._axes, self._seeds, self._tuned = _parts(space, seeds)
        check(space, seeds, root)
        self._studies = [self._study(base, storage) for base in space.bases]
        self._jobs: dict[tuple[str, int], Job] = {}
        self._under_way: list[_Trial] = []
        self._earlier = [
            (study, base, trial)
            for study, base in zip(self._studies, space.bases, strict=True)
            for trial in study.get_trials(deepcopy=False)
            if trial.state.name in ("RUNNING", "COMPLETE")
        ]
        failed = sum(self._counted(study) for study in self._studies) - len(self._earlier)
        self.total = (max(trials * len(space.bases), len(self._earlier) + failed) - failed) * len(self._seeds or [0])

    def take(self) -> list[Job]:
        """The jobs of an earlier call's trial, else of a new one of the study with the fewest."""
        while self._earlier:
            study, base, earlier = self._earlier.pop(0)
            if jobs := self._jobs_of(study, base, earlier.number, earlier.params):
                return jobs
        while True:
            count, chosen = min((self._counted(study), number) for number, study in enumerate(self._studies))
            if count >= self.trials:
                return []
            study, base = self._studies[chosen], self.space.bases[chosen]
            trial = study.ask()
            jobs = self._jobs_of(study, base, trial.number, {key: self._draw(trial, key) for key in self._tuned})
            if jobs or self.problems:
                return jobs

    def told(self, job: Job) -> None:
        """Tell the study about every trial whose last job this was."""
        for trial in [trial for trial in self._under_way if any(job is each for each in trial.jobs)]:
            self._settle(trial)

    def _jobs_of(self, study: optuna.Study, base: Config, number: int, drawn: dict[str, Any]) -> list[Job]:
        """A trial's jobs, less those that other trials have, too; none if its configuration is wrong."""
        if drawn.keys() != set(self._tuned):  # stopped while it was being drawn
            self._give_up(study, number)
            return []
        values = _filled(self.space, {key: self._value(key, drawn[key]) for key in drawn})
        config, points = self.space.config(base, values), Points(self.root)
        try:
            added = points.add(config, self.space.stem(config), number + 1, self._tuned, self._seeds)
            points.grid(f"{self.space.name}, trial {number + 1}")
        except ConfigError as error:
            self._give_up(study, number)
            self.problems.append(str(error))
            self.total -= len(self._seeds or [0])
            return []
        trial = _Trial(study, number, [self._jobs.get(point.key) or Job.of(point, self.root) for point in added])
        new = [job for job in trial.jobs if job.point.key not in self._jobs]
        self._jobs |= {job.point.key: job for job in new}
        self.total -= len(trial.jobs) - len(new)
        self._under_way.append(trial)
        self._settle(trial)
        return new

    def _settle(self, trial: _Trial) -> None:
        """Tell the study what came of a trial, if all its jobs have ended."""
        if any(job.state not in (State.DONE, State.FAILED) for job in trial.jobs):
            return
        self._under_way.remove(trial)
        values = [job.value for job in trial.jobs if job.state is State.DONE and job.value is not None]
        if len(values) < len(trial.jobs):
            self._give_up(trial.study, trial.number)
        else:
            trial.study.tell(trial.number, sum(values) / len(values), skip_if_finished=True)

    def _give_up(self, study: optuna.Study, number: int) -> None:
        import optuna

        study.tell(number, state=optuna.trial.TrialState.FAIL, skip_if_finished=True)

    def _counted(self, study: optuna.Study) -> int:
        """Its trials, less those that were stopped while they were being drawn."""
        return sum(trial.params.keys() == set(self._tuned) for trial in study.get_trials(deepcopy=False))

    def _draw(self, trial: optuna.Trial, key: str) -> Any:
        if key in self._axes:
            return trial.suggest_categorical(key, [_text(value) for value, _ in self._axes[key]])
        found = self.space.ranges[key]
        if _whole(found):
            return trial.suggest_int(key, int(found.low), int(found.high), step=int(found.step or 1), log=found.log)
        return trial.suggest_float(key, found.low, found.high, step=found.step, log=found.log)

    def _value(self, key: str, drawn: Any) -> tuple[Any, str]:
        """What was drawn as a value of the key, with its place in the file."""
        if key in self._axes:
            return next(each for each in self._axes[key] if _text(each[0]) == drawn)
        return drawn, self.space.ranges[key].where

    def _study(self, base: Config, storage: str) -> optuna.Study:
        try:
            import optuna
        except ModuleNotFoundError:
            raise ConfigError(MISSING) from None
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        ranges = {key: [found.low, found.high, found.log, found.step] for key, found in self.space.ranges.items()}
        axes = {key: [value for value, _ in values] for key, values in self._axes.items()}
        content = _text([axes, ranges, self._seeds, base.values])
        digest = hashlib.blake2b(content.encode(), digest_size=5).hexdigest()
        name = f"{self.space.name}-{base.values['dataset_id']}-{digest}"
        try:
            study = optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)
        except Exception as error:  # any of SQLAlchemy's, which optuna lets through
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"--storage {storage}: {type(error).__name__}: {reason}; give sqlite:///FILE") from None
        # a study gone on with must not draw its first trials again
        seed = len(study.get_trials(deepcopy=False))
        study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        return study


def check(space: Space, seeds: Sequence[int] | None, root: str | None) -> Point:
    """Refuse, before any run, what is wrong with a value whatever the others are.

    Returns:
        One of the configurations.

    Args:
        root: the repository; given, the data files must be there, too.

    Raises:
        ConfigError: all that is wrong with configurations of one value of a key and the first of all others; or nothing
            is to be chosen.
    """
    axes, seeds, tuned = _parts(space, seeds)
    if not tuned:
        raise ConfigError(f"{space.path}: every key of tuner_space has one value, so there is nothing to search")
    points = Points(root)
    ends = {key: [(end, found.where) for end in (found.low, found.high)] for key, found in space.ranges.items()}
    for base in space.bases:
        for key, values in {**axes, **ends}.items():
            for value in values:
                config = space.config(base, _filled(space, {key: value}))
                points.add(config, space.stem(config), 0, tuned, seeds)
    return points.grid(space.name).points[0]


def _parts(
    space: Space, seeds: Sequence[int] | None
) -> tuple[dict[str, list[tuple[Any, str]]], Sequence[int] | None, list[str]]:
    """The axes less the seed, the seeds (None: the base's own), and the keys of which there is a choice."""
    axes = {key: values for key, values in space.axes.items() if key != "seed"}
    seeds = seeds or [value for value, _ in space.axes.get("seed", [])] or None
    return axes, seeds, [key for key, values in axes.items() if len(values) > 1] + list(space.ranges)


def _filled(space: Space, chosen: dict[str, tuple[Any, str]]) -> dict[str, tuple[Any, str]]:
    """A point of the space: the first value of every key but the chosen ones."""
    first = {key: values[0] for key, values in space.axes.items() if key != "seed"}
    low = {key: (found.low, found.where) for key, found in space.ranges.items()}
    return {**first, **low, **chosen}


def default_storage(folder: str) -> str:
    """An sqlite file in the grid's folder."""
    return f"sqlite:///{os.path.abspath(os.path.join(folder, 'optuna.db'))}"


def _whole(found: Range) -> bool:
    return all(isinstance(number, int) for number in (found.low, found.high, found.step or 1))


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
