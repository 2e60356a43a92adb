"""How often the length of a gap is found, and its words, by how the lengths are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from difftrain.progress import progress
from difftrain.sampling.choosing import Choice
from difftrain.sampling.gaps import LENGTHS, Filled, candidates_of, fill_candidates
from difftrain.sampling.loaded import Loaded
from difftrain.sampling.writing import How, Writer

LONGEST_CUT = 8  # characters that are cut out; lengths from 1 on, equally often
CONSTANT = 4
PASSES = 9
LENGTH = torch.arange(LENGTHS[0], LENGTHS[1] + 1, dtype=torch.int64, device="cpu")
RULES: dict[str, Callable[[Filled, int], Tensor]] = {
    "known": lambda _, cut: (cut == LENGTH).double(),
    "sum of log p, words around it too": lambda filled, _: (filled.written + filled.given)[0],
    "sum of log p": lambda filled, _: filled.written[0],
    "mean of log p": lambda filled, _: filled.written[0] / LENGTH,
    "words around it alone": lambda filled, _: filled.given[0],
    f"always {CONSTANT}": lambda filled, _: (LENGTH == CONSTANT).double(),
    "always the shortest": lambda filled, _: -LENGTH,
    "always the longest": lambda filled, _: LENGTH,
}  # each a value of every length, of which the greatest is taken


def measure_lengths(model: Loaded, clean: Tensor, number: int) -> Iterator[dict[str, Any]]:
    """An entry for each rule and each length that was cut out of held-out windows (W, block_size)."""
    words, writer = model.tokenizer, Writer(model.module, model.tokenizer, model.config)
    side = (model.config.block_size - LENGTHS[1]) // 2
    how = How(policy="confidence", steps=PASSES, choice=Choice(temperature=0.0))
    found: dict[tuple[str, int], list[tuple[bool, bool, int]]] = {}
    for i, window in enumerate(progress(clean.tolist(), what=f"gaps, model {number + 1}", unit="text")):
        cut = 1 + i % LONGEST_CUT
        left, right = window[:side], window[side + cut : 2 * side + cut]
        text = words.decode_words(left) + "[[gap]]" + words.decode_words(right)
        whole = left + window[side : side + cut] + right
        filled = fill_candidates(
            writer, candidates_of(text, words, LENGTHS, model.config.block_size), 1, how
        )
        for rule, value in RULES.items():
            best = int(value(filled, cut).argmax())
            length = int(LENGTH[best])
            outcome = length == cut, filled.text(0, best) == whole, abs(length - cut)
            found.setdefault((rule, cut), []).append(outcome)
    for (rule, cut), outcomes in found.items():
        right_length, exact, off = (sum(o) / len(outcomes) for o in zip(*outcomes, strict=True))
        figures = {"right_length": right_length, "exact": exact, "off": off}
        yield {"rule": rule, "cut": cut, "model": number, "figures": figures}
