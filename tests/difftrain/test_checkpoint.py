import dataclasses
import errno
import json

import pytest
import torch

from difftrain.checkpoints import folder as folder_names
from difftrain.checkpoints import writing
from difftrain.checkpoints.folder import CONTENT
from difftrain.checkpoints.reading import find_checkpoint, find_newest_good, open_checkpoint
from difftrain.checkpoints.writing import save_checkpoint
from difftrain.data.vocabulary import Characters
from difftrain.errors import UserError
from difftrain.model import Transformer

WORDS = Characters(tuple("abcdef"))


@pytest.fixture
def run(tmp_path, tiny):
    """A run folder and a function that saves a checkpoint in it."""
    config = tiny(out_dir=str(tmp_path), keep_checkpoints=2)
    (tmp_path / "config.toml").write_text(config.to_toml())

    def save(step, is_best=False, seed=None):
        torch.manual_seed(step if seed is None else seed)
        model = Transformer(config, WORDS.vocab_size)
        state = {"best_loss": 0.5, "usual_norm": 0.1}
        weights = {name: p.detach() for name, p in model.named_parameters()}
        moments = {"a.exp_avg": torch.randn(3), "a.step": torch.tensor(float(step))}
        save_checkpoint(
            tmp_path, step, weights, moments, state, config, WORDS, best_step=step if is_best else None
        )
        return model, moments, state

    return tmp_path, save


def names(run_dir):
    return sorted(p.name for p in (run_dir / "checkpoints").iterdir())


def test_what_is_loaded_is_what_was_saved(run):
    run_dir, save = run
    model, moments, state = save(7, is_best=True)
    for which in ("latest", "best", "7"):
        found = find_checkpoint(run_dir, which)
        assert found.step == 7
        assert found.vocabulary == WORDS
        loaded = found.make_model(torch.device("cpu"))
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
        assert loaded.head.weight is loaded.embedding.weight
        assert not loaded.training
        assert found.state == state
        read = {name: torch.full_like(tensor, torch.nan) for name, tensor in moments.items()}
        found.read_optimizer(read)
        assert all(torch.equal(read[name], moments[name]) for name in moments)
        assert found.config.out_dir == str(run_dir)


def test_the_newest_and_the_best_stay(run):
    run_dir, save = run
    for step in range(1, 7):
        save(step, is_best=step == 2)
    assert names(run_dir) == ["best", "latest", "step-00000002", "step-00000005", "step-00000006"]
    assert find_checkpoint(run_dir, "best").step == 2
    assert find_checkpoint(run_dir, "latest").step == 6


@pytest.mark.parametrize("name", [*CONTENT, "optimizer/optimizer.safetensors"])
@pytest.mark.parametrize("harm", ["flip a bit", "truncate", "delete"])
def test_a_harmed_checkpoint_is_refused_by_name_and_the_one_before_found(run, name, harm):
    run_dir, save = run
    save(1)
    save(2)
    path = run_dir / "checkpoints" / "step-00000002" / name
    content = bytearray(path.read_bytes())
    if harm == "flip a bit":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif harm == "truncate":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
    with pytest.raises(UserError, match=name):
        open_checkpoint(run_dir / "checkpoints" / "step-00000002")
    found, problems = find_newest_good(run_dir)
    assert found.step == 1
    assert len(problems) == 1
    assert name in problems[0]


def test_harmed_digests_are_refused(run):
    run_dir, save = run
    save(1)
    path = run_dir / "checkpoints" / "step-00000001" / folder_names.DIGESTS
    for content in ("", "[]", "{}", json.dumps({"model.safetensors": "0"})):
        path.write_text(content)
        with pytest.raises(UserError, match="damaged"):
            open_checkpoint(path.parent)


def test_a_full_disk_leaves_the_old_checkpoint_and_no_leftovers(run, monkeypatch):
    run_dir, save = run
    save(1)

    def no_space(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writing, "save_file", no_space)
    with pytest.raises(OSError, match="No space"):
        save(2)
    assert names(run_dir) == ["latest", "step-00000001"]
    assert find_checkpoint(run_dir, "latest").step == 1


def test_saving_a_step_again_replaces_it(run):
    run_dir, save = run
    save(3, seed=1)
    model, *_ = save(3, seed=2)
    loaded = find_checkpoint(run_dir, "latest").make_model(torch.device("cpu"))
    assert torch.equal(loaded.embedding.weight, model.embedding.weight)
    assert names(run_dir) == ["latest", "step-00000003"]


def test_a_kill_while_an_old_checkpoint_is_deleted_leaves_no_half_of_it_under_its_name(run, monkeypatch):
    run_dir, save = run
    for step in (1, 2):
        save(step)

    def killed(folder):
        (folder / folder_names.WEIGHTS).unlink(missing_ok=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writing.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            save(3)
    for folder in (run_dir / "checkpoints").glob("step-*"):
        open_checkpoint(folder)
    writing.remove_leftovers(run_dir)
    assert names(run_dir) == ["latest", "step-00000002", "step-00000003"]


def test_what_a_killed_save_left_is_cleaned_up_and_nothing_is_lost(run):
    run_dir, save = run
    save(1)
    home = run_dir / "checkpoints"
    (home / ".writing-step-00000002").mkdir()
    (home / ".writing-step-00000002" / "model.safetensors").write_bytes(b"half")
    # Killed between moving the old one of this step away and the new one into place.
    (home / "step-00000001").rename(home / ".old-step-00000001")
    save(3)
    assert names(run_dir) == ["latest", "step-00000001", "step-00000003"]
    assert open_checkpoint(home / "step-00000001").step == 1


def test_another_models_weights_are_refused_in_one_line(run, tiny):
    run_dir, save = run
    save(1)
    other = Transformer(tiny(n_embd=32), WORDS.vocab_size)
    with pytest.raises(UserError, match="does not fit this model") as caught:
        find_checkpoint(run_dir, "latest").load_weights(other)
    assert "\n" not in str(caught.value)


class _Hostile:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize("name", [*CONTENT, "optimizer/optimizer.safetensors"])
def test_a_hostile_pickle_in_any_file_is_refused_unexecuted(run, capsys, name):
    run_dir, save = run
    _, moments, _ = save(1)
    folder = run_dir / "checkpoints" / "step-00000001"
    torch.save({"x": _Hostile()}, folder / name)
    digests = json.loads((folder / folder_names.DIGESTS).read_text())
    digests[name] = folder_names.digest_of(folder / name)
    (folder / folder_names.DIGESTS).write_text(json.dumps(digests))

    def load_all():
        opened = open_checkpoint(folder)
        opened.make_model(torch.device("cpu"))
        opened.read_optimizer({name: torch.zeros_like(tensor) for name, tensor in moments.items()})

    with pytest.raises(UserError, match="does not fit"):
        load_all()
    assert "executed" not in capsys.readouterr().out


def test_places_without_a_checkpoint_are_named(run, tmp_path):
    run_dir, save = run
    with pytest.raises(UserError, match="no checkpoint 'best'; steps there: none"):
        find_checkpoint(run_dir, "best")
    save(4)
    with pytest.raises(UserError, match="no checkpoint '5'; steps there: 4"):
        find_checkpoint(run_dir, "5")
    with pytest.raises(UserError, match="is not a run folder"):
        find_checkpoint(tmp_path / "nowhere", "latest")


def test_a_pointer_cannot_lead_out_of_the_run(run):
    run_dir, save = run
    save(1)
    (run_dir / "checkpoints" / "latest").write_text("step-1/../../../elsewhere")
    with pytest.raises(UserError, match="no checkpoint 'latest'"):
        find_checkpoint(run_dir, "latest")


def test_every_field_of_the_configuration_is_kept(run):
    run_dir, save = run
    save(1)
    kept = json.loads((run_dir / "checkpoints/step-00000001/config.json").read_text())["config"]
    assert kept == dataclasses.asdict(find_checkpoint(run_dir, "1").config)


def test_everything_is_flushed_before_the_name_appears(run, monkeypatch):
    run_dir, save = run
    home = run_dir / "checkpoints"
    flushed = []
    monkeypatch.setattr(
        writing, "flush", lambda path: flushed.append((path.name, (home / "step-00000001").exists()))
    )
    save(1)
    before = [name for name, is_there in flushed if not is_there]
    files = [*CONTENT, "optimizer.safetensors"]
    assert sorted(before[: len(files)]) == sorted(files)
    assert before[len(files) :] == [folder_names.DIGESTS, "optimizer", ".writing-step-00000001"]
    assert ("checkpoints", True) in flushed


def test_a_checkpoint_that_does_not_read_back_never_appears(run, monkeypatch):
    run_dir, save = run
    save(1)
    real = writing.flush

    def harms(path):
        if path.name == folder_names.STATE:
            path.write_bytes(path.read_bytes()[:-1])
        real(path)

    monkeypatch.setattr(writing, "flush", harms)
    with pytest.raises(UserError, match=r"state.json is damaged"):
        save(2)
    assert names(run_dir) == ["latest", "step-00000001"]
    assert find_checkpoint(run_dir, "latest").step == 1


def test_a_users_copies_and_links_among_the_checkpoints_do_no_harm(run, tmp_path_factory):
    run_dir, save = run
    home = run_dir / "checkpoints"
    save(1)
    elsewhere = tmp_path_factory.mktemp("disk") / "moved"
    (home / "step-00000001").rename(elsewhere)
    (home / "step-00000001").symlink_to(elsewhere)
    (home / "step-backup").mkdir()
    for step in (2, 3):
        save(step)
    (home / "step-00000002").rename(home / "step-00000002.bak")
    save(4)
    assert names(run_dir) == [
        "latest", "step-00000002.bak", "step-00000003", "step-00000004", "step-backup",
    ]  # fmt: skip
    assert (elsewhere / "state.json").exists(), "a link goes, what it leads to stays"
    with pytest.raises(UserError, match="steps there: 3, 4"):
        find_checkpoint(run_dir, "7")


def test_a_file_too_many_or_another_steps_checkpoint_is_refused(run):
    run_dir, save = run
    save(1)
    home = run_dir / "checkpoints"
    (home / "step-00000001" / "optimizer" / "more.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="more.safetensors is not among the files of step-00000001"):
        open_checkpoint(home / "step-00000001")
    (home / "step-00000001" / "optimizer" / "more.safetensors").unlink()
    (home / "step-00000001").rename(home / "step-00000002")
    with pytest.raises(UserError, match="does not fit"):
        open_checkpoint(home / "step-00000002")


def test_damaged_newer_checkpoints_do_not_take_the_places_of_good_ones(run):
    run_dir, save = run
    for step in (1, 7, 8):
        save(step)
    for step in (7, 8):
        (run_dir / "checkpoints" / f"step-0000000{step}" / "state.json").write_text("")
    save(2)
    save(3)
    assert find_newest_good(run_dir)[0].step == 3
    assert {"step-00000002", "step-00000003"} <= set(names(run_dir))


def test_the_latest_is_never_deleted_even_behind_later_steps(run):
    run_dir, save = run
    save(5)
    save(6)
    save(1)  # a run that fell back
    assert find_checkpoint(run_dir, "latest").step == 1


def test_a_run_killed_between_the_two_renames_can_be_resumed(run):
    run_dir, save = run
    save(4)
    home = run_dir / "checkpoints"
    (home / "step-00000004").rename(home / ".old-step-00000004")
    found, problems = find_newest_good(run_dir)
    assert (found.step, problems) == (4, [])
