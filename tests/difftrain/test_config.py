import dataclasses
import math

import pytest

from difftrain.config import Config
from difftrain.config.options import GROUPS
from difftrain.config.sources import (
    LARGEST_TOML,
    parse_word,
    preset_names,
    preset_summary,
    read_preset,
    read_toml,
    resolve_config,
)
from difftrain.config.table import options_table
from difftrain.errors import UserError


def test_defaults_are_the_specifications():
    config = Config()
    assert (config.penalty_keep_mask, config.penalty_mask_correct) == (0.25, 0.5)
    assert (config.masking_warmup_iters, config.guaranteed_correct_factor) == (1000, 0.01)
    assert config.max_corruption == 0.99


def test_later_layers_win(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("n_layer = 3\nlearning_rate = 1\n")
    config = resolve_config("demo", str(file), {"n_layer": "4"})
    assert config.n_layer == 4
    assert config.learning_rate == 1.0
    assert isinstance(config.learning_rate, float)
    assert config.block_size == read_preset("demo")["block_size"]
    assert config.dropout == Config().dropout


def test_toml_round_trip_keeps_every_value(tmp_path):
    config = Config(out_dir='a "quoted" \\ path', learning_rate=1e-30, min_lr=0.0, decay_lr=False)
    (tmp_path / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    assert Config(**read_toml(tmp_path / "config.toml")) == config


def test_resume_starts_from_the_saved_configuration_not_the_preset(tmp_path):
    saved = Config(out_dir=str(tmp_path), n_layer=5, max_iters=70)
    (tmp_path / "config.toml").write_text(saved.to_toml())
    words = {"out_dir": str(tmp_path), "max_iters": "90"}
    assert resolve_config("demo", None, words, resume=True) == dataclasses.replace(saved, max_iters=90)
    slow = dataclasses.replace(saved, learning_rate=0.01, min_lr=1e-5)
    (tmp_path / "config.toml").write_text(slow.to_toml())
    words = {"out_dir": str(tmp_path), "min_lr": "0.005"}  # above the default learning rate
    assert resolve_config(None, None, words, resume=True).min_lr == 0.005
    with pytest.raises(UserError, match="cannot resume: .* is not a run folder"):
        resolve_config(None, None, {"out_dir": str(tmp_path / "x")}, resume=True)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_a_valid_configuration_with_a_summary(name):
    resolve_config(name, None, {})
    assert len(preset_summary(name)) > 10


def test_unknown_preset_lists_near_matches():
    with pytest.raises(UserError, match="no preset named 'dmo'; did you mean demo"):
        read_preset("dmo")
    with pytest.raises(UserError, match="there are .*demo"):
        read_preset("../../etc/passwd")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n_layr = 3", "unknown option 'n_layr'; did you mean n_layer"),
        ("n_layer = ", "not valid TOML"),
        ("[model]\nn_layer = 3", "unknown option 'model'"),
        ("x" * (LARGEST_TOML + 1), "larger than"),
    ],
)
def test_bad_toml_is_refused_in_one_line(tmp_path, text, message):
    file = tmp_path / "c.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_toml(file)
    assert "\n" not in str(caught.value)


def test_missing_and_binary_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="configuration file not found"):
        read_toml(tmp_path / "none.toml")
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        read_toml(tmp_path / "b.toml")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_iters": 0}, "max_iters must be at least 1, got 0"),
        ({"penalty_keep_mask": -0.1}, "penalty_keep_mask must be at least 0.0, got -0.1"),
        ({"penalty_mask_correct": math.nan}, "penalty_mask_correct must be finite, got nan"),
        ({"penalty_mask_correct": math.inf}, "penalty_mask_correct must be finite, got inf"),
        ({"penalty_mask_correct": 1e39}, r"penalty_mask_correct must be at most 3.4e\+38, got 1e\+39"),
        ({"penalty_keep_mask": 1e39}, r"penalty_keep_mask must be at most 3.4e\+38, got 1e\+39"),
        ({"learning_rate": 10**400}, "learning_rate must be finite, got a whole number of 1329 bits"),
        ({"guaranteed_correct_factor": 1.5}, "must be at most 0.999, got 1.5"),
        ({"n_layer": 2.0}, "n_layer must be int, got float 2.0"),
        ({"batch_size": 10**20}, "batch_size must be at most 2147483647, got 1000"),
        ({"n_layer": True}, "n_layer must be int, got bool True"),
        ({"bias": 1}, "bias must be bool, got int 1"),
        ({"learning_rate": "fast"}, "learning_rate must be float, got str 'fast'"),
        ({"mode": "bert"}, "mode must be one of diffusion, gpt2, got 'bert'"),
        ({"n_embd": 10, "n_head": 3}, "n_embd must be a multiple of n_head 3, got 10"),
        ({"n_embd": 9, "n_head": 3}, "must be even for rotary positions, got 3"),
        ({"recipe": "bert"}, "recipe must be one of specification, llada, mdlm, got 'bert'"),
        *(
            (
                {name: value, "mode": "gpt2"},
                f"{name} must be .* in gpt2 mode, which corrupts nothing, got {value}",
            )
            for name, value in {
                "self_errors": 0.5,
                "mask_factor": 0.5,
                "replace_factor": 0.0,
                "replacement": "unigram",
                "wrong_target": "token",
                "span_length": 2,
                "mask_level": "cosine",
            }.items()
        ),
        ({"recipe": "llada", "mode": "gpt2"}, "recipe must be specification in gpt2 mode, .*, got llada"),
        ({"forbid_mask": True}, "forbid_mask must be false with recipe specification, where"),
        ({"gate": "soft"}, "gate must be one of argmax, probability, got 'soft'"),
        ({"token_weighting": 1}, "token_weighting must be one of recipe, uniform, got 1"),
        ({"softcap": -1.0}, "softcap must be at least 0.0, got -1.0"),
        ({"softcap": 1e39}, r"softcap must be at most 3.4e\+38, got 1e\+39"),
        ({"label_smoothing": 1.0}, "label_smoothing must be at most 0.999, got 1.0"),
        ({"z_loss": -1e-4}, "z_loss must be at least 0.0, got -0.0001"),
        ({"learning_rate": 1e-5}, "min_lr must be at most learning_rate 1e-05, got 0.0001"),
    ],
)
def test_wrong_values_name_the_option_expected_and_got(values, message):
    with pytest.raises(UserError, match=message):
        Config(**values)


def test_a_whole_number_does_for_a_float():
    assert parse_word("penalty_keep_mask", "1") == 1.0
    assert Config(penalty_keep_mask=1).penalty_keep_mask == 1.0


@pytest.mark.parametrize(("word", "value"), [("true", True), ("False", False), ("1", True), ("no", False)])
def test_words_for_booleans(word, value):
    assert parse_word("tensorboard", word) is value


@pytest.mark.parametrize(
    ("name", "word", "message"),
    [
        ("tensorboard", "maybe", "tensorboard must be true or false, got 'maybe'"),
        ("seed", "x", "seed must be int, got 'x'"),
    ],
)
def test_unreadable_words_are_named(name, word, message):
    with pytest.raises(UserError, match=message):
        parse_word(name, word)


def test_groups_and_table_cover_every_option():
    names = [field.name for field in dataclasses.fields(Config)]
    assert set(GROUPS) <= set(names)
    assert next(iter(GROUPS)) == names[0]
    assert all(f"| `{name}` |" in options_table() for name in names)


def test_penalties_are_the_specifications_alone_and_mask_is_forbidden_by_mdlm():
    kinds = [
        {},
        {"mode": "gpt2"},
        {"recipe": "llada"},
        {"recipe": "llada", "forbid_mask": True},
        {"recipe": "mdlm"},
    ]
    configs = [Config(**kind) for kind in kinds]
    assert [config.has_penalties for config in configs] == [True, False, False, False, False]
    assert [config.forbids_mask for config in configs] == [False, False, False, True, True]
    assert Config(mode="gpt2", forbid_mask=True).forbids_mask
