"""Predicting the upstream gradient, so that ``(loss / k).backward()`` makes its gradient with the loss.

The loss cannot know in forward what gradient will reach it; mostly it is what reached the last loss of
its kind. What did is kept on the device (``triton_kernels/upstream.py``), where forward reads it and
backward compares it: the host learns neither and waits for nothing. In bytes for N rows of V bf16 logits a
call moves 6NV where nothing is expected (2 forward, 4 backward), 4NV on a hit (all of it forward) and 8NV on
a miss (4 and 4), with the same bits.

When something is expected: as soon as the last ``needed`` backwards of a kind received the same upstream
gradient. At first ``needed`` is 1, a miss doubles it up to ``MOST_NEEDED``, and each ``HITS_TO_EASE`` hits
halve it. After a miss the count starts again.

The worst case. Let a sequence of C calls have H hits and M misses: it costs 6C - 2H + 2M. A miss either
doubles ``needed``, which happens at most log2(MOST_NEEDED) = 8 times more often than it is halved, H / 4
times; or it comes at ``needed`` = 256, where 255 calls that expect nothing went before it. So
M <= 8 + H/4 + C/256, and the calls cost at most 6C + C/128 + 16 - 1.5H: 6.008 NV a call, plus 16 NV once.
Two losses of different scale in turn miss once and then stay at 6.

At most one gradient made in forward waits for its backward in each kind; a call that comes meanwhile makes
its own in backward. So memory holds one buffer more than without prediction, and only where several losses
of a kind are open at once. After ``MOST_UNUSED`` calls in a row without a backward, whose gradients were made
for nothing (4 in place of 2), forward makes none until a backward comes; then one more is tried, and if nobody takes
it either, the next only after twice as many backwards. A gradient that ends untaken counts among these too where a
backward takes another one: several losses that are looked at for one that is trained on, or a compiled region that
computes its forward again.

One state serves one stream at a time: a graph that took it must not replay beside eager calls of its kind.

A kind is: thread, stream, device, dtype, reduction, vocabulary, and the number of rows up to a factor of 2.
Nothing is predicted where hooks on saved tensors are at work (checkpointing and offloading of eager code), which
want little kept between forward and backward.
"""

from __future__ import annotations

import os
import sys
from threading import get_ident
from weakref import ref

import torch
from torch import Tensor

# Read once: DIFFTRAIN_UPSTREAM_PREDICTION=0 turns it off in the whole process.
IS_ENABLED = os.environ.get("DIFFTRAIN_UPSTREAM_PREDICTION", "1") != "0"
MOST_KINDS = 1024  # a further kind is not predicted: what a captured graph reads can never be freed
MOST_UNUSED = 4
MOST_PATIENCE = 256


class Expectation:
    """What one kind of call expects.

    Attributes:
        state: (5,) fp32 on the device, NaN where nothing is known yet. Only kernels read and write it.
    """

    __slots__ = ("_dropped", "_missed", "_patience", "_unused", "_waiting", "state")

    def __init__(self, state: Tensor) -> None:
        self.state = state
        self._unused = 0  # calls in a row whose gradient no backward has taken
        self._waiting = None  # the gradient that waits for its backward
        self._dropped = False  # whether one has ended untaken since the last backward
        self._missed, self._patience = (
            0,
            1,
        )  # backwards since none is made in forward; after how many one is

    @property
    def may_open(self) -> bool:
        """Whether another call may make its gradient in forward."""
        waiting = self._waiting  # once: another thread may clear it meanwhile
        return self._unused < MOST_UNUSED and (waiting is None or waiting() is None)

    def open(self, gradient: Tensor) -> None:
        """A call has made a gradient, or has left room for it."""
        self._unused += 1
        self._dropped |= self._waiting is not None
        self._waiting = ref(gradient)

    def close(self, gradient: Tensor | None) -> None:
        """A backward has come, and takes ``gradient`` if it has one."""
        if gradient is not None:
            if self._dropped:
                self._unused -= 1
            else:
                self._unused, self._missed, self._patience = 0, 0, 1
            self._dropped = False
            waiting = self._waiting
            if waiting is not None and waiting() is gradient:
                self._waiting = None
        elif self._unused >= MOST_UNUSED:
            self._missed += 1
            if self._missed >= self._patience:  # one more trial; if nobody takes it, the next comes later
                self._unused, self._missed = MOST_UNUSED - 1, 0
                self._patience = min(2 * self._patience, MOST_PATIENCE)


_expectations: dict[tuple, Expectation] = {}


def find_expectation(logits: Tensor, n_rows: int, reduction: str) -> Expectation | None:
    """What this call's kind expects; None where nothing may be predicted.

    Under CUDA graph capture a kind is not begun, since each replay would begin it again; one that the
    thread has met on another stream is taken, and compared and learnt from by every replay.
    """
    if not IS_ENABLED or n_rows == 0:
        return None
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return None
    device = logits.device
    stream = torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0
    kind = (
        stream, get_ident(), device, logits.dtype, reduction, logits.shape[-1], n_rows.bit_length()
    )  # fmt: skip
    found = _expectations.get(kind)
    return _begin(kind) if found is None else found


def _begin(kind: tuple) -> Expectation | None:
    device = kind[2]
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        met = list(_expectations.items())  # another thread may add to it meanwhile
        return next((expectation for other, expectation in met if other[1:] == kind[1:]), None)
    if len(_expectations) >= MOST_KINDS:
        return None
    state = torch.full((5,), torch.nan, dtype=torch.float32, device=device)
    return _expectations.setdefault(kind, Expectation(state))


def replays_graphs(device: torch.device) -> bool:
    """Whether torch.compile captures what it compiles for this device in CUDA graphs (``mode="reduce-overhead"``).

    They know of no memory that a graph's own tensors do not hold, and refuse to begin where there is some.
    """
    inductor, trees = (sys.modules.get(f"torch._inductor.{name}") for name in ("config", "cudagraph_trees"))
    if device.type != "cuda" or inductor is None:
        return False
    containers = "tree_manager_containers"
    try:
        if not inductor.triton.cudagraph_trees:  # captured in another way, which nothing tells
            return True
        if trees is None or not (hasattr(trees.local, containers) or torch._C._is_key_in_tls(containers)):
            return False  # not in this thread, and to ask would begin it
        return trees.get_manager(device.index, create_if_none_exists=False) is not None
    except Exception:  # private, so another torch may not have it
        return True
