"""What is written may be read by whom the umask says, as with other programs."""

import dataclasses
import os

import pytest

from difftrain.cli import main
from difftrain.data import contents, prepare
from difftrain.reporting.log import drop_records_after


@pytest.fixture
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077, 0o027], indirect=True, ids=oct)
def test_all_that_is_written_follows_the_umask(tiny, tmp_path, umask, monkeypatch, capsys):
    place = tmp_path / "place"  # the folder above is pytest's
    place.mkdir()
    monkeypatch.setenv("DIFFTRAIN_CACHE", str(place / "cache"))
    monkeypatch.setattr(contents, "SETTLED", 0)  # so that a memo is written
    text, run = place / "texts" / "fox.txt", place / "runs" / "fox"
    text.parent.mkdir()
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    prepare(str(text), out=place / "tokens" / "fox")
    config = dataclasses.replace(tiny(max_iters=4), data=str(text), out_dir=str(run))
    (place / "c.toml").write_text(config.to_toml())
    argv = ["train", "--config", str(place / "c.toml")]
    assert main(argv) == 0
    drop_records_after(run, 3, is_evaluated=False)
    assert main([*argv, "--resume", "--max_iters=5"]) == 0
    assert main(["plot", str(run)]) == 0
    assert main(["sample", str(run), "--held_out", "--device", "cpu", "--steps=1"]) == 0
    written = list(place.rglob("*"))
    names = {path.name for path in written}
    assert names >= {
        "train.bin", "meta.json", "config.toml", "metrics.jsonl", "model.safetensors", "optimizer.safetensors",
        "state.json", "digests.json", "latest", "best", "curves.png", ".lock", contents.MEMO,
    }  # fmt: skip
    assert any(name.endswith("-001.txt") for name in names)
    wrong = {
        str(path): oct(path.stat().st_mode & 0o777)
        for path in written
        if path.stat().st_mode & 0o777 != (0o777 if path.is_dir() else 0o666) & ~umask
    }
    assert wrong == {}
