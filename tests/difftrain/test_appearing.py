import errno
import os
import resource
import signal
import sys

import pytest
import torch

import nanogpt
from difftrain import appearing as appearing_module
from difftrain.appearing import appearing, replacing, write_whole
from difftrain.errors import UserError
from difftrain.exchange.from_nanogpt import import_nanogpt
from launch import obey


def test_nothing_has_the_name_before_all_is_written_and_flushed(tmp_path, monkeypatch):
    flushed = []
    target = tmp_path / "new" / "folder"
    monkeypatch.setattr(
        appearing_module, "flush", lambda path: flushed.append((path.name, target.exists()))
    )
    with appearing(target) as aside:
        aside.mkdir()
        (aside / "file").write_text("whole")
        assert not target.exists()
    assert (target / "file").read_text() == "whole"
    assert flushed == [("file", False), (aside.name, False), ("new", True)]
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("is_folder", [True, False])
def test_an_error_leaves_nothing(tmp_path, is_folder):

    def write():
        with appearing(tmp_path / "name") as aside:
            if is_folder:
                aside.mkdir()
            (aside / "half" if is_folder else aside).write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        write()
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_stays(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(UserError, match="exists already"), appearing(tmp_path / name):
            pass
    assert (tmp_path / "file").read_text() == "mine"


def test_a_file_is_replaced_when_the_new_one_is_whole_and_on_the_disk(tmp_path, monkeypatch):
    target = tmp_path / "file"
    target.write_text("old")
    at_flush = []
    monkeypatch.setattr(
        appearing_module, "flush", lambda path: at_flush.append((path.read_bytes(), target.read_text()))
    )
    with replacing(target) as file:
        file.write(b"new")
    assert at_flush == [(b"new", "old")]
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_an_error_leaves_the_old_file_and_no_half_of_the_new(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")

    def write():
        with replacing(target) as file:
            file.write(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        write()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_is_written_whole_in_a_folder_that_is_made(tmp_path):
    write_whole(tmp_path / "a" / "b" / "text", "\u00e9")
    write_whole(tmp_path / "a" / "b" / "bytes", b"\x00\n")
    assert (tmp_path / "a" / "b" / "text").read_bytes() == b"\xc3\xa9"
    assert (tmp_path / "a" / "b" / "bytes").read_bytes() == b"\x00\n"
    assert len(list((tmp_path / "a" / "b").iterdir())) == 2


@pytest.fixture
def full_disk(monkeypatch):
    """Within it a file cannot grow beyond so many bytes, as on a full disk."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # cut short it would be read later
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [6000, 9000])
def test_a_full_disk_says_so_and_leaves_nothing(tmp_path, full_disk, size):
    model, args = nanogpt.gpt()
    torch.save(nanogpt.checkpoint_of(model, args), tmp_path / "ckpt.pt")
    import_nanogpt(tmp_path / "ckpt.pt", tmp_path / "run", mode="diffusion")
    commands = {
        "nanogpt": ["export", "nanogpt", tmp_path / "run", "--out", tmp_path / "out"],
        "hf": ["export", "hf", tmp_path / "run", "--out", tmp_path / "out"],
        "import": ["import", "nanogpt", tmp_path / "ckpt.pt", "--out", tmp_path / "out"],
    }
    for words in commands.values():
        full_disk(size)
        try:
            code, _, err = obey(words)
        finally:
            full_disk(resource.RLIM_INFINITY)
        assert code == 1, err
        assert err.count("\n") == 1
        assert "the disk is full or a quota is reached" in err
        assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt.pt", "run"]


def test_a_system_error_keeps_its_number(tmp_path):
    with pytest.raises(OSError, match="No space") as caught, appearing(tmp_path / "name"):
        raise RuntimeError(f"write failed: Errno {errno.ENOSPC}: {os.strerror(errno.ENOSPC)}")
    assert caught.value.errno == errno.ENOSPC
