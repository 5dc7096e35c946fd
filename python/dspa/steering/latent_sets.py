"""Sets of latents that a user has chosen, with what becomes of each, and their file."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import StrictFloat
from torch import Tensor

from dspa.errors import SAEError, listed, refusal
from dspa.schemas import Accepts, Count, OneOf, check, read_json, schema
from dspa_kernels import SteeringPlan

MODES, WHENS = ("augment", "ablate", "clamp"), ("active", "always")
SIGNS = {
    ("augment", "active"): SteeringPlan.AUGMENT,
    ("augment", "always"): SteeringPlan.AUGMENT_ALWAYS,
    ("clamp", "active"): SteeringPlan.CLAMP,
    ("clamp", "always"): SteeringPlan.CLAMP_ALWAYS,
    ("ablate", "active"): SteeringPlan.ABLATE,
    # A latent that is not active has nothing to ablate.
    ("ablate", "always"): SteeringPlan.ABLATE,
}


@schema
class LatentSet:
    """Latents of one SAE with a strength s for each, in units of the latent itself as on Neuronpedia.

    | mode | `when="active"`, where f > 0 | `when="always"`, at every token |
    | --- | --- | --- |
    | augment | `max(f + s, 0)` | `f + s` |
    | ablate | `max(f - s, 0)` | the same as where it is active |
    | clamp | `s` | `s` |

    The residual then moves by `(f' - f) W_dec[j]`. A negative s augments downwards: to 0 at most where the latent is
    active, and as far as it says at every token, as Neuronpedia adds a vector. A latent with None for s is removed.

    Attributes:
        strengths: strength of each latent, by its index; None sets it to 0 where it is active, in every mode.
        mode: "augment", "ablate" or "clamp".
        when: "active" or "always".

    Raises:
        ValueError: a strength that is not finite, or negative with "ablate".
    """

    strengths: dict[Count, Annotated[StrictFloat, Accepts("a number")] | None]
    mode: Annotated[str, OneOf(MODES)] = "augment"
    when: Annotated[str, OneOf(WHENS)] = "active"

    def __post_init__(self) -> None:
        for latent, s in self.strengths.items():
            if s is not None and not (math.isfinite(s) or (s > 0 and self.mode == "ablate")):
                raise refusal(ValueError, f"The strength of latent {latent}", s, "a finite number", REMOVES)
            if s is not None and s < 0 and self.mode == "ablate":
                raise refusal(ValueError, f"The strength of latent {latent}", s, "a number >= 0 for mode 'ablate'")

    @classmethod
    def of(cls, latents: Mapping[int, float | None] | Sequence[int] | LatentSet, **settings: str) -> LatentSet:
        """Return a set of latents with their strengths, or of a list of latents that are removed.

        Raises:
            ValueError: as the class, or no latent, or one twice.
        """
        if isinstance(latents, LatentSet):
            return latents
        if not isinstance(latents, Mapping):
            latents = list(latents)
            if len(set(latents)) < len(latents):
                raise refusal(ValueError, "A set of latents", listed(latents), "different latents")
            latents = dict.fromkeys(latents)
        if not latents:
            raise refusal(ValueError, "A set of latents", "empty", "one latent or more")
        return cls(dict(latents), **settings)

    @classmethod
    def read(cls, path: str | Path) -> LatentSet:
        """Read a set from a JSON file: `{"strengths": {"971": 4.0, "77": null}, "mode": "augment", "when": "active"}`.

        Raises:
            SAEError: a file of something else.
            OSError: the file cannot be read.
        """
        record: Any = read_json(Path(path), SAEError)
        if isinstance(record, dict) and isinstance(record.get("strengths"), dict):
            strengths = record["strengths"].items()
            # JSON has no other keys than texts.
            record["strengths"] = {int(latent) if latent.isdecimal() else latent: s for latent, s in strengths}
        chosen = check(cls, record, SAEError, str(path))
        if not chosen.strengths:
            raise refusal(SAEError, str(path), "empty", "one latent or more, with their strengths")
        return chosen

    def slots(self) -> list[tuple[int, int, float]]:
        """Return each latent with its sign and its strength, as `SteeringPlan` has them."""
        sign = SIGNS[self.mode, self.when]
        return [(j, SteeringPlan.ABLATE, math.inf) if s is None else (j, sign, s) for j, s in self.strengths.items()]

    def __str__(self) -> str:
        signed = {"augment": "{}{:+g}", "ablate": "{}{:+g}", "clamp": "{}={:g}"}[self.mode]
        way = -1 if self.mode == "ablate" else 1
        latents = (f"{j} removed" if s is None else signed.format(j, way * s) for j, s in self.strengths.items())
        return listed(latents) + (" at every token" if self.when == "always" else "")


def plans_of(sets: Collection[LatentSet]) -> tuple[Tensor, SteeringPlan]:
    """Return the latents of sets, for `MapWeights.gather`, and a plan of a row per set and an empty one at the end."""
    columns = sorted({latent for chosen in sets for latent in chosen.strengths})
    place = {latent: slot for slot, latent in enumerate(columns)}
    slots = torch.full((len(sets) + 1, max(len(chosen.strengths) for chosen in sets) or 1), -1, dtype=torch.int32)
    signs, strengths = torch.zeros_like(slots, dtype=torch.int8), torch.zeros(slots.shape)
    for row, chosen in enumerate(sets):
        for i, (latent, sign, s) in enumerate(chosen.slots()):
            slots[row, i], signs[row, i], strengths[row, i] = place[latent], sign, s
    return torch.tensor(columns, dtype=torch.int32), SteeringPlan(slots, signs, strengths)


REMOVES = "A latent without a strength (None, or in a list) is removed."
