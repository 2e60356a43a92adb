"""Other programs, run with a limit of time and ended with all that they started."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from pathlib import Path


def run_command(
    command: list[str],
    seconds: float,
    *,
    cwd: Path | None = None,
    environment: dict[str, str] | None = None,
) -> tuple[int | None, str]:
    """Exit code (None: ended after ``seconds``) and what it printed until then, errors included.

    Raises:
        OSError: it could not be started.
    """
    # Unbuffered, so that what was printed is there when a program must be ended.
    changes = {"PYTHONUNBUFFERED": "1"} | (environment or {})
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, cwd=cwd, env=os.environ | changes, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        return code, output.read().decode(errors="replace")
