"""How long a test waits: only what hangs takes so long, on a machine many times slower too."""

import subprocess
import time

PATIENCE = 900  # seconds


def wait_until(is_so, what: str) -> None:
    """Return as soon as ``is_so()`` is true; the test fails where it never is."""
    until = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < until, f"not in {PATIENCE} s: {what}"
        time.sleep(0.01)


def popen_whose_time_is_over_when(is_over):
    """A Popen for which a first limit of time is reached as soon as ``is_over()`` is true, and not before."""

    class Popen(subprocess.Popen):
        was_over = False

        def wait(self, timeout=None):
            if timeout is None or self.was_over:
                return super().wait(timeout)
            wait_until(lambda: is_over() or self.poll() is not None, "the program hangs or ends")
            self.was_over = is_over()
            if self.was_over:
                raise subprocess.TimeoutExpired(self.args, timeout)
            return super().wait()

    return Popen
