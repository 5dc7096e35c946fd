"""Shards: the counts of one piece of the data, and their tensors in a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FORMAT = "dspa.counts.3"
# Unit of sums of residuals, which are integers so that the order of summation does not matter.
ROW_QUANTUM = 2.0**-16
# Parts of a triple: input latents are counted on the prompt, output latents on the responses.
PARTS = ("prompt", "chosen", "rejected")
# Counts on all tokens of each part, and on those of them that are special tokens.
COUNTED = (*PARTS, *(f"{part}_special" for part in PARTS))


@dataclass(frozen=True)
class Counts:
    """Sparse counts of N texts.

    Text n activates latent `latents[e]` on `counts[e]` of its `lengths[n]` tokens, for the entries e from `starts[n]`
    to `starts[n + 1]`, latents in increasing order.

    Attributes:
        starts: [N + 1] int64.
        latents, counts: [entries] int32.
        lengths: [N] int64.
    """

    starts: Tensor
    latents: Tensor
    counts: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, dense: Tensor, lengths: Tensor) -> Counts:
        """Make sparse counts of dense ones.

        Args:
            dense: counts [N, width] on any device.
            lengths: tokens of each text [N].
        """
        texts, latents = dense.nonzero(as_tuple=True)
        sizes = torch.bincount(texts, minlength=len(dense)).cpu()
        counts = dense[texts, latents].to(torch.int32)
        return cls(_starts(sizes), latents.to(torch.int32).cpu(), counts.cpu(), lengths.long().cpu())

    @classmethod
    def join(cls, parts: Sequence[Counts]) -> Counts:
        """Concatenate the texts of several."""
        return cls(
            starts=_starts(torch.cat([part.starts.diff() for part in parts])),
            latents=torch.cat([part.latents for part in parts]),
            counts=torch.cat([part.counts for part in parts]),
            lengths=torch.cat([part.lengths for part in parts]),
        )


def _starts(sizes: Tensor) -> Tensor:
    return torch.cat((sizes.new_zeros(1), sizes.cumsum(0)))


@dataclass(frozen=True)
class Shard:
    """Counts of n triples, and statistics of a sample of their response tokens.

    Attributes:
        index: numbers of the triples in the data, [n] int64.
        keys: their contents by `pieces.key_of`, [n] int64.
        cut: responses that were shortened, per triple, [n] uint8.
        counts: the counts by each name of COUNTED.
        max_counts: sampled tokens on which each output latent is the largest, [d_sae_out] int64.
        n_sampled: number of sampled tokens, [1] int64.
        residual_sum: sum of their residuals in units of ROW_QUANTUM, [d_in] int64.
    """

    index: Tensor
    keys: Tensor
    cut: Tensor
    counts: dict[str, Counts]
    max_counts: Tensor
    n_sampled: Tensor
    residual_sum: Tensor

    @classmethod
    def join(cls, parts: Sequence[Shard]) -> Shard:
        """Concatenate the triples of several shards, and add up the statistics of their samples."""
        return cls(
            index=torch.cat([part.index for part in parts]),
            keys=torch.cat([part.keys for part in parts]),
            cut=torch.cat([part.cut for part in parts]),
            counts={name: Counts.join([part.counts[name] for part in parts]) for name in COUNTED},
            **{name: torch.stack([getattr(part, name) for part in parts]).sum(dim=0) for name in SAMPLE_NAMES},
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by their names in a file."""
        sparse = {f"{name}.{field}": getattr(self.counts[name], field) for name in COUNTED for field in FIELDS}
        return sparse | {file_name: getattr(self, name) for name, file_name in FILE_NAMES.items()}

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> Shard:
        """Make a shard of the tensors of a file."""
        counts = {name: Counts(**{field: tensors[f"{name}.{field}"] for field in FIELDS}) for name in COUNTED}
        return cls(counts=counts, **{name: tensors[file_name] for name, file_name in FILE_NAMES.items()})


FIELDS = tuple(Counts.__annotations__)
# Statistics of a shard's sample and their names in its file.
SAMPLE_NAMES = {"max_counts": "maxima", "n_sampled": "looked", "residual_sum": "totals"}
# The same of all attributes but the counts.
FILE_NAMES = {"index": "index", "keys": "keys", "cut": "cut"} | SAMPLE_NAMES
# Names of all tensors of a file, in order.
NAMES = (*(f"{name}.{field}" for name in COUNTED for field in FIELDS), *FILE_NAMES.values())
