"""Runs the jobs of a grid or a search: each once, a crashed one twice, those that others run waited for."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Protocol

from model_zoo.experiment.backends.process import HELD, Backend, Task
from model_zoo.experiment.grid import write_config
from model_zoo.experiment.tuner_jobs import Job, Launcher, State
from model_zoo.experiment.tuner_table import Display
from model_zoo.interrupts import Stopped, held

#: times that a run is started: a crash is given a second chance, a refusal (exit code 2) is not
TRIES = 2
REFUSED = 2
#: seconds between two looks at the processes, and at a run that another process has
POLL, POLL_ELSEWHERE = 0.25, 5.0
#: lines of a failed run's log that are shown
LOG_LINES = 8


class Source(Protocol):
    """Where jobs come from.

    Attributes:
        total: how many there will be.
        problems: what could not become a job, since it was last looked at.
    """

    total: int
    problems: list[str]

    def take(self) -> list[Job]:
        """New jobs; none if there are none, or none before others have ended."""

    def told(self, job: Job) -> None:
        """A job is done or has failed."""


class Listed:
    """Jobs that are known from the start."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.total = len(jobs)
        self.problems: list[str] = []
        self._jobs = list(jobs)

    def take(self) -> list[Job]:
        jobs, self._jobs = self._jobs, []
        return jobs

    def told(self, job: Job) -> None:
        """Nothing follows from it."""


class Tuner:
    """Runs jobs until there are none left.

    Args:
        folder: of the grid: configs and logs.
        table: results csv of the grid.
    """

    def __init__(
        self, source: Source, backend: Backend, launcher: Launcher, folder: str, table: str, display: Display
    ) -> None:
        self.source, self.backend, self.launcher = source, backend, launcher
        self.folder, self.table, self.display = folder, table, display
        self.jobs: dict[tuple[str, int], Job] = {}
        self.refused: list[str] = []
        self._tasks: dict[Task, Job] = {}

    def run(self) -> bool:
        """Run all; returns whether none failed.

        Raises:
            Stopped: by a signal, once the runs have written their state; a second signal kills them.
        """
        try:
            while True:
                with held():
                    self._turn()
                if not self._tasks and not self._of(State.LEFT, State.ELSEWHERE):
                    return not self._of(State.FAILED) and not self.refused
                time.sleep(POLL)
        except Stopped:
            self._stop()
            raise
        finally:
            self.backend.stop()
            self.backend.close()
            self.display.close()

    def _turn(self) -> None:
        """Take note of what has ended, and start what can be."""
        for task, code in self.backend.ended():
            self._ended(self._tasks.pop(task), code)
        while self.backend.free() and (job := self._next()) is not None:
            self._start(job)
        self.display.show(list(self.jobs.values()), self.source.total, self.backend.free() + len(self._tasks))

    def _next(self) -> Job | None:
        """A job to start; None if there is none now."""
        while not self._of(State.LEFT):
            jobs, problems = self.source.take(), self.source.problems
            if not jobs and not problems:
                break
            self.source.problems = []
            self.refused += problems
            for text in problems:
                self.display.note(f"refused: {text}")
            for job in jobs:
                self.jobs[job.point.key] = job
                job.look(self.table)
                self._closed(job)
        due = [job for job in self._of(State.ELSEWHERE) if job.retry_at <= time.monotonic()]
        return next(iter([*self._of(State.LEFT), *due]), None)

    def _start(self, job: Job) -> None:
        """Start a job that no other process has done meanwhile."""
        waited = job.state is State.ELSEWHERE
        job.look(self.table)
        if self._closed(job):
            return
        if job.folder and not job.tries and not waited:
            self.display.note(f"stopped earlier: {job.point}; goes on in {job.folder}")
        command = self.launcher.command(job, write_config(job.point, self.folder))
        job.log = os.path.join(self.folder, "logs", f"{job.point.expid}-seed{job.point.seed}.log")
        task = Task(tuple(command), job.log, job.lock, os.getcwd())
        job.state, job.started, job.resumed = State.RUNNING, time.monotonic(), job.folder is not None
        job.tries += 1
        self._tasks[task] = job
        job.device = self.backend.start(task)

    def _ended(self, job: Job, code: int) -> None:
        """What a job's process left."""
        if code == HELD:
            if job.retry_at == 0:
                self.display.note(f"elsewhere: {job.point} is run by another process; waiting for it")
            job.state, job.tries, job.retry_at = State.ELSEWHERE, job.tries - 1, time.monotonic() + POLL_ELSEWHERE
            return
        job.state = State.LEFT
        job.look(self.table)
        if self._closed(job):
            return
        how = f"signal {-code}" if code < 0 else f"exit code {code}" if code else "no record"
        if code != REFUSED and job.tries < TRIES:
            goes_on = "goes on with it" if job.folder else "starts it again"
            self.display.note(f"crashed: {job.point} ({how}: {' '.join(job.said())}); {goes_on}")
            return
        job.fail(f"{how}{', twice' if job.tries > 1 else ''}; its output is in {job.log}", job.said(LOG_LINES))
        self._closed(job)

    def _closed(self, job: Job) -> bool:
        """Whether a job is done or has failed; if so, those who want to know are told."""
        if job.state not in (State.DONE, State.FAILED):
            return False
        self.source.told(job)
        self.display.ended(job, sum(one.state is State.DONE for one in self.jobs.values()), self.source.total)
        return True

    def _of(self, *states: State) -> list[Job]:
        return [job for job in self.jobs.values() if job.state in states]

    def _stop(self) -> None:
        """Let the runs write their state; a second signal kills them."""
        if self._tasks:
            self.display.note(f"stopping: runs under way ({len(self._tasks)}) write their state; Ctrl-C again kills them")
        try:
            self.backend.stop()
            self._drain()
        except Stopped:
            self.backend.stop(kill=True)
            self._drain()

    def _drain(self) -> None:
        while self._tasks:
            for task, _ in self.backend.ended():
                job = self._tasks.pop(task)
                job.state = State.LEFT
                job.look(self.table)
            time.sleep(POLL)
