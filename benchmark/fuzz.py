"""Damaged files: how often reading one ends in a clear error, how often in anything else; ``--write`` records FUZZ.md.

    python benchmark/fuzz.py [--cases 600] [--kinds train h5 ...] [--write]

Readers run in processes of their own, so that one that is killed, or hangs, is counted and the next case goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from fuzz_cases import KINDS, make_files
from machine import markdown, this_machine

OUTCOMES = ("clear error", "read correctly", "values changed, sums tell", "values changed", "schema changed, sums tell",
            "schema changed", "traceback", "crash", "hang")  # fmt: skip
FORBIDDEN = ("schema changed", "traceback", "crash", "hang")
SCRIPT = str(Path(__file__).with_name("fuzz_cases.py"))
#: bytes of address space of a reader, beyond which an allocation fails
MEMORY = 8 * 2**30

#: seconds until a reader is ready
START = 300.0

Result = tuple[str, int, str, str, str]


class Reader:
    """A process that reads damaged files; started again when it dies.

    Args:
        folder: of the sound files.
        work: where it may write.
        script: what the process runs.
        patience: seconds for one case.
    """

    def __init__(self, folder: Path, work: Path, script: str = SCRIPT, patience: float = 30.0) -> None:
        self.folder, self.work, self.script, self.patience = folder, work, script, patience
        work.mkdir(exist_ok=True)
        self.noise = open(work / "stderr", "w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self.process: subprocess.Popen[str] | None = None
        self.answers: queue.Queue[str | None] = queue.Queue()

    def result(self, kind: str, number: int) -> Result:
        """Outcome of one case."""
        if self.process is None:
            self.process = self._start()
            self.answers.get(timeout=START)  # its imports are done
            self.noise.seek(0)
            self.noise.truncate()
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"kind": kind, "number": number}) + "\n")
        self.process.stdin.flush()
        try:
            line = self.answers.get(timeout=self.patience)
        except queue.Empty:
            self.close()
            return kind, number, "hang", f"no answer in {self.patience:.0f} seconds", ""
        if line is None:
            code = self.process.wait()
            self.close()
            return kind, number, "crash", f"the process ended with {code}", ""
        outcome, words, damage = json.loads(line)
        self.noise.seek(0)
        if said := self.noise.read().strip():  # a library that prints its stack before it raises
            outcome, words = "traceback", f"{outcome}, and on stderr: {said[:500]}"
            self.noise.seek(0)
            self.noise.truncate()
        return kind, number, outcome, words, damage

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process, self.answers = None, queue.Queue()

    def _start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, self.script, str(self.folder), str(self.work)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.noise, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "2"}, preexec_fn=_bounded,
        )  # fmt: skip
        answers = self.answers

        def listen() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                answers.put(line)
            answers.put(None)

        threading.Thread(target=listen, daemon=True).start()
        return process


def _bounded() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def run(kinds: Iterable[str], numbers: range) -> Iterator[Result]:
    """The outcome of every case."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "sound"
        folder.mkdir()
        make_files(folder)
        reader = Reader(folder, Path(place) / "work")
        try:
            for kind in kinds:
                for number in numbers:
                    yield reader.result(kind, number)
        finally:
            reader.close()
            reader.noise.close()


def table(results: list[Result]) -> str:
    """Outcomes by kind of file, in markdown; columns without any case are left out but for what must not be."""
    counts = {kind: Counter(result[2] for result in results if result[0] == kind) for kind in KINDS}
    shown = [name for name in OUTCOMES if name in FORBIDDEN or any(count[name] for count in counts.values())]
    lines = [
        [kind, str(sum(count.values())), *(str(count[name]) for name in shown)] for kind, count in counts.items() if count
    ]
    return markdown(["file", "cases", *shown], lines)


def main(arguments: list[str] | None = None) -> int:
    """Print the table and every case that must not be; 1 if there is one."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--cases", type=int, default=600, help="per kind of file (default: %(default)s)")
    options.add_argument("--first", type=int, default=0, help="number of the first case")
    options.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    options.add_argument("--write", action="store_true", help="put the table into FUZZ.md")
    chosen = options.parse_args(arguments)
    results = []
    for result in run(chosen.kinds, range(chosen.first, chosen.first + chosen.cases)):
        results.append(result)
        if result[2] in FORBIDDEN:
            print(*result, sep=" | ", flush=True)
    print(table(results))
    if chosen.write:
        _record(results)
    return int(any(result[2] in FORBIDDEN for result in results))


def _record(results: list[Result]) -> None:
    path = Path(__file__).with_name("FUZZ.md")
    kept = path.read_text(encoding="utf-8").partition("<!-- table -->")[0]
    path.write_text(f"{kept}<!-- table -->\n\n{table(results)}\n\n{this_machine()}\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
