"""What is compiled in a session of tests is kept in one folder for all its processes, and goes with it."""

import atexit
import os
import shutil
import sys
import tempfile

FOLDER = "DIFFTRAIN_TEST_CACHE"  # where several sessions are to share it, their caller sets and removes it


def keep() -> None:
    """Give this process and those it starts a cache for Triton, for Inductor and, where none is kept, for bytecode.

    So no session depends on what an earlier one left in the user's caches, and none leaves anything there.
    """
    folder = os.environ.get(FOLDER)
    if folder is None:
        folder = os.environ[FOLDER] = tempfile.mkdtemp(prefix="difftrain-tests-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["TRITON_CACHE_DIR"] = f"{folder}/triton"
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/inductor"
    # Where Python writes no bytecode, each start of a process compiles all of torch anew: five seconds of eight.
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
        os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix = f"{folder}/bytecode"
        sys.dont_write_bytecode = False
