"""Blocks end with lines, and lie at the same places wherever reading begins."""

import gzip
import random
from itertools import pairwise
from pathlib import Path

import pytest

from difftrain.data import blocks
from difftrain.data.blocks import Blocks
from difftrain.data.sources import find_sources
from difftrain.errors import UserError


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 16)
    monkeypatch.setattr(blocks, "CHUNK", 24)


def source_of(path, content):
    Path(path).write_bytes(content)
    return find_sources([str(path)], [], "auto")[0][0]


def random_text(rng):
    """Lines of any length, some longer than blocks and some of many blocks; characters of one to four bytes."""
    letters = "abcé€\U0001f600"
    lines = [
        "".join(rng.choices(letters, k=rng.choice([0, 1, 3, 9, 30, 100])))
        for _ in range(rng.randrange(1, 12))
    ]
    return rng.choice(["\n", "\r\n"]).join(lines) + rng.choice(["", "\n"])


@pytest.mark.parametrize("whole_lines", [False, True])
def test_ranges_give_the_blocks_of_the_whole_wherever_a_file_is_parted(tmp_path, whole_lines):
    rng = random.Random(3)
    for _ in range(150):
        content = random_text(rng).encode()
        source = source_of(tmp_path / "a.txt", content or b"\n")
        content = content or b"\n"
        whole = list(Blocks(source, whole_lines=whole_lines))
        assert b"".join(block for _, block in whole) == content
        assert [offset + len(block) for offset, block in whole] == [o for o, _ in whole[1:]] + [
            len(content)
        ]
        cuts = sorted(rng.sample(range(16, 16 * 40, 16), k=3))
        ends = [0, *(cut for cut in cuts if cut < len(content)), len(content)]
        parted = [b for pair in pairwise(ends) for b in Blocks(source, *pair, whole_lines=whole_lines)]
        assert parted == whole


def test_a_block_holds_whole_characters_and_line_ends(tmp_path):
    rng = random.Random(4)
    for _ in range(150):
        text = random_text(rng) or "a"
        found = [block for _, block in Blocks(source_of(tmp_path / "a.txt", text.encode()))]
        assert "".join(block.decode() for block in found) == text
        assert not any(a.endswith(b"\r") and b.startswith(b"\n") for a, b in pairwise(found))
        assert max(map(len, found)) <= 2 * 16 + 4
        whole = Blocks(source_of(tmp_path / "a.txt", text.encode()), whole_lines=True)
        assert all(block.endswith(b"\n") for _, block in list(whole)[:-1])


def test_a_long_line_is_read_in_a_time_that_grows_with_its_length_alone(tmp_path, monkeypatch):
    """Counted: the places at which a line end is looked for."""
    source = source_of(tmp_path / "a.jsonl", b"x" * 16000 + b"\n" + b"y\n")
    cuts = []
    real = Blocks._cut
    monkeypatch.setattr(
        Blocks, "_cut", lambda self, nominal: (cuts.append(nominal), real(self, nominal))[1]
    )
    assert len(list(Blocks(source, whole_lines=True))) == 2
    assert len(cuts) < 6


def test_packed_files_give_the_blocks_of_what_they_hold(tmp_path):
    content = b"".join(b"line %d\n" % i for i in range(100))
    plain = source_of(tmp_path / "a.txt", content)
    packed = source_of(tmp_path / "a.txt.gz", gzip.compress(content[:300]) + gzip.compress(content[300:]))
    assert list(Blocks(packed)) == list(Blocks(plain))
    assert packed.name == plain.name == "a.txt"


@pytest.mark.parametrize(
    "harm", [lambda b: b[:-9], lambda b: b[:40], lambda b: b[:30] + b"\0\0\0" + b[33:]]
)
def test_a_packed_file_that_is_cut_off_or_damaged_is_named(tmp_path, harm):
    content = gzip.compress(random.Random(0).randbytes(400).hex().encode())
    with pytest.raises(UserError, match=r"a\.txt\.gz is cut off or damaged"):
        list(Blocks(source_of(tmp_path / "a.txt.gz", harm(content))))


def test_zstandard_frames_are_read_one_after_the_other_and_a_cut_one_is_named(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    content = b"".join(b"line %d\n" % i for i in range(100))
    plain = source_of(tmp_path / "a.txt", content)
    frames = zstandard.compress(content[:300]) + zstandard.compress(content[300:])
    assert list(Blocks(source_of(tmp_path / "a.txt.zst", frames))) == list(Blocks(plain))
    for harmed in (frames[:-3], frames[: len(frames) // 3], b"abc" + frames):
        with pytest.raises(UserError, match=r"a\.txt\.zst is cut off or damaged"):
            list(Blocks(source_of(tmp_path / "a.txt.zst", harmed)))


def test_lines_are_counted_from_the_files_beginning(tmp_path):
    content = b"".join(b"line %d\n" % i for i in range(1, 100))
    source = source_of(tmp_path / "a.txt", content)
    for start in (0, 16, 160):
        reader = Blocks(source, start, len(content))
        for _, block in reader:
            first = int(block.split()[1])
            assert reader.line_of(0) == first
            assert reader.line_of(1) == first + 1
