"""The seeded faults are in step with the code that they are seeded into."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
FAULTS = {
    room: runpy.run_path(str(ROOT / "tests" / room / "faults.py")) for room in ("kernels", "difftrain")
}


@pytest.mark.parametrize("room", FAULTS)
def test_every_faults_text_stands_in_the_file_it_names(room):
    gone = [
        f"{file}: {fault}"
        for file, fault, text, replacement in FAULTS[room]["MUTANTS"]
        if text not in (ROOT / file).read_text(encoding="utf-8") or replacement == text
    ]
    assert gone == []


@pytest.mark.parametrize("room", FAULTS)
def test_every_file_with_a_fault_has_tests_that_look_for_it(room):
    faults = FAULTS[room]
    assert {file for file, *_ in faults["MUTANTS"]} == set(faults["STAGES"])
    for stages in faults["STAGES"].values():
        assert all((ROOT / stage[0]).exists() for stage in stages)


@pytest.mark.parametrize("room", FAULTS)
def test_every_hint_belongs_to_a_fault(room):
    named = [fault for _, fault, *_ in FAULTS[room]["MUTANTS"]]
    hints = FAULTS[room].get("HINTS", {})
    assert [start for start in hints if not any(fault.startswith(start) for fault in named)] == []
