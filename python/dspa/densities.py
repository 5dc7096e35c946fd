"""The expensive offline pass: run the model on preference triples, keep integer activation counts.

Counts stay integers until the map is reduced from them, so that the map does not depend on how triples were
batched, sharded or ordered. On the way, some response tokens tell which latents tend to hold a token's maximum and
where residuals lie: with that, steering reads less of the encoder, and does nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dspa.errors import MapError
from dspa.hooks import (
    base_model,
    check_eval,
    check_finite,
    check_saes,
    context_length,
    decoder_layers,
    device_of,
    layer_of,
    read_layers,
)
from dspa.hooks import model_name as name_of
from dspa.preferences import TokenizedTriple, Triple, load_triples, tokenize_triple
from dspa.saes import FrozenSAE
from dspa_kernels import activation_counts

FORMAT = "dspa.counts.2"
COUNT_TOKENS = ("all", "text")
PARTS = ("prompt", "chosen", "rejected")
# What is counted: latents on the tokens of each part, and which of them held the maximum of a response token.
COUNTED = (*PARTS, "maxima")
TRIPLES_A_SHARD = 32
# Maxima are taken of at most this many tokens of a response, and so many latents at once.
TOKENS_A_RESPONSE = 16
LATENTS_A_BLOCK = 1 << 24
# Residuals become multiples of this, no larger than the bound, so that sums of 2^23 of them are exact integers.
ROW_QUANTUM = 2.0**-16
ROW_BOUND = 2.0**24


@dataclass(frozen=True)
class CollectSettings:
    """All that decides the counts. SAE fingerprints; layers; dtypes of model and SAEs; `count_tokens`; what each
    triple was cut to (tokens); a digest of the tokens of the data; and the format of the shards."""

    model_name: str
    sae_in: str
    sae_out: str
    layer_in: int
    layer_out: int
    d_sae_in: int
    d_sae_out: int
    dtypes: str
    count_tokens: str
    max_length: int | None
    data: str
    n_triples: int
    n_cut: int
    format: str = FORMAT


@dataclass(frozen=True)
class Counts:
    """Sparse counts of N texts: text n activates latent `latents[e]` on `counts[e]` of its `lengths[n]` tokens, for
    the entries e from `starts[n]` to `starts[n + 1]`. All int64 but counts and latents, int32."""

    starts: Tensor
    latents: Tensor
    counts: Tensor
    lengths: Tensor

    @classmethod
    def join(cls, rows: Sequence[tuple[Tensor, Tensor, int]]) -> Counts:
        """Of one (latents, counts, length) a text."""
        sizes = torch.tensor([0, *(len(latents) for latents, _, _ in rows)])
        return cls(
            starts=sizes.cumsum(0),
            latents=torch.cat([latents for latents, _, _ in rows]),
            counts=torch.cat([counts for _, counts, _ in rows]),
            lengths=torch.tensor([length for _, _, length in rows]),
        )

    def row(self, n: int) -> tuple[Tensor, Tensor, int]:
        """Latents, counts and length of text n."""
        entries = slice(int(self.starts[n]), int(self.starts[n + 1]))
        return self.latents[entries], self.counts[entries], int(self.lengths[n])

    def densities(self, width: int) -> Tensor:
        """`rho` [N, width] in fp64: the fraction of each text's tokens on which each latent is active."""
        n_texts = len(self.lengths)
        text = torch.repeat_interleave(torch.arange(n_texts), self.starts.diff())
        rho = torch.zeros(n_texts, width, dtype=torch.float64)
        rho[text, self.latents.long()] = self.counts.double()
        # A text whose tokens are all special has no text tokens to count.
        return rho / self.lengths.clamp(min=1)[:, None]


@dataclass(frozen=True)
class Densities:
    """Counts of N triples in their order: of prompts at the input SAE, of responses at the output SAE.

    maxima counts the tokens of both responses whose largest output latent it is, at most TOKENS_A_RESPONSE of each
    (every n-th one), a token without an active latent for none; its lengths are the tokens that were looked at.
    totals [N, d_in] int64: their residuals as the output SAE normalises them, summed, in units of ROW_QUANTUM.
    """

    settings: CollectSettings
    prompt: Counts
    chosen: Counts
    rejected: Counts
    maxima: Counts
    totals: Tensor

    def hot(self) -> tuple[Tensor, Tensor]:
        """Output latents that ever held a maximum, [H] int32, most often first and of equals the smaller, and how
        often they did, [H] int64."""
        held = torch.zeros(self.settings.d_sae_out, dtype=torch.int64)
        held.index_add_(0, self.maxima.latents.long(), self.maxima.counts.long())
        order = held.argsort(descending=True, stable=True)[: int((held > 0).sum())]
        return order.to(torch.int32), held[order]

    def mean(self) -> Tensor:
        """Mean residual [d_in] fp32 of the same tokens, normalised, as exact as bf16: what batching does to the last
        bits of hidden states should not show in a map."""
        n_tokens = int(self.maxima.lengths.sum())
        mean = self.totals.sum(dim=0).double() * ROW_QUANTUM / max(1, n_tokens)
        return mean.to(torch.bfloat16).float()


@dataclass(frozen=True)
class _Item:
    index: int
    triple: TokenizedTriple

    @property
    def length(self) -> int:
        return len(self.triple.prompt) + max(len(self.triple.chosen), len(self.triple.rejected))


@dataclass(frozen=True)
class _Row:
    """What one triple gives: latents, counts and length of each of COUNTED, and its row of `Densities.totals`."""

    counts: dict[str, tuple[Tensor, Tensor, int]]
    total: Tensor


Rows = dict[int, _Row]


def collect(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    triples: Iterable[Triple] | str | Path,
    sae_in: FrozenSAE,
    sae_out: FrozenSAE,
    *,
    count_tokens: str = "all",
    max_length: int | None = None,
    batch_tokens: int = 8192,
    work_dir: str | Path | None = None,
    progress: bool = True,
    layers: str | None = None,
    model_name: str | None = None,
) -> Densities:
    """Count active latents on every triple, teacher-forced (DSPA, activation densities).

    Args:
        model, tokenizer: the model that will be steered.
        triples: what `load_triples` takes. All are read and checked before the model runs.
        sae_in, sae_out: the SAEs, copied to the devices of their layers where they are elsewhere.
        count_tokens: "all" tokens, as published, or "text": special tokens left out.
        max_length: tokens of prompt and response together; longer responses are cut at their end, and a prompt
            that leaves no room is refused. Default: the model's context.
        batch_tokens: padded tokens a forward pass, two sequences a triple.
        work_dir: a folder for finished shards, from which a stopped run goes on.
        progress: show a bar with the rate and the time left.
        layers, model_name: as for `Steering.attach`.

    Raises:
        PreferenceError: a bad triple. ModelError: an SAE that does not fit, a model in training mode, hidden
        states that are not finite.
        MapError: a work_dir of other settings, or damaged.
    """
    if count_tokens not in COUNT_TOKENS:
        raise ValueError(f"`count_tokens` is {count_tokens!r}; accepted: {', '.join(COUNT_TOKENS)}.")
    inner = base_model(model)
    check_eval(inner)
    stack = decoder_layers(inner, layers)
    check_saes(sae_in, sae_out, inner, len(stack), model_name)
    sae_in, sae_out = (sae.to(device_of(stack[layer_of(sae)])) for sae in (sae_in, sae_out))
    context = context_length(inner)
    limit = context if max_length is None else max_length
    if limit is not None and not 2 <= limit <= (context or limit):
        raise ValueError(f"`max_length` is {limit!r}; accepted: 2 to {context}, the model's positions.")
    items = [
        _Item(index, tokenize_triple(triple, tokenizer, max_length=limit))
        for index, triple in enumerate(load_triples(triples))
    ]
    settings = _settings(inner, sae_in, sae_out, items, count_tokens, limit, model_name)
    shards = _Shards(Path(work_dir), settings) if work_dir is not None else None
    rows: Rows = shards.read() if shards else {}
    waiting = sorted((item for item in items if item.index not in rows), key=lambda item: item.length)
    fresh: Rows = {}
    with tqdm(total=len(items), initial=len(rows), unit="triple", disable=not progress, desc="collect") as bar:
        for batch in _batches(waiting, batch_tokens):
            counted = _count(inner, batch, sae_in, sae_out, count_tokens, layers)
            rows.update(counted)
            fresh.update(counted)
            if shards and (len(fresh) >= TRIPLES_A_SHARD or batch[-1] is waiting[-1]):
                shards.write(fresh)
                fresh = {}
            bar.update(len(batch))
    return Densities(settings=settings, **_joined([rows[n] for n in range(len(items))]))


def _joined(rows: Sequence[_Row]) -> dict[str, Any]:
    """The fields of `Densities` that hold one row a triple."""
    counts = {name: Counts.join([row.counts[name] for row in rows]) for name in COUNTED}
    return {**counts, "totals": torch.stack([row.total for row in rows])}


def _settings(
    model: nn.Module,
    sae_in: FrozenSAE,
    sae_out: FrozenSAE,
    items: Sequence[_Item],
    count_tokens: str,
    max_length: int | None,
    called: str | None,
) -> CollectSettings:
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps([getattr(item.triple, part) for part in PARTS]).encode())
    return CollectSettings(
        model_name=called or name_of(model),
        sae_in=sae_in.fingerprint,
        sae_out=sae_out.fingerprint,
        layer_in=layer_of(sae_in),
        layer_out=layer_of(sae_out),
        d_sae_in=sae_in.d_sae,
        d_sae_out=sae_out.d_sae,
        dtypes=", ".join(str(each.dtype) for each in (model, sae_in, sae_out)),
        count_tokens=count_tokens,
        max_length=max_length,
        data=digest.hexdigest()[:16],
        n_triples=len(items),
        n_cut=sum(item.triple.cut for item in items),
    )


def _batches(items: Sequence[_Item], batch_tokens: int) -> Iterator[list[_Item]]:
    """Neighbours of like length, as many as fit the budget, and at least one."""
    batch: list[_Item] = []
    for item in items:
        if batch and 2 * (len(batch) + 1) * item.length > batch_tokens:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _count(
    model: nn.Module,
    batch: Sequence[_Item],
    sae_in: FrozenSAE,
    sae_out: FrozenSAE,
    count_tokens: str,
    layers: str | None,
) -> Rows:
    """Counts of one batch, by the index of the triple.

    The sequences 2 i and 2 i + 1 are prompt + chosen and prompt + rejected of triple i, padded on the right, where a
    causal model cannot see it. Prompts are counted on the first of the two, at `l_in`; responses at `l_out`, and
    some of their tokens looked at more closely.
    """
    width = max(item.length for item in batch)
    tokens = torch.zeros(2 * len(batch), width, dtype=torch.long)
    prompt, response, sample = (torch.full(tokens.shape, -1, dtype=torch.int32) for _ in range(3))
    for i, item in enumerate(batch):
        start = len(item.triple.prompt)
        for row, part in ((2 * i, "chosen"), (2 * i + 1, "rejected")):
            answer = getattr(item.triple, part)
            end = start + len(answer)
            tokens[row, :end] = torch.tensor([*item.triple.prompt, *answer])
            counted = _counted(item, part, count_tokens)
            response[row, start:end] = torch.where(counted, row, -1)
            sample[row, start + _evenly(counted.nonzero().flatten(), TOKENS_A_RESPONSE)] = i
        prompt[2 * i, :start] = torch.where(_counted(item, "prompt", count_tokens), i, -1)

    l_in, l_out = layer_of(sae_in), layer_of(sae_out)
    h = read_layers(
        model, [l_in, l_out], layers, input_ids=tokens.to(device_of(base_model(model).get_input_embeddings()))
    )
    at_prompt = _counts_at(h[l_in], sae_in, prompt, len(batch))
    at_response = _counts_at(h[l_out], sae_out, response, 2 * len(batch))
    lengths = [(row >= 0).sum().item() for row in (*prompt[::2], *response)]
    triple, held, rows_out = _looked_at(h[l_out], sae_out, sample)
    totals = torch.zeros(len(batch), sae_out.d_in, dtype=torch.int64).index_add_(0, triple, rows_out)

    rows: Rows = {}
    for i, item in enumerate(batch):
        counts = {
            part: (*_entries(counts), int(length))
            for part, counts, length in (
                ("prompt", at_prompt[i], lengths[i]),
                ("chosen", at_response[2 * i], lengths[len(batch) + 2 * i]),
                ("rejected", at_response[2 * i + 1], lengths[len(batch) + 2 * i + 1]),
            )
        }
        mine = held[triple == i]
        latents, times = mine[mine >= 0].unique(return_counts=True)
        counts["maxima"] = (latents.to(torch.int32), times.to(torch.int32), len(mine))
        rows[item.index] = _Row(counts, totals[i])
    return rows


def _evenly(places: Tensor, most: int) -> Tensor:
    """Every n-th of `places` [T] from the first on, `most` at most."""
    return places[:: max(1, -(-len(places) // most))]


def _looked_at(h: Tensor, sae: FrozenSAE, triples: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the N rows of `h` [B, T, d_in] with a triple (not -1 in `triples` [B, T]), on the CPU: the triple [N]; the
    latent that holds the maximum [N], of equals the smaller, -1 where none is active; the row [N, d_in] as the encoder
    reads it, in units of ROW_QUANTUM. All int64."""
    at = (triples.flatten() >= 0).nonzero().flatten()
    rows = h.flatten(0, 1)[at.to(h.device)]
    held = [at.new_empty(0)]
    for block in rows.split(max(1, LATENTS_A_BLOCK // sae.d_sae)):
        largest, latent = sae.encode(block).max(dim=1)
        held.append(torch.where(largest > 0, latent, -1).cpu())
    # Where an SAE divides by the norm, a row of zeros is none.
    units = (sae.normalise(rows).double().nan_to_num().clamp(-ROW_BOUND, ROW_BOUND) / ROW_QUANTUM).round()
    return triples.flatten()[at].long(), torch.cat(held), units.long().cpu()


def _counted(item: _Item, part: str, count_tokens: str) -> Tensor:
    """Which tokens of a part count, [T] bool."""
    text: list[bool] = getattr(item.triple, f"{part}_text")
    return torch.tensor(text) if count_tokens == "text" else torch.ones(len(text), dtype=torch.bool)


def _counts_at(h: Tensor, sae: FrozenSAE, sequences: Tensor, n_sequences: int) -> Tensor:
    sequences = sequences.to(h.device).flatten()
    h = h.flatten(0, 1)
    check_finite(h[sequences >= 0], layer_of(sae))
    return activation_counts(h, sae.weights, sequences, n_sequences).cpu()


def _entries(counts: Tensor) -> tuple[Tensor, Tensor]:
    latents = counts.nonzero().flatten().to(torch.int32)
    return latents, counts[latents.long()]


class _Shards:
    """Finished triples in a folder: `settings.json`, and files that appear whole or not at all."""

    def __init__(self, folder: Path, settings: CollectSettings) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        mine, path = asdict(settings), folder / "settings.json"
        if not path.exists():
            _replace(path, json.dumps(mine, indent=2).encode())
        try:
            theirs = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise MapError(f"{path} is not what collect wrote ({error}). Use another work_dir.") from error
        if theirs != mine:
            differ = [
                f"{key}: {theirs.get(key)!r} there, {mine[key]!r} now" for key in mine if theirs.get(key) != mine[key]
            ]
            raise MapError(f"{folder} holds shards of other settings ({'; '.join(differ)}). Use another work_dir.")

    def read(self) -> Rows:
        """Every triple of every shard."""
        rows: Rows = {}
        for path in sorted(self.folder.glob("shard-*.safetensors")):
            content = path.read_bytes()
            if path.name != _name(content):
                raise MapError(
                    f"{path} is damaged: its content has another checksum than its name. Delete it, and its triples "
                    "are counted again."
                )
            tensors = load(content)
            parts = {part: Counts(*(tensors[f"{part}.{name}"] for name in Counts.__annotations__)) for part in COUNTED}
            for n, index in enumerate(tensors["index"].tolist()):
                rows[index] = _Row({part: counts.row(n) for part, counts in parts.items()}, tensors["totals"][n])
        return rows

    def write(self, rows: Rows) -> None:
        """One new shard."""
        index = sorted(rows)
        joined = _joined([rows[i] for i in index])
        tensors = {"index": torch.tensor(index), "totals": joined["totals"]}
        for part in COUNTED:
            tensors.update({f"{part}.{name}": getattr(joined[part], name) for name in Counts.__annotations__})
        content = save(tensors)
        _replace(self.folder / _name(content), content)


def _name(shard: bytes) -> str:
    return f"shard-{hashlib.sha256(shard).hexdigest()[:16]}.safetensors"


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)
