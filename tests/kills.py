"""Runs of ``run_expid.py`` that are killed by SIGKILL and resumed: ``python tests/kills.py [--kills 60] [--seed 0]``.

Each trial starts the same small MoS experiment in a fresh folder, kills it, resumes it (and kills some of the resumed ones
again), and compares the end with that of a run that nobody stopped: final weights and those of every phase, validation
history, scores, codebooks, the results table.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from multiprocessing import forkserver, get_context
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # which torch itself imports at the first optimizer step

from model_zoo.checkpoint import read_weights
from model_zoo.experiment import cli, run  # noqa: F401 imported before the fork
from model_zoo.training import TrainingLoop

#: where a kill comes: at a moment that a clock chooses, within a training step or an evaluation, within a file's writing
PLACES = ("clock", "step", "evaluation", "write")
#: what a writer calls; the kill comes just before or just after one of the calls
WRITER_CALLS = ("fsync", "replace")
#: seconds after which a run counts as hanging
LIMIT = 300
#: a server that has imported everything and used nothing (packages with threads do not survive a fork) makes the children
FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(["kills"])


@dataclass(frozen=True)
class Kill:
    """One kill.

    Attributes:
        place: of `PLACES`.
        number: of the step, evaluation or call, from 1; of ``clock``: thousandths of the whole run's time.
        after: behind the call rather than before it.
    """

    place: str
    number: int
    after: bool


def experiment(
    config: Path, root: Path, arguments: tuple[str, ...] = (), kill: Kill | None = None, seconds: float = 0
) -> int:
    """Run in a child process; returns its exit code, negative after a signal."""
    _start_server()
    child = FORKS.Process(target=_child, args=(config, root, arguments, kill))
    child.start()
    if kill is not None and kill.place == "clock":
        time.sleep(seconds * kill.number / 1000)
        child.kill()
    child.join(LIMIT)
    if child.is_alive():
        child.kill()
        raise TimeoutError(f"{root}: no end within {LIMIT} seconds; {_console(root)}")
    assert child.exitcode is not None
    return child.exitcode


def _start_server() -> None:
    """Start it, if it does not run, with this module in reach (Python 3.11's does not hand on ``sys.path``)."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path, before or ""])
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


def _child(config: Path, root: Path, arguments: tuple[str, ...], kill: Kill | None) -> None:
    log = os.open(root / "console.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    if kill is not None:
        _arm(kill)
    sys.exit(cli.main(str(root), ["--config", str(config), "--expid", "MoS_TWIN_tiny", *arguments]))


def _console(root: Path) -> str:
    return (root / "console.log").read_text()[-500:]


def _arm(kill: Kill) -> None:
    """Let this process kill itself at the given call."""
    left = kill.number

    def deadly(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0 and not kill.after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*arguments, **options)
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return counted

    if kill.place == "write":
        for name in WRITER_CALLS:
            setattr(os, name, deadly(getattr(os, name)))
    elif kill.place == "step":
        TrainingLoop.train_step = deadly(TrainingLoop.train_step)  # type: ignore[method-assign]
    elif kill.place == "evaluation":
        TrainingLoop.predict_split = deadly(TrainingLoop.predict_split)  # type: ignore[method-assign]


def outcome(root: Path) -> dict[str, Any]:
    """What must be the same whether a run was stopped or not."""
    (folder,) = (root / "checkpoints").glob("*/*/*")
    record = json.loads((folder / "metrics.json").read_text())
    weights = {}
    for path in sorted(folder.glob("*.model")):
        for name, value in read_weights(path).state.items():
            weights[f"{path.name}: {name}"] = value
    (table,) = (root / "checkpoints").glob("*.csv")
    shown = [line.split("[exp_id]")[1] for line in table.read_text().splitlines()]
    history = [{k: v for k, v in entry.items() if "second" not in k} for entry in record["history"]]
    left = sorted(path.name for path in folder.iterdir())
    return {"weights": weights, "scores": record["scores"], "history": history, "table": shown, "files": left,
            "routing": record["codebook_usage"]}  # fmt: skip


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Names of what differs, by any bit."""
    wrong = [name for name in wanted if name not in ("weights", "files") and found[name] != wanted[name]]
    wrong += sorted({*found["files"]} ^ {*wanted["files"]})
    if found["weights"].keys() != wanted["weights"].keys():
        return [*wrong, "the checkpoints' parameters"]
    return wrong + [name for name, value in wanted["weights"].items() if not torch.equal(value, found["weights"][name])]


class Trials:
    """Kills one after the other, against one run that was left alone.

    Args:
        config: of the experiment ``MoS_TWIN_tiny``.
        folder: for the runs.
        seed: of the kills.
        settings: ``KEY=VALUE`` for every run.
    """

    def __init__(self, config: Path, folder: Path, seed: int, settings: tuple[str, ...] = ()) -> None:
        self.config, self.folder = config, folder
        self.random = random.Random(seed)
        self.options = tuple(part for text in settings for part in ("--set", text))
        self.whole = folder / "whole"
        self.whole.mkdir(parents=True)
        started = time.perf_counter()
        assert experiment(config, self.whole, self.options) == 0, _console(self.whole)
        self.seconds = time.perf_counter() - started
        self.wanted = outcome(self.whole)

    def counts(self) -> dict[str, int]:
        """How often each place comes in a whole run (upper bounds that a kill's number is drawn from)."""
        steps = sum(1 for _ in self.wanted["history"])
        return {"clock": 1000, "step": 18, "evaluation": steps + 4, "write": 60}

    def draw(self) -> Kill:
        """A kill."""
        place = self.random.choice(PLACES)
        return Kill(place, self.random.randint(1, self.counts()[place]), self.random.random() < 0.5)

    def trial(self, number: int) -> tuple[list[Kill], list[str]]:
        """Kill (once or twice) and resume; returns the kills that struck, and what differs from the whole run."""
        root = self.folder / f"trial{number}"
        root.mkdir()
        struck = []
        for _ in range(self.random.choice((1, 1, 2))):
            kill = self.draw()
            code = experiment(self.config, root, (*self.options, "--resume"), kill, self.seconds)
            if code == -signal.SIGKILL:
                struck.append(kill)
            elif code:
                return struck, [f"exit code {code}: {_console(root)}"]
        code = experiment(self.config, root, (*self.options, "--resume"))
        if code:
            return struck, [f"exit code {code}: {_console(root)}"]
        return struck, differences(outcome(root), self.wanted)


def main(arguments: list[str] | None = None) -> int:
    """Print each trial and the counts; returns 1 if one differs."""
    import tempfile

    from conftest import SPEC, TINY_EXPERIMENTS

    from model_zoo.pipeline.synthetic import generate
    from model_zoo.pipeline.synthetic_files import dataset_config, write

    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kills", type=int, default=60, help="runs that are killed (once or twice each)")
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args(arguments)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        config = folder / "config"
        config.mkdir()
        write(generate(SPEC), folder / "tiny")
        (config / "model_config.yaml").write_text(TINY_EXPERIMENTS)
        (config / "dataset_config.yaml").write_text(dataset_config(SPEC, folder / "tiny"))
        trials = Trials(config, folder / "runs", chosen.seed, ("checkpoint_steps=1",))
        print(f"whole run: {trials.seconds:.1f} s, {len(trials.wanted['weights'])} tensors")
        same, done = 0, 0
        places: Counter[str] = Counter()
        for number in count():
            if done == chosen.kills:
                break
            kills, wrong = trials.trial(number)
            done += bool(kills) or bool(wrong)
            same += bool(kills) and not wrong
            places.update(kill.place for kill in kills)
            if kills or wrong:
                where = " + ".join(f"{kill.place} {kill.number}" for kill in kills)
                print(f"{done:3d} {where:40s} {'; '.join(wrong[:3]) or 'same'}", flush=True)
        print(f"{same} of {done} runs end bit for bit as the whole one; kills: {dict(places)}")
        return int(same < done)


if __name__ == "__main__":
    import kills  # by that name the server of forks knows the children's function

    sys.exit(kills.main())
