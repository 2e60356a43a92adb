"""Where a run computes: what is asked of CUDA, on a stand-in for it where there is none; and a run on CUDA."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from difftrain.config import Config
from difftrain.errors import UserError
from difftrain.reporting.log import FILE
from difftrain.runtime import Runtime, resolve_device, resolve_dtype, start_runtime
from difftrain.training.loop import train
from resume_runs import train_with_stop
from run_digests import digests_of

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.fixture
def two_gpus(monkeypatch):
    """CUDA with two devices as far as Python sees; what is made the current one goes into the list."""
    chosen, current = [], [1]

    def exchange(index):
        before, current[0] = current[0], index
        return before

    stand_ins = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "current_device": lambda: current[0],
        "_exchange_device": exchange,
        "_maybe_exchange_device": exchange,
        # Device 0 is older than bfloat16, which torch emulates there.
        "is_bf16_supported": lambda including_emulation=True: including_emulation or current[0] == 1,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    return chosen


@pytest.mark.parametrize(
    ("name", "number", "dtype"),
    [("auto", 1, torch.bfloat16), ("cuda", 1, torch.bfloat16), ("cuda:0", 0, torch.float32)],
)
def test_a_cuda_device_has_its_number_and_the_dtype_that_it_computes_in(name, number, dtype, two_gpus):
    """torch's own set_device refuses a device without a number."""
    with start_runtime(Config(device=name)) as runtime:
        assert (runtime.device, runtime.dtype) == (torch.device("cuda", number), dtype)
    assert two_gpus == [number]
    assert resolve_device(name) == torch.device("cuda", number)


@pytest.mark.parametrize(
    ("name", "device", "dtype"),
    [
        ("auto", "cuda:0", torch.float32),  # it only emulates bfloat16
        ("auto", "cuda:1", torch.bfloat16),
        ("auto", "cpu", torch.float32),
        ("bfloat16", "cpu", torch.bfloat16),
        ("float64", "cuda:0", torch.float64),
    ],
)
@pytest.mark.usefixtures("two_gpus")
def test_a_dtype_is_that_of_its_name_and_auto_what_the_device_has(name, device, dtype):
    assert resolve_dtype(name, torch.device(device)) == dtype


def test_what_goes_to_a_gpu_is_pinned_and_nothing_waits_for_its_copy(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: asked.append("pinned") or tensor)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *a, **k: asked.append((a, k)) or tensor)
    gpu = torch.device("cuda", 0)
    Runtime(gpu, torch.float32, 0, 1).to_device(torch.zeros(2))
    assert asked == ["pinned", ((gpu,), {"non_blocking": True})]


@pytest.mark.parametrize(("name", "got"), [("int8", "'int8'"), ("", "''")])
def test_a_dtype_that_is_none_is_named(name, got):
    told = f"dtype must be auto, float32, bfloat16, float16, float64, got {got}"
    with pytest.raises(UserError, match=told):
        resolve_dtype(name, torch.device("cpu"))
    with pytest.raises(UserError, match="dtype must be text, got NoneType"):
        resolve_dtype(None, torch.device("cpu"))


@pytest.mark.usefixtures("two_gpus")
def test_each_process_of_several_takes_the_device_of_its_place(monkeypatch):
    started = []
    monkeypatch.setattr(torch.distributed, "init_process_group", started.append)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    for key, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(key, value)
    with start_runtime(Config(device="auto", batch_size=12)) as runtime:
        assert runtime.device == torch.device("cuda", 0)
    assert started == ["nccl"]


def read_metrics(folder):
    return [json.loads(line) for line in (Path(folder) / FILE).read_text(encoding="utf-8").splitlines()]


@NEEDS_CUDA
@pytest.mark.parametrize("compiled", ["off", "model", "step"])
@pytest.mark.parametrize("loss_impl", ["logits", "linear", "reference"])
def test_a_run_on_cuda_learns_and_goes_on_where_it_stopped(loss_impl, compiled, tiny):
    torch._dynamo.reset()
    config = tiny(
        device="cuda", dtype="auto", loss_impl=loss_impl, compile=compiled, max_iters=40, eval_interval=20
    )
    train_with_stop(config, 25)
    losses = [record["loss"] for record in read_metrics(config.out_dir) if record["kind"] == "train"]
    assert len(losses) == 40
    assert sum(losses[-5:]) < sum(losses[:5])


@NEEDS_CUDA
def test_a_deterministic_run_on_cuda_has_the_same_bits_stopped_or_not(tiny):
    straight = tiny(device="cuda", dtype="bfloat16", deterministic=True)
    train(straight)
    stopped = dataclasses.replace(straight, out_dir=f"{straight.out_dir}-stopped")
    train_with_stop(stopped, 5)
    assert digests_of(stopped) == digests_of(straight)
