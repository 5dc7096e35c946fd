"""A persona as a method of a comparison, and its control."""

from __future__ import annotations

from dspa.evaluate.compare.methods import Method
from dspa.personal.persona import Persona, ablation_of
from dspa.saes.frozen import FrozenSAE


def persona_methods(persona: Persona, sae: FrozenSAE, name: str, *, control: bool = True) -> list[Method]:
    """Return the method of a persona, and its control "random persona".

    The control ablates the latents of another persona for each seed, with random weights of all axes, chosen by the
    same rule from the same effects.

    Args:
        persona: the persona.
        sae: its SAE.
        name: name of the method in tables.
        control: also return the control.

    Raises:
        PersonaError: another SAE.
    """
    ablation = ablation_of({name: persona}, sae)
    settings = {
        "persona": persona.digest,
        "sae": sae.fingerprint,
        "layers": [ablation.layer],
        "alpha": ablation.alpha,
        "latents": persona.latents,
    }
    methods = [Method(name, "persona", settings, lambda _seed: ablation)]
    if control:
        drawn = {**settings, "control": "random persona"}
        methods.append(
            Method(
                f"{name}: random persona",
                "control",
                drawn,
                lambda seed: ablation_of({name: persona.random(seed)}, sae),
                drawn=True,
                control_of=name,
            )
        )
    return methods
