"""The command line of ``run_expid.py``; heavy imports wait until an experiment is known to be sound."""

from __future__ import annotations

import argparse
import logging
import os
import sys

from model_zoo.errors import UserError

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
    options.add_argument("--dry-run", action="store_true", help="show merged config, sizes and parameters; no training")
    return options


def main(root: str, arguments: list[str] | None = None) -> int:
    """Run; returns the exit code: 0, 2 for a user's error (one line on stderr), 130 when interrupted."""
    options = parser().parse_args(arguments)
    try:
        return _main(root, options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _main(root: str, options: argparse.Namespace) -> int:
    from model_zoo.experiment.config import load_config

    for path in options.load:
        from model_zoo.experiment.plugins import load_plugin

        load_plugin(path)
    own_config = os.path.join(root, "config")
    config_dir = options.config or own_config
    config = load_config(config_dir, options.expid, options.set, own_config)
    config.set("model_id", config.expid, "--expid")
    config.set("gpu", options.gpu, "--gpu")
    if options.seed is not None:
        config.set("seed", options.seed, "--seed")

    from model_zoo.experiment.schema import validate

    params = validate(config)

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
    experiment.run(config, params, root, config_dir)
    return 0
