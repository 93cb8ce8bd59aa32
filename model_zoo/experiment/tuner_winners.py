"""A grid, then its winners with more seeds: what tuning costs is paid once, what is reported has its spread."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from model_zoo.experiment.tuner import Listed
from model_zoo.experiment.tuner_jobs import Job, State

#: data set, model, history length
Place = tuple[str, str, int]


class Winners(Listed):
    """Listed jobs; once all of a place have ended, its best configuration on validation with each of ``seeds``.

    A configuration with several seeds counts by their mean; one with a failed run, or without a figure, does not count.
    ``total`` counts a winner's runs from the start, and falls by those that the grid itself turns out to have.
    """

    def __init__(self, jobs: Sequence[Job], seeds: Sequence[int]) -> None:
        super().__init__(jobs)
        self._seeds = list(dict.fromkeys(seeds))
        self._left: dict[Place, int] = defaultdict(int)
        self._ended: dict[Place, dict[str, list[Job]]] = defaultdict(lambda: defaultdict(list))
        self._grid = {job.point.key for job in jobs}
        for job in jobs:
            self._left[_place(job)] += 1
        self.total += len(self._left) * len(self._seeds)

    def told(self, job: Job) -> None:
        """Count a job; after a place's last one its winner's jobs follow."""
        if job.point.key not in self._grid:
            return
        place = _place(job)
        self._ended[place][job.point.expid].append(job)
        self._left[place] -= 1
        if not self._left[place]:
            again = self._again(place)
            self.total -= len(self._seeds) - len(again)
            self._jobs += again

    def _again(self, place: Place) -> list[Job]:
        """The jobs of a place's winner that are not in the grid."""
        best, most = None, float("-inf")
        for jobs in self._ended[place].values():
            values = [job.value for job in jobs if job.state is State.DONE and job.value is not None]
            if len(values) == len(jobs) and sum(values) / len(values) > most:
                best, most = jobs[0], sum(values) / len(values)
        if best is None:
            dataset, model, length = place
            self.problems.append(f"{model} on {dataset}, length {length}: no configuration has a validation figure for "
                                 "all of its seeds, so none is run again")  # fmt: skip
            return []
        point = best.point
        points = [replace(point, seed=seed, params={**point.params, "seed": seed}) for seed in self._seeds]
        return [Job(one, best.model_root) for one in points if one.key not in self._grid]


def _place(job: Job) -> Place:
    params = job.point.params
    return params["dataset_id"], params["model"], params["max_len"]
