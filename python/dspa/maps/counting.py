"""Runs the model on pieces of preference triples, in batches that fit the memory, and counts what latents do."""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerBase

from dspa.data.tokens import TokenizedTriple, tokenize_triple
from dspa.data.triples import Triple
from dspa.errors import ModelError
from dspa.maps.pieces import Piece, key_of
from dspa.maps.shards import ROW_QUANTUM, CollectSettings, Counts, Shard
from dspa.models.layers import (
    base_model,
    check_eval,
    check_finite,
    context_length,
    decoder_layers,
    device_of,
    loaded_name,
)
from dspa.models.reading import read_layers
from dspa.saes.frozen import FrozenSAE
from dspa.saes.placement import check_saes, required_layer
from dspa_kernels import activation_counts

# Maxima are taken of at most this many tokens of a response, and so many latents at once.
TOKENS_PER_RESPONSE = 16
LATENTS_PER_BLOCK = 1 << 24
# Residuals beyond this, in multiples of ROW_QUANTUM, are cut to it: sums of 2^23 of them stay exact integers.
ROW_BOUND = 2.0**24
# A batch of at least one SMALL_BATCH-th of the budget takes no more padding than this times its tokens.
MOST_PADDED, SMALL_BATCH = 1.1, 8
# Texts that tell tokenizers apart.
PROBE = ("The quick brown fox, it's 42 years old!\n\n\tdef f(x): return x**2", "Über naïve cafés — 日本語 и русский 🙂")


@dataclass(frozen=True)
class _Item:
    """A triple: its number in the data, its key, what errors call it, its tokens."""

    index: int
    key: int
    name: str
    triple: TokenizedTriple


@dataclass(frozen=True)
class _Group:
    """Responses, the longest first: which row of the batch each is, its tokens, and which of them are text."""

    rows: list[int]
    ids: list[list[int]]
    text: list[list[bool]]


class TripleCounter:
    """Counts what a model's latents do on triples, in batches that fit the memory."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        sae_in: FrozenSAE,
        sae_out: FrozenSAE,
        max_length: int | None,
        batch_tokens: int,
        layers: str | None,
        called: str | None,
    ) -> None:
        self.model, self.tokenizer, self.layers = base_model(model), tokenizer, layers
        self.name, self.batch_tokens = called or loaded_name(self.model), batch_tokens
        check_eval(self.model)
        stack = decoder_layers(self.model, layers)
        check_saes(sae_in, sae_out, self.model, len(stack), called)
        self.sae_in, self.sae_out = (sae.to(device_of(stack[required_layer(sae)])) for sae in (sae_in, sae_out))
        context = context_length(self.model)
        self.limit = context if max_length is None else max_length
        if self.limit is not None and not 2 <= self.limit <= (context or self.limit):
            raise ValueError(f"`max_length` is {self.limit!r}; accepted: 2 to {context}, the model's positions.")

    def settings(self) -> CollectSettings:
        """What the counts depend on, but for the triples."""
        tokenizer: Any = self.tokenizer
        told = [tokenizer(text)["input_ids"] for text in PROBE], tokenizer.all_special_ids, tokenizer.chat_template
        return CollectSettings(
            model_name=self.name,
            sae_in=self.sae_in.fingerprint,
            sae_out=self.sae_out.fingerprint,
            layer_in=required_layer(self.sae_in),
            layer_out=required_layer(self.sae_out),
            d_sae_in=self.sae_in.d_sae,
            d_sae_out=self.sae_out.d_sae,
            dtypes=", ".join(str(each.dtype) for each in (self.model, self.sae_in, self.sae_out)),
            max_length=self.limit,
            tokenizer=hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16],
        )

    def tokenize(self, triple: Triple) -> TokenizedTriple:
        """As the model reads it, cut to its limit."""
        return tokenize_triple(triple, self.tokenizer, max_length=self.limit)

    def count(self, piece: Piece) -> Shard:
        """Counts of one piece."""
        waiting = [_Item(index, key_of(triple), triple.name, self.tokenize(triple)) for index, triple in piece.triples]
        waiting.sort(key=lambda item: len(item.triple.prompt), reverse=True)
        shards = []
        while waiting:
            batch = waiting[: _batch_size([len(item.triple.prompt) for item in waiting], 0, self.batch_tokens)]
            shard = self._count_or_shrink(batch)
            if shard is not None:
                shards.append(shard)
                waiting = waiting[len(batch) :]
        return Shard.join(shards)

    def _count_or_shrink(self, batch: Sequence[_Item]) -> Shard | None:
        """Counts of a batch; None where memory did not suffice, and the budget is smaller now."""
        groups = self._groups(batch)
        try:
            return self._count(batch, groups)
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
            if len(batch) == 1 and len(groups) == 2:
                raise ModelError(
                    f"Memory does not suffice for one triple alone: {batch[0].name}, of {len(batch[0].triple.prompt)} "
                    f"tokens and {len(groups[0].ids[0])} of a response. What is finished is kept. Set max_length "
                    "lower, or free memory, and start again."
                ) from error
        # Out here nothing holds the tensors of the failed pass any more.
        torch.cuda.empty_cache()
        n_prompt = len(batch[0].triple.prompt)
        tokens = max(len(batch) * n_prompt, *(len(g.rows) * (n_prompt + len(g.ids[0])) for g in groups))
        self.batch_tokens = tokens // 2
        warnings.warn(
            f"Memory does not suffice for batches of {tokens} tokens: going on with {self.batch_tokens}. "
            f"batch_tokens={self.batch_tokens} does so from the start.",
            stacklevel=2,
        )
        return None

    def _groups(self, batch: Sequence[_Item]) -> list[_Group]:
        """Responses of like length that go on together: of B triples, rows below B are chosen, the others rejected."""
        triples = [item.triple for item in batch]
        ids = [t.chosen for t in triples] + [t.rejected for t in triples]
        text = [t.chosen_text for t in triples] + [t.rejected_text for t in triples]
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]), reverse=True)
        groups = []
        while order:
            n = _batch_size([len(ids[row]) for row in order], len(triples[0].prompt), self.batch_tokens)
            rows, order = order[:n], order[n:]
            groups.append(_Group(rows, [ids[row] for row in rows], [text[row] for row in rows]))
        return groups

    @torch.no_grad()
    def _count(self, batch: Sequence[_Item], groups: Sequence[_Group]) -> Shard:
        """Prompts run once, padded on the left: windows of attention then reach back over tokens alone. Responses go on
        from copies of their cache, padded on the right."""
        triples, n = [item.triple for item in batch], len(batch)
        prompts = _Rows.padded([t.prompt for t in triples], [t.prompt_text for t in triples], left=True)
        cache = DynamicCache(config=self.model.config)
        h = self._read(prompts.tokens, prompts.mask, (prompts.mask.cumsum(dim=1) - 1).clamp(min=0), cache)
        prompt_counts = _counts_at(h[required_layer(self.sae_in)], self.sae_in, prompts)
        if cache.get_seq_length() != prompts.tokens.shape[1]:
            raise ModelError(
                f"{type(self.model).__name__} keeps no key/value cache of a prompt, from which its responses could go "
                "on. Accepted: models of attention layers that take a cache."
            )
        del h
        counts = torch.zeros(2, 2 * n, self.sae_out.d_sae, dtype=torch.int32, device=self.sae_out.device)
        lengths = torch.zeros(2, 2 * n, dtype=torch.int64)
        samples = []
        for group in groups:
            answers = _Rows.padded(group.ids, group.text)
            rows = torch.tensor(group.rows)
            before = prompts.mask[rows % n]
            places = before.sum(dim=1, keepdim=True) + answers.mask.cumsum(dim=1) - 1
            mask = torch.cat((before, answers.mask), dim=1)
            h_out = self._read(answers.tokens, mask, places, _copied(cache, rows % n))[required_layer(self.sae_out)]
            counts[:, rows] = _counts_at(h_out, self.sae_out, answers)
            lengths[:, rows] = answers.lengths
            samples.append(_sample_statistics(h_out, self.sae_out, answers.sample()))
        found = {}
        for kind, name in enumerate(("", "_special")):
            found[f"prompt{name}"] = Counts.of(prompt_counts[kind], prompts.lengths[kind])
            found[f"chosen{name}"] = Counts.of(counts[kind, :n], lengths[kind, :n])
            found[f"rejected{name}"] = Counts.of(counts[kind, n:], lengths[kind, n:])
        maxima, looked, totals = (torch.stack(each).sum(dim=0) for each in zip(*samples, strict=True))
        index = torch.tensor([item.index for item in batch])
        cut = torch.tensor([t.cut for t in triples], dtype=torch.uint8)
        keys = torch.tensor([item.key for item in batch])
        return Shard(index, keys, cut, found, maxima, looked, totals)

    def _read(self, tokens: Tensor, mask: Tensor, places: Tensor, cache: DynamicCache) -> dict[int, Tensor]:
        device = device_of(self.model.get_input_embeddings())
        inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": places}
        return read_layers(
            self.model,
            [required_layer(self.sae_in), required_layer(self.sae_out)],
            self.layers,
            cache,
            **{name: each.to(device) for name, each in inputs.items()},
        )


@dataclass(frozen=True)
class _Rows:
    """Token ids [N, T], where they are tokens and not padding (1, 0), and where special tokens; int64, int64, bool."""

    tokens: Tensor
    mask: Tensor
    special: Tensor

    @classmethod
    def padded(cls, rows: Sequence[list[int]], text: Sequence[list[bool]], *, left: bool = False) -> _Rows:
        """Of ids, and of where they are text."""
        width = max(map(len, rows))
        tokens, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
        special = torch.zeros(len(rows), width, dtype=torch.bool)
        for n, (ids, is_text) in enumerate(zip(rows, text, strict=True)):
            at = slice(width - len(ids), width) if left else slice(len(ids))
            tokens[n, at], mask[n, at], special[n, at] = torch.tensor(ids), 1, ~torch.tensor(is_text)
        return cls(tokens, mask, special)

    @property
    def lengths(self) -> Tensor:
        """Tokens, and special ones, [2, N]."""
        return torch.stack((self.mask.sum(dim=1), self.special.sum(dim=1)))

    def sample(self) -> Tensor:
        """Every n-th token of each row from the first on, at most TOKENS_PER_RESPONSE, [N, T] bool."""
        step = -(-self.mask.sum(dim=1, keepdim=True) // TOKENS_PER_RESPONSE)
        return (self.mask > 0) & ((self.mask.cumsum(dim=1) - 1) % step == 0)


def _batch_size(lengths: Sequence[int], before: int, budget: int) -> int:
    """How many texts of these lengths, the longest first, make a batch: what fits the budget with `before` tokens in
    front of each, and little padding once it is large enough to be worth a pass. At least one."""
    n, tokens = 1, lengths[0]
    while n < len(lengths):
        tokens += lengths[n]
        padding = (n + 1) * lengths[0] > MOST_PADDED * tokens
        if (n + 1) * (before + lengths[0]) > budget or (padding and tokens - lengths[n] >= budget // SMALL_BATCH):
            break
        n += 1
    return n


def _copied(cache: DynamicCache, rows: Tensor) -> DynamicCache:
    """Some rows of a cache, which stays as it is."""
    new = copy.copy(cache)
    new.layers = [copy.copy(layer) for layer in cache.layers]
    new.batch_select_indices(rows)
    return new


def _counts_at(h: Tensor, sae: FrozenSAE, rows: _Rows) -> Tensor:
    """Counts [2, N, d_sae] of N rows: on all their tokens, and on special ones."""
    n_rows = len(rows.tokens)
    # Each token counts once, for its row or for the special tokens of its row.
    row = torch.arange(n_rows)[:, None] + n_rows * rows.special
    sequences = torch.where(rows.mask > 0, row, -1).to(torch.int32).flatten().to(h.device)
    h = h.flatten(0, 1)
    check_finite(h[sequences >= 0], required_layer(sae))
    text, special = activation_counts(h, sae.weights, sequences, 2 * n_rows).chunk(2)
    return torch.stack((text + special, special))


def _sample_statistics(h: Tensor, sae: FrozenSAE, sample: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the rows of `h` [B, T, d_in] where `sample` [B, T] is true: how many each latent is the largest of [d_sae], of
    equals the smaller; their number [1]; their sum [d_in] as the encoder reads them, in units of ROW_QUANTUM. int64."""
    rows = h.flatten(0, 1)[sample.flatten().to(h.device)]
    maxima = torch.zeros(sae.d_sae, dtype=torch.int64)
    for block in rows.split(max(1, LATENTS_PER_BLOCK // sae.d_sae)):
        largest, latent = sae.encode(block).max(dim=1)
        maxima += torch.bincount(latent[largest > 0], minlength=sae.d_sae).cpu()
    # Where an SAE divides by the norm, a row of zeros is none.
    units = (sae.normalise(rows).double().nan_to_num().clamp(-ROW_BOUND, ROW_BOUND) / ROW_QUANTUM).round()
    return maxima, torch.tensor([len(rows)]), units.long().sum(dim=0).cpu()


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
