"""Parts are worked on by one process or several, with one bar, and what goes wrong in one ends all."""

import contextlib
import io
import signal
import threading

import pytest

from difftrain.data import processes
from difftrain.data.processes import work
from difftrain.errors import UserError
from part_work import be_killed, fail_at_three, square


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("workers", [1, 2])
def test_every_part_is_worked_on_once_and_the_bar_counts_bytes(workers, monkeypatch):
    monkeypatch.setattr("difftrain.progress.DELAY", 0.0)
    with contextlib.redirect_stderr(Terminal()) as terminal:
        found = list(work(square, range(7), workers=workers, what="squaring", total=21))
    assert sorted(found) == [(number, number**2) for number in range(7)]
    assert "squaring" in terminal.getvalue()
    assert "/21.0 [" in terminal.getvalue()
    assert "B/s" in terminal.getvalue()


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_is_raised_as_it_is_and_ends_the_work(workers):
    found = []
    results = work(fail_at_three, range(200), workers=workers, what="failing", total=None)
    with pytest.raises(OSError, match="No space left"):
        found.extend(number for number, _ in results)
    assert len(found) < 199


def test_a_worker_that_is_killed_is_a_line():
    with pytest.raises(
        UserError, match="a process was killed, perhaps for its memory; take fewer --workers"
    ):
        list(work(be_killed, range(4), workers=2, what="dying", total=None))


def test_ctrl_c_is_unheard_while_processes_begin_and_heard_again_afterwards():
    before, found = signal.getsignal(signal.SIGINT), []

    def begin():
        with processes._unheard():
            found.append(signal.getsignal(signal.SIGINT))

    begin()
    assert (found, signal.getsignal(signal.SIGINT)) == ([signal.SIG_IGN], before)
    thread = threading.Thread(target=begin)  # may not say what is heard, and does not
    thread.start()
    thread.join()
    assert found[1:] == [before]
