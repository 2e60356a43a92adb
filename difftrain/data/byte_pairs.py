"""Learning a byte-pair vocabulary from texts, with Hugging Face's tokenizers (extra: tok)."""

from __future__ import annotations

from collections.abc import Iterable

from difftrain.errors import UserError, import_extra

MARK = "<|endoftext|>"  # a word of its own, which no text yields by itself


def learn_byte_pairs(texts: Iterable[str], n_words: int) -> str:
    """The ``tokenizer.json`` of a byte-level BPE: 256 bytes, pairs learned from the texts, and MARK.

    Raises:
        UserError: the texts have too few different pairs for so many words.
    """
    tokenizers = import_extra("tokenizers", "tok")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=n_words,
        special_tokens=[MARK],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < n_words:
        raise UserError(
            f"train_bpe {n_words} asks for more words than the text yields: {tokenizer.get_vocab_size()}"
        )
    return tokenizer.to_str()
