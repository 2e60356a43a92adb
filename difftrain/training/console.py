"""What a run says and to whom: standard output or the functions of a program, and what becomes of it when nobody reads."""

from __future__ import annotations

import copy
import errno
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from difftrain.errors import OutputClosed
from difftrain.progress import is_quiet

Listener = Callable[[dict[str, Any]], object]
"""Is given a record; where it returns True the run stops, as at Ctrl-C."""


def print_line(message: str) -> None:
    """Print above the progress bar, at once even into a pipe."""
    tqdm.write(message)
    sys.stdout.flush()


@dataclass(frozen=True)
class Listeners:
    """Who hears of a run, on its main process.

    Attributes:
        on_line: is given each line that the command line prints; None: nobody.
        on_step: is given a record of each step.
        on_evaluation: is given a record of each evaluation.
    """

    on_line: Callable[[str], object] | None = print_line
    on_step: Listener | None = None
    on_evaluation: Listener | None = None


NOBODY = Listeners(None)


class Console:
    """Tells the listeners of a run, on the main process alone.

    A reader that has gone away (``| head``) and a listener that returned True are requests to stop, like Ctrl-C:
    :attr:`asks_to_stop` tells the loop, which saves first; :meth:`check` raises in the end where nobody reads.
    """

    def __init__(self, is_main: bool, listeners: Listeners | None = None):
        self._listeners = (listeners or Listeners()) if is_main else NOBODY
        self._last = ""
        self.is_closed = self._is_enough = False

    @property
    def asks_to_stop(self) -> bool:
        return self.is_closed or self._is_enough

    def __call__(self, message: str) -> None:
        self._last = message
        if self.is_closed or not self._listeners.on_line:
            return
        try:
            self._listeners.on_line(message)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # EIO: the terminal is gone
                raise
            self.is_closed = True

    def progress(self, message: str) -> None:
        """Say a line that only tells that the run goes on, unless it is to be printed and progress is not wanted."""
        if self._listeners.on_line is not print_line or not is_quiet():
            self(message)

    def step(self, record: dict[str, Any]) -> None:
        """Tell of a step."""
        self._tell(self._listeners.on_step, record)

    def evaluation(self, record: dict[str, Any]) -> None:
        """Tell of an evaluation."""
        self._tell(self._listeners.on_evaluation, record)

    def _tell(self, listener: Listener | None, record: dict[str, Any]) -> None:
        if listener and listener(copy.deepcopy(record)) is True:
            self._is_enough = True

    def check(self) -> None:
        """Raise OutputClosed, with the last thing that was said, if nobody has read it."""
        if self.is_closed:
            raise OutputClosed(f"nobody reads standard output any longer; {self._last}")
