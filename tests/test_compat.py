"""The file that knows FuxiCTR: no needless import of heavy packages, its own still whole afterwards, seeds."""

import importlib.util
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from model_zoo import compat

#: seconds; the imports take four or so on two busy cores
LIMIT = 120
#: what training and scoring do without, and what takes seconds to import
UNNEEDED = (
    "ray", "keras_preprocessing", "sklearn", "scipy", "pandas", "tensorflow", "keras", "tensorboard", "matplotlib", "wandb",
    "mlflow", "huggingface_hub", "numba",
)  # fmt: skip
#: modules that need numba, which a scan asks for where it can use it
NUMBAS = ("model_zoo.layers.scan_kernels", "model_zoo.layers.scan_compiled")
#: which of them FuxiCTR imports in modules that are needed: 2.3.9's Monitor lies beside pandas
FUXICTRS_OWN = ("pandas", "keras_preprocessing") if compat.FUXICTR_VERSION == "2.3.9" else ()


def python(code: str, *path: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))} if path else None
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_models_import_without_ray_and_fuxictrs_preprocessing_still_works_afterwards() -> None:
    out = python(
        "import sys\n"
        "import model_zoo.registry\n"
        "print('ray' in sys.modules, 'fuxictr' in sys.modules)\n"
        "from fuxictr.preprocess import FeatureProcessor\n"
        "from fuxictr.preprocess.tokenizer import Tokenizer\n"
        "import fuxictr, fuxictr.preprocess\n"
        "print(FeatureProcessor.__module__, fuxictr.preprocess.FeatureProcessor is FeatureProcessor)\n"
        "print(Tokenizer.__name__, fuxictr.preprocess.__name__, hasattr(fuxictr.preprocess, 'NoSuchThing'))\n"
    )
    assert out.splitlines() == [
        "False True",
        "fuxictr.preprocess.feature_processor True",
        "Tokenizer fuxictr.preprocess False",
    ]


def test_fuxictrs_metrics_work_when_they_are_used_and_are_not_loaded_before() -> None:
    out = python(
        "import sys\n"
        "import model_zoo.compat\n"
        "from fuxictr.metrics import evaluate_metrics\n"
        "from fuxictr.pytorch.models import rank_model\n"
        "print('sklearn' in sys.modules)\n"
        "print(rank_model.evaluate_metrics([0, 1, 1], [0.1, 0.9, 0.05], ['AUC']), 'sklearn' in sys.modules)\n"
        "import fuxictr.metrics\n"
        "from fuxictr.metrics import gAUC\n"
        "print(evaluate_metrics([0, 1], [0.1, 0.9], ['AUC']), fuxictr.metrics.evaluate_metrics.__module__)\n"
        "print(gAUC.__module__, fuxictr.metrics.__name__, hasattr(fuxictr.metrics, 'no_such_metric'))\n"
    )
    *first, second, third, fourth = out.splitlines()
    assert first[-1] == "False" and "'AUC', 0.5" in second.replace(": ", ", ") and second.endswith(" True")
    assert "'AUC', 1.0" in third.replace(": ", ", ") and third.endswith(" fuxictr.metrics")
    assert fourth == "fuxictr.metrics fuxictr.metrics False"


@pytest.fixture
def stand_ins(tmp_path: Path) -> Path:
    """A folder with an empty package in place of each of `UNNEEDED` that is not installed: an import of it succeeds."""
    for name in UNNEEDED:
        if importlib.util.find_spec(name) is None:
            (tmp_path / f"{name}.py").touch()
    return tmp_path


def test_importing_every_module_loads_nothing_that_is_not_needed(root: Path, stand_ins: Path) -> None:
    out = python(
        "import importlib, pkgutil, sys\n"
        "import model_zoo\n"
        "names = [found.name for found in pkgutil.walk_packages(model_zoo.__path__, 'model_zoo.')]\n"
        f"assert set({NUMBAS}) < set(names)\n"
        f"for name in names: name in {NUMBAS} or importlib.import_module(name)\n"
        "model_zoo.MoS_TWIN\n"
        f"print(len(names) > 80, [name for name in {UNNEEDED} if name in sys.modules and name not in {FUXICTRS_OWN}])\n",
        root,
        stand_ins,
    )
    assert out == "True []"


def test_importing_the_package_alone_loads_neither_torch_nor_fuxictr() -> None:
    assert python("import sys, model_zoo; print('torch' in sys.modules, 'fuxictr' in sys.modules)") == "False False"


def test_help_loads_no_library_that_takes_time(root: Path) -> None:
    heavy = ("torch", "fuxictr", "numpy", "polars", "pyarrow", "pydantic", *UNNEEDED)
    out = python(
        "import runpy, sys\n"
        f"sys.argv = [{str(root / 'run_expid.py')!r}, '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        f"finally: print([name for name in {heavy} if name in sys.modules])\n"
    )
    assert "usage: run_expid.py" in out and out.endswith("\n[]")


def test_a_preprocessing_package_imported_before_is_left_alone() -> None:
    out = python(
        "import fuxictr.preprocess as before\n"
        "import model_zoo.compat, sys\n"
        "print(sys.modules['fuxictr.preprocess'] is before, hasattr(before, 'FeatureProcessor'))\n"
    )
    assert out == "True True"


def test_star_imports_of_fuxictrs_preprocessing_work() -> None:
    assert python("import model_zoo.compat\nfrom fuxictr.preprocess import *\nprint(FeatureProcessor.__name__)") == (
        "FeatureProcessor"
    )


def test_the_installed_fuxictr_is_named() -> None:
    assert compat.FUXICTR_VERSION.startswith("2.3.")
    for name in compat.__all__:
        assert getattr(compat, name) is not None


def test_seed_everything_fixes_torch_numpy_and_random() -> None:
    def draws() -> tuple[float, float, float]:
        return float(torch.rand(())), float(np.random.rand()), random.random()  # noqa: NPY002

    seen = []
    for seed in (5, 5, 6):
        compat.seed_everything(seed)
        seen.append(draws())
    assert seen[0] == seen[1]
    assert all(a != b for a, b in zip(seen[0], seen[2], strict=True))


@pytest.mark.parametrize(
    "value, wanted",
    [(0.1, [(2, 0.1)]), ("l1(0.2)", [(1, 0.2)]), ("l1_l2(1e-3,2e-3)", [(1, 1e-3), (2, 2e-3)]), (None, [])],
)
def test_fuxictrs_regulariser_notation(value: object, wanted: list[tuple[int, float]]) -> None:
    assert compat.get_regularizer(value) == wanted
