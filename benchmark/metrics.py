"""Time the metrics on synthetic predictions, beside FuxiCTR's where it is installed.

python benchmark/metrics.py --rows 1000000 --groups 11000
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from model_zoo.pipeline.metrics import evaluate_metrics

METRICS = ["gAUC", "AUC", "logloss"]
Rows = tuple[np.ndarray, np.ndarray, np.ndarray]


def timed(evaluate: Callable[..., dict[str, float]], rows: Rows, repeats: int) -> tuple[float, dict[str, float]]:
    """Median seconds of ``repeats`` calls on (labels, predictions, groups), each ``[N]``, and the last call's values."""
    label, prediction, group = rows
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        values = evaluate(label, prediction, METRICS, group)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--groups", type=int, default=11_000)
    parser.add_argument("--repeats", type=int, default=7, help="calls of ours")
    parser.add_argument("--fuxictr-repeats", type=int, default=3, help="calls of FuxiCTR's; 0 leaves it out")
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    group = rng.integers(0, args.groups, args.rows)
    # Three decimals make ties as common as in the output of a saturated model.
    tied = rng.beta(2, 5, args.rows).round(3).astype(np.float32)
    cases = {
        "float32": rng.beta(2, 5, args.rows).astype(np.float32),
        "float32, tied": tied,
        "float64": rng.beta(2, 5, args.rows),
    }
    label = (rng.random(args.rows) < tied).astype(np.float32)

    try:
        from fuxictr.metrics import evaluate_metrics as theirs
    except ImportError:
        args.fuxictr_repeats = 0
    print(f"{', '.join(METRICS)} of {args.rows:,} rows in {args.groups:,} groups, median seconds")
    for name, prediction in cases.items():
        ours = timed(evaluate_metrics, (label, prediction, group), args.repeats)[0]
        line = f"{name:14} ours {ours:7.3f}"
        if args.fuxictr_repeats:
            # FuxiCTR hands its metrics float64, which also sets where its logloss clips.
            wide = prediction.astype(np.float64)
            other, reference = timed(theirs, (label, wide, group), args.fuxictr_repeats)
            values = evaluate_metrics(label, wide, METRICS, group)
            worst = max(abs(values[metric] - reference[metric]) for metric in METRICS)
            line += f"   FuxiCTR {other:7.3f}   ratio {other / ours:6.1f}   largest difference {worst:.1e}"
        print(line)


if __name__ == "__main__":
    main()
