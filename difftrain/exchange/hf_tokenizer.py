"""A vocabulary as the ``tokenizer.json`` of Hugging Face, with the same ids and [MASK] after the last word."""

from __future__ import annotations

import json
from typing import Any

from difftrain.data.vocabulary import Vocabulary
from difftrain.errors import UserError

MASK = "[MASK]"


def tokenizer_files(vocabulary: Vocabulary, block_size: int) -> dict[str, str]:
    """``tokenizer.json`` and ``tokenizer_config.json``; empty for words that have no such form (numbers, tiktoken).

    Raises:
        UserError: a word that is no character of Unicode.
    """
    meta = vocabulary.to_meta()
    mask = MASK
    if meta["kind"] == "char":
        definition = _of_characters(meta["itos"])
    elif meta["kind"] == "bytes":
        definition = _of_bytes()
    elif meta["kind"] == "tokenizer":
        definition = json.loads(meta["definition"])
        # Ids are those of training: no words are put around a text.
        definition["post_processor"] = None
        if MASK in json.dumps(definition["model"].get("vocab", "")) or any(
            token["content"] == MASK for token in definition.get("added_tokens", ())
        ):
            mask = "[DIFFTRAIN_MASK]"
    else:
        return {}
    definition.setdefault("added_tokens", []).append(
        {
            "id": vocabulary.mask_id, "content": mask, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True,
        }
    )  # fmt: skip
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "mask_token": mask,
        "model_max_length": block_size,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    return {
        "tokenizer.json": json.dumps(definition, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(config, indent=2),
    }


def _of_characters(characters: list[str]) -> dict[str, Any]:
    for character in characters:
        if "\ud800" <= character <= "\udfff":
            raise UserError(f"the vocabulary holds {character!r}, half of a character, which UTF-8 has not")
    return _definition(
        # A character that is no word is refused by the library, since there is no word for what is unknown.
        {"type": "WordLevel", "vocab": {c: i for i, c in enumerate(characters)}, "unk_token": "[UNKNOWN]"},
        {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False},
        {"type": "Fuse"},
    )


def _of_bytes() -> dict[str, Any]:
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return _definition(
        {"type": "BPE", "vocab": {c: i for i, c in enumerate(_byte_characters())}, "merges": []},
        level,
        level,
    )


def _definition(
    model: dict[str, Any], splitting: dict[str, Any], joining: dict[str, Any]
) -> dict[str, Any]:
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": splitting,
        "post_processor": None, "decoder": joining, "model": model,
    }  # fmt: skip


def _byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level tokenizers.

    Source: GPT-2's encoder.py, ``bytes_to_unicode``.
    """
    shown = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte if byte in shown else 256 + hidden.index(byte)) for byte in range(256)]
