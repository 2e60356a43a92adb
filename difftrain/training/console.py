"""What a run says on standard output, and what becomes of it when nobody reads that any longer."""

from __future__ import annotations

import errno
import sys

from tqdm import tqdm

from difftrain.errors import OutputClosed
from difftrain.progress import is_quiet


class Console:
    """Prints lines above the progress bar, at once even into a pipe; on the main process alone.

    A reader that has gone away (``| head``) is a request to stop, like Ctrl-C: :attr:`is_closed` tells the
    loop, which saves first, and :meth:`check` raises in the end.
    """

    def __init__(self, is_main: bool):
        self._is_main = is_main
        self._last = ""
        self.is_closed = False

    def __call__(self, message: str) -> None:
        self._last = message
        if not self._is_main or self.is_closed:
            return
        try:
            tqdm.write(message)
            sys.stdout.flush()
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # EIO: the terminal is gone
                raise
            self.is_closed = True

    def progress(self, message: str) -> None:
        """Say a line that only tells that the run goes on, unless progress is not wanted."""
        if not is_quiet():
            self(message)

    def check(self) -> None:
        """Raise OutputClosed, with the last thing that was said, if nobody has read it."""
        if self.is_closed:
            raise OutputClosed(f"nobody reads standard output any longer; {self._last}")
