"""Personas: weights of axes of style, the latents whose ablation serves them best, and their file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from dspa.errors import PersonaError, listed, refusal
from dspa.evaluate.style import StyleAxis
from dspa.files import SEAL, checksum, digest_of, read_sealed, write_tensors
from dspa.models.sources import Source
from dspa.outputs import output_file
from dspa.personal.effects import Effects
from dspa.saes.frozen import FrozenSAE
from dspa.schemas import Count, NonNegative, Number, OneOf, PositiveInt, Text, check, read_json, schema
from dspa.steering.latent_sets import LatentSet
from dspa.steering.latents import LatentSteering

FORMAT = "dspa.persona.1"
TENSORS = ("latents", "effects", "errors")
# Latents of a persona, as published.
TOP = 5
# What a persona takes over from the measurement of its effects.
SHARED = ("sae", "layer", "alpha", "model_name", "model_digest", "sources")


@schema
class PersonaRecord:
    """The header of a persona's file, and all of a persona but its numbers.

    Attributes:
        weights: weight of each axis that counts.
        axes: all axes, in the order of the effects.
        rules: digest of the rules of the axes.
        top: largest number of latents that it ablates; None for all of a positive gain.
        sae: fingerprint of the SAE.
        layer: its layer.
        alpha: strength of the ablation.
        n_prompts: number of prompts that the effects are means over.
        model_name: name of the model, empty if that is not known.
        model_digest: its weights, as `dspa.models.sources.model_digest` gives them, or empty.
        sources: where the model and the SAE were loaded from.
        format: FORMAT.
        package: version of the package that wrote the file.
        sha256: checksum of the numbers.
        seal: digest of all else.
    """

    weights: dict[Text, Number]
    axes: list[Text]
    rules: Text
    top: PositiveInt | None
    sae: Text
    layer: Count
    alpha: NonNegative
    n_prompts: PositiveInt
    model_name: Text = ""
    model_digest: Text = ""
    sources: dict[Text, Source] = field(default_factory=dict)
    format: Annotated[str, OneOf((FORMAT,))] = FORMAT
    package: Text = ""
    sha256: Text = ""
    seal: Text = ""

    def __post_init__(self) -> None:
        check_weights(self.weights, self.axes)


def check_weights(weights: Mapping[str, float], axes: list[str]) -> None:
    """Raise `PersonaError` unless weights are finite numbers for some of these axes, and not all 0."""
    check(dict[Text, Number], dict(weights), PersonaError, "The weights of a persona")
    if unknown := sorted(weights.keys() - set(axes)):
        raise refusal(PersonaError, "The axis of a weight", repr(unknown[0]), ", ".join(axes))
    if not any(weights.values()):
        got = "none but 0" if weights else "none"
        raise refusal(PersonaError, "The weights of a persona", got, f"a weight other than 0 of {', '.join(axes)}")


@dataclass(frozen=True)
class Utility:
    """The utility of an answer to a persona: `sum of weight * axis`."""

    terms: tuple[tuple[float, StyleAxis], ...]

    def __call__(self, prompt: str, answer: str) -> float:
        """Return the utility of an answer."""
        return sum(weight * axis(prompt, answer) for weight, axis in self.terms)

    @property
    def pattern(self) -> str:
        """The formula, for records."""
        return " ".join(f"{weight:+g} * {axis.pattern}" for weight, axis in self.terms)


class Persona:
    """The taste of a reader, as weights of axes, and the latents whose ablation is expected to give more of it.

    The utility of an answer is `sum of weight * axis`, and the gain of a latent is the mean change of the utility when
    it alone is ablated: `gain_j = w . mean over prompts of (axes with j ablated - axes)`. A persona ablates the
    latents of the largest gains, if these are positive.

    Args:
        record: everything but the numbers.
        latents: the C candidates, [C] int64.
        effects: mean change of each of A axes by the ablation of each candidate, [C, A] fp64.
        errors: standard error of each candidate's gain, [C] fp64.

    Raises:
        PersonaError: numbers of other shapes, or that are not finite.
    """

    def __init__(self, record: PersonaRecord, latents: Tensor, effects: Tensor, errors: Tensor) -> None:
        shapes = [list(tensor.shape) for tensor in (latents, effects, errors)]
        if shapes != [[len(latents)], [len(latents), len(record.axes)], [len(latents)]]:
            accepted = f"[C], [C, {len(record.axes)}] and [C] of C candidates"
            raise refusal(PersonaError, "The numbers of a persona", f"of shapes {shapes}", accepted)
        if not bool(effects.isfinite().all() and errors.isfinite().all()):
            raise refusal(PersonaError, "The numbers of a persona", "partly NaN or infinite", "finite numbers")
        self.record, self._latents, self._effects, self._errors = record, latents, effects, errors

    @classmethod
    def of(
        cls,
        effects: Effects,
        axes: Mapping[str, StyleAxis],
        weights: Mapping[str, float],
        *,
        top: int | None = TOP,
    ) -> Persona:
        """Return the persona with these weights.

        Args:
            effects: effects of the candidates.
            axes: axes by name.
            weights: weights by the name of an axis.
            top: largest number of latents to ablate, as published; None for all of a positive gain.

        Raises:
            PersonaError: an axis that is not there, weights that are all 0, or no latent of a positive gain.
        """
        measured, changes = effects.measurement, effects.changes(axes)
        if not changes:
            raise refusal(PersonaError, "The effects", "of no latent", "effects of one latent or more")
        check_weights(weights, list(axes))
        latents = sorted(changes)
        every = np.stack([changes[latent] for latent in latents])
        gains = every @ _vector(weights, list(axes))
        n = len(measured.asked)
        errors = gains.std(axis=1, ddof=1) / n**0.5 if n > 1 else np.zeros(len(latents))
        record = check(
            PersonaRecord,
            {
                "weights": dict(weights),
                "axes": list(axes),
                "rules": rules_digest(axes),
                "top": top,
                "n_prompts": n,
                **{name: getattr(measured, name) for name in SHARED},
            },
            PersonaError,
            "Persona",
        )
        persona = cls(record, torch.tensor(latents), torch.from_numpy(every.mean(axis=1)), torch.from_numpy(errors))
        if not persona.latents:
            got = f"not raised by the ablation of any of {len(latents)} latents"
            raise refusal(PersonaError, "The utility of this persona", got, "a persona that some of them serve")
        return persona

    @property
    def gains(self) -> dict[int, tuple[float, float]]:
        """Estimated gain of each candidate and its standard error, by falling gain."""
        values = self._effects @ torch.from_numpy(_vector(self.record.weights, self.record.axes))
        rows = zip(self._latents.tolist(), values.tolist(), self._errors.tolist(), strict=True)
        return {latent: (gain, error) for latent, gain, error in sorted(rows, key=lambda row: -row[1])}

    @property
    def latents(self) -> list[int]:
        """The latents that the persona ablates, by falling gain."""
        return [latent for latent, (gain, _) in self.gains.items() if gain > 0][: self.record.top]

    def utility(self, axes: Mapping[str, StyleAxis]) -> Utility:
        """Return the function of an answer that the persona is meant to raise.

        Args:
            axes: axes by name, by the rules that the persona was made with.

        Raises:
            PersonaError: other axes.
        """
        if rules_digest(axes) != self.record.rules:
            got = f"of other axes than the persona's ({listed(self.record.axes)})"
            raise refusal(PersonaError, "The rules of style", got, "those that the persona was made with")
        return Utility(tuple((weight, axes[axis]) for axis, weight in self.record.weights.items()))

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that identify the persona, and the effects that random ones are drawn from."""
        tensors = {"latents": self._latents, "effects": self._effects}
        return digest_of([asdict(self.record)["weights"], self.record.top, self.record.alpha, checksum(tensors)])

    def random(self, seed: int) -> Persona:
        """Return a persona with random weights of all axes, from the same effects: a control.

        The weights are drawn from a normal distribution. The errors of its gains are not known, and 0.
        """
        drawn = torch.randn(len(self.record.axes), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        record = replace(self.record, weights=dict(zip(self.record.axes, drawn.tolist(), strict=True)))
        return Persona(record, self._latents, self._effects, torch.zeros_like(self._errors))

    def save(self, path: str | Path) -> None:
        """Write the persona to one safetensors file.

        Raises:
            PersonaError: a path that cannot be a file.
            OSError: the file cannot be written.
        """
        output_file(Path(path), "The path of the persona", PersonaError)
        header = {name: value for name, value in asdict(self.record).items() if name not in ("sha256", SEAL)}
        tensors = {"latents": self._latents, "effects": self._effects, "errors": self._errors}
        write_tensors(Path(path), tensors, header | {"package": version("dspa-kernels")})

    @classmethod
    def load(cls, path: str | Path) -> Persona:
        """Read a persona that `save` wrote.

        Raises:
            PersonaError: there is no such file, or it is damaged or not a persona.
        """
        what = "persona, which dspa personal make writes"
        record, tensors = read_sealed(Path(path), PersonaRecord, TENSORS, PersonaError, what, FORMAT)
        return cls(record, **tensors)

    def __repr__(self) -> str:
        weights = ", ".join(f"{axis}: {weight:g}" for axis, weight in self.record.weights.items())
        return f"Persona({weights}; ablates {listed(self.latents)})"


def ablation_of(personas: Mapping[str, Persona], sae: FrozenSAE) -> LatentSteering:
    """Return what ablates the latents of personas, by their names, while it is attached to a model.

    A single persona is that of all prompts. Of several, `ablation.rows([name, None, ...])` gives each prompt of a batch
    one or none.

    Raises:
        PersonaError: no persona, one of another SAE, or personas of different strengths or models.
    """
    if not personas:
        raise refusal(PersonaError, "`personas`", "empty", "one persona or more, by their names")
    first = next(iter(personas.values())).record
    for name, persona in personas.items():
        if (persona.record.sae, persona.record.layer) != (sae.fingerprint, sae.layer):
            got = f"of an SAE with fingerprint {persona.record.sae} at layer {persona.record.layer}"
            accepted = f"a persona of this SAE, {sae.fingerprint} at layer {sae.layer}"
            raise refusal(PersonaError, f"The persona {name!r}", got, accepted)
        for entry in ("alpha", "model_name", "model_digest"):
            if (other := getattr(persona.record, entry)) != getattr(first, entry):
                accepted = f"personas of one `{entry}`, as the first ({getattr(first, entry)!r})"
                raise refusal(PersonaError, f"The persona {name!r}", f"of `{entry}` {other!r}", accepted)
    sets = {name: LatentSet(dict.fromkeys(persona.latents)) for name, persona in personas.items()}
    return LatentSteering(sae, sets, alpha=first.alpha, model_name=first.model_name, model_digest=first.model_digest)


def read_weights(path: Path) -> dict[str, float]:
    """Return the weights of a persona from a JSON file, an object of numbers by the names of axes.

    Raises:
        PersonaError: a file of something else.
        OSError: the file cannot be read.
    """
    return check(dict[Text, Number], read_json(path, PersonaError), PersonaError, str(path))


def rules_digest(axes: Mapping[str, StyleAxis]) -> str:
    """Return 16 hexadecimal digits that identify the axes."""
    return digest_of({name: axis.pattern for name, axis in axes.items()})


def _vector(weights: Mapping[str, float], axes: list[str]) -> Any:
    return np.array([weights.get(axis, 0.0) for axis in axes], dtype=np.float64)
