"""The command line of ``data/validate.py``: a data set, described as for ``run_expid.py``, checked from end to end."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from typing import Any

from model_zoo.errors import ConfigError, answered

REQUIRED = ("train_data", "valid_data", "user_info", "item_info", "feature_cols", "label_col")


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(
        prog="data/validate.py",
        description="Check a data set and print every finding, with file, column, row and count.",
        epilog="Exit code: 0 all is well, 1 warnings but no errors, 2 errors. Histories that exceed half "
        "of --memory-mib are put into a temporary file meanwhile (TMPDIR says where).",
    )
    options.add_argument("dataset_id", metavar="DATASET_ID", help="name in dataset_config")
    options.add_argument("--config", metavar="DIR", help="folder with dataset_config (default: config/)")
    options.add_argument("--expid", help="check for this experiment: its group_id, metrics and feature_specs")
    options.add_argument("--time", metavar="COLUMN", help="column of train, valid and test that says when a row was")
    options.add_argument("--memory-mib", type=int, default=1024, help="memory for rows and events (default: %(default)s)")
    return options


@answered
def main(root: str, arguments: Sequence[str] | None = None) -> int:
    """Check; returns the exit code."""
    options = parser().parse_args(arguments)
    started = time.perf_counter()
    from model_zoo.experiment.paths import resolve_paths
    from model_zoo.pipeline.feature_map import build_feature_map
    from model_zoo.pipeline.validation import validate_dataset

    params = _params(root, options)
    resolve_paths(params, root)
    feature_map = build_feature_map(params)
    limit = max(options.memory_mib, 1) * 2**20
    report = validate_dataset(feature_map, params, params.get("metrics"), options.time, limit)
    print(f"{options.dataset_id}: {os.path.dirname(params['train_data'])}")
    print(*report.lines(), sep="\n")
    print(f"{time.perf_counter() - started:.1f} seconds")
    return report.exit_code


def _params(root: str, options: argparse.Namespace) -> dict[str, Any]:
    """The data set's entry, or the whole experiment's config."""
    from model_zoo.experiment.config import dataset_section, load_config

    own = os.path.join(root, "config")
    config_dir = options.config or own
    if options.expid:
        from model_zoo.experiment.schema import validate

        config = load_config(config_dir, options.expid, [f"dataset_id={options.dataset_id}"], own)
        config.set("model_id", config.expid, "--expid")
        return validate(config)
    section = dataset_section(options.dataset_id, config_dir, own, "DATASET_ID")
    missing = [key for key in REQUIRED if key not in section.values]
    if missing:
        where = f"{section.path}:{section.line}"
        raise ConfigError(f"{where}: {options.dataset_id} has no {', '.join(missing)}; see data/README.md")
    return {**section.values, "dataset_id": options.dataset_id}
