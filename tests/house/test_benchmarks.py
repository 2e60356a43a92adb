"""The benchmarks' table of contents: commands on top, their parts in rooms, nothing that nobody calls."""

import ast
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
BENCHMARKS = ROOT / "benchmarks"
COMMANDS = {
    "bench_loss", "bench_cpu", "bench_cpu_linear", "bench_prepare", "bench_train", "bench_codegen", "bench_host",
    "bench_rows", "bench_sampling", "curriculum", "gpu_session", "predict", "report", "sweep_tiles",
}  # fmt: skip
# Each room, and the rooms whose modules it may import.
ROOMS = {
    "measuring": set(),
    "ptx": set(),
    "comparison": {"measuring"},
    "reporting": {"comparison", "measuring"},
    "stages": {"comparison", "measuring"},
    "training_step": set(),
    "text_quality": set(),
    "experiment": {"text_quality"},
}
OURS = {"difftrain", "difftrain_kernels"}
MODULES = {
    ".".join(path.relative_to(BENCHMARKS).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(BENCHMARKS.rglob("*.py"))
}


def syntax_of(module):
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imports_of(node):
    """Modules that one statement imports; of `from room import module` both."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def imported_by(module):
    return {name for node in ast.walk(syntax_of(module)) for name in imports_of(node)}


def started_by(module):
    """Modules whose name stands in the module as a text: programs of their own."""
    texts = {node.value for node in ast.walk(syntax_of(module)) if isinstance(node, ast.Constant)}
    return {name for name in MODULES.keys() - ROOMS.keys() if name in texts}


def reached_by(programs):
    """All modules that come into use, from the programs down."""
    found, left = set(), list(programs)
    while left:
        module = left.pop()
        if module in MODULES and module not in found:
            found.add(module)
            left += imported_by(module) | started_by(module)
    return found


def test_the_top_holds_the_commands_and_their_rooms_alone():
    found = {path.name for path in BENCHMARKS.iterdir()} - {"__pycache__"}
    assert found == {f"{name}.py" for name in COMMANDS} | ROOMS.keys() | {"NOTES.md", "results"}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_holds_modules_alone_and_says_what_they_are(room):
    assert {path.suffix for path in (BENCHMARKS / room).iterdir()} - {""} == {".py"}
    assert ast.get_docstring(syntax_of(room))


def test_every_module_is_imported_or_started_by_a_command():
    assert MODULES.keys() - ROOMS.keys() - reached_by(COMMANDS) == set()


@pytest.mark.parametrize("module", sorted(MODULES.keys() - COMMANDS))
def test_rooms_import_rooms_below_them_and_no_command(module):
    room = module.split(".")[0]
    tops = {name.split(".")[0] for name in imported_by(module)}
    assert tops & (ROOMS.keys() | COMMANDS) <= ROOMS[room] | {room}


def test_commands_and_rooms_have_names_that_nobody_else_uses():
    """They are top-level modules where a command runs, before everything that is installed."""
    others = set(sys.stdlib_module_names) | metadata.packages_distributions().keys()
    others |= {path.stem for path in (ROOT / "tests/support").iterdir()}
    assert (COMMANDS | ROOMS.keys()) & others == set()


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_a_commands_first_paragraph_says_how_long_it_takes_and_what_it_writes(command):
    paragraph = ast.get_docstring(syntax_of(command)).split("\n\n")[0]
    assert re.search(r"\bTakes .*(second|minute)", paragraph, re.S)
    assert re.search(r"\b[Ww]rites\b", paragraph)


def test_every_program_puts_the_checkout_on_the_path_before_it_imports_what_lies_in_it():
    programs = [*COMMANDS, *(name for module in MODULES for name in started_by(module))]
    assert len(programs) > len(COMMANDS), "small_launches is a program too"
    for program in programs:
        if not any(OURS & {n.split(".")[0] for n in imported_by(m)} for m in reached_by([program])):
            continue
        first = next(
            name for node in syntax_of(program).body for name in imports_of(node)
            if name.split(".")[0] in ROOMS.keys() | OURS
        )  # fmt: skip
        assert first == "measuring.checkout", program


def test_the_report_needs_no_torch():
    assert not any("torch" in imported_by(module) for module in reached_by(["report"]))


PROBE = """
import bench_loss
import difftrain_kernels

if __name__ == "__main__":
    print(difftrain_kernels.__file__)
    jobs = bench_loss.plan(bench_loss.parse(["--quick", "--only", "eager"]))[:1]
    list(bench_loss.run_jobs(bench_loss.work, jobs, job_seconds=600, seconds=600))
"""
WORK = """

def work(jobs, connection):
    import difftrain_kernels

    print(difftrain_kernels.__file__, flush=True)
"""


def test_a_command_and_its_workers_find_the_code_that_lies_beside_them(tmp_path):
    pytest.importorskip("triton")
    for name in ("benchmarks", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    worker = tmp_path / "benchmarks/comparison/worker.py"
    worker.write_text(worker.read_text(encoding="utf-8") + WORK, encoding="utf-8")
    probe = tmp_path / "benchmarks/probe.py"
    probe.write_text(PROBE, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(probe)], check=True, cwd=tmp_path, capture_output=True, text=True
    )
    expected = str(tmp_path / "kernels/difftrain_kernels/__init__.py")
    assert done.stdout.splitlines() == [expected, expected], done.stderr
