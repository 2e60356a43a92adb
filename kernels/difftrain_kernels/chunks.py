"""One pass over a linear head in chunks of tokens: losses, and the gradients of hidden, weight and bias.

One buffer of chunk x V holds the logits of a chunk and then, in place where the kernel runs, their
gradient, from which the chunk's share of every gradient is made before the next chunk comes.

Positions that do not count take part in nothing where the host knows how many they are (``positions.py``).
On the CPU neither do those that count but have no gradient, since the model's answer gave them weight 0: their
rows are left out of the backward products. Measured on one core, 1024 positions, D = 2048, V = 8192, fp32: beyond
the loss alone, the gradients take 1.00 s with all rows, and loss and gradients 1.76 s; 0.78 s where every
weight is 0. On a GPU those are multiplied, as zeros: which they are is known only after the loss of each chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .implementation import divisor_of, load_kernels, no_grad, row_gradients, score_rows
from .positions import TILE_ROWS, Positions, TakenRows, check_enough, choose_positions, part_of, slices_of
from .stepwise_reference import scores_of
from .terms import PLAIN, Terms
from .weight_sums import ROUNDING_BYTES, SumPlan, WeightSum, add_product, plan_sums

# 256 MiB hold 2560 bf16 rows at V = 50304 and 1024 at V = 128256. A chunk reads and writes the fp32
# sum of the weight's gradient, 8 bytes per element against 2 * rows FLOP: on an H100 (about 7e14
# FLOP/s and 3e12 bytes/s) the product hides that traffic from about 900 rows on.
DEFAULT_WORKSPACE_MIB = 256
MAX_CHUNK_TOKENS = 4096
MEMORY_PER_WORKSPACE = 4  # what a call may hold beside inputs and gradients, all together
LIBRARY_BYTES = 32 * 2**20  # the workspace that torch gives cuBLAS on sm_90
BYTES_PER_POSITION = 128  # labels and statistics of a row, gathered and spread, at most


def row_bytes(vocab_size: int, dtype: torch.dtype, uses_triton: bool, terms: Terms = PLAIN) -> int:
    """Bytes that one position takes in a chunk.

    The kernel works in place on rows padded to 16 bytes. The reference also makes up to three rows
    in fp32 (fp64 for fp64) at a time, and five where there are terms.
    """
    if uses_triton:
        return -(-vocab_size * dtype.itemsize // 16) * 16
    wide = sum_dtype(dtype).itemsize
    return vocab_size * (dtype.itemsize + (3 if terms is PLAIN or terms == PLAIN else 5) * wide)


def choose_chunk_tokens(n_tokens: int, bytes_per_row: int, workspace_mib: float) -> int:
    """Positions per chunk: as many as fit, at most ``MAX_CHUNK_TOKENS``, all chunks about equal."""
    most = max(1, min(MAX_CHUNK_TOKENS, int(workspace_mib * 2**20 / bytes_per_row)))
    if most > TILE_ROWS:
        most -= most % TILE_ROWS
    even = -(-n_tokens // max(1, -(-n_tokens // most)))
    return min(most, -(-max(1, even) // TILE_ROWS) * TILE_ROWS)


def upstream_of_gradients(
    n_tokens: int, reduction: str, dtype: torch.dtype, upstream_scale: float | None = None
) -> float:
    """The upstream gradient for which the gradients are made in forward."""
    if reduction == "none":
        return 1.0
    if dtype != torch.float16:
        return upstream_scale or 1.0
    # In fp16 a gradient divided by N vanishes before the upstream gradient, a loss scale, lifts it.
    return float(max(1, n_tokens)) if reduction == "mean" else 1.0


def gradient_dtype(dtype: torch.dtype, device: torch.device, uses_triton: bool) -> torch.dtype:
    """In what the gradient of the hidden states is made."""
    # CPUs multiply narrow floats slowly, where they can at all; there the rows are made wide too.
    return dtype if device.type == "cuda" or uses_triton else sum_dtype(dtype)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """In what the gradients of weight and bias are summed."""
    return torch.float64 if dtype is torch.float64 else torch.float32


@dataclass(frozen=True)
class ChunkedLoss:
    """One call's targets and chunks. Rows are positions; (..., D) hidden, (V, D) weight."""

    y: Tensor
    mask_id: int
    ignore_index: int
    terms: Terms
    reduction: str
    made_for: float  # the upstream gradient for which the gradients are made
    divisor: int
    dtype: torch.dtype
    uses_triton: bool
    chunk_tokens: int | None
    workspace_bytes: int
    counted: int | None  # at least as many as positions count

    @classmethod
    def plan(
        cls, terms: Terms, y: Tensor, mask_id: int, ignore_index: int, reduction: str, dtype: torch.dtype,
        uses_triton: bool, chunk_tokens: int | None, workspace_bytes: int, counted: int | None,
        upstream_scale: float | None = None,
    ) -> ChunkedLoss:  # fmt: skip
        """How to compute one call's loss; y is (N,)."""
        n = y.shape[0]  # which the len of a tensor in a graph would make a constant
        made_for = upstream_of_gradients(n, reduction, dtype, upstream_scale)
        divisor = divisor_of(reduction, n)
        return cls(
            y, mask_id, ignore_index, terms, reduction, made_for, divisor, dtype, uses_triton, chunk_tokens,
            workspace_bytes, counted,
        )  # fmt: skip

    def kept(self) -> ChunkedLoss:
        """The same, for a backward before which a scale on the device may change."""
        terms = self.terms.kept()
        return self if terms is self.terms else replace(self, terms=terms)

    def run(
        self, hidden, weight, bias, needs=(False,) * 3, *, weighting=None, saved=None, upstream=None, into=None,
    ):  # fmt: skip
        """One pass over the chunks: (statistics of all rows, gradients of hidden, weight and bias).

        Args:
            needs: which of the three gradients are wanted.
            weighting: what the weights follow from: x (N,), pk and pm.
            saved: instead of it, the statistics of an earlier pass.
            upstream: (N,) or 0-d factor of each row's gradient; 1 by default.
            into: a gradient (V, D) that the weight's is added to, and that is given back.
        """
        with no_grad():
            may_look = hidden.device.type == "cpu" and not self.uses_triton
            positions = choose_positions(self._is_left_out(), self.counted, may_look=may_look)
            rows = TakenRows.of(positions, hidden, self.y, self.terms, weighting, saved, upstream)
            gradients = _Gradients(hidden, weight, needs, self, positions, into) if any(needs) else None
            head = weight.to(self.dtype), None if bias is None else bias.to(self.dtype)
            statistics = self._first_round(rows, *head, gradients, may_look)
            for words in gradients.further_rounds() if gradients else ():
                self._further_round(rows, *head, statistics, gradients.weight, words)
        return positions.spread(*statistics), gradients.parts() if gradients else (None,) * 3

    def _is_left_out(self) -> Tensor:
        """Which positions do not count, (N,) bool."""
        is_left_out = self.y == self.ignore_index
        if self.terms.token_weights is not None:
            is_left_out |= self.terms.token_weights.reshape(-1).to(sum_dtype(self.dtype)) == 0
        return is_left_out

    def check_counted(self) -> None:
        """Raise ValueError where more positions count than was stated; waits for a GPU."""
        if self.counted is not None:
            check_enough(self.counted, int((~self._is_left_out()).sum()))

    def _first_round(self, rows, weight, bias, gradients, may_look) -> tuple[Tensor, Tensor]:
        """The statistics of the rows, and all gradients but those of words left to further rounds."""
        vocab_size = weight.shape[0]
        size = self.chunk_tokens or self.chunk_size(len(rows), vocab_size)
        buffer = self._buffer(min(len(rows), size), vocab_size, weight.device)
        parts = []
        for chunk in slices_of(len(rows), size):
            states = rows.states(chunk, self.dtype)
            logits = product(states, weight, bias, buffer)
            part, gradient = self._score(logits, rows, chunk, bool(gradients) and not may_look)
            parts.append(part)
            if gradients and not may_look:
                gradients.add(chunk, gradient, states, weight)
            elif gradients:
                self._add_live(gradients, part, logits, states, rows, chunk, weight)
        if gradients:
            gradients.end_round()
        return parts[0] if len(parts) == 1 else _joined(parts)

    def _further_round(self, rows, weight, bias, statistics, weight_sum, words) -> None:
        """The weight's gradient for some words: their logits again, and of these the gradient."""
        weight, bias = weight[words], None if bias is None else bias[words]
        vocab_size = weight.shape[0]
        size = self.chunk_tokens or self.chunk_size(len(rows), vocab_size)
        buffer = self._buffer(min(len(rows), size), vocab_size, weight.device)
        for chunk in slices_of(len(rows), size):
            states = rows.states(chunk, self.dtype)
            logits = product(states, weight, bias, buffer)
            part = statistics[0][chunk], statistics[1][:, chunk].contiguous()
            gradient = row_gradients(
                self.uses_triton, logits, rows.y[chunk] - words.start, part, rows.upstream_of(chunk, part),
                divisor=1.0, mask_id=self.mask_id - words.start, terms=self.terms, overwrite=True,
            )  # fmt: skip
            weight_sum.add(gradient, states, self.scale)
        weight_sum.end()

    def _buffer(self, rows: int, vocab_size: int, device) -> Tensor:
        """Uninitialised (rows, V); for the kernel every row begins at a 16-byte boundary."""
        per_16_bytes = 16 // self.dtype.itemsize if self.uses_triton else 1
        width = -(-vocab_size // per_16_bytes) * per_16_bytes
        buffer = torch.empty(rows, width, dtype=self.dtype, device=device)
        return buffer if width == vocab_size else buffer.narrow(1, 0, vocab_size)

    def _score(self, logits, rows, chunk, wants_gradient):
        """A chunk's statistics and the gradient of its losses, where the kernel runs over the logits."""
        y, terms = part_of(rows.y, chunk), rows.terms.of_rows(chunk)
        if rows.saved is not None:
            part = rows.saved[0][chunk], rows.saved[1][:, chunk].contiguous()
        else:
            x, pk, pm = rows.weighting
            arguments = (logits, y, part_of(x, chunk), self.mask_id, pk, pm, self.ignore_index)
            if self.uses_triton and wants_gradient:
                return load_kernels().launch_loss_and_gradient(
                    *arguments, terms=terms, upstream=1.0, divisor=1.0, gradient_out=logits
                )
            part = score_rows(self.uses_triton, *arguments, terms=terms)
        if not wants_gradient:
            return part, None
        return part, row_gradients(
            self.uses_triton, logits, y, part, rows.upstream_of(chunk, part),
            divisor=1.0, mask_id=self.mask_id, terms=terms, overwrite=True,
        )  # fmt: skip

    def _add_live(self, gradients, part, logits, states, rows, chunk, weight) -> None:
        """The reference's gradients, without rows whose losses weigh nothing; the host looks for these."""
        upstream, terms = rows.upstream_of(chunk, part), rows.terms.of_rows(chunk)
        scores = scores_of(part, terms)
        has_gradient = scores.factor != 0
        if terms.z_loss:
            has_gradient |= scores.others["z_factor"] != 0
        y, live = rows.y[chunk], None
        if not has_gradient.all():
            live = has_gradient.nonzero().squeeze(1)
            y, logits, states, part = y[live], logits[live], states[live], (part[0][live], part[1][:, live])
            upstream = upstream[live] if upstream.dim() else upstream
            terms = terms.of_rows(live)
        options = {"divisor": 1.0, "mask_id": self.mask_id, "terms": terms}
        gradient = row_gradients(False, logits, y, part, upstream, **options)
        gradients.add(chunk, gradient, states, weight, live)

    # Memory -----------------------------------------------------------------------------------------

    @property
    def scale(self) -> float:
        """Of the gradients, beside those of row losses."""
        return self.made_for / self.divisor

    def chunk_size(self, n_tokens: int, vocab_size: int) -> int:
        """Positions per chunk, of so many, where a chunk holds the logits of so many words."""
        bytes_per_row = row_bytes(vocab_size, self.dtype, self.uses_triton, self.terms)
        return choose_chunk_tokens(n_tokens, bytes_per_row, self.workspace_bytes / 2**20)

    def bytes_beside_sums(self, vocab_size: int, width: int) -> int:
        """Memory of a pass beside inputs, gradients and the sums of the weight's; without a cast weight."""
        # The largest: what a graph gives must not hang on how many positions there are.
        chunk = self.chunk_tokens or self.chunk_size(MAX_CHUNK_TOKENS, vocab_size)
        # The logits; states as they are gathered, and as they are multiplied; the product that is put in place.
        chunk_bytes = chunk * (
            row_bytes(vocab_size, self.dtype, self.uses_triton, self.terms)
            + 3 * width * self.dtype.itemsize
        )
        return chunk_bytes + self.y.shape[0] * BYTES_PER_POSITION + ROUNDING_BYTES + LIBRARY_BYTES

    def plan_sums(
        self, vocab_size: int, width: int, dtype: torch.dtype, *, is_there: bool = False
    ) -> SumPlan:
        """How a pass sums the gradient of a weight (V, D) of this dtype; see ``weight_sums.py``.

        Args:
            is_there: whether it is added to a gradient of that dtype.
        """
        sums = sum_dtype(self.dtype)
        rest = 0
        if dtype != sums:  # else the sums are the gradient
            rest = MEMORY_PER_WORKSPACE * self.workspace_bytes - self.bytes_beside_sums(vocab_size, width)
        # An fp16 sum that is rounded before the upstream gradient divides it could overflow.
        splits = self.uses_triton and (is_there or dtype == torch.bfloat16)
        return plan_sums(
            vocab_size, width, dtype, sums, max(self.workspace_bytes, rest),
            splits=splits, is_there=is_there,
        )  # fmt: skip

    def peak_bytes(self, vocab_size: int, width: int, dtype: torch.dtype) -> int:
        """Memory in use at most, beside what is passed in and the gradients; without a cast weight."""
        words = self.plan_sums(vocab_size, width, dtype).beside
        return self.bytes_beside_sums(vocab_size, width) + words * width * sum_dtype(self.dtype).itemsize


class _Gradients:
    """The gradients of hidden, weight and bias for ``chunked.made_for``, filled chunk by chunk."""

    def __init__(self, hidden, weight, needs, chunked: ChunkedLoss, positions: Positions, into):
        wide = sum_dtype(chunked.dtype)
        self.positions, self.scale = positions, chunked.scale
        self.hidden = self.weight = self.bias = None
        if needs[0]:
            narrow = gradient_dtype(chunked.dtype, hidden.device, chunked.uses_triton)
            self.hidden = positions.empty_gradient(hidden.shape[-1], narrow, hidden.device)
        if needs[1]:
            plan = chunked.plan_sums(
                *weight.shape, weight.dtype if into is None else into.dtype, is_there=into is not None
            )
            self.weight = WeightSum(weight, plan, wide, into)
        if needs[2]:
            self.bias = weight.new_zeros(len(weight), dtype=wide)
            if positions.missing is not None:
                self.bias += positions.poison()

    def add(self, chunk: slice, gradient: Tensor, states: Tensor, weight: Tensor, live=None) -> None:
        """One chunk: its rows of the gradient of hidden, and its share of the other two.

        Args:
            live: which of the chunk's rows these are, (rows,) int64; None: all. The others have no gradient.
        """
        if self.hidden is not None:
            index = self.positions.index
            index = live if index is None else index[chunk] if live is None else index[chunk][live]
            if index is None:
                add_product(part_of(self.hidden, chunk), gradient, weight, self.scale, 0)
            else:
                out = self.hidden
                if self.positions.index is None:
                    out = self.hidden[chunk].zero_()
                product = out.new_empty(len(gradient), out.shape[1])
                add_product(product, gradient, weight, self.scale, 0)
                out.index_copy_(0, index, product)
        if self.weight is not None:
            self.weight.add(gradient, states, self.scale)
        if self.bias is not None:
            self.bias.add_(gradient.sum(0, dtype=self.bias.dtype), alpha=self.scale)

    def end_round(self) -> None:
        if self.weight is not None:
            self.weight.end()

    def further_rounds(self):
        """The words of each round after the first, which has begun when it is given."""
        for words in self.weight.plan.rounds[1:] if self.weight is not None else ():
            self.weight.begin(words)
            yield words

    def parts(self) -> tuple:
        return self.hidden, None if self.weight is None else self.weight.gradient, self.bias


def product(states: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor) -> Tensor:
    """The logits of a chunk, in the buffer."""
    logits = part_of(buffer, slice(0, states.shape[0]))
    if bias is None:
        return torch.mm(states, weight.t(), out=logits)
    return torch.addmm(bias, states, weight.t(), out=logits)


def _joined(parts: list[tuple]) -> tuple[Tensor, Tensor]:
    """Statistics of all rows from those of the chunks."""
    case, columns = zip(*parts, strict=True)
    return torch.cat(case), torch.cat(columns, dim=1)
