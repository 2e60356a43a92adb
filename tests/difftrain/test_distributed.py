import dataclasses
import os
import random
import re
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from difftrain.checkpoints.reading import find_checkpoint
from difftrain.reporting.log import read_metrics
from difftrain.training import step as step_module
from difftrain.training.loop import train
from launch import SUPPORT, finish, obey, start, train_command
from processes import run_in_processes
from resume_runs import resume_all, train_all
from run_digests import TIMES, digests_of
from waiting import wait_until

# Together and first: they take long, and two of them at once would want four cores.
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("processes")]


def records_of(config):
    return [{k: v for k, v in r.items() if k not in TIMES} for r in read_metrics(Path(config.out_dir))]


def test_two_processes_train_the_demo(tmp_path):
    words = ["--max_iters", 3, "--eval_iters", 2, "--eval_batch_size", 4, "--batch_size", 4]
    words += ["--out_dir", tmp_path / "demo", "--device", "cpu"]
    (code, out, _), (other_code, other_out, _) = run_in_processes(
        2, partial(obey, ["train", "demo", *words]), tmp_path
    )
    assert (code, other_code, other_out) == (0, 0, "")
    assert "2 process(es), steps 0 to 3" in out
    assert "unigram entropy" in out
    assert find_checkpoint(tmp_path / "demo", "latest").step == 3


def test_two_processes_train_as_one_and_evaluate_all_batches(tiny, tmp_path):
    kinds = [
        {},
        {"parallel": "fsdp", "n_layer": 2},
        {"parallel": "fsdp", "loss_impl": "linear"},
        {"parallel": "fsdp", "mode": "gpt2", "position": "learned", "bias": True},
        {"recipe": "llada", "softcap": 3.0, "z_loss": 1e-3, "label_smoothing": 0.1},
        {"parallel": "fsdp", "loss_impl": "linear", "recipe": "mdlm", "token_weighting": "uniform"},
    ]
    # 3 fixed batches and 4 others: an odd number, so that one process has one batch more to count.
    shape = {"max_iters": 6, "batch_size": 2, "gradient_accumulation_steps": 4, "dtype": "float64"}
    ones = [
        tiny(**shape, eval_iters=3, out_dir=str(tmp_path / f"one-{i}"), **kind)
        for i, kind in enumerate(kinds)
    ]
    twos = [dataclasses.replace(one, out_dir=one.out_dir + "-two") for one in ones]
    train_all([(two, None) for two in twos], 2, tmp_path)
    for one, two in zip(ones, twos, strict=True):
        train(one)
        for a, b in zip(records_of(one), records_of(two), strict=True):
            assert a["step"] == b["step"]
            for key in ("loss", "loss_final", "nll"):
                assert a[key] == pytest.approx(b[key], rel=1e-10)
            if "cases" in a:
                assert [a["cases"][k]["n"] for k in a["cases"]] == [b["cases"][k]["n"] for k in b["cases"]]
        a, b = (
            load_file(find_checkpoint(Path(c.out_dir), "latest").folder / "model.safetensors")
            for c in (one, two)
        )
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-12)


def test_shards_resume_bit_equal_in_16_bit_types_too(tiny, tmp_path):
    runs = []
    for dtype in ("bfloat16", "float16"):
        straight = tiny(
            max_iters=6, dtype=dtype, parallel="fsdp", dropout=0.1, gradient_accumulation_steps=2,
            eval_interval=3, out_dir=str(tmp_path / dtype),
        )  # fmt: skip
        runs += [(straight, None), (dataclasses.replace(straight, out_dir=straight.out_dir + "-halves"), 4)]
    train_all(runs, 2, tmp_path)
    for (straight, _), (halves, _) in (runs[:2], runs[2:]):
        a, b = (find_checkpoint(Path(c.out_dir), "latest").folder for c in (straight, halves))
        files = [p.relative_to(a) for p in a.rglob("*.safetensors")]
        assert len(files) == 3
        for file in files:
            left, right = load_file(a / file), load_file(b / file)
            assert left.keys() == right.keys()
            assert all(torch.equal(left[name], right[name]) for name in left), file
        assert (a / "state.json").read_bytes() == (b / "state.json").read_bytes()
        assert records_of(straight) == records_of(halves)


# Stopping -----------------------------------------------------------------------------------------


def start_torchrun(config, *words):
    """torchrun with two processes, in a session of its own as on a terminal."""
    return start(
        SUPPORT / "slow_train.py", *train_command(config, *words), processes=2, start_new_session=True
    )


def wait_for_step(config, step, process):
    """Return when a run has logged this step."""
    path = Path(config.out_dir) / "metrics.jsonl"

    def is_there():
        assert process.poll() is None, finish(process)
        return path.exists() and f'"step": {step}' in path.read_text()

    wait_until(is_there, f"step {step}")


def long_run(tiny, **changes):
    return tiny(max_iters=100_000, eval_interval=400, gradient_accumulation_steps=2, dropout=0.1, **changes)


@pytest.mark.parametrize(
    "signals",
    [
        pytest.param(["Ctrl-C"], id="Ctrl-C"),
        pytest.param(["SIGTERM", "Ctrl-C"] * 3, marks=pytest.mark.slow, id="six at random moments"),
    ],
)
def test_a_signal_to_torchrun_saves_on_all_processes_and_the_run_goes_on_exactly(tiny, tmp_path, signals):
    dice = random.Random(0)
    config = long_run(tiny, lr_decay_iters=400)
    words, steps = [], [0]
    for name in signals:
        process = start_torchrun(config, *words)
        wait_for_step(config, steps[-1] + 3, process)
        if len(signals) > 1:
            time.sleep(dice.uniform(0, 0.5))  # anywhere in a step, or in several
        # What a terminal does at Ctrl-C: the signal goes to torchrun and to its processes at once.
        if name == "Ctrl-C":
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.terminate()
        _, out, err = finish(process)
        assert "go on with: difftrain train --resume" in out, out + err
        steps.append(int(re.search(r"stopped after (\d+) steps", out)[1]))
        assert find_checkpoint(Path(config.out_dir), "latest").step == steps[-1] > steps[-2]
        words = ["--resume"]
    last = dataclasses.replace(config, max_iters=steps[-1] + 2)
    straight = dataclasses.replace(last, out_dir=config.out_dir + "-straight")
    resume_all([last], 2, tmp_path)
    train_all([(straight, None)], 2, tmp_path)
    assert digests_of(last) == digests_of(straight)


def signalled_after(config, n_steps, rank):
    """Train, while the second process alone gets SIGTERM in a step: how the command ended."""
    real = step_module._make_batch
    calls = []

    def make_batch(*arguments):
        calls.append(1)
        if rank == 1 and len(calls) == n_steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    step_module._make_batch = make_batch
    return obey(train_command(config), rank)


def test_a_signal_to_one_process_stops_all_of_them(tiny, tmp_path):
    config = long_run(tiny)
    (code, out, err), (other_code, *_) = run_in_processes(2, partial(signalled_after, config, 6), tmp_path)
    assert (code, other_code) == (0, 0), out + err
    assert "stopped after 6 steps; go on with: difftrain train --resume" in out
    assert find_checkpoint(Path(config.out_dir), "latest").step == 6


def test_a_killed_process_ends_the_job_and_its_rank_is_named(tiny):
    config = long_run(tiny)
    process = start_torchrun(config)
    wait_for_step(config, 3, process)
    os.kill(process_of_rank(process, 1), signal.SIGKILL)
    code, _, err = finish(process)
    assert code != 0
    assert re.search(r"rank\s*: 1 .*\n.*exitcode\s*: -9", err), err
    assert find_checkpoint(Path(config.out_dir), "latest").step == 0


def process_of_rank(launcher, rank):
    """Process id of one of torchrun's processes."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                environment = (folder / "environ").read_bytes().split(b"\0")
                parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
            if parent == launcher.pid and f"RANK={rank}".encode() in environment:
                return int(folder.name)
    raise AssertionError(f"no process of rank {rank}")


# Errors -------------------------------------------------------------------------------------------


def test_a_mistake_in_the_data_is_told_once_and_ends_every_process(tiny, tmp_path):
    config = tiny(data=str(tmp_path / "nowhere"), gradient_accumulation_steps=2)
    (code, _, err), (other_code, *silence) = run_in_processes(
        2, partial(obey, train_command(config)), tmp_path
    )
    assert (code, other_code) == (2, 2)
    assert err.count("\n") == 1
    assert err.startswith("difftrain: data must be")
    assert silence == ["", ""]
    assert not Path(config.out_dir).exists()


def bad_for_one(config, bad, rank):
    """Train, while the losses of the second process are NaN in these micro-batches: how the command ended."""
    real = step_module.model_loss
    calls = []

    def model_loss(*arguments, **options):
        calls.append(1)
        loss = real(*arguments, **options)
        if rank == 1 and len(calls) - 1 in bad:
            return loss[0] * torch.nan, *loss[1:]
        return loss

    step_module.model_loss = model_loss
    return obey(train_command(config), rank)


def test_a_loss_that_is_not_finite_on_one_process_skips_the_step_on_all(tiny, tmp_path):
    config = tiny(max_iters=4, gradient_accumulation_steps=2, max_bad_steps=2, eval_interval=2)
    (code, out, err), (other_code, *_) = run_in_processes(2, partial(bad_for_one, config, {1}), tmp_path)
    assert (code, other_code) == (0, 0), out + err
    assert out.count("step 1 is not applied: its loss or gradient is not finite") == 1
    assert find_checkpoint(Path(config.out_dir), "latest").step == 4
    moments = load_file(Path(config.out_dir) / "checkpoints/step-00000004/optimizer/optimizer.safetensors")
    assert {t.item() for name, t in moments.items() if name.endswith(".step")} == {3.0}

    again = dataclasses.replace(config, out_dir=config.out_dir + "-2")
    ended = run_in_processes(2, partial(bad_for_one, again, {2, 3}), tmp_path)
    for code, _, err in ended:
        assert code == 1
        assert "2 steps in a row had a non-finite loss or gradient" in err
    latest = find_checkpoint(Path(again.out_dir), "latest")
    assert latest.step == 2
    assert all(t.isfinite().all() for t in load_file(latest.folder / "model.safetensors").values())
