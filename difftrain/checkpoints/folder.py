"""What a checkpoint folder holds, how it and the pointers to it are named, and its digests."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from pathlib import Path

WEIGHTS, STATE, CONFIG, DIGESTS = "model.safetensors", "state.json", "config.json", "digests.json"
OPTIMIZER = "optimizer"  # a folder of safetensors: one file, or one of each process that holds a share
CONTENT = (WEIGHTS, STATE, CONFIG)


def folder_aside(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step is written."""
    return run_dir / "checkpoints" / f".writing-step-{step:08d}"


def files_below(folder: Path) -> list[str]:
    """All files below a folder, by their paths in it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def step_folders(home: Path) -> list[Path]:
    """Checkpoints, oldest first; a user's own copies under other names are none of ours."""
    folders = (p for p in home.glob("step-*") if re.fullmatch(r"step-\d{8,}", p.name) and p.is_dir())
    return sorted(folders, key=step_of)


def step_of(folder: Path) -> int:
    """The step of a checkpoint, which its name says, also while it is being written."""
    return int(folder.name.removeprefix(".writing-").removeprefix("step-"))


def read_pointer(home: Path, name: str) -> str | None:
    """The folder name that ``latest`` or ``best`` points to; None without an undamaged one."""
    try:
        text = (home / name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    target = text.split(" ")[0]
    return target if text == pointer_text(target) and Path(target).name == target else None


def pointer_text(target: str) -> str:
    """A folder's name and a digest of it, so that a flipped bit does not lead to another step."""
    return f"{target} {hashlib.sha256(target.encode()).hexdigest()[:16]}\n"


def digest_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def damage_of(folder: Path) -> str:
    """What is wrong with a checkpoint's files; empty where every one is there and has its digest."""
    try:
        stored = json.loads((folder / DIGESTS).read_text(encoding="utf-8"))
        if not isinstance(stored, dict) or not stored.keys() >= set(CONTENT):
            raise ValueError
    except FileNotFoundError:
        return f"{folder / DIGESTS} is missing, so {folder.name} is no whole checkpoint"
    except (ValueError, RecursionError):
        return f"{folder / DIGESTS} is damaged"
    for file in sorted({*stored, *files_below(folder)} - {DIGESTS}):
        path = folder / file
        if file not in stored:
            return f"{path} is not among the files of {folder.name}"
        if "\0" in file or not path.is_file():
            return f"{path} is missing, so {folder.name} is no whole checkpoint"
        if digest_of(path) != stored[file]:
            return f"{path} is damaged: its digest does not match"
    return ""


def put_back_replaced(home: Path) -> None:
    """Put back a checkpoint that was moved away and whose replacement never came."""
    for old in home.glob(".old-*"):
        original = home / old.name.removeprefix(".old-")
        if not original.exists():
            with contextlib.suppress(FileNotFoundError):  # another process has done it
                old.rename(original)
