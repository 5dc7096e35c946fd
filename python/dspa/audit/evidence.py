"""Evidence of what latents stand for: where a text activates them, and how often. It needs no labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dspa.data.texts import TextFile, tokenize_entry
from dspa.data.token_texts import token_pieces
from dspa.models.layers import base_model, check_eval, check_finite, decoder_layers, device_of
from dspa.models.reading import read_layers
from dspa.saes.activations import batches_by_length
from dspa.saes.config import MAX_NORM_RATIO
from dspa.saes.frozen import FrozenSAE
from dspa.saes.meanings import checked_latents
from dspa.saes.outliers import typical_rows
from dspa.saes.placement import check_sae, required_layer
from dspa.schemas import Count, PositiveInt, check
from dspa_kernels import SAEWeights, activation_counts, sparse_encode

# Documents that are held at once, to be read in batches of similar length.
DOCUMENTS_PER_BLOCK = 512


@dataclass(frozen=True)
class Context:
    """A stretch of text, and the values of a latent on its tokens.

    Attributes:
        entry: number of the line, record or triple of the file, from 1.
        place: number of the token that it was chosen for, from 0: where the latent is strongest, if it is active.
        tokens: text of each token. Joined, they are the text.
        values: value of the latent on each token, 0 where it is inactive and on tokens of outlying norm.
    """

    entry: int
    place: int
    tokens: tuple[str, ...]
    values: tuple[float, ...]

    @property
    def value(self) -> float:
        """Value of the latent on the token at `place`."""
        return self.values[self.place]

    @property
    def before(self) -> str:
        """Text before that token."""
        return "".join(self.tokens[: self.place])

    @property
    def token(self) -> str:
        """Text of that token."""
        return self.tokens[self.place]

    @property
    def after(self) -> str:
        """Text after that token."""
        return "".join(self.tokens[self.place + 1 :])


@dataclass(frozen=True)
class LatentEvidence:
    """Contexts of one latent, at most one per entry and list, and no text twice in a list.

    Attributes:
        top: those in which it is strongest, the strongest first.
        active: a random sample of the entries in which it is active, at the token where it is strongest.
        inactive: a random sample of stretches in which it is not active.
    """

    top: tuple[Context, ...]
    active: tuple[Context, ...]
    inactive: tuple[Context, ...]


@dataclass(frozen=True)
class Evidence:
    """The findings of a text about an SAE.

    Attributes:
        n_tokens: number of tokens that were read, without those of outlying norm.
        counts: number of them on which each latent of the SAE is active, [d_sae] int64.
        latents: contexts by latent, of those that were asked for.
    """

    n_tokens: int
    counts: Tensor
    latents: dict[int, LatentEvidence]

    @property
    def density(self) -> Tensor:
        """Share of the tokens on which each latent of the SAE is active, [d_sae] fp64."""
        return self.counts.double() / max(1, self.n_tokens)


@torch.no_grad()
def collect_evidence(
    sae: FrozenSAE,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: TextFile | str | Path,
    latents: Iterable[int],
    *,
    n: int = 3,
    n_sample: int = 0,
    window: int = 10,
    n_tokens: int = 100_000,
    max_length: int = 1024,
    batch_tokens: int = 8192,
    seed: int = 0,
    layers: str | None = None,
    model_name: str | None = None,
    progress: bool = True,
) -> Evidence:
    """Read a text, count how often each latent is active, and keep contexts of some of them.

    The text is streamed. Tokens of outlying norm, as the first of a text, are left out, as in the training of an SAE.

    Args:
        sae: the SAE.
        model: its model, in evaluation mode.
        tokenizer: the model's tokenizer.
        texts: the file, as for `dspa sae train`.
        latents: latents of the SAE to keep contexts of.
        n: number of strongest contexts per latent.
        n_sample: number of random contexts per latent, of those with it and of those without it.
        window: tokens to show on either side.
        n_tokens: tokens of the file to read, from its start.
        max_length: tokens per document, which is cut at its end.
        batch_tokens: padded tokens per forward pass.
        seed: seed of the random contexts.
        layers: as for `Steering.attach`.
        model_name: as for `Steering.attach`.
        progress: show a bar.

    Returns:
        The evidence, with fewer contexts, or none, where a latent is active in fewer entries.

    Raises:
        SAEError: a latent that the SAE does not have.
        ModelError: an SAE that does not fit the model, a model in training mode, or residuals that are not finite.
        TextError: as for `TextFile`.
        PreferenceError: an invalid triple.
        ValueError: a number below 1, or an `n_sample` or `window` below 0.
    """
    for name, number in (("n", n), ("n_tokens", n_tokens), ("max_length", max_length), ("batch_tokens", batch_tokens)):
        check(PositiveInt, number, ValueError, f"`{name}`")
    for name, number in (("n_sample", n_sample), ("window", window)):
        check(Count, number, ValueError, f"`{name}`")
    inner, wanted = base_model(model), checked_latents(latents, sae)
    check_eval(inner)
    check_sae("sae", sae, inner, len(decoder_layers(inner, layers)), model_name)
    file = texts if isinstance(texts, TextFile) else TextFile(texts)
    encode, counts, n_read = _encoder(sae.weights, wanted), torch.zeros(sae.d_sae, dtype=torch.int64), 0
    top = _Kept(wanted, n, window)
    active, inactive = (_Kept(wanted, n_sample, window) for _ in range(2))
    draws = torch.Generator().manual_seed(seed)
    documents = _documents(file, tokenizer, max_length, n_tokens)
    with tqdm(total=n_tokens, unit="token", unit_scale=True, desc="contexts", disable=not progress) as bar:
        for batch, rows, typical in _batches(sae, inner, documents, batch_tokens, layers):
            sequences = typical.int() - 1
            counts += activation_counts(rows, sae.weights, sequences, 1)[0].cpu()
            n_read += int(typical.sum())
            values, lengths = (encode(rows) * typical[:, None]).cpu(), list(map(len, batch))
            for document, part in zip(batch, values.split(lengths), strict=True):
                largest, places = part.max(dim=0)
                top.add(document, part, largest, places)
                if n_sample:
                    keys = torch.rand(2, len(wanted), generator=draws) + torch.finfo(torch.float32).tiny
                    active.add(document, part, keys[0] * (largest > 0), places)
                    place = int(torch.randint(len(document), (), generator=draws))
                    silent = ~part[_around(place, window)].any(dim=0)
                    inactive.add(document, part, keys[1] * silent, torch.full_like(places, place))
            bar.update(sum(lengths))
        bar.total = bar.n
    kept = [collector.contexts(tokenizer) for collector in (top, active, inactive)]
    return Evidence(n_read, counts, {latent: LatentEvidence(*(part[latent] for part in kept)) for latent in wanted})


def top_contexts(
    sae: FrozenSAE,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: TextFile | str | Path,
    latents: Iterable[int],
    **options: Any,
) -> dict[int, list[Context]]:
    """Return the places of a text at which latents are strongest, at most one per entry and none twice.

    Args:
        sae: the SAE.
        model: its model, in evaluation mode.
        tokenizer: the model's tokenizer.
        texts: the file, as for `dspa sae train`.
        latents: latents of the SAE.
        options: as for `collect_evidence`: `n` contexts per latent, a `window` of tokens on either side, `n_tokens` to
            read, and others.

    Returns:
        Contexts by latent, the strongest first; fewer, or none, where the latent is active in fewer entries.

    Raises:
        SAEError: as for `collect_evidence`, as are ModelError, TextError, PreferenceError and ValueError.
    """
    evidence = collect_evidence(sae, model, tokenizer, texts, latents, **options)
    return {latent: list(kept.top) for latent, kept in evidence.latents.items()}


@dataclass(frozen=True)
class _Document:
    """Token ids of a document, and the number of its entry."""

    entry: int
    ids: list[int]

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.ids)


def _documents(
    file: TextFile, tokenizer: PreTrainedTokenizerBase, max_length: int, n_tokens: int
) -> Iterator[_Document]:
    """Yield the documents of a file, the last of them cut, until they have `n_tokens` tokens."""
    for entry, content in enumerate(file.entries(), start=1):
        for ids in tokenize_entry(content, tokenizer, max_length):
            yield _Document(entry, ids[:n_tokens])
            n_tokens -= len(ids)
            if n_tokens <= 0:
                return


def _batches(
    sae: FrozenSAE, model: Any, documents: Iterator[_Document], batch_tokens: int, layers: str | None
) -> Iterator[tuple[list[_Document], Tensor, Tensor]]:
    """Yield documents with their residuals [N, d_in] on the SAE's device, and the mask [N] of the typical ones."""
    layer, device = required_layer(sae), device_of(model.get_input_embeddings())
    while block := list(islice(documents, DOCUMENTS_PER_BLOCK)):
        for batch in batches_by_length(block, batch_tokens):
            # Padded on the right, where a causal model cannot see it.
            ids = pad_sequence([torch.tensor(document.ids) for document in batch], batch_first=True)
            h = read_layers(model, [layer], layers, input_ids=ids.to(device))[layer]
            rows = torch.cat([row[: len(document)] for row, document in zip(h, batch, strict=True)]).to(sae.device)
            check_finite(rows, layer)
            yield batch, rows, typical_rows(rows, MAX_NORM_RATIO)


def _encoder(weights: SAEWeights, latents: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """Return a function from residuals [N, d_in] to the values [N, L] of some latents, and of no others."""
    chosen = torch.tensor(latents, dtype=torch.long, device=weights.encoder_rows.device)
    if weights.k or not latents:
        # The k largest are those of all latents. The last column is of the others.
        column = torch.full((weights.d_sae + 1,), len(latents), device=chosen.device)
        column[chosen] = torch.arange(len(latents), device=chosen.device)

        def among_all(rows: Tensor) -> Tensor:
            if not latents:
                return rows.new_empty(len(rows), 0)
            sparse = sparse_encode(rows, weights)
            values = sparse.values.new_zeros(len(rows), len(latents) + 1)
            return values.scatter_(1, column[sparse.indices.long()], sparse.values)[:, :-1]

        return among_all
    return replace(
        weights,
        encoder_rows=weights.encoder_rows[chosen],
        b_enc=weights.b_enc[chosen],
        threshold=weights.threshold[chosen],
        W_dec=weights.W_dec[chosen],
    ).latents


def _around(place: int, window: int) -> slice:
    return slice(max(0, place - window), place + window + 1)


@dataclass(frozen=True)
class _Candidate:
    """A context before its tokens have texts, and the score that keeps it."""

    score: float
    entry: int
    place: int
    ids: tuple[int, ...]
    values: tuple[float, ...]


class _Kept:
    """The contexts of each latent with the n largest scores above 0, at most one per entry and none twice."""

    def __init__(self, latents: Sequence[int], n: int, window: int) -> None:
        self._latents, self._n, self._window = latents, n, window
        self._kept: dict[int, list[_Candidate]] = {latent: [] for latent in latents}
        self._least = torch.zeros(len(latents))

    def add(self, document: _Document, values: Tensor, scores: Tensor, places: Tensor) -> None:
        """Take the places [L] of a document with values [T, L] into account, which have the scores [L]."""
        for k in (scores > self._least).nonzero().flatten().tolist():
            latent, place = self._latents[k], int(places[k])
            around = _around(place, self._window)
            ids, part = tuple(document.ids[around]), tuple(values[around, k].tolist())
            new = _Candidate(float(scores[k]), document.entry, place - around.start, ids, part)
            kept: list[_Candidate] = []
            for other in sorted((*self._kept[latent], new), key=lambda c: (-c.score, c.entry)):
                if all(other.entry != c.entry and other.ids != c.ids for c in kept):
                    kept.append(other)
            self._kept[latent] = kept[: self._n]
            if len(kept) >= self._n:
                self._least[k] = kept[self._n - 1].score

    def contexts(self, tokenizer: PreTrainedTokenizerBase) -> dict[int, tuple[Context, ...]]:
        """Return the contexts of each latent, by falling score."""
        return {
            latent: tuple(
                Context(c.entry, c.place, tuple(token_pieces(tokenizer, c.ids)), c.values) for c in candidates
            )
            for latent, candidates in self._kept.items()
        }
