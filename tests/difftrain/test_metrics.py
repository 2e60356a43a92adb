import math
import time

import pytest

from difftrain.config import Config
from difftrain.errors import UserError
from difftrain.reporting.lines import console_line, summary_line
from difftrain.reporting.log import MetricsLog, drop_records_after, read_metrics
from made_records import record


def write(run_dir, *records):
    with MetricsLog(run_dir, Config(), is_writing=True) as log:
        for item in records:
            log.write(item)


def read(run_dir):
    """The records without the time at which they were written."""
    return [{k: v for k, v in r.items() if k != "time"} for r in read_metrics(run_dir)]


def test_records_come_back_in_order_and_non_finite_numbers_as_null(tmp_path):
    write(tmp_path, record(0), record(1, loss=math.nan, nll=math.inf))
    first, second = read(tmp_path)
    assert first == record(0)
    assert second == record(1, loss=None, nll=None)


def test_a_record_says_when_it_was_written_in_the_file_alone(tmp_path):
    kept, before = record(0), time.time()
    write(tmp_path, kept)
    assert before - 0.001 <= read_metrics(tmp_path)[0]["time"] <= time.time() + 0.001
    assert "time" not in kept


def test_processes_that_do_not_write_leave_no_file(tmp_path):
    with MetricsLog(tmp_path, Config(wandb_log=True), is_writing=False) as log:
        log.write(record(0))
    assert list(tmp_path.iterdir()) == []


def test_a_line_cut_off_by_a_kill_is_passed_over(tmp_path):
    write(tmp_path, record(0))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "ev')
    assert read(tmp_path) == [record(0)]


def test_folders_without_records_are_named(tmp_path):
    with pytest.raises(UserError, match="is not a run folder: it has no metrics.jsonl"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="has no records yet"):
        read_metrics(tmp_path)


@pytest.mark.parametrize(
    ("is_evaluated", "kept"),
    [(True, [("eval", 0), ("train", 0), ("eval", 4)]), (False, [("eval", 0), ("train", 0)])],
)
def test_a_resumed_run_forgets_what_it_writes_again(tmp_path, is_evaluated, kept):
    steps = [("eval", 0), ("train", 0), ("eval", 4), ("train", 4), ("train", 5), ("eval", 8)]
    write(tmp_path, *(record(step, kind) for kind, step in steps))
    drop_records_after(tmp_path, 4, is_evaluated=is_evaluated)
    assert [(r["kind"], r["step"]) for r in read_metrics(tmp_path)] == kept


def test_the_console_line_shows_losses_penalties_rate_levels_and_cases():
    line = console_line(record(7, tokens_per_second=12345.0))
    for part in ("step      7", "loss 1.2500", "final 1.5000", "nll 2.0000", "15:2.100", "85:2.800",
                 "pk 0.500 pm 0.250", "lr 1.00e-03", "masked 10%", "corrupted 90%", "12,345 tok/s", "val abc"):  # fmt: skip
        assert part in line
    assert "\n" not in line


def test_the_summary_states_unigram_entropy_and_every_level():
    assert summary_line(record(9)) == (
        "unigram entropy 3.250 nats; validation nll on masked positions 2.100 at 15 %, 2.400 at 50 %, "
        "2.800 at 85 % masked, 2.900 as in training"
    )
    assert (
        summary_line(record(9, masked_nll=None))
        == "unigram entropy 3.250 nats; validation nll 2.000 nats a token"
    )


def test_a_missing_tracker_names_its_extra(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'difftrain\[wandb\]'"):
        MetricsLog(tmp_path, Config(wandb_log=True), is_writing=True)


def test_trackers_get_every_number_of_a_record(tmp_path, monkeypatch):
    import sys
    from types import SimpleNamespace

    logged = []
    run = SimpleNamespace(
        log=lambda scalars, step: logged.append((step, scalars)), finish=lambda: logged.append("end")
    )
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: run))
    with MetricsLog(tmp_path, Config(wandb_log=True), is_writing=True) as log:
        log.write(record(3))
        assert read(tmp_path) == [record(3)]  # flushed at once
    (step, scalars), end = logged
    assert (step, end) == (3, "end")
    assert scalars["eval/loss"] == 1.25
    assert scalars["eval/cases/masked/mask"] == 0.1
    assert scalars["eval/masked_nll/85"] == 2.8
    assert not any(isinstance(value, str) for value in scalars.values())


def test_a_train_line_shows_the_nll_of_its_masked_positions():
    assert "masked nll 1.000" in console_line(record(7, kind="train", masked_nll=None))
