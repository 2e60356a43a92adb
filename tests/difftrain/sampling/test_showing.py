import io
import json
import re
import sys

import pytest

from difftrain import appearing
from difftrain.cli import main
from difftrain.data.vocabulary import Characters
from difftrain.sampling import showing
from difftrain.sampling.picture import INKS, write_gif
from difftrain.sampling.showing import Frames, Terminal, coloured_lines, write_page

WORDS = Characters(tuple("ab<\n"))
M = WORDS.mask_id
PASSES = [[0, M, M, M], [0, 1, 2, M], [0, 1, M, 3], [0, 0, 1, 3]]


def shown(watch, passes=PASSES):
    for ids in passes:
        watch(ids, WORDS)
    return watch


def test_each_pass_tells_what_was_written_and_what_was_sent_back():
    assert shown(Frames("#")).frames == [
        [("a", "settled"), ("###", "masked")],
        [("a", "settled"), ("b<", "fresh"), ("#", "masked")],
        [("ab", "settled"), ("#", "back"), ("\n", "fresh")],
        [("a", "settled"), ("ab", "fresh"), ("\n", "settled")],
    ]


def test_lines_keep_their_width_and_a_control_character_moves_nothing():
    frame = [("abcdefg\nhi", "settled"), ("\tj\x1bk", "fresh")]
    lines = list(coloured_lines(frame, 5))
    bare = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in lines]
    assert bare == ["abcde", "fg", "hi   ", " j\N{REPLACEMENT CHARACTER}k"]
    assert lines[3] == "\x1b[1;92m j\N{REPLACEMENT CHARACTER}k\x1b[0m"


def test_frames_on_a_terminal_are_drawn_over_one_another_and_go(monkeypatch, capsys):
    monkeypatch.setattr(showing, "DELAY", 0.0)
    shown(Terminal("#")).clear()
    out = capsys.readouterr().out
    drawn = out.split("\x1b[J")
    assert [re.findall(r"\x1b\[(\d+)A", frame) for frame in drawn] == [[], ["1"], ["1"], ["2"], ["2"], []]
    assert "\x1b[91m#\x1b[0m" in drawn[2]
    assert "\x1b[2m###\x1b[0m" in drawn[0]


def test_more_lines_than_the_terminal_has_show_their_end(monkeypatch, capsys):
    monkeypatch.setattr(showing, "DELAY", 0.0)
    monkeypatch.setenv("LINES", "4")
    monkeypatch.setenv("COLUMNS", "40")
    shown(Terminal("#"), [[3, 3, 3, 3, 3, 0]] * 2)
    assert re.findall(r"\x1b\[(\d+)A", capsys.readouterr().out) == ["3"]


def test_a_page_holds_every_frame_whatever_its_words(tmp_path):
    frames = [[("</script><b>&\u2591", "fresh")]]
    write_page(frames, tmp_path / "a.html", "a < b")
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert page.count("</script>") == 1
    assert "<title>a &lt; b</title>" in page
    assert "http" not in page
    (data,) = re.findall(r"^const frames = (.*);$", page, re.MULTILINE)
    assert [[tuple(run) for run in frame] for frame in json.loads(data)] == frames


def test_a_terminal_of_one_column_and_line_ends_and_shows_the_end(monkeypatch, capsys):
    monkeypatch.setattr(showing, "DELAY", 0.0)
    monkeypatch.setenv("LINES", "1")
    monkeypatch.setenv("COLUMNS", "1")
    shown(Terminal("#"), [[3, 3, 3]] * 2)
    assert re.findall(r"\x1b\[(\d+)A", capsys.readouterr().out) == ["1"]


def test_a_title_may_be_any_text(tmp_path):
    write_page([[("a", "fresh")]], tmp_path / "a.html", "FRAMES of TITLE")
    assert "<h1>FRAMES of TITLE</h1>" in (tmp_path / "a.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus_folder):
    from difftrain.config import Config
    from difftrain.training.loop import train

    config = Config(
        out_dir=str(tmp_path_factory.mktemp("showing") / "run"), data=str(corpus_folder), device="cpu",
        block_size=16, batch_size=8, n_layer=1, n_head=2, n_embd=16, max_iters=1, eval_iters=2, eval_batch_size=2,
    )  # fmt: skip
    train(config)
    return config.out_dir


class Screen(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def test_the_command_shows_on_a_terminal_alone_and_writes_its_page(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(showing, "DELAY", 0.0)
    capsys.readouterr()
    words = ["sample", run, "--device", "cpu", "--policy", "confidence", "--steps", "4", "--prompt", "red "]
    assert main(words) == 0
    text = capsys.readouterr().out
    page = tmp_path / "page.html"
    assert main([*words, "--show", "--html", str(page)]) == 0
    assert capsys.readouterr().out == text
    (data,) = re.findall(r"^const frames = (.*);$", page.read_text(encoding="utf-8"), re.MULTILINE)
    frames = json.loads(data)
    assert len(frames) == 1 + 4
    assert "".join(words for words, _ in frames[-1]) == text.removesuffix("\n")
    screen = Screen()
    monkeypatch.setattr("sys.stdout", screen)
    assert main([*words, "--show", "--html", str(page)]) == 0
    assert screen.getvalue().count("\x1b[J") == 1 + 4 + 1
    assert screen.getvalue().endswith("\x1b[J" + text)
    assert (
        json.loads(re.findall(r"^const frames = (.*);$", page.read_text(encoding="utf-8"), re.MULTILINE)[0])
        == frames
    )


def test_a_text_of_several_blocks_is_seen_whole(run, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert (
        main(["sample", run, "--device", "cpu", "--length", "40", "--steps", "9", "--html", str(page)]) == 0
    )
    (data,) = re.findall(r"^const frames = (.*);$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert {sum(len(words) for words, _ in frame) for frame in json.loads(data)} == {40}


@pytest.mark.parametrize("place", ["folder", "file/page.html"])
def test_a_page_that_cannot_be_written_is_told_before_anything_is_sampled(
    run, tmp_path, capsys, monkeypatch, place
):
    from difftrain.sampling import texts

    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setattr(texts, "sample_run", lambda *_: pytest.fail("sampled"))
    assert main(["sample", run, "--device", "cpu", "--html", str(tmp_path / place)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("difftrain: a page must have a place of its own, and ")
    assert told.count("\n") == 1


def test_a_page_takes_the_place_of_an_older_one_when_it_is_whole(run, tmp_path, monkeypatch):
    page = tmp_path / "new" / "page.html"
    words = ["sample", run, "--device", "cpu", "--steps", "2", "--html", str(page)]
    assert main(words) == 0
    before = page.read_text(encoding="utf-8")

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(appearing, "flush", full)
    assert main(words) == 1
    assert [p.name for p in page.parent.iterdir()] == ["page.html"]
    assert page.read_text(encoding="utf-8") == before


def test_gpt2_mode_has_nothing_to_show(tiny, tmp_path, capsys):
    from difftrain.training.loop import train

    train(tiny(mode="gpt2", max_iters=1))
    capsys.readouterr()
    page = tmp_path / "page.html"
    assert main(["sample", str(tmp_path / "run"), "--device", "cpu", "--html", str(page)]) == 2
    assert "there is nothing to see settle" in capsys.readouterr().err
    assert not page.exists()


def test_the_gif_has_a_frame_a_pass_in_the_letters_colours_and_rests_on_the_last(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    passes = [
        [("\u2591" * 90, "masked")],
        [("ab\tc\n", "fresh"), ("\u2591", "back")],
        [("ab\tc\nd\x07", "settled")],
    ]
    write_gif(passes, tmp_path / "new" / "a.gif")
    with image.open(tmp_path / "new" / "a.gif") as picture:
        assert (picture.format, picture.n_frames, picture.info["loop"]) == ("GIF", 3, 0)
        inks, durations = [], []
        for i in range(3):
            picture.seek(i)
            durations.append(picture.info["duration"])
            colours = {colour for _, colour in picture.convert("RGB").getcolors(4096)}
            inks.append({what for what, ink in INKS.items() if any(_near(ink, c) for c in colours)})
        assert picture.width < 900  # lines of 80 characters
    assert inks[0] == {"masked"}
    assert [found - {"masked", "caption"} for found in inks[1:]] == [
        {"fresh", "back"},
        {"settled"},
    ]  # edges of letters are grey
    assert durations == [130, 130, 3000]


def _near(ink, colour):
    return all(abs(int(ink[i : i + 2], 16) - c) < 3 for i, c in zip((1, 3, 5), colour, strict=True))


def test_the_command_writes_its_gif_and_says_what_is_missing_before_it_samples(
    run, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("PIL")
    gif = tmp_path / "a.gif"
    words = ["sample", run, "--device", "cpu", "--length", "20", "--steps", "5", "--gif", str(gif)]
    assert main(words) == 0
    assert gif.read_bytes().startswith(b"GIF8")
    text = capsys.readouterr().out
    assert main([*words[:-1], str(tmp_path / "a.png")]) == 2
    assert "gif must be a .gif file, got" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "PIL.ImageFont", None)
    assert main(words) == 2
    done = capsys.readouterr()
    assert (done.out, done.err.count("\n")) == ("", 1)
    assert "pip install 'difftrain[plot]'" in done.err
    assert text
