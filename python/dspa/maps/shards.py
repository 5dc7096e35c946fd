"""Shards: the counts of one piece of the data, and their tensors in a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dspa.errors import MapError

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

    def fault(self, n_texts: int, width: int) -> str:
        """Return what cannot be true of counts of `n_texts` texts and `width` latents, empty if all can be."""
        n_entries = len(self.latents)
        shapes = {"starts": n_texts + 1, "latents": n_entries, "counts": n_entries, "lengths": n_texts}
        for name, size in shapes.items():
            tensor, dtype = getattr(self, name), torch.int64 if name in ("starts", "lengths") else torch.int32
            if tensor.dtype != dtype or tuple(tensor.shape) != (size,):
                return f"{name} are {tensor.dtype} {list(tensor.shape)}, not {dtype} [{size}]"
        sizes = self.starts.diff()
        if self.starts[0] != 0 or self.starts[-1] != n_entries or bool((sizes < 0).any()):
            return f"starts do not lead from 0 to the {n_entries} entries"
        if bool((self.lengths < 0).any()):
            return "lengths are below 0"
        if bool(((self.latents < 0) | (self.latents >= width)).any()):
            return f"latents are not all from 0 to {width - 1}"
        # A latent may be smaller than the one before it only where a text begins.
        begins = torch.zeros(n_entries + 1, dtype=torch.bool).index_fill(0, self.starts, True)[1:n_entries]
        if bool((~begins & (self.latents.diff() <= 0)).any()):
            return "latents of a text are not in increasing order, each once"
        if bool(((self.counts < 1) | (self.counts > self.lengths.repeat_interleave(sizes))).any()):
            return "counts are not all from 1 to the length of their text"
        return ""

    def holds(self, part: Counts, width: int) -> bool:
        """Return True if `part` can be the counts of some of the tokens of these texts, of at most `width` latents."""
        mine, theirs = self._places(width), part._places(width)
        at = torch.searchsorted(mine, theirs).clamp(max=max(0, len(mine) - 1))
        if len(theirs) and (not len(mine) or not torch.equal(mine[at], theirs)):
            return False
        return bool((part.lengths <= self.lengths).all()) and bool((part.counts <= self.counts[at]).all())

    def _places(self, width: int) -> Tensor:
        """Return the place of each entry in a table [N, width], increasing."""
        texts = torch.arange(len(self.lengths)).repeat_interleave(self.starts.diff())
        return texts * width + self.latents

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
        keys: their contents by `dspa.data.triples.key_of`, [n] int64.
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

    def check(self, name: str, d_sae_in: int, d_sae_out: int) -> None:
        """Raise `MapError` for numbers that no text has, which a checksum does not show.

        Args:
            name: name of the shard in the message.
            d_sae_in: width of the SAE whose latents are counted on prompts.
            d_sae_out: width of the SAE whose latents are counted on responses.
        """
        if fault := self._fault(d_sae_in, d_sae_out):
            raise MapError(f"{name} is damaged ({fault}).")

    def _fault(self, d_sae_in: int, d_sae_out: int) -> str:
        n = len(self.index)
        for name, counts in self.counts.items():
            if fault := counts.fault(n, d_sae_in if name.startswith("prompt") else d_sae_out):
                return f"{name}: {fault}"
        for part in PARTS:
            if not self.counts[part].holds(self.counts[f"{part}_special"], max(d_sae_in, d_sae_out)):
                return f"{part}: more on special tokens than on all"
        expected = {
            "index": (torch.int64, (n,)),
            "keys": (torch.int64, (n,)),
            "cut": (torch.uint8, (n,)),
            "max_counts": (torch.int64, (d_sae_out,)),
            "n_sampled": (torch.int64, (1,)),
            "residual_sum": (torch.int64, tuple(self.residual_sum.shape[:1])),
        }
        for name, (dtype, shape) in expected.items():
            tensor = getattr(self, name)
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                return f"{FILE_NAMES[name]} is {tensor.dtype} {list(tensor.shape)}, not {dtype} {list(shape)}"
        if bool((self.index < 0).any()) or len(self.index.unique()) < n:
            return "index has numbers below 0, or one twice"
        if bool((self.cut > 2).any()):
            return "cut is above 2, the responses of a triple"
        if bool((self.max_counts < 0).any()) or int(self.max_counts.sum()) > int(self.n_sampled):
            return "maxima are below 0, or more than the tokens that were looked at"
        return ""

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
