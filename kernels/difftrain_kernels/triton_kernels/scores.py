"""From a logit to what the softmax sees: its scale and its soft cap, in units that make the exponent one fma.

exp2(unit * factor - shift) is the softmax before its division. Without a cap the unit is the logit and
the scale goes into the factor; with one the unit is tanh, in [-1, 1].
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Start of a running maximum: finite, since -inf minus -inf is NaN; its product with LOG2E too.
FLOOR = tl.constexpr(-2e38)
# An exponent whose exp2 is 0, in place of -inf: 0 times -inf is NaN.
FAINT = tl.constexpr(-1e4)


class Scaling(NamedTuple):
    """A row's way from logits to exponents. What the terms do not have is 1: Triton 3.6 returns no None."""

    factor: Any  # exponent = unit * factor - shift
    floor: Any  # start of a running maximum of logits
    scale: Any  # of the logits
    inner: Any  # unit = tanh(logit * inner)


@triton.jit
def scaling_of(terms):
    """The scaling of every row."""
    if terms.logit_scale is None:
        if terms.softcap is None:
            return Scaling(LOG2E, FLOOR, 1.0, 1.0)
        else:
            cap = tl.cast(terms.softcap, tl.float32)
            return Scaling(cap * LOG2E, FLOOR, 1.0, 1.0 / cap)
    else:
        if terms.SCALE_ON_DEVICE:
            scale = tl.load(terms.logit_scale)
        else:
            scale = tl.cast(terms.logit_scale, tl.float32)
        if terms.softcap is None:
            return Scaling(scale * LOG2E, 1.0 / tl.maximum(scale, 1.0) * FLOOR, scale, 1.0)
        else:
            cap = tl.cast(terms.softcap, tl.float32)
            return Scaling(cap * LOG2E, FLOOR, scale, scale / cap)


@triton.jit
def _exp_of_twice(a):
    """exp(2a), and 1 / (1 + exp(2a)) without a division, which costs twice the instructions."""
    # A NaN stays one, which a device's minimum would drop.
    exp = tl.exp2(tl.minimum(a * (2 * LOG2E), 100.0, propagate_nan=tl.PropagateNan.ALL))
    root = tl.rsqrt(1.0 + exp)
    inverse = root * root
    return exp, tl.fma(inverse, tl.fma(-inverse, 1.0 + exp, 1.0), inverse)


@triton.jit
def units_of(logits, scaling, terms):
    """Logits in the units of the factor; tanh to a few roundings, of either sign and any size."""
    if terms.softcap is None:
        return logits
    else:
        a = logits * scaling.inner
        _, inverse = _exp_of_twice(a)
        # Near 0 the difference from 1 would cancel: an odd polynomial, fitted to 1e-7 up to 0.6.
        square = a * a
        series = tl.fma(square, 0.015612517, -0.052211737)
        series = tl.fma(square, series, 0.13313115)
        series = tl.fma(square, series, -0.33332597)
        near = tl.fma(a * square, series, a)
        return tl.where(tl.abs(a) < 0.6, near, tl.fma(inverse, -2.0, 1.0))


@triton.jit
def slopes_of(logits, scaling):
    """The derivative of tanh, 1 - unit^2, as a product: nothing cancels where it is small."""
    exp, inverse = _exp_of_twice(logits * scaling.inner)
    return 4.0 * exp * inverse * inverse


@triton.jit
def exponents_of(units, shift, scaling):
    """Powers of 2 that the softmax sums: one rounding, so that a common offset cancels."""
    return tl.fma(units, scaling.factor, -shift)


@triton.jit
def shift_of(top, scaling, terms):
    """What exponents are relative to, where ``top`` is the largest logit."""
    return units_of(top, scaling, terms) * scaling.factor
