"""Corpora written token by token."""

import json
import os

import numpy as np


def nanogpt_folder(path, train=(0, 1, 2, 1, 0, 2), val=(2, 1, 0), dtype="uint16", meta=None):
    """A folder in nanoGPT's format; without ``meta`` it has none."""
    path.mkdir()
    np.array(train, dtype=dtype).tofile(path / "train.bin")
    np.array(val, dtype=dtype).tofile(path / "val.bin")
    if meta is not None:
        (path / "meta.json").write_text(json.dumps(meta))
    return path


def rewrite(path, ids, *, keeps_mtime=False):
    """Other uint16 ids in a token file; with ``keeps_mtime`` its mtime is put back, as by ``cp -p``."""
    before = path.stat()
    np.array(ids, dtype="uint16").tofile(path)
    while path.stat().st_ctime_ns == before.st_ctime_ns:  # until the file system's clock has ticked
        os.utime(path)
    if keeps_mtime:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
