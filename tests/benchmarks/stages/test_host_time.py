"""Host time of the losses, rehearsed on the CPU."""

import pytest

pytest.importorskip("triton")

from measuring.rehearsal import REHEARSAL
from stages import host_time


def test_every_loss_and_a_function_that_does_nothing_are_timed(monkeypatch):
    monkeypatch.setenv(REHEARSAL, "1")
    found = host_time.run_host()
    assert found["ok"]
    assert {(row["kind"], row["contender"]) for row in found["rows"]} == {
        ("logits", "nothing"), ("logits", "ours"), ("logits", "ours, upstream stated"), ("logits", "ours, not predicted"),
        ("logits", "eager reference"), ("linear", "nothing"), ("linear", "ours linear"), ("linear", "eager reference"),
    }  # fmt: skip
    assert all(row["us_20"] <= row["us"] <= row["us_80"] for row in found["rows"])


def test_a_loss_that_fails_is_a_result(monkeypatch):
    monkeypatch.setenv(REHEARSAL, "1")
    calls_of = host_time.calls_of

    def fails_for_ours(loss_of, problems, *rest):
        if problems[0].kind == "linear":
            raise MemoryError("none left")
        return calls_of(loss_of, problems, *rest)

    monkeypatch.setattr(host_time, "calls_of", fails_for_ours)
    found = host_time.run_host()
    assert not found["ok"]
    failures = [row["failure"] for row in found["rows"] if row["kind"] == "linear"]
    assert len(failures) == 3
    assert all("none left" in failure for failure in failures)
