"""Run one experiment: ``python run_expid.py --expid MoS_TWIN_microvideo --gpu 0``."""

import os
import sys

from model_zoo.experiment.cli import main

if __name__ == "__main__":
    sys.exit(main(os.path.dirname(os.path.abspath(__file__))))
