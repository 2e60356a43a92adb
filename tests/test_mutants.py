"""The seeded faults of mutants.py are in step with the code that they are seeded into."""

import mutants


def test_every_faults_text_stands_in_the_file_it_names():
    gone = [
        f"{file}: {fault}"
        for file, fault, text, replacement in mutants.MUTANTS
        if text not in (mutants.ROOT / file).read_text(encoding="utf-8") or replacement == text
    ]
    assert gone == []


def test_every_file_with_a_fault_has_tests_that_look_for_it():
    assert {file for file, *_ in mutants.MUTANTS} == set(mutants.STAGES)


def test_every_hint_belongs_to_a_fault():
    faults = [fault for _, fault, *_ in mutants.MUTANTS]
    assert [start for start in mutants.HINTS if not any(f.startswith(start) for f in faults)] == []
