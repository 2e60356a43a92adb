"""Triton kernels of the loss from logits, each followed by the function that launches it.

A row is one position: V logits. Two families do the same work:

- streamed rows (V > ``SMALL_VOCAB``): one program per row, the row read in blocks of
  ``REPEAT * LANES * VECTOR`` logits, one lane per thread, 16 bytes per load. Every lane keeps its
  own running maximum and sum, so that nothing crosses lanes before the row's end.
- small rows: several rows per program, each held in registers.

Bytes moved, for N rows of V logits of b bytes: the loss reads N*V*b; loss and gradient together
read and write N*V*b each; the gradient alone, from saved row statistics, the same again. The
second read of a streamed row comes from the cache as long as all rows in flight fit in it.

Numbers are compiled with ``enable_fp_fusion=False``; what must be fused says ``tl.fma``. A shift
that is rounded once and then used everywhere cancels exactly, at any logit offset; a product the
compiler fuses into one use of it and not into another does not. A row whose largest logit is beyond
1.8e8 in size gives NaN: there fp32 shifts are too coarse for an exact loss. No atomics: two runs
give the same bits. The formula of the loss is in ``reference.py``.

A loss with more than two penalties (``terms.py``) is compiled from the same kernels: they take a tuple
of what its terms need, in which None compiles to nothing.

Reading order: ``tiles`` and ``spacing`` (how rows are cut, and where they lie), ``scores`` (from a
logit to an exponent), ``weights`` and ``row_statistics`` (what is kept of a row), ``term_arguments``
(the terms as kernels take them), ``streamed_rows`` with its ``blocks`` and ``first_maximum`` and
``small_rows`` (how either family reads and writes), ``upstream`` (what a gradient is made for), then the kernels: ``loss``, ``gradient``,
``slices``, ``case_sums``, ``rescale``.
"""

from .case_sums import launch_case_sums
from .device import is_interpreted
from .gradient import empty_gradient_like, have_one_phase, launch_gradient
from .loss import launch_loss, launch_loss_and_gradient
from .rescale import launch_rescale
from .row_statistics import N_STATISTICS, RowStatistics, columns, n_statistics, row_values
from .slices import launch_combine, launch_slice, message_size
from .tiles import SMALL_VOCAB, Tile, row_phase

__all__ = [
    "N_STATISTICS",
    "SMALL_VOCAB",
    "RowStatistics",
    "Tile",
    "columns",
    "empty_gradient_like",
    "have_one_phase",
    "is_interpreted",
    "launch_case_sums",
    "launch_combine",
    "launch_gradient",
    "launch_loss",
    "launch_loss_and_gradient",
    "launch_rescale",
    "launch_slice",
    "message_size",
    "n_statistics",
    "row_phase",
    "row_values",
]
