"""`dspa.collect_evidence` and `dspa.top_contexts`, against plain passes of the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dspa
from dspa import ModelError, SAEError
from dspa.testing import D_SAE_OUT, ENGLISH, L_OUT, make_model, word_tokenizer

LATENTS = [3, 90, 17, 64]


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("gemma2")


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
    for name in ("window", "n_sample"):
        with pytest.raises(ValueError, match=f"`{name}` is -1; accepted: a whole number >= 0"):
            dspa.top_contexts(*given, [1], **{name: -1})
    with pytest.raises(SAEError, match="`latents` is 128"):
        dspa.top_contexts(*given, [128])
    with pytest.raises(ModelError, match="training mode"):
        dspa.top_contexts(sae_out, make_model("gemma2").train(), word_tokenizer(), lines, [1])


# Counts and samples


@pytest.mark.parametrize("k", [0, 6])
def test_counts_and_values_are_those_of_every_token(
    model: Any, sae_out: dspa.FrozenSAE, lines: Path, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With documents read in several blocks; of a top-k SAE, the k largest of all latents are active."""
    monkeypatch.setattr("dspa.audit.evidence.DOCUMENTS_PER_BLOCK", 7)
    tokenizer, sae = word_tokenizer(), sae_out
    if k:
        sae = dspa.FrozenSAE("topk", sae_out.W_enc, sae_out.b_enc, sae_out.W_dec, k=k, layer=L_OUT)
    texts = [tokenizer(text)["input_ids"] for text in lines.read_text().splitlines()]
    counts, tokens, values = [0] * D_SAE_OUT, 0, {}
    for entry, ids in enumerate(texts, start=1):
        for place, row in enumerate(values_by_hand(model, sae, ids, k)):
            tokens += 1
            for latent in range(D_SAE_OUT):
                counts[latent] += int(row[latent] > 0)
            values[entry, place] = row
    evidence = dspa.collect_evidence(sae, model, tokenizer, lines, LATENTS, n=5, window=3, progress=False)
    assert evidence.n_tokens == tokens and evidence.counts.tolist() == counts
    assert evidence.density.tolist() == pytest.approx([count / tokens for count in counts])
    shown = 0
    for latent, kept in evidence.latents.items():
        for context in kept.top:
            words = tokenizer.convert_ids_to_tokens(texts[context.entry - 1])
            place = max(range(len(words)), key=lambda t: float(values[context.entry, t][latent]))
            start = max(0, place - 3)
            assert [token.strip() for token in context.tokens] == words[start : place + 4]
            assert context.place == place - start
            expected = [float(values[context.entry, start + t][latent]) for t in range(len(context.values))]
            assert context.values == pytest.approx(expected, abs=1e-4)
            shown += 1
    assert shown > 10


@torch.no_grad()
def values_by_hand(model: Any, sae: dspa.FrozenSAE, ids: list[int], k: int) -> list[Tensor]:
    """The latents of each token of a document: those above their threshold, or the k largest above 0."""
    if not k:
        return list(values_of(model, sae, ids))
    h = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[L_OUT + 1][0]
    rows = []
    for pre in h @ sae.W_enc + sae.b_enc:
        largest = set(sorted(range(D_SAE_OUT), key=lambda j: -float(pre[j]))[:k])
        rows.append(torch.tensor([float(pre[j]) if j in largest and pre[j] > 0 else 0.0 for j in range(D_SAE_OUT)]))
    return rows


def test_samples_are_with_and_without_the_latent(model: Any, sae_out: dspa.FrozenSAE, lines: Path) -> None:
    """Of as many entries as there are, drawn alike by the same seed alone."""

    def sample(seed: int, n_sample: int = 4) -> dict[int, Any]:
        options: dict[str, Any] = {"n_sample": n_sample, "window": 2, "seed": seed, "progress": False}
        return dspa.collect_evidence(sae_out, model, word_tokenizer(), lines, range(D_SAE_OUT), **options).latents

    latents, other = sample(0), sample(1)
    assert latents == sample(0)
    assert latents != other and all(latents[j].top == other[j].top for j in latents)
    assert any(kept.active != other[j].active for j, kept in latents.items())
    for kept in latents.values():
        assert all(c.value == max(c.values) > 0 for c in kept.active)
        assert all(not any(c.values) for c in kept.inactive)
        for part in (kept.active, kept.inactive):
            assert len({c.entry for c in part}) == len(part) <= 4
        assert bool(kept.active) == bool(kept.top)
    assert any(len(kept.inactive) == 4 for kept in latents.values())
    # The sample of all entries is every entry.
    everything = {"n": 100, "window": 2, "progress": False}
    strongest = dspa.top_contexts(sae_out, model, word_tokenizer(), lines, range(D_SAE_OUT), **everything)
    for j, kept in sample(0, n_sample=100).items():
        assert sorted(c.value for c in kept.active) == pytest.approx(sorted(c.value for c in strongest[j]), abs=1e-4)


def test_no_latents_still_give_counts(model: Any, sae_out: dspa.FrozenSAE, lines: Path) -> None:
    evidence = dspa.collect_evidence(sae_out, model, word_tokenizer(), lines, [], progress=False)
    assert evidence.latents == {} and int(evidence.counts.sum()) > 0
