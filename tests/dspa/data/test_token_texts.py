"""`dspa.data.token_texts`: spaces, line breaks, parts of characters, special tokens."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from dspa.data.token_texts import quoted, token_text
from dspa.testing import word_tokenizer


def tokenizer_of(words: list[str], decoder: decoders.Decoder) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=words[0])


@pytest.mark.parametrize(
    ("words", "decoder", "texts"),
    [
        # As GPT-2's and Qwen's: a space is "Ġ", a line feed "Ċ", and "âĢ" two of three bytes of a dash.
        (
            ["<unk>", "Ġwarm", "warm", "Ċ", "âĢ", "Ã¼"],
            decoders.ByteLevel(),
            ["<unk>", " warm", "warm", "\n", "âĢ", "ü"],
        ),
        # As Llama-2's, which drops the first space of a text.
        (
            ["<unk>", "▁warm", "warm", "<0xE2>", "▁▁"],
            decoders.Sequence(
                [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
            ),
            ["<unk>", " warm", "warm", "<0xE2>", " "],
        ),
    ],
)
def test_a_token_shows_its_space(words: list[str], decoder: decoders.Decoder, texts: list[str]) -> None:
    tokenizer = tokenizer_of(words, decoder)
    assert [token_text(tokenizer, n) for n in range(len(words))] == texts


def test_words() -> None:
    tokenizer = word_tokenizer()
    assert token_text(tokenizer, tokenizer.convert_tokens_to_ids("cat")) == "cat"
    assert token_text(tokenizer, 1) == "<bos>"


def test_quotes_show_what_is_hard_to_see() -> None:
    assert quoted([" warm", "\n", '"', "ü"]) == r'" warm" "\n" "\"" "ü"'
    assert quoted([]) == ""
