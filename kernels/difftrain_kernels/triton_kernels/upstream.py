"""The upstream gradient that a gradient is made for: stated by the host, or predicted on the device.

The state of a kind of call, (5,) fp32; each number is NaN until it is known:

| place | |
|---|---|
| PREDICTION | what the next call may expect; NaN: nothing |
| LAST | what the last backward received |
| STREAK | how many backwards in a row |
| NEEDED | how many it takes to expect it again |
| HITS | since NEEDED was last halved |

Forward only reads PREDICTION, one word, and notes for every row what its gradient was made for; backward
compares row by row with that, so whatever happens to the state in between costs time and never a wrong
gradient. Only the first program of a backward writes it. ``upstream_prediction.py`` has the policy's bound.
"""

import triton
import triton.language as tl

PREDICTION = tl.constexpr(0)
LAST = tl.constexpr(1)
STREAK = tl.constexpr(2)
NEEDED = tl.constexpr(3)
HITS = tl.constexpr(4)
MOST_NEEDED = tl.constexpr(256)
HITS_TO_EASE = tl.constexpr(4)


@triton.jit
def upstream_of_rows(upstream, made_for_ptr, row, inside):
    """What the gradient of rows is made for, and whether it is made at all."""
    if made_for_ptr is None:
        return upstream, True
    else:
        predicted = tl.load(upstream + PREDICTION)
        tl.store(made_for_ptr + row, predicted, mask=inside)
        return predicted, predicted == predicted


@triton.jit
def made_for_of_rows(stated, made_for_ptr, row, inside):
    """What the gradient of rows was made for, NaN where it was not."""
    if made_for_ptr is None:
        return stated
    else:
        return tl.load(made_for_ptr + row, mask=inside, other=0.0)


@triton.jit
def learn_upstream(state_ptr, made_for_ptr, upstream_ptr, upstream_stride):
    """What the next call may expect, after this backward."""
    if tl.program_id(0) == 0:
        received = tl.load(upstream_ptr)
        # One number for all rows, or none; and 0 is none, which has two signs that compare equal.
        received = tl.where((upstream_stride == 0) & (received != 0.0), received, float("nan"))
        made_for = tl.load(made_for_ptr)
        was_made = made_for == made_for
        is_miss = was_made & (made_for != received)
        streak = tl.load(state_ptr + STREAK)
        goes_on = (received == tl.load(state_ptr + LAST)) & (is_miss == 0)
        streak = tl.where(goes_on, streak + 1.0, 1.0)
        needed = tl.load(state_ptr + NEEDED)
        needed = tl.where(needed >= 1.0, needed, 1.0)
        needed = tl.where(is_miss, tl.minimum(2.0 * needed, MOST_NEEDED), needed)
        hits = tl.load(state_ptr + HITS)
        hits = tl.where(hits >= 0.0, hits, 0.0) + tl.where(was_made & (is_miss == 0), 1.0, 0.0)
        is_eased = hits >= HITS_TO_EASE
        needed = tl.where(is_eased, tl.maximum(0.5 * needed, 1.0), needed)
        hits = tl.where(is_eased, 0.0, hits)
        # Every thread reads the state, one writes it.
        tl.debug_barrier()
        tl.store(state_ptr + LAST, received)
        tl.store(state_ptr + STREAK, streak)
        tl.store(state_ptr + NEEDED, needed)
        tl.store(state_ptr + HITS, hits)
        tl.store(state_ptr + PREDICTION, tl.where(streak >= needed, received, float("nan")))
