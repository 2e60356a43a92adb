"""Whether a step counts: the device decides, and the host reads a step later what it decided."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from difftrain.config import Config
from difftrain.runtime import Runtime

# Steps over which the usual gradient norm is averaged, and before which no step is a spike.
SPIKE_MEMORY = 100


class TrainingFailed(RuntimeError):
    """The run ended because its steps could not be applied, or another process was lost."""


@dataclass(frozen=True)
class Verdict:
    """What the host learns of a step: its gradient's norm, and which flags any process had set at it."""

    norm: float = math.nan
    is_stopping: bool = False
    has_failed: bool = False


class Judge:
    """Leaves out steps that are no good, counts them, and ends the run after too many in a row.

    A step is no good where its loss or gradient is not finite on any process, or where its gradient's
    norm is a spike: ``spike_factor`` times the usual one. The device compares, and the optimiser leaves the
    step out there; the host begins to copy the answer and reads it in :meth:`settle`, which comes after the
    next step's passes are under way and before that step is judged. So the device always has work while the
    host waits, and the usual norm is known up to the step before when a step is judged: the host's state is
    a function of the steps alone, whenever it is read.
    """

    def __init__(self, config: Config, runtime: Runtime, say: Callable[[str], None]):
        self._config, self._runtime, self._say = config, runtime, say
        self._bad_steps = self.skipped_steps = 0  # not applied: in a row, in all
        self._usual_norm, self._norms = 0.0, 0  # running mean of the gradient's norm, and of how many steps
        self._unread: tuple[int, Callable[[], list[float]]] | None = None  # the step judged last

    def rules_out(self, step: int, norm: Tensor, loss_sum: Tensor, *flags: bool) -> Tensor:
        """Whether the optimiser must leave the step out, 0-d fp32 on the device: 1 or 0. Waits for nothing.

        Args:
            step: its number.
            norm: 0-d, of the gradient of all processes.
            loss_sum: 0-d, of this process.
            flags: ``is_stopping`` and ``has_failed`` of this process.
        """
        assert self._unread is None, "the step before has not been settled"
        is_bad = (norm + loss_sum).isfinite().logical_not(), norm > self._most()
        told = (torch.full_like(norm, flag) for flag in flags)
        answer = torch.stack((*(t.to(norm.dtype) for t in is_bad), *told))
        answer = self._runtime.sum_over_processes(answer)
        self._unread = step, self._runtime.read_later(torch.cat((norm.view(1), answer)))
        return answer[:2].any().float()

    def settle(self) -> Verdict:
        """Read what was decided of the step judged last, if that has not been read, and count it.

        Raises:
            TrainingFailed: it was the last of ``max_bad_steps`` in a row.
        """
        if self._unread is None:
            return Verdict()
        (step, read), self._unread = self._unread, None
        norm, *answer = read()
        not_finite, is_spike, is_stopping, has_failed = (number > 0 for number in answer)
        if not_finite:
            self._leave_out(step, "its loss or gradient is not finite")
        elif is_spike:
            self._remember(self._most())
            self._leave_out(step, f"its gradient's norm {norm:.3g} is a spike")
        else:
            self._remember(norm)
            self._bad_steps = 0
        return Verdict(norm, is_stopping, has_failed)

    def _most(self) -> float:
        """The largest norm that is no spike."""
        factor = self._config.spike_factor
        return factor * self._usual_norm if factor and self._norms == SPIKE_MEMORY else math.inf

    def _remember(self, norm: float) -> None:
        """Move the usual norm; a spike moves it as far as no spike could, so that a lasting change is accepted."""
        self._norms = min(self._norms + 1, SPIKE_MEMORY)
        self._usual_norm += (norm - self._usual_norm) / self._norms

    def _leave_out(self, step: int, reason: str) -> None:
        self._bad_steps, self.skipped_steps = self._bad_steps + 1, self.skipped_steps + 1
        self._say(f"warning: step {step} is not applied: {reason}")
        if self._bad_steps >= self._config.max_bad_steps:
            raise TrainingFailed(
                f"{self._bad_steps} steps in a row had a non-finite loss or gradient, or a spike, the last was "
                f"{step}: {reason}; the checkpoints in {self._config.out_dir} are as they were"
            )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; every step must have been settled."""
        assert self._unread is None, "a checkpoint must hold the verdict on the step before it"
        return {
            "bad_steps": self._bad_steps,
            "skipped_steps": self.skipped_steps,
            "usual_norm": self._usual_norm,
            "norms": self._norms,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up a state; raises KeyError, TypeError or ValueError where it is none."""
        self._bad_steps, self.skipped_steps = int(state["bad_steps"]), int(state["skipped_steps"])
        self._usual_norm, self._norms = float(state["usual_norm"]), int(state["norms"])
