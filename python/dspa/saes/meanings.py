"""Meanings of latents: the tokens that they promote, and the places of a text where they are strongest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dspa.data.texts import TextFile, tokenize_entry
from dspa.data.token_texts import token_text
from dspa.errors import SAEError, listed, refusal
from dspa.models.layers import base_model, check_eval, check_finite, decoder_layers, device_of
from dspa.models.logit_lens import LogitLens
from dspa.models.reading import read_layers
from dspa.saes.activations import batches_by_length
from dspa.saes.config import MAX_NORM_RATIO
from dspa.saes.frozen import FrozenSAE
from dspa.saes.outliers import typical_rows
from dspa.saes.placement import check_made_for, check_sae, required_layer
from dspa.schemas import Count, PositiveInt, check

# Tokens that are recorded and shown per latent.
N_TOKENS = 5


def top_tokens(
    sae: FrozenSAE,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    latents: Iterable[int] | None = None,
    *,
    n: int = N_TOKENS,
    suppressed: bool = False,
    layers: str | None = None,
    model_name: str | None = None,
    progress: bool = False,
) -> dict[int, list[str]]:
    """Return the tokens that latents promote most when they are active, by the logit lens (`LogitLens`).

    It looks at the decoder rows alone, needs no text, and says most of late layers. Of an early layer, or of what makes
    a latent active, `top_contexts` says more.

    Args:
        sae: the SAE.
        model: its model.
        tokenizer: the model's tokenizer.
        latents: latents of the SAE. Default: all.
        n: number of tokens per latent.
        suppressed: return the tokens that the latents suppress most, instead.
        layers: as for `Steering.attach`.
        model_name: as for `Steering.attach`.
        progress: show a bar.

    Returns:
        Texts of tokens by latent, the most promoted first.

    Raises:
        SAEError: a latent that the SAE does not have.
        ModelError: an SAE that does not fit the model, or a model whose final norm or head cannot be read.
        ValueError: an invalid `n`.
    """
    check_made_for("sae", sae, model, model_name)
    wanted, lens = _checked(latents, sae), LogitLens(model, layers)
    vocabulary = min(len(tokenizer), len(lens.unembedding))
    if not 1 <= n <= vocabulary:
        raise refusal(ValueError, "`n`", n, f"1 to {vocabulary}, the number of tokens")
    directions = sae.W_dec[torch.tensor(wanted, dtype=torch.long, device=sae.device)]
    ids = lens.top(-directions if suppressed else directions, n, vocabulary, progress=progress).tolist()
    texts = {token: token_text(tokenizer, token) for token in {token for row in ids for token in row}}
    return {latent: [texts[token] for token in row] for latent, row in zip(wanted, ids, strict=True)}


@dataclass(frozen=True)
class Context:
    """A token of a text at which a latent is active, and the text around it.

    Attributes:
        value: value of the latent.
        entry: number of the line, record or triple of the file, from 1.
        before, token, after: text before the token, of the token, and after it.
    """

    value: float
    entry: int
    before: str
    token: str
    after: str


@torch.no_grad()
def top_contexts(
    sae: FrozenSAE,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: TextFile | str | Path,
    latents: Iterable[int],
    *,
    n: int = 3,
    window: int = 10,
    n_tokens: int = 100_000,
    max_length: int = 1024,
    batch_tokens: int = 8192,
    layers: str | None = None,
    model_name: str | None = None,
    progress: bool = True,
) -> dict[int, list[Context]]:
    """Return the places of a text at which latents are strongest, at most one per entry and none twice.

    Tokens of outlying norm, as the first of a text, are left out, as in the training of an SAE.

    Args:
        sae: the SAE.
        model: its model, in evaluation mode.
        tokenizer: the model's tokenizer.
        texts: the file, as for `dspa sae train`.
        latents: latents of the SAE.
        n: number of contexts per latent.
        window: tokens to show on either side.
        n_tokens: tokens of the file to read, from its start.
        max_length: tokens per document, which is cut at its end.
        batch_tokens: padded tokens per forward pass.
        layers: as for `Steering.attach`.
        model_name: as for `Steering.attach`.
        progress: show a bar.

    Returns:
        Contexts by latent, the strongest first; fewer, or none, where the latent is active in fewer entries.

    Raises:
        SAEError: a latent that the SAE does not have.
        ModelError: an SAE that does not fit the model, a model in training mode, or residuals that are not finite.
        TextError: as for `TextFile`.
        PreferenceError: an invalid triple.
        ValueError: a number below 1, or a `window` below 0.
    """
    for name, number in (("n", n), ("n_tokens", n_tokens), ("max_length", max_length), ("batch_tokens", batch_tokens)):
        check(PositiveInt, number, ValueError, f"`{name}`")
    check(Count, window, ValueError, "`window`")
    inner, wanted = base_model(model), _checked(latents, sae)
    check_eval(inner)
    check_sae("sae", sae, inner, len(decoder_layers(inner, layers)), model_name)
    file = texts if isinstance(texts, TextFile) else TextFile(texts)
    documents = list(_documents(file, tokenizer, max_length, n_tokens))
    layer, device = required_layer(sae), device_of(inner.get_input_embeddings())
    strongest = _Strongest(wanted, n, window, tokenizer)
    bar = tqdm(total=sum(map(len, documents)), unit="token", unit_scale=True, desc="contexts", disable=not progress)
    with bar:
        for batch in batches_by_length(documents, batch_tokens):
            # Padded on the right, where a causal model cannot see it.
            ids = pad_sequence([torch.tensor(document.ids) for document in batch], batch_first=True)
            h = read_layers(inner, [layer], layers, input_ids=ids.to(device))[layer]
            rows = torch.cat([row[: len(document)] for row, document in zip(h, batch, strict=True)]).to(sae.device)
            check_finite(rows, layer)
            lengths, typical = list(map(len, batch)), typical_rows(rows, MAX_NORM_RATIO)[:, None]
            # The latents of one document at a time, because an SAE may have many.
            for document, row, kept in zip(batch, rows.split(lengths), typical.split(lengths), strict=True):
                strongest.add(document, (sae.encode(row)[:, wanted] * kept).cpu())
            bar.update(sum(lengths))
    return strongest.contexts


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


class _Strongest:
    """The n strongest contexts of each latent so far."""

    def __init__(self, latents: Sequence[int], n: int, window: int, tokenizer: PreTrainedTokenizerBase) -> None:
        self.contexts: dict[int, list[Context]] = {latent: [] for latent in latents}
        self._latents, self._n, self._window, self._tokenizer = latents, n, window, tokenizer
        self._least = torch.zeros(len(latents), dtype=torch.float32)

    def add(self, document: _Document, values: Tensor) -> None:
        """Take the values [T, L] of the latents in a document into account."""
        largest, places = values.max(dim=0)
        for k in (largest > self._least).nonzero().flatten().tolist():
            latent = self._latents[k]
            context = self._context(document, int(places[k]), float(largest[k]))
            kept: list[Context] = []
            for other in sorted((*self.contexts[latent], context), key=lambda c: (-c.value, c.entry)):
                if all(other.entry != c.entry and _text(other) != _text(c) for c in kept):
                    kept.append(other)
            self.contexts[latent] = kept[: self._n]
            if len(kept) >= self._n:
                self._least[k] = kept[self._n - 1].value

    def _context(self, document: _Document, place: int, value: float) -> Context:
        start, end = max(0, place - self._window), place + self._window + 1
        # The text of a token depends on those before it, as spaces do.
        before, to_token, whole = (
            str(self._tokenizer.decode(document.ids[start:stop])) for stop in (place, place + 1, end)
        )
        return Context(value, document.entry, before, to_token[len(before) :], whole[len(to_token) :])


def _text(context: Context) -> tuple[str, str, str]:
    return context.before, context.token, context.after


def _checked(latents: Iterable[int] | None, sae: FrozenSAE) -> list[int]:
    """Return latents, each once; raise `SAEError` for those that the SAE does not have."""
    wanted = list(dict.fromkeys(range(sae.d_sae) if latents is None else map(int, latents)))
    if outside := [latent for latent in wanted if not 0 <= latent < sae.d_sae]:
        raise refusal(SAEError, "`latents`", listed(outside), f"0 to {sae.d_sae - 1}, those of {sae!r}")
    return wanted
