import threading
from pathlib import Path

import pytest
import torch

from difftrain.checkpoints import saver as saver_module
from difftrain.checkpoints.reading import find_checkpoint
from difftrain.checkpoints.saver import CheckpointSaver
from difftrain.data.vocabulary import Characters
from difftrain.model import Transformer, make_optimizer, optimizer_tensors
from difftrain.runtime import Runtime
from waiting import PATIENCE, wait_until

WORDS = Characters(tuple("abcdef"))
ALONE = Runtime(torch.device("cpu"), torch.float32, rank=0, world_size=1)


@pytest.fixture
def parts(tiny):
    """Configuration, model and optimiser of a run after one step."""
    config = tiny()
    Path(config.out_dir).mkdir()
    (Path(config.out_dir) / "config.toml").write_text(config.to_toml())
    model = Transformer(config, WORDS.vocab_size)
    optimizer = make_optimizer(model, config)
    take_step(model, optimizer)
    return config, model, optimizer


def take_step(model, optimizer):
    model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture
def slow_writer(monkeypatch):
    """Saves that begin to write only when told."""
    may_write, real = threading.Event(), saver_module.save_checkpoint

    def save(*arguments, **options):
        assert may_write.wait(PATIENCE)
        return real(*arguments, **options)

    monkeypatch.setattr(saver_module, "save_checkpoint", save)
    yield may_write
    may_write.set()


def test_training_goes_on_while_a_checkpoint_is_written_and_what_is_written_is_the_moment_of_the_save(
    parts, slow_writer
):
    config, model, optimizer = parts
    run_dir = Path(config.out_dir)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    moments = {name: t.clone() for name, t in optimizer_tensors(model, optimizer).items()}
    with CheckpointSaver(run_dir, config, WORDS, ALONE) as saver:
        saver.save(1, model, optimizer, {"a": 1}, best_step=1)
        assert not (run_dir / "checkpoints" / "latest").exists()
        take_step(model, optimizer)
        slow_writer.set()
    found = find_checkpoint(run_dir, "best")
    for name, p in found.make_model(torch.device("cpu")).named_parameters():
        assert torch.equal(p, weights[name]), name
        assert not torch.equal(p, dict(model.named_parameters())[name]), name
    read = {name: torch.zeros_like(t) for name, t in moments.items()}
    found.read_optimizer(read)
    assert all(torch.equal(read[name], moments[name]) for name in moments)


def test_a_save_waits_for_the_one_before_it(parts, slow_writer, monkeypatch):
    config, model, optimizer = parts
    happened, real = [], saver_module.save_checkpoint

    def save(run_dir, step, *arguments, **options):
        happened.append(f"begin {step}")
        real(run_dir, step, *arguments, **options)
        happened.append(f"end {step}")

    class Thread(threading.Thread):
        def join(self):
            slow_writer.set()  # nobody waits before
            super().join()

    monkeypatch.setattr(saver_module, "save_checkpoint", save)
    monkeypatch.setattr(saver_module.threading, "Thread", Thread)
    with CheckpointSaver(Path(config.out_dir), config, WORDS, ALONE) as saver:
        saver.save(1, model, optimizer, {}, best_step=None)
        saver.save(2, model, optimizer, {}, best_step=None)
    assert happened == ["begin 1", "end 1", "begin 2", "end 2"]
    assert find_checkpoint(Path(config.out_dir), "latest").step == 2


def test_what_a_save_failed_with_reaches_the_loop_and_ends_the_run(parts, monkeypatch):
    config, model, optimizer = parts

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saver_module, "save_checkpoint", full)
    saver = CheckpointSaver(Path(config.out_dir), config, WORDS, ALONE)
    saver.save(1, model, optimizer, {}, best_step=None)
    wait_until(lambda: saver.has_failed, "the save fails")
    with pytest.raises(OSError, match="No space"):
        saver.finish()


def test_a_run_in_which_a_save_fails_ends_with_the_step_under_way(tiny, monkeypatch):
    from difftrain.training.loop import train
    from difftrain.training.step import LiveRun

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    def gradients(self, *arguments, **options):
        steps.append(1)
        # However late the thread is heard of: then a step is under way, and it is the last.
        wait_until(lambda: any(saver.has_failed for saver in savers), "the save fails")
        return real(self, *arguments, **options)

    monkeypatch.setattr(saver_module, "save_checkpoint", full)
    savers, make = [], CheckpointSaver.__init__
    monkeypatch.setattr(
        CheckpointSaver, "__init__", lambda self, *a: (savers.append(self), make(self, *a))[1]
    )
    steps, real = [], LiveRun.gradients
    monkeypatch.setattr(LiveRun, "gradients", gradients)
    with pytest.raises(OSError, match="No space"):
        train(tiny(max_iters=3000, eval_interval=3000))
    assert len(steps) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_error_elsewhere_lets_the_save_finish_but_a_second_ctrl_c_does_not_wait(
    parts, slow_writer, error
):
    config, model, optimizer = parts

    def interrupted():
        with CheckpointSaver(Path(config.out_dir), config, WORDS, ALONE) as saver:
            saver.save(1, model, optimizer, {}, best_step=None)
            if error is not KeyboardInterrupt:
                slow_writer.set()
            raise error

    with pytest.raises(error):
        interrupted()
    is_there = (Path(config.out_dir) / "checkpoints" / "latest").exists()
    assert is_there == (error is not KeyboardInterrupt)
