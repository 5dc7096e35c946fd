"""Counting of active latents: runs of the model on pieces of preference triples, in batches that fit the memory."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dspa.data.templates import check_template_kwargs, date_of_today
from dspa.data.tokens import BOUNDARY, TokenizedTriple, tokenize_triple
from dspa.data.triples import Triple, key_of
from dspa.errors import ModelError
from dspa.maps.batches import Group, Rows, batch_size
from dspa.maps.collection import CollectSettings
from dspa.maps.passes import SharedPrompts, WholePasses, shares_prompts
from dspa.maps.pieces import Piece
from dspa.maps.shards import ROW_QUANTUM, Counts, Shard
from dspa.models.attention import attention_implementation
from dspa.models.layers import (
    base_model,
    check_eval,
    check_finite,
    context_length,
    decoder_layers,
    device_of,
    loaded_name,
)
from dspa.models.sources import Source, model_digest, model_source
from dspa.saes.frozen import FrozenSAE
from dspa.saes.placement import check_saes, required_layer
from dspa.schemas import PositiveInt, check, whole
from dspa_kernels import activation_counts

# Largest number of tokens sampled per response, and of latents whose maximum is taken at once.
TOKENS_PER_RESPONSE = 16
LATENTS_PER_BLOCK = 1 << 24
# Residuals are clamped to this, in multiples of ROW_QUANTUM, so that sums of 2^23 of them stay exact integers.
ROW_BOUND = 2.0**24
# Texts on which different tokenizers differ.
PROBE = ("The quick brown fox, it's 42 years old!\n\n\tdef f(x): return x**2", "Über naïve cafés — 日本語 и русский 🙂")


@dataclass(frozen=True)
class _Item:
    """A triple to count: its number in the data, its key, its name in errors and its tokens."""

    index: int
    key: int
    name: str
    triple: TokenizedTriple


class TripleCounter:
    """Counter of a model's active latents on triples, in batches that fit the memory."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        sae_in: FrozenSAE,
        sae_out: FrozenSAE,
        max_length: int | None,
        batch_tokens: int,
        layers: str | None,
        model_name: str | None,
        chat_template_kwargs: Mapping[str, Any] | None,
    ) -> None:
        check(PositiveInt, batch_tokens, ValueError, "`batch_tokens`")
        check_template_kwargs(tokenizer, chat_template_kwargs)
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.model, self.tokenizer, self.layers = base_model(model), tokenizer, layers
        self.name, self.batch_tokens = model_name or loaded_name(self.model), batch_tokens
        check_eval(self.model)
        stack = decoder_layers(self.model, layers)
        check_saes(sae_in, sae_out, self.model, len(stack), model_name)
        self.sae_in, self.sae_out = (sae.to(device_of(stack[required_layer(sae)])) for sae in (sae_in, sae_out))
        self.shares_prompts = shares_prompts(self.model)
        context = context_length(self.model)
        self.limit = context if max_length is None else max_length
        if self.limit is not None:
            accepted = f"2 to {context}, the model's positions" if context else "2 or more"
            check(whole(2, context, accepted), self.limit, ValueError, "`max_length`")

    def settings(self) -> CollectSettings:
        """Return all that the counts of given triples depend on."""
        tokenizer: Any = self.tokenizer
        behaviour = [tokenizer(text)["input_ids"] for text in PROBE], tokenizer.all_special_ids, tokenizer.chat_template
        return CollectSettings(
            model_name=self.name,
            sae_in=self.sae_in.fingerprint,
            sae_out=self.sae_out.fingerprint,
            layer_in=required_layer(self.sae_in),
            layer_out=required_layer(self.sae_out),
            d_sae_in=self.sae_in.d_sae,
            d_sae_out=self.sae_out.d_sae,
            dtypes=", ".join(str(part.dtype) for part in (self.model, self.sae_in, self.sae_out)),
            max_length=self.limit,
            tokenizer=hashlib.sha256(json.dumps(behaviour).encode()).hexdigest()[:16],
            boundary=BOUNDARY,
            chat_template_kwargs=self.chat_template_kwargs or None,
            template_date=date_of_today(tokenizer),
            attention=attention_implementation(self.model),
            neuronpedia_out=self.sae_out.neuronpedia_place,
            model_digest=model_digest(self.model) or "",
        )

    def sources(self) -> dict[str, Source]:
        """Return where the model and the SAEs were loaded from, as far as that is known."""
        sources = {"model": model_source(self.model), "sae_in": self.sae_in.source, "sae_out": self.sae_out.source}
        return {name: source for name, source in sources.items() if source is not None}

    def tokenize(self, triple: Triple) -> TokenizedTriple:
        """Return the tokens of a triple as the model reads them, cut to its limit."""
        return tokenize_triple(
            triple, self.tokenizer, max_length=self.limit, chat_template_kwargs=self.chat_template_kwargs
        )

    def count(self, piece: Piece) -> Shard:
        """Count one piece.

        Args:
            piece: the triples to count.

        Returns:
            Their counts, in an order that depends on their lengths.

        Raises:
            ModelError: hidden states that are not finite, a model that cannot be read, or not enough memory for one
                triple alone.
        """
        waiting = [_Item(index, key_of(triple), triple.name, self.tokenize(triple)) for index, triple in piece.triples]
        waiting.sort(key=lambda item: len(item.triple.prompt), reverse=True)
        shards = []
        while waiting:
            batch = waiting[: batch_size([len(item.triple.prompt) for item in waiting], 0, self.batch_tokens)]
            shard = self._count_or_shrink(batch)
            if shard is not None:
                shards.append(shard)
                waiting = waiting[len(batch) :]
        return Shard.join(shards)

    def _count_or_shrink(self, batch: Sequence[_Item]) -> Shard | None:
        """Count a batch, or lower the token budget and return None where memory did not suffice."""
        groups = self._group_responses(batch)
        try:
            return self._count(batch, groups)
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
            if len(batch) == 1 and len(groups) == 2:
                raise ModelError(
                    f"There is not enough memory for one triple alone: {batch[0].name}, with a prompt of "
                    f"{len(batch[0].triple.prompt)} tokens and a response of {len(groups[0].ids[0])}. Finished pieces "
                    "are kept. Lower `max_length` or free memory, then start again."
                ) from error
        # Outside the handler, nothing holds the tensors of the failed pass any more.
        torch.cuda.empty_cache()
        n_prompt = len(batch[0].triple.prompt)
        tokens = max(len(batch) * n_prompt, *(len(g.rows) * (n_prompt + len(g.ids[0])) for g in groups))
        self.batch_tokens = tokens // 2
        warnings.warn(
            f"There is not enough memory for batches of {tokens} tokens. Continuing with {self.batch_tokens}. To "
            "start with that, pass it as `batch_tokens`.",
            stacklevel=2,
        )
        return None

    def _group_responses(self, batch: Sequence[_Item]) -> list[Group]:
        """Return groups of responses of similar length. Of B triples, rows below B are chosen, the others rejected."""
        triples = [item.triple for item in batch]
        ids = [t.chosen for t in triples] + [t.rejected for t in triples]
        text = [t.chosen_text for t in triples] + [t.rejected_text for t in triples]
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]), reverse=True)
        groups = []
        while order:
            n = batch_size([len(ids[row]) for row in order], len(triples[0].prompt), self.batch_tokens)
            rows, order = order[:n], order[n:]
            groups.append(Group(rows, [ids[row] for row in rows], [text[row] for row in rows]))
        return groups

    @torch.no_grad()
    def _count(self, batch: Sequence[_Item], groups: Sequence[Group]) -> Shard:
        """Count a batch: run its prompts, then the groups of its responses."""
        triples, n = [item.triple for item in batch], len(batch)
        layer_in, layer_out = required_layer(self.sae_in), required_layer(self.sae_out)
        way = SharedPrompts if self.shares_prompts else WholePasses
        passes = way(self.model, triples, layer_in, layer_out, self.layers)
        h, prompts = passes.read_prompts()
        prompt_counts = _counts_at(h, self.sae_in, prompts)
        del h
        counts = torch.zeros(2, 2 * n, self.sae_out.d_sae, dtype=torch.int32, device=self.sae_out.device)
        lengths = torch.zeros(2, 2 * n, dtype=torch.int64)
        samples = []
        for group in groups:
            h, answers = passes.read_responses(group)
            counts[:, group.rows] = _counts_at(h, self.sae_out, answers)
            lengths[:, group.rows] = answers.lengths
            samples.append(_sample_statistics(h, self.sae_out, _sampled(answers.mask)))
        sparse_counts = {}
        for kind, suffix in enumerate(("", "_special")):
            sparse_counts[f"prompt{suffix}"] = Counts.of(prompt_counts[kind], prompts.lengths[kind])
            sparse_counts[f"chosen{suffix}"] = Counts.of(counts[kind, :n], lengths[kind, :n])
            sparse_counts[f"rejected{suffix}"] = Counts.of(counts[kind, n:], lengths[kind, n:])
        max_counts, n_sampled, residual_sum = (
            torch.stack(statistics).sum(dim=0) for statistics in zip(*samples, strict=True)
        )
        return Shard(
            index=torch.tensor([item.index for item in batch]),
            keys=torch.tensor([item.key for item in batch]),
            cut=torch.tensor([t.cut for t in triples], dtype=torch.uint8),
            counts=sparse_counts,
            max_counts=max_counts,
            n_sampled=n_sampled,
            residual_sum=residual_sum,
        )


def _counts_at(h: Tensor, sae: FrozenSAE, rows: Rows) -> Tensor:
    """Return the counts [2, N, d_sae] of N rows, on all their tokens and on their special tokens."""
    n_rows = len(rows.tokens)
    # Each token counts once: for the text of its row, or for the special tokens of its row.
    row = torch.arange(n_rows)[:, None] + n_rows * rows.special
    sequences = torch.where(rows.mask > 0, row, -1).to(torch.int32).flatten().to(h.device)
    h = h.flatten(0, 1)
    check_finite(h[sequences >= 0], required_layer(sae))
    text, special = activation_counts(h, sae.weights, sequences, 2 * n_rows).chunk(2)
    return torch.stack((text + special, special))


def _sampled(mask: Tensor) -> Tensor:
    """Return a mask of every n-th token of each row, from the first on.

    Args:
        mask: 1 for tokens and 0 for padding, [N, T] int64.

    Returns:
        [N, T] bool, with n as small as leaves at most TOKENS_PER_RESPONSE tokens per row.
    """
    step = -(-mask.sum(dim=1, keepdim=True) // TOKENS_PER_RESPONSE)
    return (mask > 0) & ((mask.cumsum(dim=1) - 1) % step == 0)


def _sample_statistics(h: Tensor, sae: FrozenSAE, sample: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return statistics of the sampled rows of `h`, all int64.

    Args:
        h: hidden states [B, T, d_in].
        sae: the SAE that reads them.
        sample: True for the sampled rows, [B, T].

    Returns:
        max_counts [d_sae], sampled rows on which each latent is the largest (ties: smaller index); n_sampled [1];
        residual_sum [d_in], sum of the rows as the encoder reads them, in units of ROW_QUANTUM.
    """
    rows = h.flatten(0, 1)[sample.flatten().to(h.device)]
    max_counts = torch.zeros(sae.d_sae, dtype=torch.int64)
    for block in rows.split(max(1, LATENTS_PER_BLOCK // sae.d_sae)):
        largest, latent = sae.encode(block).max(dim=1)
        max_counts += torch.bincount(latent[largest > 0], minlength=sae.d_sae).cpu()
    # An SAE that divides by the norm turns a row of zeros into NaN.
    units = (sae.weights.normalise(rows).rows.double().nan_to_num().clamp(-ROW_BOUND, ROW_BOUND) / ROW_QUANTUM).round()
    return max_counts, torch.tensor([len(rows)]), units.long().sum(dim=0).cpu()


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
