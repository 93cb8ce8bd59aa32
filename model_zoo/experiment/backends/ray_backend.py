"""Runs as tasks of Ray: on this machine, or on a cluster whose nodes all see the repository, the data and the results."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from model_zoo.errors import ConfigError
from model_zoo.experiment.backends.process import HELD, Task, launch, stop
from model_zoo.files import write_whole

MISSING = "--backend ray needs the package ray; install it with: pip install -e '.[ray]'"
#: seconds between a task's looks at its process and at the order to stop
POLL = 0.5
REACH_SECONDS = 10
STOP, KILL = "stop", "kill"


class RayBackend:
    """Tasks of one GPU each, or of one CPU core.

    Args:
        address: of a cluster, or ``auto``; None starts Ray on this machine.
        devices: of CUDA; -1 is the CPU. A cluster chooses its GPUs itself: there they only say GPU or CPU.
        jobs: runs at once, if not one for each device named (on this machine) or each GPU or core (on a cluster).
        orders: a file that all nodes see, for the order to stop.

    Raises:
        ConfigError: ray is not installed, the cluster is not found, or GPU and CPU are mixed.
    """

    def __init__(self, address: str | None, devices: Sequence[int], jobs: int | None, orders: str) -> None:
        on_gpu = {device >= 0 for device in devices}
        if len(on_gpu) > 1:
            raise ConfigError("--gpu: with --backend ray, name GPUs or -1, not both")
        try:
            import ray
        except ModuleNotFoundError:
            raise ConfigError(MISSING) from None
        self._ray: Any = ray
        self._gpu = on_gpu == {True}
        self._orders = orders
        with _own_signals():
            self._connect(address, devices)
        there = int(self._ray.cluster_resources().get("GPU" if self._gpu else "CPU", 0))
        self._slots = jobs or (len(devices) if address is None else there)
        self._running: dict[Any, Task] = {}
        self._work = self._ray.remote(max_retries=0, num_cpus=1, num_gpus=int(self._gpu))(_work)

    def _connect(self, address: str | None, devices: Sequence[int]) -> None:
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        try:
            if address is not None:
                _reach(address)
                self._ray.init(address=address, **quiet)
                return
            here = {"num_cpus": max(len(devices), os.cpu_count() or 1), "include_dashboard": False}
            if self._gpu:
                os.environ.setdefault("CUDA_VISIBLE_DEVICES", ",".join(map(str, dict.fromkeys(devices))))
                here["num_gpus"] = len(set(devices))
            self._ray.init(address="local", **here, **quiet)
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            where = "on this machine" if address is None else f"at --address {address}"
            raise ConfigError(f"--backend ray: no Ray {where}: {reason}") from None

    def free(self) -> int:
        return self._slots - len(self._running)

    def start(self, task: Task) -> str:
        self._running[self._work.remote(task, 0 if self._gpu else -1, self._orders)] = task
        return "ray"

    def ended(self) -> list[tuple[Task, int]]:
        if not self._running:
            return []
        found = []
        ready, _ = self._ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
        for reference in ready:
            task = self._running.pop(reference)
            try:
                code = self._ray.get(reference)
            except self._ray.exceptions.RayError as error:  # its worker or its node died, or it was cancelled
                with suppress(OSError), open(task.log, "a", encoding="utf-8") as log:
                    log.write(f"{type(error).__name__}: {' '.join(str(error).split())}\n")
                code = 1
            found.append((task, code))
        return found

    def stop(self, kill: bool = False) -> None:
        if self._running:
            write_whole(self._orders, KILL if kill else STOP)

    def close(self) -> None:
        with suppress(FileNotFoundError):
            os.remove(self._orders)
        self._ray.shutdown()


def _reach(address: str) -> None:
    """See whether something listens at ``host:port``: Ray would try for minutes, and then end the process.

    Raises:
        OSError: nothing does.
    """
    host, colon, port = address.rpartition("/")[2].rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=REACH_SECONDS).close()


@contextmanager
def _own_signals() -> Iterator[None]:
    """Put back the handlers of signals that Ray replaces as it starts."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


def _work(task: Task, gpu: int, orders: str) -> int:
    """Run a task in a worker of Ray; returns its exit code."""
    order = _read(orders)
    if order:
        return HELD
    process = launch(task, gpu, {})
    if process is None:
        return HELD
    while process.poll() is None:
        time.sleep(POLL)
        if (latest := _read(orders)) != order:
            order = latest
            stop(process, kill=order == KILL)
    return process.returncode


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return ""
