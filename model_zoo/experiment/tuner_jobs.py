"""One run of a grid: what of it lies on disk already, and how it is started or gone on with."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from model_zoo.errors import UserError
from model_zoo.experiment.collect import row_of
from model_zoo.experiment.grid import Point
from model_zoo.experiment.grid_ids import canonical
from model_zoo.experiment.paths import PATH_KEYS, resolve_paths
from model_zoo.experiment.record import append_result, read_record
from model_zoo.experiment.unfinished import CONFIG_FILE, RECORD_FILE, Run

#: what is read of a log's end
TAIL_BYTES = 8192


class State(Enum):
    """Where a run of the grid stands."""

    LEFT = "left"
    ELSEWHERE = "elsewhere"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


@dataclass
class Job:
    """A point on its way.

    Attributes:
        folder: of its run, once there is one.
        before: it was done before this grid's process began.
        tries: how often it was started.
        resumed: whether it was last started to go on with a stopped run.
        retry_at: when to try again what another process runs, in seconds of `time.monotonic`.
        started: when it was last started, likewise.
        device: where it runs.
        log: where the output of its processes goes.
        value: what the monitor says of it on validation, greater is better; None if not known.
        monitor: the monitor, in words.
        seconds: that it took.
        reason: why it failed: one sentence, then the last lines of its log.
    """

    point: Point
    model_root: str
    state: State = State.LEFT
    folder: str | None = None
    before: bool = False
    tries: int = 0
    resumed: bool = False
    retry_at: float = 0.0
    started: float = 0.0
    device: str = ""
    log: str = ""
    value: float | None = None
    monitor: str = ""
    seconds: float | None = None
    reason: tuple[str, ...] = ()

    @classmethod
    def of(cls, point: Point, root: str) -> Job:
        """A point's job, its results where the point says, seen from the repository."""
        params = dict(point.params)
        resolve_paths(params, root)
        return cls(point, params["model_root"])

    @property
    def place(self) -> str:
        """The folder that its runs are in."""
        return os.path.join(self.model_root, self.point.params["dataset_id"], self.point.expid)

    @property
    def lock(self) -> str:
        """Held by the process that runs it, whichever grid that belongs to."""
        return os.path.join(self.place, f"seed{self.point.seed}.lock")

    def look(self, table: str | None = None) -> None:
        """See what lies on disk: done with a record, failed with an unusable one, or left.

        Of several records the newest counts; a stopped run is gone on with only if none has one.

        Args:
            table: results csv that a record's line must be in: it is added, if it is not.

        Raises:
            FileError: the table cannot be written.
        """
        self.folder = None
        runs = _folders(self.place, self.point.seed)
        for folder in reversed(runs):
            if os.path.exists(os.path.join(folder, RECORD_FILE)):
                self._take(folder, table)
                return
        for folder in reversed(runs):
            if os.path.exists(os.path.join(folder, CONFIG_FILE)):
                try:
                    begun = Run.read(folder).params
                except UserError as error:
                    self.fail(str(error))
                    return
                self._check(folder, begun)
                return

    def _take(self, folder: str, table: str | None) -> None:
        """Take a finished run's record for this one."""
        path = os.path.join(folder, RECORD_FILE)
        try:
            record = read_record(path)
        except UserError as error:
            self.fail(f"{error}; the record is left as it is: move its folder away, or choose another model_root")
            return
        if not self._check(folder, record["config"]):
            return
        row = row_of(record, folder)
        self.before = self.state is State.LEFT and not self.tries
        self.value, self.monitor, self.seconds, self.state = row.monitored, row.monitor, row.seconds, State.DONE
        if table is not None and record["finished"]:
            final = record["scores"]["final"]
            append_result(table, record["command"] or "", row.expid, row.dataset, final, when=record["finished"])

    def _check(self, folder: str, config: dict[str, Any]) -> bool:
        """Whether a run has the point's configuration and seed; if not, the job fails, for it must not be taken for it."""
        other = canonical(self.point.params)
        try:
            one = canonical(config)
        except KeyError:  # of a model that there is not
            one = {"model": str(config.get("model"))}
        changed = [k for k in sorted({*one, *other}) if k not in PATH_KEYS and one.get(k) != other.get(k)]
        if config.get("seed") != self.point.seed:
            changed.append("seed")
        if changed:
            self.fail(
                f"{folder}: has the id of {self.point.label}, but another configuration, in {', '.join(changed)}; "
                "it is left as it is: move its folder away, or choose another model_root"
            )
            return False
        self.folder = folder
        return True

    def fail(self, reason: str, lines: Sequence[str] = ()) -> None:
        """It failed; with the last lines of its log."""
        self.state = State.FAILED
        self.reason = (reason, *lines)

    def said(self, count: int = 1) -> list[str]:
        """The last lines of its log that are not blank; none if there is no log."""
        try:
            with open(self.log, "rb") as file:
                file.seek(max(0, os.path.getsize(self.log) - TAIL_BYTES))
                text = file.read().decode(errors="replace")
        except OSError:
            return []
        return [line for line in re.split(r"[\r\n]+", text) if line.strip()][-count:]


@dataclass(frozen=True)
class Launcher:
    """What starts a grid's runs have in common.

    Attributes:
        script: ``run_expid.py``.
        plugins: files of ``--load``.
    """

    script: str
    plugins: Sequence[str] = ()

    def command(self, job: Job, config_dir: str) -> list[str]:
        """The process of a run, less its ``--gpu``."""
        loads = [part for path in self.plugins for part in ("--load", os.path.abspath(path))]
        start = [sys.executable, "-u", self.script, "--config", config_dir, *loads]
        if job.folder is not None:
            return [*start, "--resume", job.folder]
        return [*start, "--expid", job.point.expid, "--seed", str(job.point.seed)]


def _folders(place: str, seed: int) -> list[str]:
    """A seed's run folders, oldest first."""
    pattern = re.compile(rf"(\d{{8}}-\d{{6}})-seed{seed}(?:-(\d+))?")
    try:
        names = os.listdir(place)
    except OSError:
        return []
    found = [(match[1], int(match[2] or 1), name) for name in names if (match := pattern.fullmatch(name))]
    return [os.path.join(place, name) for _, _, name in sorted(found)]
