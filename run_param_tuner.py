"""Run a grid: ``python run_param_tuner.py --config benchmark/grids/TWIN_KuaiVideo_x2_100.yaml --gpu 0 1``."""

import os
import sys

from model_zoo.experiment.tuner_cli import main

if __name__ == "__main__":
    sys.exit(main(os.path.dirname(os.path.abspath(__file__))))
