"""Packaging of difftrain: two import packages from one repository.

The folder ``kernels/`` is a source root, not a package: the import name ``kernels`` belongs to
another distribution.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
PLOT = ["matplotlib>=3.7"]
# ruff formats the signatures in the API page.
DOCS = ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.26", "ruff>=0.9"]
COMPLETION = ["shtab>=1.7"]
TEST = [
    *PLOT,
    *COMPLETION,
    "pytest>=8",
    "pytest-xdist>=3.5",
    "hypothesis>=6.100",
    "ruff>=0.9",
    "mypy>=1.15",
]

setup(
    name="difftrain",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "difftrain/__init__.py").read_text())[1],
    description="A fused loss and a small trainer for masked-diffusion language models",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["difftrain", "difftrain.*"]) + find_packages("kernels"),
    package_dir={"difftrain_kernels": "kernels/difftrain_kernels"},
    package_data={
        "difftrain": ["py.typed"],
        "difftrain.config": ["presets/*.toml"],
        "difftrain.reporting.page": ["page.*"],
        "difftrain_kernels": ["py.typed"],
    },
    entry_points={"console_scripts": ["difftrain = difftrain.cli:main"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "numpy>=1.26",
        "safetensors>=0.4",
        "tqdm>=4.60",
        "tomli>=2.0; python_version < '3.11'",
    ],
    extras_require={
        "plot": PLOT,
        "completion": COMPLETION,
        "tb": ["tensorboard>=2.14"],
        "wandb": ["wandb>=0.16"],
        "pandas": ["pandas>=2.0"],
        "tok": ["tokenizers>=0.20", "tiktoken>=0.7"],
        "data": ["pyarrow>=15", "zstandard>=0.22"],
        "hf": ["transformers>=5.0", "accelerate>=1.0"],
        "bench": [*PLOT, "liger-kernel>=0.5; platform_system == 'Linux'"],
        "examples": ["transformers>=5.0", "accelerate>=1.0", "kernels>=0.17"],
        "docs": DOCS,
        "test": TEST,
        "dev": [*TEST, "pre-commit>=3.5"],
    },
)
