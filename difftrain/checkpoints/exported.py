"""Reading what ``difftrain export hf`` wrote: a model's folder as a checkpoint without an optimiser's state."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from difftrain.checkpoints.folder import CONFIG, DIGESTS, WEIGHTS, read_pointer
from difftrain.checkpoints.reading import Checkpoint, find_checkpoint, load_weights, open_checkpoint
from difftrain.config import Config
from difftrain.data.vocabulary import from_meta
from difftrain.errors import UserError

PREFIX = "transformer"  # the model's place in transformers' one
DESCRIPTION = "difftrain"  # the key of what is ours in the configuration


@dataclass(frozen=True)
class Exported(Checkpoint):
    """The folder of an exported model."""

    def load_weights(self, model: nn.Module) -> None:
        whole = nn.Module()
        whole.add_module(PREFIX, model)
        load_weights(whole, self.folder)


def open_model(folder: Path, which: str) -> Checkpoint:
    """A run's checkpoint that is named as for :func:`find_checkpoint`, or else the checkpoint or export that a folder is.

    ``checkpoints/best`` and ``checkpoints/latest``, which are files, are the checkpoints that they name.

    Raises:
        UserError: it is neither, or damaged.
    """
    if folder.is_file() and (target := read_pointer(folder.parent, folder.name)):
        folder = folder.parent / target
    if (folder / DIGESTS).is_file():
        return open_checkpoint(folder)
    content = _read(folder / CONFIG)
    if content is None:
        return find_checkpoint(folder, which)
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder / WEIGHTS} is missing")
    try:
        return Exported(
            folder,
            int(content["step"]),
            Config(**content["config"]),
            from_meta(content["vocabulary"], str(folder / CONFIG)),
            dict(content["state"]),
        )
    except UserError as error:
        raise UserError(f"{folder / CONFIG} does not fit this version of difftrain: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / CONFIG} does not fit this version of difftrain: {error!r}") from None


def _read(file: Path) -> dict[str, Any] | None:
    """What an exported model's configuration says of its run; None where there is no configuration."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        raise UserError(f"{file} is damaged: it holds no JSON") from None
    found = content.get(DESCRIPTION) if isinstance(content, dict) else None
    if not isinstance(found, dict):
        raise UserError(f"{file} is not that of a model that difftrain exported: it has no {DESCRIPTION!r}")
    return found
