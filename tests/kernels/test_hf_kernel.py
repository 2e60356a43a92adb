"""The losses as a kernel of Hugging Face's ``kernels`` package, loaded from a local folder."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from difftrain.hf_kernel import BACKENDS, export_kernel

ROOT = Path(__file__).parent.parent.parent

LOAD = """
import importlib.util, sys
from pathlib import Path
import torch
from kernels import get_local_kernel, get_loaded_kernels
import difftrain_kernels

loaded = get_local_kernel(Path(sys.argv[1]))
assert loaded.__file__.startswith(sys.argv[1]), loaded.__file__
assert loaded.fused_diffusion_loss is not difftrain_kernels.fused_diffusion_loss
(about,) = get_loaded_kernels()
assert str(about.metadata.name) == "difftrain-kernels" and about.metadata.license == "Apache-2.0"
assert sorted(loaded.__all__) == sorted(difftrain_kernels.__all__)
if importlib.util.find_spec("triton"):
    kernels = importlib.import_module(loaded.__name__ + ".triton_kernels")
    assert kernels.__file__.startswith(sys.argv[1]), kernels.__file__

generator = torch.Generator().manual_seed(0)
hidden = torch.randn(40, 8, generator=generator, dtype=torch.float64)
head = torch.randn(11, 8, generator=generator, dtype=torch.float64)
y = torch.randint(0, 11, (40,), generator=generator)
x = torch.where(torch.arange(40) % 2 == 0, 10, y)
gradients = []
for package in (loaded, difftrain_kernels):
    for loss_of, arguments in (
        (package.fused_diffusion_loss, lambda w: (hidden @ w.t(),)),
        (package.fused_linear_diffusion_loss, lambda w: (hidden, w)),
    ):
        weight = head.clone().requires_grad_()
        loss, cases = loss_of(*arguments(weight), y, x, 10, 0.25, 0.5, return_cases=True)
        loss.backward()
        assert isinstance(cases, package.CaseTable)
        gradients.append((loss.detach(), weight.grad))
for found, expected in zip(gradients[:2], gradients[2:]):
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
print("loaded", loaded.__name__)
"""


def test_every_variant_holds_the_package_and_its_metadata(tmp_path):
    stale = tmp_path / "build" / "torch-cpu" / "stale.py"
    stale.parent.mkdir(parents=True)
    stale.touch()
    variants = export_kernel(tmp_path)
    assert [variant.name for variant in variants] == [f"torch-{backend}" for backend in BACKENDS]
    source = files_in(ROOT / "kernels/difftrain_kernels")
    assert "triton_kernels/loss.py" in source
    ids = set()
    for backend, variant in zip(BACKENDS, variants, strict=True):
        found = files_in(variant)
        about = json.loads(found.pop("metadata.json"))
        assert found == source
        assert about["backend"] == {"type": backend}
        assert about["id"].isidentifier(), "it becomes the module's name"
        ids.add(about["id"])
    assert len(ids) == len(BACKENDS)


def files_in(folder):
    """Contents by path below the folder."""
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {name: p.read_bytes() for name, p in files.items() if "__pycache__" not in name}


def test_the_kernels_package_loads_it_beside_the_installed_one(tmp_path):
    if not list(metadata.distributions(name="kernels")):
        pytest.skip("needs Hugging Face's package kernels")
    subprocess.run(
        [sys.executable, "-m", "difftrain.hf_kernel", str(tmp_path)],
        check=True, env=environment(), stdout=subprocess.DEVNULL,
    )  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path)], capture_output=True, text=True, env=environment()
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("loaded _difftrain_kernels_")


COPIES = """
import importlib.util, os, sys
import torch

def load(name, folder):
    spec = importlib.util.spec_from_file_location(name, folder + "/__init__.py", submodule_search_locations=[folder])
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]

copies = [
    __import__("difftrain_kernels") if folder == "installed" else load(f"_copy_{i}", folder)
    for i, folder in enumerate(sys.argv[1:])
]
hidden, head = torch.randn(12, 8), torch.randn(11, 8)
y = torch.randint(0, 11, (12,))
pk, pm = torch.tensor(0.25), torch.tensor(0.5)
for package in copies:
    for loss_of, arguments in (
        (package.fused_diffusion_loss, lambda w: (hidden @ w.t(),)),
        (package.fused_linear_diffusion_loss, lambda w: (hidden, w)),
    ):
        gradients = []
        for call in (loss_of, torch.compile(loss_of, fullgraph=True, backend="aot_eager")):
            weight = head.clone().requires_grad_()
            call(*arguments(weight), y, y, 10, pk, pm).backward()
            gradients.append(weight.grad)
        torch.testing.assert_close(*gradients)
    if importlib.util.find_spec("triton"):
        kernels = importlib.import_module(package.__name__ + ".triton_kernels")
        assert os.path.dirname(kernels.__file__) == os.path.join(os.path.dirname(package.__file__), "triton_kernels")
        if kernels.is_interpreted():
            losses = [
                package.fused_diffusion_loss(hidden @ head.t(), y, y, 10, 0.25, 0.5, impl=impl)
                for impl in ("triton", "reference")
            ]
            torch.testing.assert_close(*losses)
print("compiled")
"""


@pytest.mark.parametrize(
    "order",
    [
        pytest.param(("copy", "installed", "other"), id="one before and one after"),
        pytest.param(("installed", "copy"), marks=pytest.mark.slow, id="after the installed one"),
        pytest.param(("copy", "other"), marks=pytest.mark.slow, id="without the installed one"),
    ],
)
def test_every_copy_of_the_package_has_its_own_operators_and_kernels(tmp_path, order):
    variants = export_kernel(tmp_path)
    folders = {"installed": "installed", "copy": str(variants[0]), "other": str(variants[1])}
    run = subprocess.run(
        [sys.executable, "-c", COPIES, *(folders[name] for name in order)],
        capture_output=True, text=True, env=environment(),
    )  # fmt: skip
    assert run.stdout == "compiled\n", run.stderr


def environment():
    """Our folders on the path, no network, and Triton as it was asked for."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
