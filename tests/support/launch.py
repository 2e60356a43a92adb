"""difftrain's commands: in real processes, one or several under torchrun, and in this one."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

from difftrain import cli
from waiting import PATIENCE

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


def finish(process):
    """Exit code, standard output and standard error; a process that hangs is killed, and the test fails."""
    try:
        out, err = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"no end after {PATIENCE} s:\n{out}\n{err}") from None
    return process.returncode, out, err


def run(*arguments, processes=1):
    return finish(start(*arguments, processes=processes))


def train_command(config, *words):
    """The words that train a configuration."""
    path = Path(f"{config.out_dir}.toml")
    path.write_text(config.to_toml())
    return ["train", "--config", str(path), *words]


def obey(words, rank=0):
    """Do a command here, or as one of several processes: its exit code and what it wrote to either stream."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = cli.main([str(word) for word in words])
    return code, out.getvalue(), err.getvalue()
