"""The command line of ``run_expid.py``; heavy imports wait until an experiment is known to be sound."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from typing import TYPE_CHECKING

from model_zoo.errors import ConfigError, answered

if TYPE_CHECKING:
    from model_zoo.experiment.config import Config
    from model_zoo.experiment.unfinished import Run

DEFAULT_EXPID = "MoS_TWIN_kuairand_sample"


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(
        prog="run_expid.py",
        description="Train and score one experiment. Without options: MoS_TWIN on the sample that ships in data/.",
    )
    options.add_argument("--config", metavar="DIR", help="folder with model_config and dataset_config (default: config/)")
    options.add_argument("--expid", default=DEFAULT_EXPID, help="experiment id in model_config (default: %(default)s)")
    options.add_argument("--gpu", type=int, default=-1, help="CUDA device index, -1 = CPU (default)")
    options.add_argument("--seed", type=int, help="instead of the config's seed")
    options.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override one key; repeatable")
    options.add_argument("--load", metavar="FILE", action="append", default=[], help="Python file that registers models")
    options.add_argument(
        "--resume", metavar="FOLDER", nargs="?", const="",
        help="go on with a stopped run: the one in FOLDER, or the experiment's newest (a new one if there is none)",
    )  # fmt: skip
    options.add_argument(
        "--deterministic", action="store_true",
        help="on CUDA: kernels whose results repeat bit for bit, which costs speed (on the CPU they do as it is)",
    )  # fmt: skip
    options.add_argument("--dry-run", action="store_true", help="show merged config, sizes and parameters; no training")
    return options


@answered
def main(root: str, arguments: list[str] | None = None) -> int:
    """Run; returns the exit code: 0, 2 for a user's error (said on stderr), 128 + its number after a signal."""
    options = parser().parse_args(arguments)
    return _main(root, options)


def _main(root: str, options: argparse.Namespace) -> int:
    from model_zoo.interrupts import Stopped, listening

    try:
        with listening():
            return _experiment(root, options)
    except Stopped as stop:
        print(f"stopped by {stop.signal.name}", file=sys.stderr)
        return 128 + stop.signal


def _experiment(root: str, options: argparse.Namespace) -> int:
    for path in options.load:
        from model_zoo.experiment.plugins import load_plugin

        load_plugin(path)
    config_dir = options.config or os.path.join(root, "config")
    resume: Run | bool = options.resume is not None
    if options.resume:
        from model_zoo.experiment.unfinished import Run

        if options.set or options.seed is not None:
            raise ConfigError("--resume FOLDER goes on with that run's own config; leave out --set and --seed")
        resume = Run.read(os.path.abspath(options.resume))
        config = resume.config()
    else:
        config = _configured(root, config_dir, options)
    config.set("gpu", options.gpu, "--gpu")
    if options.deterministic:
        config.set("deterministic", True, "--deterministic")

    from model_zoo.experiment.schema import validate

    params = validate(config, None if options.dry_run else root)

    from model_zoo.experiment import run as experiment

    if options.dry_run:
        from model_zoo.experiment.report import dry_run
        from model_zoo.pipeline.feature_map import build_feature_map

        experiment.check_device(params["gpu"])
        experiment.resolve_paths(params, root)
        dry_run(config, params, experiment.build_model(params, build_feature_map(params), None))
        return 0
    console = logging.StreamHandler(sys.stdout)
    # FuxiCTR logs through the root logger; its lines go to run.log, the console shows ours and any warning
    console.addFilter(lambda line: line.name == "model_zoo" or line.levelno >= logging.WARNING)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[console], force=True)
    experiment.run(config, params, root, config_dir, resume)
    return 0


def _configured(root: str, config_dir: str, options: argparse.Namespace) -> Config:
    """The experiment's config, as the options change it."""
    from model_zoo.experiment.config import load_config

    config = load_config(config_dir, options.expid, options.set, os.path.join(root, "config"))
    config.set("model_id", config.expid, "--expid")
    if options.seed is not None:
        config.set("seed", options.seed, "--seed")
    return config
