"""Counts what the kernels of the loss from logits launch and move, by the rows that they write."""

import torch

from difftrain_kernels import triton_kernels
from difftrain_kernels.triton_kernels import gradient as gradient_file

UNTOUCHED = 77.0


class Traffic:
    """Launches since it was last read, and what they moved: bytes per bf16 logit, by the rows that were written.

    Counted on what the kernels leave in buffers whose every element was set before.
    """

    def __init__(self):
        self.launches, self.moved = [], 0.0

    def read(self):
        found = self.launches, self.moved
        self.launches, self.moved = [], 0.0
        return found

    def note(self, name, moved):
        self.launches.append(name)
        self.moved += moved

    def watch(self, monkeypatch):
        """Every launch from here on."""
        loss, both, backward = (
            getattr(triton_kernels, f"launch_{n}") for n in ("loss", "loss_and_gradient", "gradient")
        )

        def share(buffer):
            return (buffer != UNTOUCHED).any(-1).float().mean().item()

        def launch_loss(*arguments, **options):
            self.note("loss", 2)
            return loss(*arguments, **options)

        def launch_both(logits, *arguments, gradient_out=None, **options):
            gradient_out = gradient_file.gradient_buffer(logits, gradient_out).fill_(UNTOUCHED)
            found = both(logits, *arguments, gradient_out=gradient_out, **options)
            self.note("loss and gradient", 2 + 2 * share(gradient_out))
            return found

        def launch_gradient(logits, *arguments, gradient_out=None, **options):
            buffer = gradient_file.gradient_buffer(logits, gradient_out)
            before = buffer.clone()
            found = backward(logits, *arguments, gradient_out=buffer.fill_(UNTOUCHED), **options)
            assert found is buffer
            self.note("gradient", 4 * share(buffer))
            written = (buffer != UNTOUCHED).any(-1, keepdim=True)
            return buffer.copy_(torch.where(written, buffer, before))

        for name, launch in (
            ("loss", launch_loss),
            ("loss_and_gradient", launch_both),
            ("gradient", launch_gradient),
        ):
            monkeypatch.setattr(triton_kernels, f"launch_{name}", launch)
