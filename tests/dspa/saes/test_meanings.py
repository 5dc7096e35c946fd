"""`dspa.top_tokens` and `dspa.top_contexts`, against plain passes of the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dspa
from dspa import ModelError, SAEError
from dspa.testing import D_SAE_OUT, ENGLISH, L_OUT, make_model, make_sae, word_tokenizer

LATENTS = [3, 90, 17, 64]
N_WORDS = 3 + len(ENGLISH)


@pytest.fixture(scope="module")
def model() -> Any:
    """A model whose final norm has a weight of its own."""
    model = make_model("gemma2")
    torch.nn.init.normal_(model.model.norm.weight, generator=torch.Generator().manual_seed(0))
    return model


# Tokens


@torch.no_grad()
def test_tokens_are_those_of_decoder_rows(model: Any, sae_out: dspa.FrozenSAE) -> None:
    """The head of the model applied to a row times (1 + w), as in Gemma; the head has more rows than words."""
    tokenizer = word_tokenizer()
    logits = model.lm_head(sae_out.W_dec * (1 + model.model.norm.weight))[:, :N_WORDS]
    words = ["<pad>", "<bos>", "<unk>", *ENGLISH]
    tokens = dspa.top_tokens(sae_out, model, tokenizer)
    assert list(tokens) == list(range(D_SAE_OUT))
    for latent, texts in tokens.items():
        assert texts == [words[i] for i in logits[latent].argsort(descending=True)[:5]]
    assert dspa.top_tokens(sae_out, model, tokenizer, LATENTS, n=2) == {j: tokens[j][:2] for j in LATENTS}
    lowest = dspa.top_tokens(sae_out, model, tokenizer, torch.tensor([90, 90]), n=3, suppressed=True)
    assert lowest == {90: [words[i] for i in logits[90].argsort()[:3]]}
    assert dspa.top_tokens(sae_out, model, tokenizer, []) == {}


def test_tokens_of_bad_arguments(model: Any, sae_out: dspa.FrozenSAE) -> None:
    with pytest.raises(SAEError, match=r"`latents` is -1, 128; accepted: 0 to 127"):
        dspa.top_tokens(sae_out, model, word_tokenizer(), [5, -1, 128])
    for n in (0, N_WORDS + 1):
        with pytest.raises(ValueError, match=f"`n` is {n}; accepted: 1 to {N_WORDS}"):
            dspa.top_tokens(sae_out, model, word_tokenizer(), n=n)
    with pytest.raises(ModelError, match="hidden size"):
        dspa.top_tokens(make_sae(L_OUT, 8, d_in=24), model, word_tokenizer())


# Contexts


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """Documents of different lengths, the third of them twice."""
    texts = [" ".join(ENGLISH[(5 * i + k * k * (i + 1)) % len(ENGLISH)] for k in range(3 + i % 9)) for i in range(24)]
    path = tmp_path / "texts.txt"
    path.write_text("\n".join([*texts, texts[2]]))
    return path


@torch.no_grad()
def values_of(model: Any, sae: dspa.FrozenSAE, ids: list[int]) -> Tensor:
    """The latents [T, d_sae] of one document alone, by JumpReLU's formula. The first token is `<bos>`."""
    h = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[L_OUT + 1][0]
    pre = h @ sae.W_enc + sae.b_enc
    return torch.where(pre > sae.threshold.clamp(min=0), pre, 0)


def read(model: Any, sae: dspa.FrozenSAE, texts: list[list[int]]) -> list[tuple[int, list[int], Tensor]]:
    """Documents by themselves: entry, ids and latents."""
    return [(entry, ids, values_of(model, sae, ids)) for entry, ids in enumerate(texts, start=1)]


def strongest(documents: list[tuple[int, list[int], Tensor]], latent: int) -> list[tuple[float, int, int, list[int]]]:
    """The largest value of each document with its entry, its token's place and its ids, by falling value."""
    rows = []
    for entry, ids, values in documents:
        value, place = values[:, latent].max(dim=0)
        if value > 0:
            rows.append((float(value), entry, int(place), ids))
    return sorted(rows, key=lambda row: -row[0])


@pytest.mark.parametrize("batch_tokens", [1, 8192])
def test_contexts_are_the_largest_activations(
    model: Any, sae_out: dspa.FrozenSAE, lines: Path, batch_tokens: int
) -> None:
    tokenizer = word_tokenizer()
    options: dict[str, Any] = {"n": 4, "window": 2, "progress": False, "batch_tokens": batch_tokens}
    contexts = dspa.top_contexts(sae_out, model, tokenizer, lines, LATENTS, **options)
    # The last line is the third.
    texts = lines.read_text().splitlines()[:-1]
    documents = read(model, sae_out, [tokenizer(text)["input_ids"] for text in texts])
    assert list(contexts) == LATENTS
    for latent, got in contexts.items():
        expected = strongest(documents, latent)[:4]
        assert len(expected) == 4
        assert [c.value for c in got] == pytest.approx([row[0] for row in expected], abs=1e-4)
        # Equal texts have equal values.
        assert [3 if c.entry == len(texts) + 1 else c.entry for c in got] == [row[1] for row in expected]
        for context, (_, _, place, ids) in zip(got, expected, strict=True):
            words = tokenizer.convert_ids_to_tokens(ids)
            assert context.token.strip() == words[place]
            assert context.before.split() == words[max(0, place - 2) : place]
            assert context.after.split() == words[place + 1 : place + 3]


def test_no_context_is_shown_twice(model: Any, sae_out: dspa.FrozenSAE, lines: Path) -> None:
    """The third line is the last one, too."""
    contexts = dspa.top_contexts(sae_out, model, word_tokenizer(), lines, range(D_SAE_OUT), n=4, progress=False)
    shown = [[(c.before, c.token, c.after) for c in got] for got in contexts.values()]
    assert all(len(set(got)) == len(got) for got in shown)
    assert sum(c.entry in (3, 25) for got in contexts.values() for c in got) > 5


def test_an_entry_has_one_context(model: Any, sae_out: dspa.FrozenSAE, tmp_path: Path) -> None:
    """Both documents of a triple begin with its prompt."""
    path = tmp_path / "triples.jsonl"
    row = {"prompt": " ".join(ENGLISH[:8]), "chosen": f" {ENGLISH[9]}", "rejected": f" {ENGLISH[12]}"}
    other = {**row, "prompt": " ".join(ENGLISH[20:27])}
    path.write_text("".join(json.dumps(r) + "\n" for r in (row, other)))
    contexts = dspa.top_contexts(sae_out, model, word_tokenizer(), path, range(D_SAE_OUT), progress=False)
    assert {len(got) for got in contexts.values()} == {0, 1, 2}
    assert all(len({c.entry for c in got}) == len(got) for got in contexts.values())
    assert all([c.value for c in got] == sorted((c.value for c in got), reverse=True) for got in contexts.values())


def test_tokens_of_outlying_norm_are_left_out(sae_out: dspa.FrozenSAE, lines: Path) -> None:
    """As the first token of a text in models without a BOS token; here `<bos>` is one."""
    model: Any = make_model("gemma2")
    model.model.embed_tokens.weight.data[1] *= 3000
    ids = word_tokenizer()(lines.read_text().splitlines()[5])["input_ids"]
    latents = (values_of(model, sae_out, ids).argmax(dim=0) == 0).nonzero().flatten().tolist()
    contexts = dspa.top_contexts(sae_out, model, word_tokenizer(), lines, latents, progress=False)
    assert len(latents) > 20 and any(contexts.values())
    assert all(c.token.strip() != "<bos>" for got in contexts.values() for c in got)


def test_only_the_start_of_a_file_is_read(model: Any, sae_out: dspa.FrozenSAE, lines: Path) -> None:
    """4 + 5 tokens of the first lines, and 3 of the third; then 2 of each."""
    tokenizer, texts = word_tokenizer(), lines.read_text().splitlines()
    ids = [tokenizer(text)["input_ids"] for text in texts]
    for options, documents in (
        ({"n_tokens": 12}, [ids[0], ids[1], ids[2][:3]]),
        ({"max_length": 2}, [row[:2] for row in ids]),
    ):
        alone = read(model, sae_out, documents)
        contexts = dspa.top_contexts(sae_out, model, tokenizer, lines, range(D_SAE_OUT), n=1, progress=False, **options)
        for latent, got in contexts.items():
            expected = strongest(alone, latent)[:1]
            assert [c.value for c in got] == pytest.approx([row[0] for row in expected], abs=1e-4)


def test_contexts_of_bad_arguments(model: Any, sae_out: dspa.FrozenSAE, lines: Path) -> None:
    given = (sae_out, model, word_tokenizer(), lines)
    for name in ("n", "n_tokens", "max_length", "batch_tokens"):
        with pytest.raises(ValueError, match=f"`{name}` is 0; accepted: a whole number >= 1"):
            dspa.top_contexts(*given, [1], **{name: 0})
    with pytest.raises(ValueError, match="`window` is -1; accepted: a whole number >= 0"):
        dspa.top_contexts(*given, [1], window=-1)
    with pytest.raises(SAEError, match="`latents` is 128"):
        dspa.top_contexts(*given, [128])
    with pytest.raises(ModelError, match="training mode"):
        dspa.top_contexts(sae_out, make_model("gemma2").train(), word_tokenizer(), lines, [1])
