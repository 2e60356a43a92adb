import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch

from difftrain.checkpoints.folder import read_pointer
from difftrain.checkpoints.reading import find_checkpoint, open_checkpoint
from difftrain.checkpoints.writing import save_checkpoint
from difftrain.data.vocabulary import Characters
from difftrain.errors import UserError
from difftrain.model import Transformer, make_optimizer, optimizer_tensors
from difftrain.training.loop import train
from launch import SUPPORT, run
from run_digests import digests_of


# One before each change that a save makes, with the removal of what the last one left; or many at any moment.
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "kills", [[40], pytest.param([200, 1], marks=pytest.mark.slow)], ids=["each change", "200 at random"]
)
def test_kills_during_saves_cost_at_most_one_interval_and_leave_nothing_behind(tiny, tmp_path, kills):
    endless = tiny(
        max_iters=10**6, lr_decay_iters=10**6, eval_interval=1, eval_iters=2, batch_size=4, n_embd=64
    )
    (tmp_path / "c.toml").write_text(endless.to_toml())
    train(dataclasses.replace(endless, max_iters=2))
    code, out, err = run(SUPPORT / "kill_runs.py", tmp_path / "c.toml", *kills)
    assert code == 0, out + err
    counts = json.loads(out)
    assert counts["half_written"] >= kills[0] / 20, "kills must have hit saves"
    ended = dataclasses.replace(endless, max_iters=counts["step"] + 2)
    train(ended, resume=True)
    straight = dataclasses.replace(ended, out_dir=str(tmp_path / "straight"))
    train(straight)
    assert digests_of(ended) == digests_of(straight)
    home = Path(ended.out_dir) / "checkpoints"
    assert [p.name for p in home.iterdir() if p.name.startswith(".")] == []


# Harm ---------------------------------------------------------------------------------------------

PAGE = 4096


def harm(content: bytes, dice: random.Random) -> tuple[str, bytes]:
    """What was done to a file's bytes, and the result, which differs."""
    kind = dice.choice(("bit", "bit", "page", "cut"))
    harmed = bytearray(content)
    if kind == "bit":
        place = dice.randrange(len(harmed))
        harmed[place] ^= 1 << dice.randrange(8)
    elif kind == "page":
        start = dice.randrange(0, len(harmed), PAGE)
        harmed[start : start + PAGE] = bytes(len(harmed[start : start + PAGE]))
    else:
        del harmed[dice.randrange(len(harmed)) :]
    return kind, bytes(harmed)


@pytest.mark.parametrize("harms", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_harms_to_any_file_are_all_detected_and_name_the_file_and_the_remedy(tiny, harms):
    config = tiny(n_embd=32)
    run_dir = Path(config.out_dir)
    run_dir.mkdir()
    (run_dir / "config.toml").write_text(config.to_toml())
    words = Characters(tuple("abcdef"))
    model = Transformer(config, words.vocab_size)
    optimizer = make_optimizer(model, config)
    model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    optimizer.step()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    folder = save_checkpoint(
        run_dir, 4, weights, optimizer_tensors(model, optimizer), {"best": 0.5}, config, words, best_step=4
    )
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    assert len(files) == 5
    dice = random.Random(0)
    for trial in range(harms):
        path = dice.choice(files)
        content = path.read_bytes()
        kind, harmed = harm(content, dice)
        if harmed == content:  # a page of zeros
            continue
        path.write_bytes(harmed)
        with pytest.raises(UserError) as caught:
            open_checkpoint(folder)
        path.write_bytes(content)
        message = str(caught.value)
        # A harmed list of digests may accuse another file first: it is one of this folder's all the same.
        assert str(path if path.name != "digests.json" else folder) in message, (trial, kind, message)
        assert "train --resume goes on from the checkpoint before it" in message
    open_checkpoint(folder)


def test_no_flipped_bit_leads_a_pointer_to_another_step(tiny):
    config = tiny(max_iters=4)
    train(config)
    home = Path(config.out_dir) / "checkpoints"
    content = (home / "latest").read_bytes()
    assert find_checkpoint(Path(config.out_dir), "latest").step == 4
    for place in range(8 * len(content)):
        harmed = bytearray(content)
        harmed[place // 8] ^= 1 << place % 8
        (home / "latest").write_bytes(harmed)
        assert read_pointer(home, "latest") is None
