"""What a checkpoint folder holds, how it and the pointers to it are named, and its digests."""

from __future__ import annotations

import contextlib
import hashlib
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


def put_back_replaced(home: Path) -> None:
    """Put back a checkpoint that was moved away and whose replacement never came."""
    for old in home.glob(".old-*"):
        original = home / old.name.removeprefix(".old-")
        if not original.exists():
            with contextlib.suppress(FileNotFoundError):  # another process has done it
                old.rename(original)
