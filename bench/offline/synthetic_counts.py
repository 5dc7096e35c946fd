"""Counts like those of a large data set, made without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dspa.maps.collection import Collection, CollectSettings
from dspa.maps.pieces import DataRecord
from dspa.maps.shards import COUNTED, Counts, Shard

# Firing frequencies fall as rank^-FALL, are at most MOST_FREQUENT and sum to L0, as in dspa_kernels.testing. Texts are
# bursty: a latent's count in a text is negative binomial with shape BURST, so that most latents are silent in most.
L0, FALL, MOST_FREQUENT, BURST = 70.0, 0.7, 0.9, 0.05
# Tokens per text: log-normal around these with this spread, rounded to LENGTHS so that probabilities are computed once.
PROMPT, RESPONSE, SPREAD = 180, 300, 0.7
LENGTHS = np.unique(np.geomspace(16, 4096, 40).astype(int))
TRIPLES_PER_SHARD = 64

Array = np.ndarray[Any, np.dtype[Any]]


def frequencies(width: int) -> Array:
    """Probability per token that a latent fires, the most frequent first."""
    shape = np.arange(1, width + 1) ** -FALL
    scale = L0 / shape.sum()
    for _ in range(50):
        scale *= L0 / np.minimum(scale * shape, MOST_FREQUENT).sum()
    return np.minimum(scale * shape, MOST_FREQUENT)


class Texts:
    """Draws counts of texts for the latents of one SAE, the rarest `n_dead` of which never fire."""

    def __init__(self, width: int, middle: int, rng: np.random.Generator, n_dead: int = 0) -> None:
        frequency = frequencies(width) * (np.arange(width) < width - n_dead)
        expected = frequency[rng.permutation(width)] * LENGTHS[:, None]
        self.middle, self.rng = middle, rng
        self.active = (1 - (1 + expected / BURST) ** -BURST).astype(np.float32)
        self.more = np.maximum(expected / np.maximum(self.active, 1e-12) - 1, 1e-3).astype(np.float32)

    def draw(self, n_texts: int) -> Counts:
        """Counts of `n_texts` texts."""
        lengths = np.searchsorted(LENGTHS, self.middle * np.exp(SPREAD * self.rng.standard_normal(n_texts)))
        rows = []
        for i_length in np.minimum(lengths, len(LENGTHS) - 1):
            latents = np.flatnonzero(self.rng.random(self.active.shape[1], dtype=np.float32) < self.active[i_length])
            drawn = 1 + self.rng.exponential(self.more[i_length, latents]).astype(np.int32)
            rows.append((latents.astype(np.int32), np.minimum(drawn, LENGTHS[i_length]), LENGTHS[i_length]))
        return Counts(
            starts=torch.tensor(np.cumsum([0, *(len(latents) for latents, _, _ in rows)])),
            latents=torch.from_numpy(np.concatenate([latents for latents, _, _ in rows])),
            counts=torch.from_numpy(np.concatenate([counts for _, counts, _ in rows]).astype(np.int32)),
            lengths=torch.tensor([int(length) for _, _, length in rows]),
        )


def write_counts(
    folder: Path,
    n_triples: int,
    d_sae_in: int,
    d_sae_out: int,
    seed: int = 0,
    *,
    prompt_tokens: int = PROMPT,
    n_dead: int = 0,
) -> Collection:
    """A collection of `n_triples` triples, whose responses differ by chance alone.

    Prompts have `prompt_tokens` tokens, and `n_dead` latents of the input SAE are active on none of them.
    """
    rng = np.random.default_rng(seed)
    prompts, responses = Texts(d_sae_in, prompt_tokens, rng, n_dead), Texts(d_sae_out, RESPONSE, rng)
    settings = CollectSettings("synthetic", "a" * 16, "b" * 16, 0, 1, d_sae_in, d_sae_out, "", None, "")
    collection = Collection.start(folder, settings)
    starts = range(0, n_triples, TRIPLES_PER_SHARD)
    for piece, start in enumerate(tqdm(starts, desc="write", unit="shard")):
        n = min(TRIPLES_PER_SHARD, n_triples - start)
        parts = (prompts.draw(n), responses.draw(n), responses.draw(n))
        none = (Counts.of(torch.zeros(n, 1), torch.zeros(n)) for _ in parts)
        shard = Shard(
            index=torch.arange(start, start + n),
            keys=torch.arange(start, start + n),
            cut=torch.zeros(n, dtype=torch.uint8),
            counts=dict(zip(COUNTED, (*parts, *none), strict=True)),
            max_counts=torch.bincount(parts[1].latents.long(), minlength=d_sae_out),
            n_sampled=torch.tensor([n]),
            residual_sum=torch.zeros(8, dtype=torch.int64),
        )
        collection.write(piece, f"{piece}", shard)
    collection.record(DataRecord.of(n_triples, [f"{piece}" for piece in range(len(starts))]))
    return collection
