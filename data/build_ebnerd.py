"""Write data/Ebnerd_demo, event times included: ``build_ebnerd.py --raw DIR --out data/Ebnerd_demo``."""

import importlib.util
import sys
from pathlib import Path

# FuxiCTR installs a folder named model_zoo without an __init__.py; it is found, but has no origin.
spec = importlib.util.find_spec("model_zoo")
if spec is None or spec.origin is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model_zoo.pipeline.ebnerd import main  # noqa: E402

if __name__ == "__main__":
    raise SystemExit(main())
