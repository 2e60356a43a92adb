"""Workers that behave badly, for test_supervision.py. Imported by spawned processes, so light."""

import os
import signal
import time
from pathlib import Path

from waiting import PATIENCE


def obey(jobs, connection):
    """Do what each job says, and send it back with the process that did it."""
    for job in jobs:
        if job == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        if job == "exit":
            os._exit(3)
        if job.startswith("hang "):
            file = Path(job.removeprefix("hang "))
            written = file.with_suffix(".part")
            written.write_text(str(os.getpid()))
            written.rename(file)  # whoever sees it, sees all of it
            time.sleep(PATIENCE)
        connection.send((job, os.getpid()))
        if job == "last of its process":
            connection.send("restart")
            return
