"""A word-level tokenizer in Hugging Face format, for models of the tests' vocabulary."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from .conftest import VOCAB

ENGLISH = [
    "the",
    "cat",
    "is",
    "a",
    "dog",
    "of",
    "my",
    "own",
    "and",
    "we",
    "see",
    "it",
    "run",
    "to",
    "home",
    "by",
    "an",
    "old",
    "red",
    "tree",
    "near",
    "his",
    "big",
    "house",
    "with",
    "some",
    "more",
    "good",
    "food",
    "on",
    "top",
    "for",
    "all",
    "you",
    "who",
    "like",
    "warm",
    "sun",
    "day",
    "night",
    "rain",
    "snow",
    "wind",
    "sea",
    "sky",
    "fish",
    "bird",
]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """`<bos>` in front, padding on the left."""
    words = ["<pad>", "<bos>", "<unk>", *ENGLISH]
    vocabulary = {word: n for n, word in enumerate(words)}
    assert len(vocabulary) == len(words) <= VOCAB
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", pad_token="<pad>", unk_token="<unk>", padding_side="left"
    )
