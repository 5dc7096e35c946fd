"""Latents that are chosen by hand: their options, and the SAE that they are of."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from dspa.cli.loading import load_sae
from dspa.cli.options import AdapterSAEOptions, check_used
from dspa.errors import listed, refusal

if TYPE_CHECKING:
    from dspa.saes.frozen import FrozenSAE
    from dspa.steering.latent_sets import LatentSet

# The options of maps that are also for latents.
SHARED = ("--positions", "--trace", "--controls")


@dataclass(frozen=True)
class LatentOptions:
    """Latents that are chosen by hand, with their strengths."""

    latent: list[str] | None = field(
        default=None,
        metadata={
            "help": "Steer by this latent of --sae: LATENT=STRENGTH, in units of the latent, or LATENT alone to remove "
            "it. May be given several times, for one set."
        },
    )
    latent_mode: str = field(
        default="augment",
        metadata={
            "help": "What becomes of each --latent: its strength is added (also a negative one), subtracted down to 0, "
            "or takes the place of its value.",
            "choices": ("augment", "ablate", "clamp"),
        },
    )
    latent_when: str = field(
        default="active",
        metadata={
            "help": "Edit each --latent where it is active, or always, at every token.",
            "choices": ("active", "always"),
        },
    )
    latents: list[Path] | None = field(
        default=None,
        metadata={
            "help": 'JSON file of a set of latents, {"strengths": {"971": 4.0, "77": null}, "mode": "augment", "when": '
            '"active"}, where null removes a latent.'
        },
    )

    @property
    def chosen(self) -> bool:
        """True where there is a set of latents."""
        return bool(self.latent or self.latents)

    def sets(self) -> dict[str, LatentSet]:
        """Return the sets by their names: that of --latent, and those of files by their paths.

        Raises:
            ValueError: an invalid latent or strength, a setting of --latent without one, or an invalid file.
        """
        from dspa.steering.latent_sets import LatentSet

        defaults = {option.name: option.default for option in fields(LatentOptions)}
        settings = {"mode": self.latent_mode, "when": self.latent_when}
        changed = [f"--latent-{name}" for name, value in settings.items() if value != defaults[f"latent_{name}"]]
        check_used("--latent", self.latent, changed)
        sets: dict[str, LatentSet] = {}
        if self.latent:
            pairs = list(map(_latent, self.latent))
            if len(dict(pairs)) < len(pairs):
                raise refusal(ValueError, "--latent", listed(self.latent), "different latents")
            chosen = LatentSet.of(dict(pairs), **settings)
            sets[str(chosen)] = chosen
        return sets | {str(path): LatentSet.read(path) for path in self.latents or []}


def _latent(text: str) -> tuple[int, float | None]:
    """Return the latent and the strength of one --latent."""
    match = re.fullmatch(r"\s*(\d+)\s*(?:=\s*(\S+)\s*)?", text)
    try:
        if match:
            return int(match[1]), None if match[2] is None else float(match[2])
    except ValueError:
        pass
    accepted = "LATENT=STRENGTH, such as 971=4, or LATENT alone to remove it"
    raise refusal(ValueError, "--latent", repr(text), accepted)


def load_latents_sae(options: AdapterSAEOptions, device: str, loaded: Iterable[FrozenSAE]) -> FrozenSAE:
    """Return the SAE of latents: that of --sae, or else the only one whose latents something else edits."""
    if options.sae is not None:
        return load_sae(options.sae, options.layer, device)
    different = {(sae.fingerprint, sae.layer): sae for sae in loaded}
    if len(different) != 1:
        raise refusal(ValueError, "--sae", "missing", "the SAE of --latent or --latents")
    return next(iter(different.values()))


def without_shared(of_maps: Collection[str], latents: bool) -> list[str]:
    """Return the options of maps, without those that are also for latents if there are some."""
    return [option for option in of_maps if not (latents and option in SHARED)]
