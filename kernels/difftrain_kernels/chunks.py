"""One pass over a linear head in chunks of tokens: losses, and the gradients of hidden, weight and bias.

One buffer of chunk x V holds the logits of a chunk and then, in place where the kernel runs, their
gradient, from which the chunk's share of every gradient is made before the next chunk comes.

Positions without a gradient (ignored, or of weight 0). On the CPU their rows are left out of the
backward products. Measured on one core, 1024 positions, D = 2048, V = 8192, fp32: beyond the loss
alone, the gradients take 1.00 s with all rows, 0.73 s with half of them ignored, 0.33 s with nine
tenths; loss and gradients take 1.76 s, and 0.78 s where every weight is 0.

On a GPU the rows are multiplied, as zeros. To leave them out, the host must know how many there
are, and reading that number stops it until the GPU has caught up: once per step for ignored rows,
once per chunk for weights, which depend on the logits. A partition on the device gathers the zeros
but does not help, since the host sets the size of a matrix product; torch's grouped product reads
sizes on the device, but cannot add to an fp32 sum. (Not measured on a GPU.) Who knows on the host
which positions count can pass those alone, with reduction "sum", and divide by N.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .implementation import row_gradients, score_rows
from .terms import PLAIN, Terms

# 256 MiB hold 2560 bf16 rows at V = 50304 and 1024 at V = 128256. A chunk reads and writes the fp32
# sum of the weight's gradient, 8 bytes per element against 2 * rows FLOP: on an H100 (about 7e14
# FLOP/s and 3e12 bytes/s) the product hides that traffic from about 900 rows on.
DEFAULT_WORKSPACE_MIB = 256
MAX_CHUNK_TOKENS = 4096
TILE_ROWS = 128  # chunks are a multiple of it: a matrix product works on tiles of so many rows


def row_bytes(vocab_size: int, dtype: torch.dtype, uses_triton: bool, terms: Terms = PLAIN) -> int:
    """Bytes that one position takes in a chunk.

    The kernel works in place on rows padded to 16 bytes. The reference also makes up to three rows
    in fp32 (fp64 for fp64) at a time, and five where there are terms.
    """
    if uses_triton:
        return -(-vocab_size * dtype.itemsize // 16) * 16
    wide = torch.promote_types(dtype, torch.float32).itemsize
    return vocab_size * (dtype.itemsize + (3 if terms == PLAIN else 5) * wide)


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
    """In what the gradient of the hidden states is made; the other two are made in fp32 (fp64)."""
    # CPUs multiply narrow floats slowly, where they can at all; there the rows are made wide too.
    return dtype if device.type == "cuda" or uses_triton else torch.promote_types(dtype, torch.float32)


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
    chunk_tokens: int
    dtype: torch.dtype
    uses_triton: bool

    @classmethod
    def plan(
        cls, vocab_size: int, terms: Terms, y: Tensor, mask_id: int, ignore_index: int, reduction: str,
        dtype: torch.dtype, uses_triton: bool, chunk_tokens: int | None, workspace_bytes: int,
        upstream_scale: float | None = None,
    ) -> ChunkedLoss:  # fmt: skip
        """How to compute one call's loss; y is (N,)."""
        n = len(y)
        if chunk_tokens is None:
            bytes_per_row = row_bytes(vocab_size, dtype, uses_triton, terms)
            chunk_tokens = choose_chunk_tokens(n, bytes_per_row, workspace_bytes / 2**20)
        made_for = upstream_of_gradients(n, reduction, dtype, upstream_scale)
        divisor = max(1, n) if reduction == "mean" else 1
        return cls(
            y, mask_id, ignore_index, terms, reduction, made_for, divisor, chunk_tokens, dtype, uses_triton
        )

    def run(self, hidden, weight, bias, needs=(False,) * 3, *, weighting=None, saved=None, upstream=None):
        """One pass over the chunks: (statistics of all rows, gradients of hidden, weight and bias).

        Args:
            needs: which of the three gradients are wanted.
            weighting: what the weights follow from: x (N,), pk and pm.
            saved: instead of it, the statistics of an earlier pass.
            upstream: (N,) or 0-d factor of each row's gradient; 1 by default.
        """
        n, vocab_size = len(self.y), len(weight)
        parts = []
        with torch.no_grad():
            gradients = _Gradients(hidden, weight, needs, self) if any(needs) else None
            weight = weight.to(self.dtype)
            bias = None if bias is None else bias.to(self.dtype)
            buffer = self._buffer(min(n, self.chunk_tokens), vocab_size, hidden.device)
            for start in range(0, max(n, 1), self.chunk_tokens):
                rows = slice(start, start + self.chunk_tokens)
                terms = self.terms.of_rows(rows)
                is_left_out = self.y[rows] == self.ignore_index
                if terms.token_weights is not None:
                    wide = torch.promote_types(self.dtype, torch.float32)
                    is_left_out |= terms.token_weights.to(wide) == 0
                # A NaN in a position that does not count would pass through 0 * NaN into the weight's gradient.
                states = rows_of(hidden, rows).to(self.dtype).masked_fill(is_left_out[:, None], 0.0)
                logits = buffer[: len(states)]
                if bias is None:
                    torch.mm(states, weight.t(), out=logits)
                else:
                    torch.addmm(bias, states, weight.t(), out=logits)
                part, gradient = self._score(
                    logits, rows, terms, bool(gradients), weighting, saved, upstream
                )
                parts.append(part)
                if gradients:
                    gradients.add(rows, gradient, states, weight)
        return self._join(parts), gradients.parts() if gradients else (None,) * 3

    def _buffer(self, rows: int, vocab_size: int, device) -> Tensor:
        """Uninitialised (rows, V); for the kernel every row begins at a 16-byte boundary."""
        per_16_bytes = 16 // self.dtype.itemsize if self.uses_triton else 1
        width = -(-vocab_size // per_16_bytes) * per_16_bytes
        return torch.empty(rows, width, dtype=self.dtype, device=device)[:, :vocab_size]

    def _score(self, logits, rows, terms, wants_gradient, weighting, saved, upstream):
        """A chunk's statistics and the gradient of its losses, where the kernel runs over the logits."""
        y = self.y[rows]
        if saved is not None:
            part = saved[0][rows], saved[1][:, rows].contiguous()
        else:
            x, pk, pm = weighting
            arguments = (logits, y, x[rows], self.mask_id, pk, pm, self.ignore_index)
            if self.uses_triton and wants_gradient:
                from . import triton_kernels

                return triton_kernels.launch_loss_and_gradient(
                    *arguments, terms=terms, upstream=1.0, divisor=1.0, gradient_out=logits
                )
            part = score_rows(self.uses_triton, *arguments, terms=terms)
        if not wants_gradient:
            return part, None
        upstream = part[1].new_ones(()) if upstream is None else upstream[rows]
        gradient = row_gradients(
            self.uses_triton, logits, y, part, upstream,
            divisor=1.0, mask_id=self.mask_id, terms=terms, overwrite=True,
        )  # fmt: skip
        return part, gradient

    def _join(self, parts: list[tuple]) -> tuple[Tensor, Tensor]:
        """Statistics of all rows from those of the chunks."""
        case, columns = zip(*parts, strict=True)
        return torch.cat(case), torch.cat(columns, dim=1)


def rows_of(hidden: Tensor, rows: slice) -> Tensor:
    """Some rows of (..., D), counted over all leading dimensions; of a view that is no (N, D) only they are copied."""
    if hidden.dim() == 2:
        return hidden[rows]
    length = hidden.shape[-2] if hidden.dim() > 1 else 1
    hidden = hidden.reshape(-1, length, hidden.shape[-1])
    place = torch.arange(*rows.indices(hidden.shape[0] * length), dtype=torch.int64, device=hidden.device)
    return hidden[place // max(1, length), place % max(1, length)]


class _Gradients:
    """The gradients of hidden, weight and bias for ``chunked.made_for``, filled chunk by chunk."""

    def __init__(self, hidden: Tensor, weight: Tensor, needs: tuple, chunked: ChunkedLoss):
        wide = torch.promote_types(chunked.dtype, torch.float32)
        narrow = gradient_dtype(chunked.dtype, hidden.device, chunked.uses_triton)
        self.hidden = hidden.new_empty(len(chunked.y), hidden.shape[-1], dtype=narrow) if needs[0] else None
        self.weight = weight.new_empty(weight.shape, dtype=wide) if needs[1] else None
        self.bias = weight.new_zeros(len(weight), dtype=wide) if needs[2] else None
        self.scale = chunked.made_for / chunked.divisor
        self.compacts = hidden.device.type == "cpu" and not chunked.uses_triton
        self.is_first = True

    def add(self, rows: slice, gradient: Tensor, states: Tensor, weight: Tensor) -> None:
        """One chunk: its rows of the gradient of hidden, and its share of the other two."""
        live = None
        if self.compacts:
            live = gradient.ne(0).any(1).nonzero().squeeze(1)
            if len(live) < len(gradient):
                gradient, states = gradient[live], states[live]
            else:
                live = None
        if self.hidden is not None and live is None:
            _add_product(self.hidden[rows], gradient, weight, self.scale, 0)
        elif self.hidden is not None:
            product = self.hidden.new_empty(len(live), self.hidden.shape[1])
            _add_product(product, gradient, weight, self.scale, 0)
            self.hidden[rows].zero_().index_copy_(0, live, product)
        if self.weight is not None:
            _add_product(self.weight, gradient.t(), states, self.scale, 0 if self.is_first else 1)
        if self.bias is not None:
            self.bias.add_(gradient.sum(0, dtype=self.bias.dtype), alpha=self.scale)
        self.is_first = False

    def parts(self) -> tuple:
        return self.hidden, self.weight, self.bias


def _add_product(out: Tensor, a: Tensor, b: Tensor, alpha: float, beta: int) -> None:
    """out = beta * out + alpha * a @ b, rounded to out's dtype only; with beta 0 out may hold anything."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=beta, alpha=alpha, out=out)
    elif out.is_cuda:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)
    else:
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, alpha=alpha, out=out)
