"""Runs as processes of this machine, one for each device given."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from itertools import cycle, islice

from model_zoo.experiment.backends.process import HELD, Task, launch, stop


class LocalBackend:
    """Runs on the devices of this machine.

    Args:
        devices: of CUDA; -1 is the CPU; a device named twice takes two runs at once.
        jobs: runs at once, if not one for each device named; the devices are gone through again and again.
    """

    def __init__(self, devices: Sequence[int], jobs: int | None = None) -> None:
        self._free = list(islice(cycle(devices), jobs or len(devices)))
        self._running: dict[Task, tuple[subprocess.Popen[bytes], int]] = {}
        self._held: list[Task] = []
        self._settings = _threads(self._free)

    def free(self) -> int:
        return len(self._free)

    def start(self, task: Task) -> str:
        device = self._free.pop(0)
        process = launch(task, device, self._settings)
        if process is None:
            self._held.append(task)
            self._free.append(device)
        else:
            self._running[task] = process, device
        return f"gpu {device}" if device >= 0 else "cpu"

    def ended(self) -> list[tuple[Task, int]]:
        found = [(task, HELD) for task in self._held]
        self._held.clear()
        for task, (process, device) in list(self._running.items()):
            code = process.poll()
            if code is not None:
                del self._running[task]
                self._free.append(device)
                found.append((task, code))
        return found

    def stop(self, kill: bool = False) -> None:
        for process, _ in self._running.values():
            stop(process, kill)

    def close(self) -> None:
        self._held.clear()


def _threads(devices: Sequence[int]) -> dict[str, str]:
    """Share the cores among the runs on the CPU, unless the user says how: with a thread a core each they would fight."""
    runs = sum(device < 0 for device in devices)
    if runs < 2 or "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // runs))}
