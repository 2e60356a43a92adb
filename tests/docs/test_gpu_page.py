"""docs/gpu.md: its commands parse, and its list of lines for CUDA alone names every file that has some."""

import re

import pytest
import torch

pytest.importorskip("triton")

import bench_loss
import gpu_session
import predict
import report
from pages import ROOT, blocks_of

PAGE = (ROOT / "docs/gpu.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split("#")[0].split()
    for block in blocks_of("docs/gpu.md", PAGE)
    for line in block.code.splitlines()
    if line.startswith("python benchmarks/")
]
COMMANDS += [words.split() for words in re.findall(r"`(python benchmarks/[^`]+)`", PAGE)]
CUDA = re.compile(
    r'torch\.cuda\.|_cuda_|\.is_cuda|"nccl"|GradScaler|fused=True|non_blocking|out_dtype=|torch\.autocast\((?!"cpu")'
    r'|device\.type [!=]= "cuda"|device\.type != "cpu"|device\.type not in \("cpu", "cuda"\)'
)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_of_the_page_takes_its_options(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    program, *arguments = words[1:]
    if program.endswith("report.py"):
        assert report.main(arguments) in (0, 1)
    elif program.endswith(("bench_rows.py", "bench_codegen.py")):  # they turn Triton's interpreter off
        assert (ROOT / program).exists()
        assert not arguments
    elif program.endswith("predict.py"):
        assert predict.main(arguments) == 0
    else:
        {"bench_loss.py": bench_loss, "gpu_session.py": gpu_session}[program.split("/")[1]].parse(arguments)


def test_the_check_takes_three_commands_that_share_a_file():
    part = PAGE.split("## In ten minutes")[1].split("\n## ")[0]
    commands = [line for line in part.splitlines() if line.startswith("python ")]
    assert len(commands) == 3
    assert all("check.json" in line for line in commands)
    budgets = [gpu_session.STEPS[name].minutes for name in ("environment", "kernels")]
    assert f"at most {sum(budgets):g} minutes" in part


def test_every_file_with_lines_for_cuda_is_on_the_list():
    part = PAGE.split("## Lines that no CPU runs")[1].split("\n## ")[0]
    files = {
        path.relative_to(ROOT).as_posix()
        for folder in ("kernels", "difftrain")
        for path in (ROOT / folder).rglob("*.py")
        if CUDA.search(path.read_text(encoding="utf-8"))
        and "exchange" not in path.parts  # files of others, read on the CPU
    }
    assert len(files) > 4
    assert {file for file in files if f"`{file}`" not in part} == set()
