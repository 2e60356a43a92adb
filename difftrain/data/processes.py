"""Work on numbered parts by one process or several, with one bar for all of them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from typing import Any

from difftrain.errors import UserError
from difftrain.progress import progress

LOOK = 0.5  # seconds between two looks at how far the processes are

_shared: Any = None  # in a worker: the function, the bytes read by all, and whether to stop


class _Stopped(Exception):
    """Another part has failed, or the whole was interrupted."""


def work(
    function: Callable[[int, Callable[[int], None]], Any],
    numbers: Sequence[int],
    *,
    workers: int,
    what: str,
    total: int | None,
) -> Iterator[tuple[int, Any]]:
    """``function(number, advance)`` for each number: number and result, in the order in which they end.

    Args:
        function: with several workers one that can be pickled; tells ``advance`` how many bytes it
            has read since it last did.
        what, total: title of the bar, and the bytes that it counts.

    Raises:
        UserError: a worker was killed. An error of the function is raised as it is, and ends all work.
    """
    with progress(what=what, unit="B", total=total) as bar:
        if workers == 1 or len(numbers) < 2:
            for number in numbers:
                yield number, function(number, bar.update)
            return
        context = multiprocessing.get_context("spawn")
        read, stop = context.Value("q", 0), context.Event()
        with ProcessPoolExecutor(
            min(workers, len(numbers)), context, initializer=_begin, initargs=(function, read, stop)
        ) as pool:
            with _unheard():
                running = {pool.submit(_call, number): number for number in numbers}
            try:
                while running:
                    done, _ = wait(running, LOOK, FIRST_COMPLETED)
                    bar.update(read.value - bar.n)
                    for future in done:
                        yield running.pop(future), future.result()
            except BrokenProcessPool:
                raise UserError(
                    "a process was killed, perhaps for its memory; take fewer --workers"
                ) from None
            finally:
                stop.set()
                for future in running:
                    future.cancel()


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """Processes that are begun within it do not hear of Ctrl-C, not even before :func:`_begin`."""
    if threading.current_thread() is not threading.main_thread():  # which alone may say what is heard
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _begin(function: Callable, read: Any, stop: Any) -> None:
    global _shared
    _shared = function, read, stop
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each worker has a core of its own
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process hears of it, and says when to stop
    threading.Thread(target=_end_with_the_first, daemon=True).start()


def _end_with_the_first() -> None:
    """A process that was killed cannot tell its workers to end."""
    wait_for([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _call(number: int) -> Any:
    function, read, stop = _shared

    def advance(n: int) -> None:
        if stop.is_set():
            raise _Stopped
        with read.get_lock():
            read.value += n

    return function(number, advance)
