"""A trial as a moving picture: what each frame tells, and the file."""

from pathlib import Path

import pytest

from difftrain.cli import main
from difftrain.sampling.picture import GROUNDS, INKS, write_gif
from difftrain.sampling.repairing import Edit, Repair
from difftrain.sampling.showing import CAPTION
from difftrain.sampling.trial import Trial
from difftrain.sampling.trial_frames import BACK_MS, FIRST_MS, LAST_MS, PASS_MS, frames_of
from difftrain.training.loop import train


def edit(position, old, new=None):
    return Edit(position, 1, position + 1, old, 0.9, new, None if new is None else 0.95)


PLANTED = (edit(1, "X", "b"), edit(3, "Y", "d"), edit(5, "Z", "f"))
TRIAL = Trial(
    "abcdefgh", "aXcYeZgh", PLANTED, (edit(0, "a"), edit(1, "X"), edit(3, "Y")),
    Repair("qbcweZgh", (edit(0, "a", "q"), edit(1, "X", "b"), edit(3, "Y", "w"))), 8,
)  # fmt: skip
PASSES = [
    [("aXcYeZgh", "settled")],
    [("\u2591\u2591", "back"), ("c", "settled"), ("\u2591", "back"), ("eZgh", "settled")],
    [("q", "fresh"), ("\u2591", "masked"), ("c", "settled"), ("\u2591", "masked"), ("eZgh", "settled")],
    [("q", "settled"), ("b", "fresh"), ("c", "settled"), ("w", "fresh"), ("eZgh", "settled")],
]


def test_errors_are_marked_before_and_after_and_only_what_is_right_again_is_fresh():
    frames, durations = frames_of(TRIAL, PASSES)
    texts = [frame[1:] for frame in frames]
    assert texts[0] == [
        ("a", "settled"), ("X", "wrong"), ("c", "settled"), ("Y", "wrong"), ("e", "settled"), ("Z", "wrong"),
        ("gh", "settled"),
    ]  # fmt: skip
    assert texts[1:4] == PASSES[1:]
    assert texts[4] == [
        ("q", "wrong"), ("b", "fresh"), ("c", "settled"), ("w", "wrong"), ("e", "settled"), ("Z", "wrong"),
        ("gh", "settled"),
    ]  # fmt: skip
    assert durations == [FIRST_MS, BACK_MS, PASS_MS, PASS_MS, LAST_MS]
    assert [frame[0] for frame in frames] == [
        (f"{line}\n\n", CAPTION)
        for line in (
            "3 of 8 tokens of a held-out text are wrong",
            "the model sends 3 back to [MASK], and leaves the others alone",
            "it fills them, the most certain first",
            "it fills them, the most certain first",
            "1 are right again, 2 are not; 1 of 5 right ones were harmed",
        )
    ]


def test_words_of_another_length_keep_the_rest_of_the_text():
    planted = (edit(2, "XYZ", "b"), edit(6, "q", "c"))
    trial = Trial("a bd c", "a XYZdq", planted, (), Repair("a bdq", (edit(2, "XYZ", "b"),)), 5)
    frames, _ = frames_of(trial, PASSES[:2])
    assert frames[0][1:] == [("a ", "settled"), ("XYZ", "wrong"), ("d", "settled"), ("q", "wrong")]
    assert frames[-1][1:] == [("a ", "settled"), ("b", "fresh"), ("d", "settled"), ("q", "wrong")]


def test_a_blank_that_is_marked_is_seen_by_its_ground(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    write_gif([[("a b", "settled")], [("a", "settled"), (" ", "fresh")]], tmp_path / "a.gif", [100, 200])
    with image.open(tmp_path / "a.gif") as picture:
        durations, colours = [], []
        for i in range(2):
            picture.seek(i)
            durations.append(picture.info["duration"])
            colours.append(
                {"#{:02x}{:02x}{:02x}".format(*c) for _, c in picture.convert("RGB").getcolors(4096)}
            )
    assert durations == [100, 200]
    assert GROUNDS["fresh"] not in colours[0]
    assert GROUNDS["fresh"] in colours[1]
    assert INKS["fresh"] not in colours[1]


@pytest.fixture
def run(tiny):
    train(config := tiny(max_iters=2))
    return Path(config.out_dir)


def test_the_command_writes_the_picture_of_its_trial(run, tmp_path, capfdbinary, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    gif = tmp_path / "new" / "a.gif"
    words = ["repair", str(run), "--held_out", "--device", "cpu", "--suspect", "0.9"]
    assert main(words) == 0
    plain = capfdbinary.readouterr().out
    assert main([*words, "--gif", str(gif)]) == 0
    assert capfdbinary.readouterr().out == plain
    with image.open(gif) as picture:
        assert picture.n_frames > 2
    from difftrain.sampling import trial

    monkeypatch.setattr(trial, "try_repair", lambda *_: pytest.fail("repaired"))
    assert main([*words, "--gif", str(tmp_path / "a.png")]) == 2
    assert b"gif must be a .gif file" in capfdbinary.readouterr().err
    assert main(["repair", str(run), "-", "--gif", str(gif)]) == 2
    assert b"--gif goes with --held_out alone" in capfdbinary.readouterr().err
