"""How many calls are timed, on which inputs, and what becomes of the samples."""

from functools import partial

import pytest

from measuring import timing


@pytest.mark.parametrize(("nbytes", "copies"), [(10, 11), (35, 4), (10**9, 2)])
def test_the_inputs_between_two_uses_of_one_are_larger_than_the_cache(nbytes, copies):
    assert timing.copies_beyond_cache(nbytes, cache_bytes=50) == copies


def test_quantiles_of_known_samples():
    assert timing.quantiles([float(i) for i in range(11)]) == (5.0, 2.0, 8.0)
    assert timing.quantiles([3.0]) == (3.0, 3.0, 3.0)


@pytest.mark.parametrize(("each_ms", "count"), [(1.0, 20), (100.0, 10), (1e-4, 200)])
def test_calls_are_timed_in_turn_within_the_budget(each_ms, count):
    made, rounds = [], []

    def times_of(calls):
        rounds.append(len(calls))
        for call in calls:
            call.run()
            call.restore()
        return [each_ms] * len(calls)

    calls = [timing.Call(partial(made.append, n), partial(made.append, f"restore {n}")) for n in "abc"]
    assert timing.time_calls(calls, 20.0, times_of) == [each_ms] * count
    assert made[:6] == ["a", "restore a", "b", "restore b", "c", "restore c"], "the first round is untimed"
    assert rounds == [3, count]
    assert made[12:20:2] == ["a", "b", "c", "a"]


def test_cpu_times_are_of_rounds_that_repeat_short_calls(monkeypatch):
    clock, calls = [0.0], []

    def call(name, seconds):
        calls.append(name)
        clock[0] += seconds

    monkeypatch.setattr(timing.time, "process_time", lambda: clock[0])
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: calls.append("rest"))
    times = timing.cpu_times({"a": partial(call, "a", 0.005), "b": partial(call, "b", 0.5)}, 0.0)
    assert times == {"a": [pytest.approx(5.0)] * 5, "b": [pytest.approx(500.0)] * 5}
    assert calls == [*"aabb", *(5 * ["rest", *"aaaa", "rest", "b"])]
