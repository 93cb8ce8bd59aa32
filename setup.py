from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="longctr-mos",
    version="0.1.0",
    description="Long-sequence CTR prediction with mixtures of experts (MoS), a FuxiCTR / LongCTR benchmark extension",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["model_zoo", "model_zoo.*"]),
    # FuxiCTR's wheel also puts a folder `model_zoo`, without __init__, into site-packages. An editable install must
    # therefore put this folder on sys.path (where a real package wins over such a folder) and not use an import hook
    # (which would come too late); a package_dir of "" makes setuptools do so.
    package_dir={"": "."},
    install_requires=[
        "fuxictr>=2.3.9,<2.4",
        "torch>=2.8",
        "numpy>=1.26",
        "polars>=1.12",
        "pyarrow>=15",
        "h5py>=3.8",
        "scikit-learn>=1.3",
        "pydantic>=2.5",
        "pyyaml>=6.0.1",
        "tqdm>=4.60",
    ],
    extras_require={
        "mamba": ["mamba-ssm>=2.2"],
        "numba": ["numba>=0.61"],
        "tensorboard": ["tensorboard>=2.14"],
        "plots": ["matplotlib>=3.7"],
        "ray": ["ray[tune]>=2.9"],
        "optuna": ["optuna>=3.6"],
        "hub": ["huggingface_hub>=0.23"],
        "dev": [
            "pytest>=8", "hypothesis>=6.100", "ruff>=0.6", "mypy>=1.11", "types-PyYAML", "types-tqdm",
            "matplotlib>=3.7", "optuna>=3.6", "tensorboard>=2.14", "numba>=0.61",
        ],
    },
)
