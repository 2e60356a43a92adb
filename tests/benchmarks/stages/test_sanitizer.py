"""The sanitizer's reports are read, and what it is started on is checked."""

from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from comparison import contenders
from stages import sanitizer, small_launches
from waiting import PATIENCE

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, about inf and NaN

CLEAN = "========= COMPUTE-SANITIZER\n60 results checked, 0 wrong\n========= ERROR SUMMARY: 0 errors\n"
BROKEN = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 2 bytes
=========     at _loss_and_gradient_kernel+0x2a30
60 results checked, 0 wrong
========= ERROR SUMMARY: 2 errors
"""
NO_HAZARD = (
    "60 results checked, 0 wrong\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
)
HAZARD = "========= Warning: Race reported\n========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)\n"


@pytest.mark.parametrize(
    ("text", "errors"),
    [(CLEAN, 0), (BROKEN, 2), (NO_HAZARD, 0), (HAZARD, 1), ("Killed\n", None), ("", None)],
)
def test_a_sanitizers_report_is_read(text, errors):
    assert sanitizer.read_report(text)[0] == errors


def fake_sanitizer(folder, text):
    """A program that takes the sanitizer's arguments and prints what it would."""
    path = folder / "compute-sanitizer"
    path.write_text(f"#!/bin/sh\necho \"$@\" > '{folder}/arguments'\necho $PYTORCH_NO_CUDA_MEMORY_CACHING >> '{folder}/arguments'\ncat <<'END'\n{text}END\n")  # fmt: skip
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("text", "ok", "summary"),
    [
        (CLEAN, True, "0 errors, 60 results checked, 0 wrong"),
        (BROKEN, False, "2 errors, 60 results checked, 0 wrong"),
        (CLEAN.replace("0 wrong", "1 wrong"), False, "0 errors, 60 results checked, 1 wrong"),
        (CLEAN.replace("60 results", "0 results"), False, "0 errors, 0 results checked, 0 wrong"),
        ("========= ERROR SUMMARY: 0 errors\n", False, "0 errors, the program did not finish"),
        ("no GPU\n", False, "no summary, the program did not finish"),
    ],
)
def test_a_tool_is_ok_only_where_it_found_nothing_and_results_were_right(tmp_path, text, ok, summary):
    path = fake_sanitizer(tmp_path, text)
    found = sanitizer.run_tool(str(path), "memcheck", PATIENCE, ["program"])
    assert (found["ok"], found["summary"]) == (ok, summary)
    assert (found["report"] == []) == ok
    arguments, caching = (tmp_path / "arguments").read_text().splitlines()
    assert arguments == "--tool memcheck --print-limit 20 program"
    assert caching == "1"


def test_the_sanitizer_is_found_on_path_or_in_a_toolkit_or_said_to_be_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(sanitizer.glob, "glob", lambda *args, **options: [])
    assert sanitizer.run_sanitizer(5.0) == {
        "ok": False, "summary": "compute-sanitizer is not installed", "tools": {},
    }  # fmt: skip
    (tmp_path / "cuda" / "bin").mkdir(parents=True)
    path = fake_sanitizer(tmp_path / "cuda" / "bin", CLEAN)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert sanitizer.find_sanitizer() == str(path)
    monkeypatch.setenv("PATH", f"{path.parent}:/bin:/usr/bin")
    found = sanitizer.run_sanitizer(PATIENCE)
    assert found["ok"]
    assert list(found["tools"]) == ["memcheck", "racecheck"]


def test_what_the_sanitizer_is_given_starts(tmp_path):
    path = tmp_path / "compute-sanitizer"
    path.write_text('#!/bin/sh\nshift 4\nexec "$@"\n')  # the program by itself
    path.chmod(0o755)
    found = sanitizer.run_tool(str(path), "memcheck", 600.0)
    said = "results checked" if torch.cuda.is_available() else "and torch finds none"
    assert said in "\n".join(found["report"])


def test_small_launches_are_checked_and_a_wrong_one_is_named(monkeypatch, device):
    impl = "auto" if device.type == "cuda" else "triton"
    for name in ("fused_diffusion_loss", "fused_linear_diffusion_loss"):
        whole = getattr(contenders, name)
        monkeypatch.setattr(contenders, name, partial(whole, impl=impl))
    lines = small_launches.check(device, [66], [torch.bfloat16], impl)
    assert len(lines) == 13
    assert all(line.endswith(":") for line in lines), lines
    assert sum("stated wrongly" in line for line in lines) == 2
    right = small_launches._with_cases
    monkeypatch.setattr(small_launches, "_with_cases", lambda *args: right(*args) * 1.01)
    monkeypatch.setattr(small_launches, "CONTENDERS", ())
    lines = small_launches.check(device, [66], [torch.bfloat16], impl)
    (wrong,) = (line for line in lines if not line.endswith(":"))
    assert wrong.startswith("logits V=66 torch.bfloat16 with the case table: wrong: loss off by")
