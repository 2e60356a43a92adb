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


def popen_whose_time_is_over_when(*limits):
    """A Popen for which the first limits of time are reached, in turn, as soon as these are true, and not before."""

    class Popen(subprocess.Popen):
        n_over = 0

        def wait(self, timeout=None):
            if timeout is None or self.n_over == len(limits):
                return super().wait(timeout)
            is_over = limits[self.n_over]
            wait_until(lambda: is_over() or self.poll() is not None, "the program hangs or ends")
            if is_over():
                self.n_over += 1
                raise subprocess.TimeoutExpired(self.args, timeout)
            return super().wait()

    return Popen
