"""The file that knows FuxiCTR: no Ray at import, its own packages still whole afterwards, seeds."""

import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from model_zoo import compat

#: seconds; the imports take four or so on two busy cores
LIMIT = 120


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT)
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


def test_importing_the_package_alone_loads_neither_torch_nor_fuxictr() -> None:
    assert python("import sys, model_zoo; print('torch' in sys.modules, 'fuxictr' in sys.modules)") == "False False"


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
