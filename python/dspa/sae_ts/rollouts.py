"""Texts that a model writes with a vector per row of a batch added, and the mean latents of these texts without it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from dspa.errors import ModelError, refusal
from dspa.models.attachment import Attachable
from dspa.models.layers import CausalLM, check_finite, device_of
from dspa.models.reading import read_layers
from dspa.sae_ts.settings import RolloutSettings
from dspa.saes.frozen import FrozenSAE
from dspa.saes.placement import required_layer
from dspa.steering.plans import check_device
from dspa_kernels import activation_sums

# Large enough that no two directions of a measurement have one seed.
STRIDE = 1_000_003


class RowVectors(Attachable):
    """`h_n' = h_n + vectors_n` at all tokens of row n of a batch, at the output of one layer while attached.

    Args:
        layer: the layer.

    Attributes:
        vectors: a vector per row of the batch [B, d_in], fp32.
    """

    def __init__(self, layer: int) -> None:
        super().__init__()
        self._layer = layer
        self.vectors = torch.empty(0, 0)

    @property
    def layer(self) -> int:
        """The layer."""
        return self._layer

    def _prepare(self, model: CausalLM, stack: nn.ModuleList, model_name: str | None) -> None:
        if self.layer >= len(stack):
            raise ModelError(f"The layer is {self.layer}; accepted: 0 to {len(stack) - 1}, the model's layers.")

    def _edit(self, h: Tensor, kwargs: dict[str, Any]) -> Tensor:
        return (h + self.vectors.to(h.device)[:, None]).to(h.dtype)


class Drawing(LogitsProcessor):
    """Draws each token by a given number of [0, 1), so that a text depends on its numbers and not on its batch.

    Args:
        numbers: a number per row and token of the texts [B, length], fp64.
        sampling: settings.
    """

    def __init__(self, numbers: Tensor, sampling: RolloutSettings) -> None:
        self.numbers, self.sampling = numbers, sampling

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Return scores [B, vocabulary] of which only the drawn token's is finite."""
        values, tokens = scores.double().topk(min(self.sampling.top_k, scores.shape[1]))
        p = values.softmax(dim=1)
        p = torch.where(p.cumsum(dim=1) - p < self.sampling.top_p, p, 0)
        below = p.cumsum(dim=1)
        number = self.numbers[:, input_ids.shape[1] - 1].to(scores.device)
        place = (below <= (number * below[:, -1])[:, None]).sum(dim=1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens.gather(1, place), 0)


@dataclass(frozen=True)
class Rollouts:
    """Texts of a model after openers, and the latents of an SAE on them.

    Attributes:
        model: the model.
        sae: the SAE, at the layer of `added`.
        added: attached to the model.
        openers: token ids of the openers.
        sampling: settings.
        batch_size: number of texts that are written together.
        layers: dotted path of the decoder layers, for an unknown architecture.
    """

    model: CausalLM
    sae: FrozenSAE
    added: RowVectors
    openers: Sequence[Sequence[int]]
    sampling: RolloutSettings
    batch_size: int
    layers: str | None

    def mean_latents(self, vectors: Tensor, first: int, rollouts: int) -> Iterator[int | Tensor]:
        """Yield the number of texts of each batch when it is done, and in the end the mean latents [D, d_sae] fp32.

        The mean is over all positions of all texts that were written with one of the vectors.

        Args:
            vectors: vectors [D, d_in], whose texts share batches.
            first: number of the first vector, which seeds the draws.
            rollouts: texts per vector.
        """
        numbers = torch.stack([self._numbers(first + d, rollouts) for d in range(len(vectors))])
        sums = torch.zeros(len(vectors), self.sae.d_sae, device=self.sae.device)
        for batch in self._batches(len(vectors), rollouts):
            rows = torch.tensor([d for d, _ in batch])
            texts = self._write(
                [self.openers[r % len(self.openers)] for _, r in batch],
                vectors[rows],
                torch.stack([numbers[d, r] for d, r in batch]),
            )
            self._add_latents(texts, rows, sums)
            yield len(batch)
        yield (sums / (rollouts * self.sampling.length)).cpu()

    def _numbers(self, direction: int, rollouts: int) -> Tensor:
        g = torch.Generator().manual_seed((self.sampling.seed * STRIDE + direction) % 2**63)
        return torch.rand(rollouts, self.sampling.length, generator=g, dtype=torch.float64)

    def _batches(self, n_vectors: int, rollouts: int) -> Iterator[list[tuple[int, int]]]:
        """Yield pairs of a vector and the number of its text, whose openers are equally long, so that none is padded.

        Those of one opener stand together, so that the vectors share each batch.
        """
        pairs = [(d, r) for r in range(rollouts) for d in range(n_vectors)]
        lengths = [len(self.openers[r % len(self.openers)]) for _, r in pairs]
        for length in sorted(set(lengths)):
            alike = [pair for pair, own in zip(pairs, lengths, strict=True) if own == length]
            for start in range(0, len(alike), self.batch_size):
                yield alike[start : start + self.batch_size]

    def _write(self, openers: Sequence[Sequence[int]], vectors: Tensor, numbers: Tensor) -> Tensor:
        """Return texts [B, length]."""
        device = device_of(self.model.get_input_embeddings())
        prompts = torch.tensor(openers, device=device)
        self.added.vectors = vectors.to(self.sae.device)
        written: Tensor = self.model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            max_new_tokens=self.sampling.length - prompts.shape[1],
            # No token has this number, so that no text ends early.
            eos_token_id=self.model.config.get_text_config().vocab_size,
            pad_token_id=0,
            logits_processor=[Drawing(numbers, self.sampling)],
        )
        return written

    def _add_latents(self, texts: Tensor, rows: Tensor, sums: Tensor) -> None:
        """Add the latents of all tokens of texts, read without a vector, to the rows of `sums` of their vectors."""
        layer = required_layer(self.sae)
        with self.added.disabled():
            mask = torch.ones_like(texts)
            h = read_layers(self.model, [layer], self.layers, input_ids=texts, attention_mask=mask)[layer]
        check_device("sae", self.sae, h)
        check_finite(h, layer, "Hidden states of the texts")
        sequences = rows.to(torch.int32).repeat_interleave(texts.shape[1]).to(h.device)
        activation_sums(h.flatten(0, 1), self.sae.weights, sequences, len(sums), out=sums, accumulate=True)


def check_openers(openers: Sequence[Sequence[int]], length: int, context: int | None) -> None:
    """Raise `ValueError` unless each opener has tokens and leaves room for others in texts of `length` tokens."""
    if not openers:
        raise refusal(ValueError, "`openers`", "empty", "one text or more, such as the default ones")
    for number, opener in enumerate(openers, start=1):
        if not 0 < len(opener) < length:
            accepted = f"1 to {length - 1} tokens, as texts have {length} (`length`)"
            raise refusal(ValueError, f"Opener {number}", f"{len(opener)} tokens long", accepted)
    if context is not None and length > context:
        raise refusal(ValueError, "`length`", length, f"up to {context}, the model's positions")


def unit_rows(directions: Tensor, d_in: int) -> Tensor:
    """Return directions [n, d_in] of length 1, fp32 on the CPU.

    Raises:
        ValueError: another shape, or directions of length 0 or that are not finite.
    """
    if directions.dim() != 2 or directions.shape[1] != d_in or not len(directions):
        raise refusal(ValueError, "`directions`", f"of shape {list(directions.shape)}", f"[n, {d_in}], n >= 1")
    rows = directions.detach().double().cpu()
    norms = rows.norm(dim=1, keepdim=True)
    if not bool((norms.isfinite() & (norms > 0)).all()):
        raise refusal(ValueError, "`directions`", "partly 0, NaN or infinite", "finite rows that are not 0")
    unit: Tensor = rows / norms
    return unit.float()
