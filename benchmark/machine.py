"""What the benchmarks' records have in common: the machine in one line, and tables in markdown."""

from __future__ import annotations

import os
import platform
from typing import Any

from model_zoo.experiment.record import environment

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def this_machine() -> str:
    """The machine that runs this process, as `describe` tells it."""
    found = environment(ROOT)
    return describe(found["hardware"], found["versions"])


def describe(hardware: dict[str, Any], versions: dict[str, str]) -> str:
    """A machine, and what ran on it, in one line; both as `model_zoo.experiment.record.environment` has them."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else 0
    parts = [
        f"{hardware['cpus']} CPUs ({cpu_name() or hardware['machine']}), {memory:.0f} GiB, {hardware['system']}",
        f"{hardware['torch_threads']} thread(s) a run",
        *(f"{name} {versions[name]}" for name in ("torch", "fuxictr", "python") if name in versions),
    ]
    return "; ".join(parts)


def cpu_name() -> str:
    """The processor's name where the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor()


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """A markdown table."""
    cells = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)
