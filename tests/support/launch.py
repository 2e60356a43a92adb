"""Starting real processes of difftrain: one, or several under torchrun."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).parent  # where the programs that tests start lie


def start(*arguments, processes=1, **options):
    """A running ``python ARGUMENTS`` or, with more processes, ``torchrun ARGUMENTS``; one thread each."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [*launcher, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def finish(process, timeout=120):
    """Exit code, standard output and standard error; a process that hangs is killed, and the test fails."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"no end after {timeout} s:\n{out}\n{err}") from None
    return process.returncode, out, err


def run(*arguments, processes=1, timeout=120):
    return finish(start(*arguments, processes=processes), timeout)


def train_all(runs, processes, folder):
    """Train [configuration, stop or None] pairs, as resume_runs.py does, in one start of several processes."""
    job = folder / "runs.json"
    job.write_text(json.dumps([[dataclasses.asdict(config), stop_at] for config, stop_at in runs]))
    script = SUPPORT / "resume_runs.py"
    code, out, err = run(script, job, processes=processes, timeout=300)
    assert code == 0, out + err
