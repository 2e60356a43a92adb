"""A user's program, for the type checker (make types): each name of the face as it is meant to be used. It is not run."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from typing_extensions import assert_type

import difftrain
from difftrain_kernels import CaseTable

config = difftrain.Config(data="text.txt", out_dir="runs/mine", max_iters=100)
losses: list[float] = []


def look(record: dict[str, Any]) -> bool:
    losses.append(record["loss"])
    return bool(record["loss"] < 1.0)


try:
    run = difftrain.train(
        config, on_evaluation=look, on_step=lambda record: print(record["step"]), progress=print
    )
except (difftrain.UserError, difftrain.TrainingFailed) as error:
    raise SystemExit(str(error)) from None
assert_type(run, difftrain.Run)
assert_type(run.config, difftrain.Config)
assert_type(run.state, str)
assert_type(run.training["loss"], np.ndarray[Any, Any])
assert_type([saved.step for saved in run.checkpoints if saved.is_best], list[int])
assert_type(run.verify(), dict[int, str])

for place in (run, run.path, "runs/mine", run.checkpoints[-1]):
    model = difftrain.load(place, "latest", device="cpu")
ids = torch.tensor([model.tokenizer.encode("def ")])
assert_type(model.logits(ids), torch.Tensor)
assert_type(model.sample(3, length=40, prompt="def ", temperature=0.5), list[str])
assert_type([edit.new for edit in model.repair("def add").edits], list[str | None])
assert_type(model.evaluate("def add", levels=[15, 50]), dict[str, Any])
assert_type(model.module.training, bool)

pk, pm = difftrain.masking_penalties(50, config)
assert_type(difftrain.learning_rate(50, config), float)
difftrain.fused_diffusion_loss(model.logits(ids), ids, ids, 4, pk, pm).backward()
loss, cases = difftrain.fused_linear_diffusion_loss(
    torch.zeros(4, 2), torch.zeros(5, 2), torch.zeros(4), torch.zeros(4), 4, pk, pm, return_cases=True
)
table: CaseTable = cases
version: str = difftrain.__version__
checked: Callable[[int, difftrain.Config], tuple[float, float]] = difftrain.masking_penalties
difftrain.no_such_name  # type: ignore[attr-defined]  # noqa: B018
difftrain.train({})  # type: ignore[arg-type]
difftrain.train(config, on_step=3)  # type: ignore[arg-type]
model.sample(length="40")  # type: ignore[arg-type]
