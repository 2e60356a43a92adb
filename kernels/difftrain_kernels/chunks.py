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

from .cases import CaseTable
from .reference import diffusion_loss_reference

# 256 MiB hold 2560 bf16 rows at V = 50304 and 1024 at V = 128256. A chunk reads and writes the fp32
# sum of the weight's gradient, 8 bytes per element against 2 * rows FLOP: on an H100 (about 7e14
# FLOP/s and 3e12 bytes/s) the product hides that traffic from about 900 rows on.
DEFAULT_WORKSPACE_MIB = 256
MAX_CHUNK_TOKENS = 4096
TILE_ROWS = 128  # chunks are a multiple of it: a matrix product works on tiles of so many rows


def row_bytes(vocab_size: int, dtype: torch.dtype, uses_triton: bool) -> int:
    """Bytes that one position takes in a chunk.

    The kernel works in place on rows padded to 16 bytes. The reference also makes up to three rows
    in fp32 (fp64 for fp64) at a time.
    """
    if uses_triton:
        return -(-vocab_size * dtype.itemsize // 16) * 16
    return vocab_size * (dtype.itemsize + 3 * torch.promote_types(dtype, torch.float32).itemsize)


def choose_chunk_tokens(n_tokens: int, bytes_per_row: int, workspace_mib: float) -> int:
    """Positions per chunk: as many as fit, at most ``MAX_CHUNK_TOKENS``, all chunks about equal."""
    most = max(1, min(MAX_CHUNK_TOKENS, int(workspace_mib * 2**20 / bytes_per_row)))
    if most > TILE_ROWS:
        most -= most % TILE_ROWS
    even = -(-n_tokens // max(1, -(-n_tokens // most)))
    return min(most, -(-max(1, even) // TILE_ROWS) * TILE_ROWS)


@dataclass(frozen=True)
class ChunkedLoss:
    """One call's labels, penalties and chunks. Rows are positions; (N, D) hidden, (V, D) weight."""

    y: Tensor
    x: Tensor
    mask_id: int
    pk: float | Tensor
    pm: float | Tensor
    ignore_index: int
    reduction: str
    made_for: float  # the upstream gradient for which the gradients are made
    divisor: int
    chunk_tokens: int
    dtype: torch.dtype
    uses_triton: bool

    def run(self, hidden, weight, bias, needs=(False,) * 3, saved=None, upstream=None):
        """One pass over the chunks: (statistics of all rows, gradients of hidden, weight and bias).

        Args:
            needs: which of the three gradients are wanted.
            saved: the statistics of an earlier pass, where there was one.
            upstream: (N,) or 0-d factor of each row's gradient; 1 by default.
        """
        n, vocab_size = len(hidden), len(weight)
        parts = []
        with torch.no_grad():
            gradients = _Gradients(hidden, weight, needs, self) if any(needs) else None
            weight = weight.to(self.dtype)
            bias = None if bias is None else bias.to(self.dtype)
            buffer = self._buffer(min(n, self.chunk_tokens), vocab_size, hidden.device)
            for start in range(0, max(n, 1), self.chunk_tokens):
                rows = slice(start, start + self.chunk_tokens)
                is_ignored = (self.y[rows] == self.ignore_index)[:, None]
                # A NaN in a position that does not count would pass through 0 * NaN into the weight's gradient.
                states = hidden[rows].to(self.dtype).masked_fill(is_ignored, 0.0)
                logits = buffer[: len(states)]
                if bias is None:
                    torch.mm(states, weight.t(), out=logits)
                else:
                    torch.addmm(bias, states, weight.t(), out=logits)
                loss_of = self._by_triton if self.uses_triton else self._by_reference
                part, gradient = loss_of(logits, rows, bool(gradients), saved, upstream)
                parts.append(part)
                if gradients:
                    gradients.add(rows, gradient, states, weight)
        return self._join(parts), gradients.parts() if gradients else (None,) * 3

    def _buffer(self, rows: int, vocab_size: int, device) -> Tensor:
        """Uninitialised (rows, V); for the kernel every row begins at a 16-byte boundary."""
        per_16_bytes = 16 // self.dtype.itemsize if self.uses_triton else 1
        width = -(-vocab_size // per_16_bytes) * per_16_bytes
        return torch.empty(rows, width, dtype=self.dtype, device=device)[:, :vocab_size]

    def _arguments(self, rows: slice) -> tuple:
        return self.y[rows], self.x[rows], self.mask_id, self.pk, self.pm, self.ignore_index

    def _by_triton(self, logits, rows, wants_gradient, saved, upstream):
        """A chunk's statistics, and the gradient of its summed losses, written over the logits."""
        from . import triton_kernels as kernels

        if saved is not None:
            part = kernels.RowStatistics(saved[0][rows], saved[1][:, rows].contiguous())
            upstream = logits.new_ones((), dtype=torch.float32) if upstream is None else upstream[rows]
            return part, kernels.launch_gradient(
                logits, self.y[rows], part, upstream, divisor=1.0, gradient_out=logits
            )
        if not wants_gradient:
            return kernels.launch_loss(logits, *self._arguments(rows)), None
        return kernels.launch_loss_and_gradient(
            logits, *self._arguments(rows), upstream=1.0, divisor=1.0, gradient_out=logits
        )

    def _by_reference(self, logits, rows, wants_gradient, saved, upstream):
        """The same in eager PyTorch; the gradient is new."""
        logits = logits.detach().requires_grad_(wants_gradient)
        y, x, mask_id, pk, pm, ignore_index = self._arguments(rows)
        with torch.set_grad_enabled(wants_gradient):
            row_loss, table = diffusion_loss_reference(
                logits,
                y,
                x,
                mask_id,
                pk,
                pm,
                ignore_index=ignore_index,
                reduction="none",
                return_cases=True,
            )
        part = (row_loss.detach(), table.counts, table.nll, table.gap)
        if not wants_gradient:
            return part, None
        upstream = torch.ones_like(row_loss) if upstream is None else upstream[rows]
        return part, torch.autograd.grad(row_loss, logits, upstream)[0]

    def _join(self, parts: list[tuple]) -> tuple[Tensor, ...]:
        """Statistics of all rows from those of the chunks."""
        first, *others = zip(*parts, strict=True)
        if self.uses_triton:
            return torch.cat(first), torch.cat(others[0], dim=1)
        return torch.cat(first), *(torch.stack(other).sum(0) for other in others)

    def row_loss(self, statistics) -> Tensor:
        return statistics[1][0] if self.uses_triton else statistics[0]

    def table(self, statistics) -> CaseTable:
        if self.uses_triton:
            from . import triton_kernels as kernels

            statistics = (None, *kernels.launch_case_sums(kernels.RowStatistics(*statistics)))
        return CaseTable(*statistics[1:], self.y.numel())


class _Gradients:
    """The gradients of hidden, weight and bias for ``chunked.made_for``, filled chunk by chunk."""

    def __init__(self, hidden: Tensor, weight: Tensor, needs: tuple, chunked: ChunkedLoss):
        wide = torch.promote_types(chunked.dtype, torch.float32)
        # CPUs multiply narrow floats slowly, where they can at all; there the rows are made wide too.
        narrow = chunked.dtype if hidden.is_cuda or chunked.uses_triton else wide
        self.hidden = hidden.new_empty(hidden.shape, dtype=narrow) if needs[0] else None
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
