"""Fewer cases of large grids, for an interpreter that takes half a second for what a GPU does in microseconds."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch

# A grid of more cases than LARGE is thinned, to about one case in SHARE.
LARGE, SHARE = 40, 4
# The published settings, by the names that parameters have in the tests.
PUBLISHED: dict[str, Hashable] = {
    "alpha": 0.2,
    "k_prompt": 32,
    "k_diff": 16,
    "mode": "ablate",
    "dtypes": (torch.bfloat16, torch.bfloat16),
}


@dataclass(frozen=True)
class Case:
    """A case of a grid: its node id and its parameters by name."""

    name: str
    parameters: Mapping[str, Hashable]

    @property
    def rank(self) -> int:
        """A number that is the same in every process, unlike `hash`, and follows no period of the grid."""
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8], "big")


def thinned(cases: Sequence[Case]) -> set[str]:
    """Return the names of the cases to run: the published ones, a share by rank, and what no value is lost without."""
    published = published_parameters(cases)
    kept = [case for case in cases if has_parameters(case, published) or case.rank % SHARE == 0]
    lost = values_of(cases) - values_of(kept)
    while lost:
        best = max(cases, key=lambda case: (len(lost & values_of([case])), case.rank))
        kept.append(best)
        lost -= values_of([best])
    return {case.name for case in kept}


def published_parameters(cases: Sequence[Case]) -> dict[str, Hashable]:
    """Return the published settings that are values of this grid."""
    values = values_of(cases)
    return {name: value for name, value in PUBLISHED.items() if (name, value) in values}


def has_parameters(case: Case, parameters: Mapping[str, Hashable]) -> bool:
    """Return whether the case has all of these parameters, of which there is at least one."""
    return bool(parameters) and parameters.items() <= case.parameters.items()


def values_of(cases: Sequence[Case]) -> set[tuple[str, Hashable]]:
    """Return pairs of a parameter's name and one of its values."""
    return {pair for case in cases for pair in case.parameters.items()}
