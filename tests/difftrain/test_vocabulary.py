import json

import pytest

from difftrain.data.vocabulary import Characters, Ids, Tokenizer, from_meta, make_vocabulary
from difftrain.errors import UserError


def test_characters_round_trip_and_show_mask():
    words = Characters(("a", "b", "\n"))
    assert words.encode("ab\n") == [0, 1, 2]
    assert words.decode([0, 3, 1, 3, 3], mask="#") == "a#b##"
    assert words.decode([]) == ""


def test_characters_outside_the_vocabulary_are_named():
    with pytest.raises(UserError, match="characters outside the vocabulary: 'x' 'z'"):
        Characters(("a", "b")).encode("azbx")


@pytest.mark.parametrize("words", [Characters(("a", "b")), Ids(500)])
def test_meta_data_survives_json(words):
    assert from_meta(json.loads(json.dumps(words.to_meta())), "test") == words


def test_ids_have_no_text():
    assert Ids(9).decode([3, 9, 4]) == "<3>_<4>"
    with pytest.raises(UserError, match="text cannot be encoded"):
        Ids(9).encode("a")


def test_tokenizer_json_round_trips():
    tokenizers = pytest.importorskip("tokenizers", reason="the extra tok is not installed")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words = Tokenizer(made.to_str())
    assert words.encode("a b a") == [0, 1, 0]
    assert words.mask_id == 3
    assert from_meta(words.to_meta(), "test") == words
    assert words.decode([0, 3, 1], mask="#") == "a#b"


def test_unknown_tokenizers_are_refused():
    with pytest.raises(UserError, match="tokenizer file not found: none.json"):
        make_vocabulary("none.json", "text")
    with pytest.raises(UserError):
        make_vocabulary("no-such-encoding", "text")
