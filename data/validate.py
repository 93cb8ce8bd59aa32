"""Check a data set and print every finding: ``validate.py DATASET_ID [--config DIR] [--expid EXPID] [--time COLUMN]``."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# FuxiCTR installs a folder named model_zoo without an __init__.py; it is found, but has no origin.
spec = importlib.util.find_spec("model_zoo")
if spec is None or spec.origin is None:
    sys.path.insert(0, str(ROOT))

from model_zoo.experiment.validate_data import main  # noqa: E402

if __name__ == "__main__":
    raise SystemExit(main(str(ROOT)))
