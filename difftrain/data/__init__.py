"""Data: a text or a folder of token files -> clean tokens -> what the model sees and should answer."""

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
from difftrain.data.preparing import prepare

__all__ = [
    "Corpus",
    "corrupt",
    "corrupt_by_recipe",
    "count_masked",
    "mask_alone",
    "mask_share",
    "open_corpus",
    "prepare",
    "read_folder",
    "replace_share",
    "sample_indices",
]
