"""The paper's figures, each one command and one picture, with its numbers as json and csv beside it.

``python benchmark/figures.py hopping|hopping-strength|utility|dispatch|scaling|alpha``; ``--help`` behind one of them tells
its options. They work on any data set of ``dataset_config`` and any run of ``run_expid.py``.
"""

from __future__ import annotations

import argparse
import logging
import os

import figures_alpha
import figures_dispatch
import figures_hopping
import figures_scaling
import figures_strength
import figures_utility
from machine import ROOT

from model_zoo.errors import answered

OUT = os.path.join(ROOT, "benchmark", "results", "figures")
CONFIG_HELP = "folder with dataset_config and model_config (default: config/)"
FIGURES = {
    "hopping": (figures_hopping, "self-similarity of histories, with session borders (Fig. 2, 8)"),
    "hopping-strength": (figures_strength, "AUC, gain and themes found against hopping strength, on synthetic data"),
    "utility": (figures_utility, "AUC and gAUC against operations (Fig. 4)"),
    "dispatch": (figures_dispatch, "experts of the most and the least popular item (Fig. 5, 9)"),
    "scaling": (figures_scaling, "AUC and gAUC against length and number of experts (Fig. 6)"),
    "alpha": (figures_alpha, "AUC and gAUC over the triangle of fusion weights (Fig. 7)"),
}


def parser() -> argparse.ArgumentParser:
    """The options."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    figures = top.add_subparsers(dest="figure", required=True, metavar="FIGURE")
    for name, (module, about) in FIGURES.items():
        one = figures.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}. {module.__doc__}",
                                 formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
        module.options(one)
        one.add_argument("--out", default=OUT, metavar="DIR", help="for the files (default: benchmark/results/figures)")
        one.add_argument("--config", metavar="DIR", help=getattr(module, "CONFIG_HELP", CONFIG_HELP))
    return top


@answered
def main(argv: list[str] | None = None) -> int:
    """Make one figure; returns the exit code: 0, or 2 for a user's error."""
    chosen = parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    FIGURES[chosen.figure][0].command(chosen)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
