"""Data: a text or a folder of token files -> clean tokens -> what the model sees and should answer.

Names are loaded on first use: what prepares texts runs without torch, in many processes.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from difftrain.data.corpus import Corpus, sample_indices
    from difftrain.data.corruption import (
        corrupt,
        corrupt_by_recipe,
        count_masked,
        mask_alone,
        mask_share,
        replace_share,
    )
    from difftrain.data.opening import open_corpus, read_folder
    from difftrain.data.parts import ShardRequest
    from difftrain.data.preparing import prepare
    from difftrain.data.sharding import prepare_shards

_HOMES = {
    "Corpus": "corpus",
    "ShardRequest": "parts",
    "corrupt": "corruption",
    "corrupt_by_recipe": "corruption",
    "count_masked": "corruption",
    "mask_alone": "corruption",
    "mask_share": "corruption",
    "open_corpus": "opening",
    "prepare": "preparing",
    "prepare_shards": "sharding",
    "read_folder": "opening",
    "replace_share": "corruption",
    "sample_indices": "corpus",
}

__all__ = [
    "Corpus",
    "ShardRequest",
    "corrupt",
    "corrupt_by_recipe",
    "count_masked",
    "mask_alone",
    "mask_share",
    "open_corpus",
    "prepare",
    "prepare_shards",
    "read_folder",
    "replace_share",
    "sample_indices",
]


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
