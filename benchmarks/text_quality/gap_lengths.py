"""How often the length of a gap is found, and its words, by how the lengths are compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from difftrain.progress import progress
from difftrain.sampling.choosing import Choice
from difftrain.sampling.gaps import LENGTHS, Filled, candidates_of, fill_candidates
from difftrain.sampling.loaded import Loaded
from difftrain.sampling.writing import How, Writer

LONGEST_CUT = 8  # tokens that are cut out; lengths from 1 on, equally often
CONSTANT = 4
PASSES = 9
RULES: dict[str, Callable[[Filled, Tensor, int], Tensor]] = {
    "known": lambda _, lengths, cut: (lengths == cut).double(),
    "sum of log p, given words too": lambda filled, *_: (filled.written + filled.given)[0],
    "sum of log p": lambda filled, *_: filled.written[0],
    "mean of log p": lambda filled, lengths, _: filled.written[0] / lengths,
    "given words alone": lambda filled, *_: filled.given[0],
    f"always {CONSTANT}": lambda _, lengths, __: (lengths == CONSTANT).double(),
    "always the shortest": lambda _, lengths, __: -lengths,
    "always the longest": lambda _, lengths, __: lengths,
}  # from all lengths, filled, to a value of each, of which the greatest is taken


def measure_lengths(model: Loaded, clean: Tensor, number: int) -> list[dict[str, Any]]:
    """An entry for each rule and each length that was cut out of held-out windows.

    Args:
        clean: (W, block_size) int64. Of each window as much stays on both sides of the gap as leaves room for the longest.
        number: of the model, for its entries.
    """
    words, writer = model.tokenizer, Writer(model.module, model.tokenizer, model.config)
    block_size = model.config.block_size
    low, high = LENGTHS[0], min(LENGTHS[1], block_size // 2)
    lengths = torch.arange(low, high + 1, dtype=torch.int64, device="cpu")
    side, longest_cut = (block_size - high) // 2, min(LONGEST_CUT, high)
    how = How(policy="confidence", steps=PASSES, choice=Choice(temperature=0.0))
    found: dict[tuple[str, int], list[tuple[bool, bool, int]]] = {}
    for i, window in enumerate(progress(clean.tolist(), what=f"gaps, model {number + 1}", unit="text")):
        cut = 1 + i % longest_cut
        left, right = window[:side], window[side + cut : 2 * side + cut]
        text = words.decode_words(left) + "[[gap]]" + words.decode_words(right)
        filled = fill_candidates(writer, candidates_of(text, words, (low, high), block_size), 1, how)
        for rule, value in RULES.items():
            best = int(value(filled, lengths, cut).argmax())
            length = int(lengths[best])
            is_exact = filled.text(0, best) == window[: side + cut] + right
            found.setdefault((rule, cut), []).append((length == cut, is_exact, abs(length - cut)))
    entries = []
    for (rule, cut), outcomes in found.items():
        right_length, exact, off = (sum(o) / len(outcomes) for o in zip(*outcomes, strict=True))
        figures = {"right_length": right_length, "exact": exact, "off": off}
        entries.append({"rule": rule, "cut": cut, "model": number, "figures": figures})
    return entries
