"""What a grid shows: while it runs one table drawn again and again, or lines where there is no terminal; and at its end."""

from __future__ import annotations

import shutil
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

from model_zoo.experiment.report import table
from model_zoo.experiment.tuner_jobs import Job, State

#: seconds between two drawings
EVERY = 1.0
#: configurations in the closing table, for each data set
RANKED = 10


@dataclass(frozen=True)
class Ranked:
    """A configuration's finished runs.

    Attributes:
        job: one of them.
        value: mean of the monitor over them, on validation, greater is better.
        seeds: how many they are.
    """

    job: Job
    value: float
    seeds: int


def ranking(jobs: Sequence[Job]) -> dict[tuple[str, str], list[Ranked]]:
    """Data set and monitor to its configurations, best first."""
    groups: dict[tuple[str, str], dict[str, list[Job]]] = defaultdict(lambda: defaultdict(list))
    for job in jobs:
        if job.state is State.DONE and job.value is not None:
            groups[job.point.params["dataset_id"], job.monitor][job.point.expid].append(job)
    return {
        group: sorted(
            (Ranked(runs[0], sum(run.value or 0.0 for run in runs) / len(runs), len(runs)) for runs in by_id.values()),
            key=lambda ranked: (-ranked.value, ranked.job.point.expid),
        )
        for group, by_id in sorted(groups.items())
    }


def seconds_left(jobs: Sequence[Job], total: int, slots: int, now: float) -> float | None:
    """Seconds until the last run ends, if each takes the mean of those done; None as long as none is.

    Args:
        now: `time.monotonic`.
    """
    known = [job.seconds for job in jobs if job.state is State.DONE and job.seconds is not None]
    if not known:
        return None
    mean = sum(known) / len(known)
    running = [max(0.0, mean - (now - job.started)) for job in jobs if job.state is State.RUNNING]
    ended = sum(job.state in (State.DONE, State.FAILED) for job in jobs)
    waiting = (total - ended - len(running)) * mean
    return max((sum(running) + waiting) / max(1, slots), *running, 0.0)


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``1 h 20 min``, ``2 d 3 h``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min")]
    first = next(i for i, (count, _) in enumerate(parts) if count)
    return " ".join(f"{count} {unit}" for count, unit in parts[first : first + 2] if count)


def drawn(name: str, jobs: Sequence[Job], total: int, slots: int, began: float, now: float) -> list[str]:
    """The table's lines."""
    count = {state: sum(job.state is state for job in jobs) for state in State}
    before = sum(job.before for job in jobs)
    left = total - count[State.DONE] - count[State.FAILED] - count[State.RUNNING] - count[State.ELSEWHERE]
    figures = [
        f"{count[State.DONE]} done{f' ({before} before)' if before else ''}",
        f"{count[State.RUNNING]} running",
        *([f"{count[State.ELSEWHERE]} elsewhere"] if count[State.ELSEWHERE] else []),
        f"{left} left",
        f"{count[State.FAILED]} failed",
    ]
    rest = seconds_left(jobs, total, slots, now)
    ahead = "time left not known yet" if rest is None else f"about {duration(rest)} left"
    lines = [f"{name}: {total} runs: {', '.join(figures)}; {duration(now - began)} so far, {ahead}"]
    for (dataset, monitor), ranked in ranking(jobs).items():
        best = ranked[0]
        lines.append(f"  best on {dataset} ({monitor}) {_value(best.value, monitor)}: {_described(best)}")
    running = [job for job in jobs if job.state is State.RUNNING]
    rows = [[job.device, duration(now - job.started), str(job.point), *job.said()] for job in running]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append("  ".join(["", *cells, *row[3:]]).rstrip())
    return lines


def closing(jobs: Sequence[Job], total: int, results: str) -> str:
    """The best configurations of each data set, every failure with the last lines of its log, and how many are done."""
    parts = []
    for (dataset, monitor), ranked in ranking(jobs).items():
        rows = [
            [_described(one), str(one.seeds), _value(one.value, monitor)] for one in ranked[:RANKED]
        ]
        more = f" (the best {RANKED} of {len(ranked)})" if len(ranked) > RANKED else ""
        parts.append(f"{dataset}, on validation{more}\n{table(['', 'seeds', monitor], rows)}")
    for job in jobs:
        if job.state is State.FAILED:
            parts.append("\n    ".join([f"failed: {job.point}: {job.reason[0]}", *job.reason[1:]]))
    done, failed = (sum(job.state is state for job in jobs) for state in (State.DONE, State.FAILED))
    counts = f"{done} of {total} runs done, {failed} failed, {total - done - failed} left"
    parts.append(counts + (f"; results: {results}" if done else ""))
    return "\n".join(parts)


class Display:
    """One table at the end of the output, drawn again and again; lines alone if the output is no terminal.

    Args:
        name: the grid's.
    """

    def __init__(self, name: str, stream: TextIO, live: bool | None = None) -> None:
        self.name, self.stream = name, stream
        self.live = stream.isatty() if live is None else live
        self._began, self._drawn_at, self._lines = time.monotonic(), -EVERY, 0

    def note(self, text: str) -> None:
        """A line that stays; the table comes again with the next `show`."""
        self._erase()
        self.stream.write(text + "\n")
        self.stream.flush()
        self._drawn_at = -EVERY

    def ended(self, job: Job, done: int, total: int) -> None:
        """A job is done or has failed."""
        if job.state is State.FAILED:
            self.note(f"failed: {job.point}: {job.reason[0]}")
        elif not job.before:
            took = f" in {duration(job.seconds)}" if job.seconds is not None else ""
            value = "no value" if job.value is None else _value(job.value, job.monitor)
            self.note(f"done {done} of {total}: {job.point}{took}: {job.monitor} {value}")

    def show(self, jobs: Sequence[Job], total: int, slots: int) -> None:
        """Draw the table, if it is time to."""
        now = time.monotonic()
        if self.live and now - self._drawn_at >= EVERY:
            self._drawn_at = now
            self._erase()
            self._draw(drawn(self.name, jobs, total, slots, self._began, now))

    def close(self) -> None:
        """Take the table away."""
        self._erase()
        self.stream.flush()

    def _erase(self) -> None:
        if self._lines:
            self.stream.write(f"\x1b[{self._lines}F\x1b[J")
            self._lines = 0

    def _draw(self, lines: list[str]) -> None:
        """Draw lines cut to the terminal's width, for a line that wraps could not be taken back."""
        width, height = shutil.get_terminal_size()
        shown = [line[: width - 1] for line in lines[: height - 1]]
        self.stream.write("".join(f"{line}\n" for line in shown))
        self.stream.flush()
        self._lines = len(shown)


def _value(value: float, monitor: str) -> str:
    """The monitor as it was written: jobs hold it with the sign that makes greater better."""
    return f"{-value if monitor.startswith('min: ') else value:.6f}"


def _described(ranked: Ranked) -> str:
    point = ranked.job.point
    tuned = str(point).partition(": ")[2]
    return f"{point.label}{f'  {tuned}' if tuned else ''}"
