"""Saving while training goes on: the loop waits for a copy of the state, a thread writes it."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from difftrain.checkpoints.folder import folder_aside
from difftrain.checkpoints.writing import complete_checkpoint, save_checkpoint, write_shards, writing_aside
from difftrain.config import Config
from difftrain.data.vocabulary import Vocabulary
from difftrain.model import Transformer, optimizer_tensors
from difftrain.parallel import is_sharded, reshard, whole
from difftrain.runtime import Runtime


class CheckpointSaver:
    """Saves the checkpoints of one run, one at a time; a context manager that ends with the last one written.

    The main process copies weights and optimiser state to host memory and writes them in a thread. A
    kill meanwhile costs that checkpoint, never an earlier one. Where the state is shared out among
    processes (FSDP), all of them write their shares and wait until the checkpoint is complete.
    """

    def __init__(self, run_dir: Path, config: Config, vocabulary: Vocabulary, runtime: Runtime):
        self._run_dir, self._config, self._vocabulary = run_dir, config, vocabulary
        self._runtime = runtime
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(
        self,
        step: int,
        model: Transformer,
        optimizer: Any,
        state: dict[str, Any],
        *,
        best_step: int | None,
    ) -> None:
        """Save this moment's state; every process must call. Raises what an earlier save failed with."""
        self.finish()
        if is_sharded(model):
            self._save_shards(step, model, optimizer, state, best_step)
        elif self._runtime.is_main:
            weights, moments = (
                _copies(dict(model.named_parameters())),
                _copies(optimizer_tensors(model, optimizer)),
            )
            self._thread = threading.Thread(
                target=self._write, args=(step, weights, moments, state, best_step), daemon=True
            )
            self._thread.start()

    @property
    def has_failed(self) -> bool:
        """Whether a save in the background has failed; :meth:`finish` raises its error."""
        return self._error is not None

    def finish(self) -> None:
        """Wait for the save in the background; raises what it failed with."""
        if self._thread:
            self._thread.join()
        self._thread = None
        if self._error:
            raise self._error

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self.finish()
        elif self._thread and not issubclass(kind, KeyboardInterrupt):  # who stops at once does not wait
            self._thread.join()

    def _write(
        self, step: int, weights: dict, moments: dict, state: dict[str, Any], best_step: int | None
    ) -> None:
        try:
            save_checkpoint(
                self._run_dir,
                step,
                weights,
                moments,
                state,
                self._config,
                self._vocabulary,
                best_step=best_step,
            )
        except Exception as error:  # whatever it is, the loop must hear of it
            self._error = error

    def _save_shards(
        self, step: int, model: Transformer, optimizer: Any, state: dict[str, Any], best_step: int | None
    ) -> None:
        is_main = self._runtime.is_main
        reshard(model)
        weights = {}
        for name, parameter in model.named_parameters():
            gathered = whole(parameter.detach())
            if is_main:
                weights[name] = gathered.cpu()
        with ExitStack() as stack:
            aside = self._runtime.main_first(
                lambda: (
                    stack.enter_context(writing_aside(self._run_dir, step))
                    if is_main
                    else folder_aside(self._run_dir, step)
                )
            )
            write_shards(aside, optimizer_tensors(model, optimizer))
            self._runtime.main_first(
                lambda: (
                    is_main
                    and complete_checkpoint(
                        aside, weights, state, self._config, self._vocabulary, best_step=best_step
                    )
                )
            )


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in host memory, which further steps do not change."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
