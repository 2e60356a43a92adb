"""Philox4x32-10: random bits as a pure function of (seed, stream, sample index)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox4x32(counter: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> tuple[Any, ...]:
    """Four 32-bit random words for each 128-bit counter.

    Args:
        counter: four int64 tensors or NumPy arrays whose shapes broadcast, holding values in [0, 2^32). The
            second and fourth may be numbers; the others, whose products wrap, may not.
        key: two integers in [0, 2^32).

    Returns:
        Four int64 tensors, or arrays, of the broadcast shape with values in [0, 2^32).

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011), 10 rounds.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The product wraps modulo 2^64, and its two halves are taken with a mask, so the sign of
        # int64 does not matter.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = (product1 >> 32) & _LOW ^ c1 ^ k0, (product0 >> 32) & _LOW ^ c3 ^ k1
        c1, c3 = product1 & _LOW, product0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def random_words(seed: int, stream: int, samples: Tensor, n: int) -> Tensor:
    """``n`` random 32-bit words for each sample.

    Args:
        seed: run seed, in [0, 2^64).
        stream: what the words are for, in [0, 2^32); each use has its own.
        samples: (B,) int64 sample indices >= 0.
        n: words a sample.

    Returns:
        (B, n) int64 with values in [0, 2^32), on the samples' device. Row b depends on the seed,
        the stream and samples[b] alone; the first words do not depend on n.
    """
    sample = samples.long()[:, None]
    block = torch.arange((n + 3) // 4, dtype=torch.int64, device=samples.device)[None]
    if lies_on_host(samples):  # where NumPy's operations have a fraction of the fixed cost of torch's
        sample, block = sample.numpy(), block.numpy()
    words = philox4x32((block, stream, sample & _LOW, sample >> 32), (seed & _LOW, seed >> 32 & _LOW))
    if lies_on_host(samples):
        words = tuple(torch.from_numpy(word) for word in words)
    return torch.stack(words, dim=2).flatten(1)[:, :n]


def lies_on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def uniform(words: Tensor) -> Tensor:
    """32-bit words as fp32 numbers in [0, 1), from their upper 24 bits (exact in fp32)."""
    return (words >> 8).float() * 2.0**-24


def below(words: Tensor, bound: int | Tensor) -> Tensor:
    """32-bit words as integers in [0, bound), by multiply and shift; bound up to 2^31."""
    return (words * bound) >> 32
