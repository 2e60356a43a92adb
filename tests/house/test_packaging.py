"""The layout, the import rules of DESIGN and what an installation brings."""

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import difftrain

ROOT = Path(__file__).parent.parent.parent
STDLIB = sys.stdlib_module_names


def test_kernels_is_a_folder_and_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def run(code, **options):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, **options
    )


@pytest.mark.core
def test_both_packages_import_and_both_losses_run_without_triton(tmp_path):
    code = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "kernels")!r}]
sys.modules["triton"] = None
import torch
import difftrain.training.loop, difftrain.sampling.texts
from difftrain_kernels import fused_diffusion_loss, fused_linear_diffusion_loss
generator = torch.Generator().manual_seed(0)
hidden, head = torch.randn(9, 4, generator=generator), torch.randn(5, 4, generator=generator)
y = torch.arange(9) % 5
x = torch.where(y % 2 == 0, 4, y)
losses = []
for loss_of in (
    lambda weight, **options: fused_diffusion_loss(hidden @ weight.t(), y, x, 4, 0.25, 0.5, **options),
    lambda weight, **options: fused_linear_diffusion_loss(hidden, weight, y, x, 4, 0.25, 0.5, **options),
):
    weight = head.clone().requires_grad_()
    loss = loss_of(weight)
    loss.backward()
    losses.append((loss.detach(), weight.grad))
    try:
        loss_of(weight, impl="triton")
    except ValueError as error:
        assert "needs the package triton, which is not installed" in str(error)
    else:
        raise SystemExit("impl='triton' ran without triton")
torch.testing.assert_close(*losses)
assert losses[0][1].any()
assert not any(name.split(".")[0] == "triton" for name, module in sys.modules.items() if module)
"""
    run(code, cwd=tmp_path)


HUGGING_FACE = """
import kernels, transformers, accelerate
import difftrain, difftrain_kernels
import torch
from transformers import BertConfig, BertForMaskedLM
assert callable(kernels.get_kernel), kernels
assert "site-packages" in kernels.__file__, kernels.__file__
config = BertConfig(vocab_size=5, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
y = torch.tensor([[0, 1, 2]])
logits = BertForMaskedLM(config)(input_ids=torch.full_like(y, 4)).logits
assert difftrain.fused_diffusion_loss(logits, y, torch.full_like(y, 4), 4, 1.0, 1.0).isfinite()
print(difftrain_kernels.__file__)
"""


def test_hugging_face_packages_import_beside_ours_from_the_repository_root():
    for name in ("kernels", "transformers", "accelerate"):
        # Not importorskip: what is imported under the name is the question.
        if not list(metadata.distributions(name=name)):
            pytest.skip(f"needs Hugging Face's {name}")
    path = os.pathsep.join([str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, "-c", HUGGING_FACE],
        check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


@pytest.mark.slow
def test_hugging_face_packages_install_beside_ours_in_a_fresh_environment(tmp_path):
    """Theirs first, then ours, as files: neither may overwrite the other's."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv/bin/python"
    (site,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    # torch and what else is installed here is taken as it is.
    (site / "outer.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    theirs = subprocess.run([*pip, "kernels", "transformers", "accelerate"], capture_output=True, text=True)
    if theirs.returncode:
        pytest.skip(f"the package index gave no kernels and transformers: {theirs.stderr.splitlines()[-1]}")
    files = {p: p.stat().st_mtime_ns for p in site.rglob("*") if p.is_file() and p.suffix != ".pyc"}
    copy = tmp_path / "source"  # setuptools leaves build/ and egg-info where it builds
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__", "runs"))
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", str(copy)], check=True)
    assert {p: p.stat().st_mtime_ns for p in files if p.exists()} == files
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    for folder in (tmp_path, ROOT):
        done = subprocess.run(
            [str(python), "-c", HUGGING_FACE],
            check=True, cwd=folder, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.stdout.strip().startswith(str(site)), "not the installed package"


# What is built, and what an installation brings --------------------------------------------------------

BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(sys.argv[2]))
"""
LEFT_OUT = (
    ".git",
    ".venv",
    ".*_cache",
    ".hypothesis",
    "__pycache__",
    "build",
    "dist",
    "site",
    "runs",
    "*.egg-info",
)


def build(kind, source, out):
    """The file that the build system makes of a source, as ``python -m build --no-isolation`` does."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BUILD, f"build_{kind}", str(out)],
        cwd=source, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist of this checkout, what it unpacks to, and the wheel that is made of that."""
    setuptools = pytest.importorskip("setuptools", reason="setuptools is not installed")
    if int(setuptools.__version__.split(".")[0]) < 71:  # torch brings a newer one
        pytest.skip("setuptools before 71 makes wheels with another package")
    folder = tmp_path_factory.mktemp("built")
    copy = shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*LEFT_OUT))
    sdist = build("sdist", copy, folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return sdist, unpacked, build("wheel", unpacked, folder)


def package_files():
    """All that an installation holds of ours, by where it lies in site-packages."""
    files = {p.relative_to(ROOT).as_posix() for p in (ROOT / "difftrain").rglob("*.py")}
    files |= {p.relative_to(ROOT).as_posix() for p in (ROOT / "difftrain/config/presets").glob("*.toml")}
    files |= {f"difftrain/reporting/page/page.{kind}" for kind in ("html", "css", "js")}
    files |= {p.relative_to(ROOT / "kernels").as_posix() for p in (ROOT / "kernels").rglob("*.py")}
    assert "difftrain_kernels/triton_kernels/__init__.py" in files
    return files | {"difftrain/py.typed", "difftrain_kernels/py.typed"}


@pytest.mark.core
def test_a_built_wheel_holds_both_packages_their_type_marks_presets_and_page_and_nothing_else(built):
    *_, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        (entries,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "difftrain = difftrain.cli:main" in archive.read(entries).decode()
    assert held == package_files()


def test_the_sdist_holds_what_the_wheel_is_made_of_and_what_a_packager_reads(built):
    _, unpacked, _ = built
    held = {p.relative_to(unpacked).as_posix() for p in unpacked.rglob("*") if p.is_file()}
    files = {name if name.startswith("difftrain/") else f"kernels/{name}" for name in package_files()}
    assert files <= held
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"} <= held
    assert not [name for name in held if name.endswith((".pyc", ".log"))]


def test_one_version_stands_everywhere(built, capsys):
    from difftrain.cli import main

    sdist, _, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        told = email.message_from_bytes(archive.read(name))
    version = difftrain.__version__
    assert told["Version"] == version
    assert (sdist.name, wheel.name) == (
        f"difftrain-{version}.tar.gz",
        f"difftrain-{version}-py3-none-any.whl",
    )
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.split()[1] == version
    assert re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1] == version
    assert told["Requires-Python"] == ">=3.10"


def test_the_page_on_installing_has_every_extra_and_each_requirement_of_it(built):
    *_, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        told = email.message_from_bytes(archive.read(name))
    page = (ROOT / "docs/installing.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w-]+)` \|(.*)$", page, re.MULTILINE))
    assert set(rows) == set(told.get_all("Provides-Extra"))
    for line in told.get_all("Requires-Dist"):
        if extra := re.search(r"extra == [\"'](\w+)[\"']", line):
            package = re.match(r"[\w-]+", line)[0]
            assert f"`{package}`" in rows[extra[1]], f"{extra[1]} brings {package}"


INSTALLED = """
import importlib, pkgutil, sys
import difftrain, difftrain_kernels
from difftrain.config.sources import preset_names, resolve_config
assert "site-packages" in difftrain.__file__ and "site-packages" in difftrain_kernels.__file__
for package in (difftrain, difftrain_kernels):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__") and ("triton" in sys.argv or "triton_kernels" not in module.name):
            importlib.import_module(module.name)
assert [resolve_config(name, None, {}).out_dir for name in preset_names()]
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist", "source"])
def test_what_is_installed_in_a_fresh_environment_works_from_any_folder(built, tmp_path, kind):
    sdist, unpacked, wheel = built
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    (site,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    # torch, pip and what else is installed here is taken as it is; ours is not, since it is found by a .pth there.
    (site / "outer.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    bin = tmp_path / "venv/bin"
    pip = [str(bin / "python"), "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps"]
    what = {"wheel": wheel, "sdist": sdist, "source": unpacked}[kind]
    subprocess.run([*pip, "--no-build-isolation", "--force-reinstall", str(what)], check=True, cwd=tmp_path)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "text.txt").write_text("red green blue white black\n" * 100)

    def obey(*words):
        done = subprocess.run(
            [str(word) for word in words],
            cwd=tmp_path / "work",
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    has_triton = list(metadata.distributions(name="triton"))
    obey(bin / "python", "-c", INSTALLED, *(["triton"] if has_triton else []))
    assert obey(bin / "difftrain", "--version").split()[1] == difftrain.__version__
    small = "--n_layer 1 --n_head 1 --n_embd 8 --block_size 16 --batch_size 4 --eval_batch_size 2 --eval_iters 2"
    words = ["train", "demo", "--data", "text.txt", "--out_dir", "run", "--max_iters", 2, *small.split()]
    obey(bin / "difftrain", *words, "--device", "cpu")
    obey(bin / "difftrain", "report", "run")
    assert (tmp_path / "work/run/report.html").stat().st_size > 10_000
    assert obey(
        bin / "difftrain", "sample", "run", "--steps", 2, "--device", "cpu", "--prompt", "red"
    ).startswith("red")
