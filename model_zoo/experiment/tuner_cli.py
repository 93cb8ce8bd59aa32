"""The command line of ``run_param_tuner.py``; heavy imports wait until its options are known to be sound."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from model_zoo.errors import ConfigError, answered

if TYPE_CHECKING:
    from model_zoo.experiment.backends.process import Backend
    from model_zoo.experiment.grid import Grid, Point
    from model_zoo.experiment.tuner import Source

TRIALS = 20


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(
        prog="run_param_tuner.py",
        description="Run every configuration of a tuner file, LongCTR's own or alike. Called again, it skips what is done "
        "and goes on with what was stopped. Exit code 1 if some runs failed.",
    )
    add = options.add_argument
    add("--config", required=True, metavar="FILE", help="tuner yaml file, or a folder of experiments")
    add("--tag", help="only the runs whose id contains it, such as 001 for the first")
    add("--set", metavar="KEY=VALUE", action="append", default=[],
        help="of tuner_space, a value or a list of them instead of the file's; repeatable")  # fmt: skip
    add("--gpu", type=int, nargs="+", default=[-1], metavar="N",
        help="CUDA devices, one run at a time on each; -1 = CPU (default); one named twice takes two")  # fmt: skip
    add("--seeds", type=int, nargs="+", metavar="N", help="run each configuration with each of these")
    add("--best-seeds", type=int, nargs="+", metavar="N",
        help="then run what validated best, of each data set, model and length, with these, too")  # fmt: skip
    add("--jobs", type=int, metavar="N", help="runs at once (default: one for each --gpu)")
    add("--load", metavar="FILE", action="append", default=[], help="Python file that registers models")
    add("--dry-run", action="store_true", help="list the runs and what is done of them; start none")
    add("--backend", choices=("local", "ray"), default="local", help="where runs run (default: %(default)s)")
    add("--address", help="of a Ray cluster, or auto (default: Ray on this machine)")
    add("--search", choices=("grid", "optuna"), default="grid", help="all combinations (default), or Optuna's choice")
    add("--trials", type=int, metavar="N", help=f"of --search optuna, for each data set (default: {TRIALS})")
    add("--storage", help="of --search optuna: sqlite:///FILE (default: in the grid's folder)")
    return options


@answered
def main(root: str, arguments: list[str] | None = None) -> int:
    """Run; returns the exit code: 0, 1 if runs failed, 2 for a user's error, 128 + its number after a signal."""
    options = parser().parse_args(arguments)
    from model_zoo.interrupts import Stopped, listening

    try:
        _check(options)
        with listening():
            return _tune(root, options)
    except Stopped as stop:
        again = shlex.join(["python", "run_param_tuner.py", *(sys.argv[1:] if arguments is None else arguments)])
        print(f"stopped by {stop.signal.name}; go on with: {again}", file=sys.stderr)
        return 128 + stop.signal


def _check(options: argparse.Namespace) -> None:
    """Refuse options that do not go together."""
    if options.address is not None and options.backend != "ray":
        raise ConfigError("--address is for --backend ray; add that, or take it out")
    for name in ("trials", "storage"):
        if getattr(options, name) is not None and options.search != "optuna":
            raise ConfigError(f"--{name} is for --search optuna; add that, or take it out")
    for name in ("jobs", "trials"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ConfigError(f"--{name} {getattr(options, name)}: must be at least 1")
    if options.search == "optuna" and options.tag is not None:
        raise ConfigError("--tag chooses among a grid's runs; leave it out with --search optuna")
    if options.search == "optuna" and options.best_seeds is not None:
        raise ConfigError("--best-seeds is for grids; with --search optuna, give --seeds, or run the best trial's config")
    if min(options.gpu) < -1:
        raise ConfigError(f"--gpu {min(options.gpu)}: name CUDA devices from 0, or -1 for the CPU")


def _tune(root: str, options: argparse.Namespace) -> int:
    from model_zoo.experiment.plugins import load_plugin

    for path in options.load:
        load_plugin(path)
    files_in = None if options.dry_run else root
    space, grid = _read(root, options, files_in)
    if grid is not None:
        model_root = grid.points[0].params.get("model_root")
    else:
        from model_zoo.experiment.search_optuna import check

        model_root = check(space, options.seeds, files_in).params.get("model_root")
    results = os.path.normpath(os.path.join(root, model_root or "checkpoints"))
    if not options.dry_run:
        return _run(root, options, results, space, grid)
    if grid is not None:
        _list(root, os.path.join(results, f"{grid.name}.csv"), grid.points)
    else:
        count = options.trials or TRIALS
        print(f"{space.path}: sound; {count} trials on each of {len(space.bases)} data sets would be run")
    return 0


def _read(root: str, options: argparse.Namespace, files_in: str | None) -> tuple[Any, Grid | None]:
    """The space of a tuner file (None for a folder of experiments), and the grid unless a search draws from it."""
    from model_zoo.experiment.grid import points_in, points_of
    from model_zoo.experiment.grid_file import read_space

    if os.path.isdir(options.config):
        if options.search == "optuna":
            raise ConfigError(f"--config {options.config}: is a folder of experiments; a search needs a tuner file")
        if options.set:
            raise ConfigError(f"--config {options.config}: its experiments run as they are; --set is for a tuner file")
        datasets = os.path.join(root, "config")
        return None, points_in(options.config, datasets, options.tag, options.seeds, files_in)
    space = read_space(options.config, root, options.set)
    if options.search == "optuna":
        return space, None
    return space, points_of(space, options.seeds, files_in).tagged(options.tag)


def _run(root: str, options: argparse.Namespace, results: str, space: Any, grid: Grid | None) -> int:
    """Run what there is to run; returns the exit code."""
    from model_zoo.experiment.backends.process import make_folder
    from model_zoo.experiment.tuner import Listed, Tuner
    from model_zoo.experiment.tuner_jobs import Job, Launcher
    from model_zoo.experiment.tuner_table import Display, closing
    from model_zoo.experiment.tuner_winners import Winners
    from model_zoo.files import locked
    from model_zoo.interrupts import Stopped

    name = grid.name if grid else space.name
    folder, table = os.path.join(results, "grids", name), os.path.join(results, f"{name}.csv")
    if grid and grid.repeated:
        print(f"{grid.repeated} of {len(grid.points) + grid.repeated} points repeat another one's values: they run once")
    with ExitStack() as stack:
        make_folder(folder)
        source: Source
        if grid is None:
            from model_zoo.experiment.search_optuna import OptunaSource, default_storage

            # two processes would each take the other's trials for stopped ones
            stack.enter_context(locked(os.path.join(folder, "search.lock"), wait=False))
            storage = options.storage or default_storage(folder)
            source = OptunaSource(space, options.trials or TRIALS, storage, options.seeds, root)
        else:
            jobs = [Job.of(point, root) for point in grid.points]
            source = Winners(jobs, options.best_seeds) if options.best_seeds else Listed(jobs)
        backend = _backend(options, os.path.join(folder, f"orders-{os.getpid()}"))
        launcher = Launcher(os.path.join(root, "run_expid.py"), options.load)
        tuner = Tuner(source, backend, launcher, folder, table, Display(name, sys.stdout))
        try:
            sound = tuner.run()
        except Stopped:
            print(closing(list(tuner.jobs.values()), source.total, table))
            raise
        print(closing(list(tuner.jobs.values()), source.total, table))
        return 0 if sound else 1


def _backend(options: argparse.Namespace, orders: str) -> Backend:
    from model_zoo.experiment.run import check_device

    if options.address is None:
        for gpu in options.gpu:
            check_device(gpu)
    if options.backend == "ray":
        from model_zoo.experiment.backends.ray_backend import RayBackend

        return RayBackend(options.address, options.gpu, options.jobs, orders)
    from model_zoo.experiment.backends.local import LocalBackend

    return LocalBackend(options.gpu, options.jobs)


def _list(root: str, table: str, points: list[Point]) -> None:
    """Each run, and what of it lies on disk."""
    from model_zoo.experiment.tuner_jobs import Job, State

    jobs = [Job.of(point, root) for point in points]
    for job in jobs:
        job.look()
        stands = job.reason[0] if job.state is State.FAILED else "stopped" if job.folder else "left"
        print(f"  {'done' if job.state is State.DONE else stands}  {job.point}")
    print(f"{len(jobs)} runs, {sum(job.state is State.DONE for job in jobs)} of them done; results: {table}")
