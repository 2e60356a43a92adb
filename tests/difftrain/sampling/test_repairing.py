import json

import pytest

from difftrain.errors import UserError
from difftrain.sampling.marking import diff_lines, place_lines, to_json
from difftrain.sampling.repairing import Edit, Repair, cut_windows
from ring_model import LETTERS, ring

RIGHT = LETTERS * 30


def planted(text, *places):
    """The text with another letter at each of these places."""
    return "".join(LETTERS[(LETTERS.index(c) + 2) % 5] if i in places else c for i, c in enumerate(text))


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 24, 25, 100])
@pytest.mark.parametrize("block_size", [1, 2, 3, 16])
def test_windows_cover_a_text_once_and_decide_amid_their_overlap(length, block_size):
    windows = cut_windows(length, block_size)
    owned = [i for _, own in windows for i in range(own.start, own.stop)]
    assert owned == list(range(length))
    for window, own in windows:
        assert window.stop - window.start == min(length, block_size)
        assert window.start <= own.start <= own.stop <= window.stop
        for side, end, at in ((own.start, 0, window.start), (window.stop, length, own.stop)):
            assert at in (0, length) or abs(side - at) >= block_size // 4 or end == at
    assert cut_windows(0, block_size) == []


@pytest.mark.parametrize("length", [9, 16, 17, 40, 150])
def test_a_right_text_comes_back_unchanged_and_an_error_is_repaired_wherever_it_stands(length):
    model = ring()
    right = RIGHT[:length]
    assert model.repair(right).text == right
    assert model.repair(right).edits == ()
    for place in range(3, length - 3, 2):
        wrong = planted(right, place)
        repaired = model.repair(wrong)
        assert repaired.text == right
        (edit,) = repaired.edits
        assert (edit.position, edit.line, edit.column) == (place, 1, place + 1)
        assert (edit.old, edit.new) == (wrong[place], right[place])
        assert edit.suspicion > 0.9
        assert edit.probability > 0.9


def test_at_most_so_many_changes_the_most_suspected_first_and_only_above_the_threshold():
    model = ring()
    wrong = planted(RIGHT[:64], 10, 30, 50)
    assert len(model.repair(wrong).edits) == 3
    all_found = model.repair(wrong, check=True).edits
    most = max(all_found, key=lambda e: e.suspicion)
    for n in (0, 1, 2):
        repaired = model.repair(wrong, max_changes=n)
        assert len(repaired.edits) == n
        assert n == 0 or most.position in [e.position for e in repaired.edits]
    between = sorted(e.suspicion for e in all_found)[0]
    assert len(model.repair(wrong, suspect=between, check=True).edits) == len(all_found)
    assert model.repair(wrong, suspect=1.0).text == wrong


def test_a_suspect_stays_where_the_model_is_not_sure_of_another_word():
    """Four wrong in a row leave few neighbours to tell what stood there, so some of them are guesses."""
    model = ring()
    wrong = planted(RIGHT[:40], 8, 19, 20, 21, 22)
    always = model.repair(wrong, sure=0).edits
    probabilities = sorted(edit.probability for edit in always)
    assert probabilities[0] < 0.9 < probabilities[-1]
    for sure in (probabilities[0], probabilities[1], 0.9, 1.0):
        repaired = model.repair(wrong, sure=sure)
        kept = [edit for edit in always if edit.probability >= sure]
        assert [(e.position, e.new) for e in repaired.edits] == [(e.position, e.new) for e in kept]
        expected = list(wrong)
        for edit in kept:
            expected[edit.position] = edit.new
        assert repaired.text == "".join(expected)


def test_a_check_marks_and_changes_nothing():
    wrong = planted(RIGHT[:40], 20)
    checked = ring().repair(wrong, check=True)
    assert checked.text == wrong
    assert [(e.position, e.new, e.probability) for e in checked.edits] == [(20, None, None)]


def test_a_window_costs_its_reading_its_steps_and_a_look_at_how_sure_the_new_words_are():
    model = ring()
    model.repair(RIGHT[:16])
    assert model.module.calls == 1
    model.repair(planted(RIGHT[:16], 4, 9, 13), steps=2)
    assert model.module.calls == 1 + 1 + 2 + 1


def test_unknown_characters_are_named_or_stay_where_they_are():
    model = ring()
    right = RIGHT[:20] + "\r\n" + "é" + RIGHT[:20]
    wrong = planted(RIGHT[:20], 12) + "\r\n" + "é" + planted(RIGHT[:20], 5)
    with pytest.raises(UserError, match=r"characters outside the vocabulary: '\\n' '\\r' 'é'"):
        model.repair(wrong)
    repaired = model.repair(wrong, keep_unknown=True)
    assert repaired.text == right
    assert [(e.position, e.line, e.column) for e in repaired.edits] == [(12, 1, 13), (28, 2, 7)]


def test_unknown_characters_are_walked_through_once_however_many_words_are_changed(monkeypatch):
    """Each edit's place counts those before it; 8,000 of both took seconds where every edit looked at all."""
    looks = []

    class Watched(dict):
        def items(self):
            for pair in super().items():
                looks.append(pair)
                yield pair

    model = ring()
    real = type(model.tokenizer).encode_known
    known = lambda self, text: (lambda ids, unknown: (ids, Watched(unknown)))(*real(self, text))  # noqa: E731
    monkeypatch.setattr(type(model.tokenizer), "encode_known", known)
    counts = []
    for places in ((12,), (12, 45, 78, 111)):
        wrong = "".join(
            planted(RIGHT[:30], *(p % 33 for p in places if p // 33 == i)) + "é\n\r" for i in range(4)
        )
        looks.clear()
        repaired = model.repair(wrong, keep_unknown=True)
        assert [e.position for e in repaired.edits] == list(places)
        counts.append(len(looks))
    assert counts[0] == counts[1]


def test_a_model_that_was_not_taught_to_find_errors_is_refused():
    for changes, told in (({"mode": "gpt2"}, "gpt2 mode"), ({"recipe": "mdlm"}, "recipe mdlm")):
        with pytest.raises(UserError, match=f"taught to find wrong words, which {told} does not do"):
            ring(**changes).repair("abc")


def test_a_tokenizer_that_does_not_give_the_text_back_is_named(monkeypatch):
    model = ring()
    monkeypatch.setattr(type(model.tokenizer), "decode_words", lambda self, ids: "?" * len(ids))
    with pytest.raises(UserError, match="tokenizer does not give this text back as it is"):
        model.repair("abc")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"suspect": 0.0}, r"suspect must be in \(0, 1\], got 0.0"),
        ({"suspect": float("nan")}, r"suspect must be in \(0, 1\], got nan"),
        ({"sure": 1.5}, r"sure must be in \[0, 1\], got 1.5"),
        ({"max_changes": -1}, "max_changes must be at least 0 and below 2\\^31, got -1"),
        ({"steps": 0}, "steps must be at least 1 and below 2\\^31, got 0"),
    ],
)
def test_numbers_out_of_range_are_named(options, told):
    with pytest.raises(UserError, match=told):
        ring().repair("abc", **options)


def test_a_diff_shows_changed_lines_with_whole_words_marked():
    text = "ab cde\nright\nfgh (cab) i\nj k\nl\nm"
    edits = [
        Edit(p, 0, 0, text[p], 0.9, new)
        for p, new in ((4, "x"), (15, "y"), (19, "z"), (25, "."), (28, " "), (31, "n"))
    ]
    repair = Repair("", tuple(edits))
    assert list(diff_lines(text, repair, is_coloured=False)) == [
        "1: ab [-cde-]{+cxe+}",
        "3: [-fgh-]{+fgy+} ([-cab-]{+czb+}) i",
        "4: [-j-]{+.+} k[-\n-]{+ +}l",
        "6: [-m-]{+n+}",
    ]
    coloured = next(diff_lines(text, repair, is_coloured=True))
    assert coloured == "1: ab \033[9;31mcde\033[0m\033[1;32mcxe\033[0m"
    assert list(diff_lines(text, Repair(text, ()), is_coloured=False)) == []


def test_places_are_named_as_compilers_do_and_json_holds_every_edit():
    wrong = planted(RIGHT[:30], 11)
    (line,) = place_lines("a.txt", ring().repair(wrong, check=True))
    assert line == f"a.txt:1:12: {wrong[11]!r} is wrong with probability 1.00"
    record = json.loads(to_json(ring().repair(wrong)))
    assert record["text"] == RIGHT[:30]
    (edit,) = record["edits"]
    assert set(edit) == {"position", "line", "column", "old", "new", "suspicion", "probability"}
    assert (edit["position"], edit["old"], edit["new"]) == (11, wrong[11], RIGHT[11])
