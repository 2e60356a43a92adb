"""Lay out difftrain_kernels as Hugging Face's ``kernels`` package loads kernels.

    python -m difftrain.hf_kernel FOLDER

``kernels.get_local_kernel(Path(FOLDER))`` then imports the losses from there, with nothing to
compile: the package is Python, Triton and relative imports. One variant per backend, as
``kernels`` wants them since 0.11; all hold the same files.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import shutil
from pathlib import Path

from difftrain import __version__
from difftrain.config.paths import expand_path
from difftrain.errors import UserError

# Where there is neither CUDA nor ROCm, the losses run in plain PyTorch.
BACKENDS = ("cpu", "cuda", "rocm", "metal", "xpu")


def export_kernel(folder: Path) -> list[Path]:
    """Write ``folder/build/torch-BACKEND`` for each backend; returns these folders.

    What an earlier export left in them is replaced. The metadata's id holds a digest of the
    files, so that two versions can be loaded side by side.
    """
    source = Path(importlib.util.find_spec("difftrain_kernels").origin).parent
    files = sorted(source.rglob("*.py"))
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:10]
    variants = []
    for backend in BACKENDS:
        variant = Path(folder) / "build" / f"torch-{backend}"
        shutil.rmtree(variant, ignore_errors=True)
        shutil.copytree(source, variant, ignore=shutil.ignore_patterns("__pycache__"))
        metadata = {
            "name": "difftrain-kernels",
            "id": f"_difftrain_kernels_{backend}_{digest}",
            "version": int(__version__.split(".")[0]),
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
        variants.append(variant)
    return variants


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where build/ is written")
    try:
        folder = Path(expand_path(str(parser.parse_args().folder)))
    except UserError as error:
        parser.error(str(error))
    for variant in export_kernel(folder):
        print(variant)


if __name__ == "__main__":
    main()
