"""The layout, the import rules of DESIGN and what an installation brings."""

import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

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


@pytest.mark.core
def test_a_built_wheel_holds_both_packages_their_type_marks_presets_and_page_and_nothing_else(tmp_path):
    code = (
        "from setuptools import setup; import sys; sys.argv = "
        f"['setup.py', '-q', 'egg_info', '-e', {str(tmp_path)!r}, 'build', '-b', {str(tmp_path / 'b')!r}]; "
        "exec(compile(open('setup.py').read(), 'setup.py', 'exec'), {'__file__': 'setup.py', '__name__': '__main__'})"
    )
    pytest.importorskip("setuptools", reason="setuptools is not installed")
    run(code, cwd=ROOT)
    built = {
        p.relative_to(tmp_path / "b/lib").as_posix() for p in (tmp_path / "b/lib").rglob("*") if p.is_file()
    }
    expected = {p.relative_to(ROOT).as_posix() for p in (ROOT / "difftrain").rglob("*.py")}
    expected |= {p.relative_to(ROOT).as_posix() for p in (ROOT / "difftrain/config/presets").glob("*.toml")}
    expected |= {f"difftrain/reporting/page/page.{kind}" for kind in ("html", "css", "js")}
    expected |= {p.relative_to(ROOT / "kernels").as_posix() for p in (ROOT / "kernels").rglob("*.py")}
    expected |= {"difftrain/py.typed", "difftrain_kernels/py.typed"}
    assert "difftrain_kernels/triton_kernels/__init__.py" in expected
    assert built == expected
