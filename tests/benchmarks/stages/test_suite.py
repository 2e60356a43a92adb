"""The suite's log is counted, whether or not it came to its end."""

import pytest

from measuring import supervision
from stages import suite
from waiting import PATIENCE, popen_whose_time_is_over_when

LOG = """\
============================= test session starts ==============================
collecting ... collected 7 items

tests/test_a.py::test_one PASSED                                         [ 14%]
tests/test_a.py::test_two[a b-PASSED] FAILED                             [ 28%]
tests/test_a.py::test_gpu SKIPPED (needs CUDA)                           [ 42%]
[gw3] [ 57%] PASSED tests/test_b.py::test_three[1 2]
[gw0] [  9%] FAILED tests/test_b.py::test_four
tests/test_b.py::test_five ERROR                                         [ 85%]
tests/test_b.py::test_six PASSED
=================================== FAILURES ===================================
FAILED tests/test_a.py::test_two - assert 1 == 2
"""


def test_a_log_is_counted_line_by_line():
    counts, failed = suite.read_log(LOG)
    assert counts == {"passed": 3, "failed": 2, "skipped": 1, "error": 1}
    assert failed == ["tests/test_a.py::test_two[a b-PASSED]", "tests/test_b.py::test_four", "tests/test_b.py::test_five"]  # fmt: skip


def test_why_tests_failed_is_read_from_the_summary():
    summary = "FAILED tests/test_a.py::test_two[a b] - assert 1 == 2 - 3\nERROR tests/test_b.py::test_five - OSError: no\n"
    assert suite.read_summary(LOG + summary) == {
        "tests/test_a.py::test_two": "assert 1 == 2",
        "tests/test_a.py::test_two[a b]": "assert 1 == 2 - 3",
        "tests/test_b.py::test_five": "OSError: no",
    }


@pytest.fixture
def small_suite(tmp_path, monkeypatch):
    """A repository of one test file that passes, fails and hangs."""
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")

    def write(body):
        (tmp_path / "test_it.py").write_text(body)

    return write


def test_a_suite_is_run_without_what_only_repeats_and_its_failures_named(small_suite):
    again = "import pytest\n@pytest.mark.slow\ndef test_again(): pass\n"
    small_suite(again + "def test_good(): pass\ndef test_bad(): assert 0\n")
    found = suite.run_suite(PATIENCE, ["-p", "no:cacheprovider"])
    assert (found["ok"], found["counts"]) == (False, {"passed": 1, "failed": 1})
    assert found["failed"] == ["test_it.py::test_bad"]
    assert "assert 0" in "\n".join(found["last_lines"])
    assert found["reasons"] == {"test_it.py::test_bad": "assert 0"}


def test_a_suite_that_does_not_finish_is_counted_as_far_as_it_came(small_suite, tmp_path, monkeypatch):
    hang = f"open('hangs', 'w').close(); time.sleep({PATIENCE})"
    small_suite(f"import time\ndef test_good(): pass\ndef test_hang(): {hang}\n")
    popen = popen_whose_time_is_over_when((tmp_path / "hangs").exists)
    monkeypatch.setattr(supervision.subprocess, "Popen", popen)
    found = suite.run_suite(4.0, ["-p", "no:cacheprovider"])
    assert (found["ok"], found["counts"], found["exit_code"]) == (False, {"passed": 1}, None)
    assert found["summary"].endswith("not finished")
