"""`dspa info PATH`: what a file or folder of this package says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspa.errors import refusal

if TYPE_CHECKING:
    from dspa.sae_ts.approximator import ApproximatorRecord

ACCEPTED = "the file of a map, a vector, a persona or an effect approximator, or the folder of an adapter"
UNKNOWN = "not recorded"


def contents(path: Path) -> dict[str, Any]:
    """Return names and values of what is at a path.

    Raises:
        ValueError: something else, or damaged.
    """
    if path.is_dir():
        return _adapter(path)
    if not path.is_file():
        raise refusal(ValueError, "PATH", f"{path}, where there is nothing", ACCEPTED)
    from dspa.files import read_header
    from dspa.maps.cdmap import FORMATS
    from dspa.personal.persona import FORMAT as PERSONA
    from dspa.sae_ts.approximator import FORMAT as APPROXIMATOR
    from dspa.steering.vector import FORMAT

    form = read_header(path).get("format")
    if form == FORMAT:
        return _vector(path)
    if form == PERSONA:
        return _persona(path)
    if form == APPROXIMATOR:
        return _approximator(path)
    if form in FORMATS:
        return _map(path)
    raise refusal(ValueError, "PATH", f"{path}, a file of another format ({form!r})", ACCEPTED)


def _vector(path: Path) -> dict[str, Any]:
    from dspa.steering.vector import SteeringVector

    vector = SteeringVector.load(path)
    return {
        "kind": "vector",
        "layer": vector.layer,
        "numbers": len(vector.vector),
        "norm": f"{vector.vector.norm():.4g}",
        "scale": f"{vector.scale:g}",
        "positions": vector.positions,
        "model": vector.model_name or UNKNOWN,
        "weights": vector.model_digest or UNKNOWN,
    }


def _persona(path: Path) -> dict[str, Any]:
    from dspa.personal.persona import Persona

    persona = Persona.load(path)
    record, gains = persona.record, persona.gains
    sae = record.sources.get("sae")
    return {
        "kind": "persona",
        "weights": ", ".join(f"{axis} {weight:+g}" for axis, weight in record.weights.items()),
        "latents": ", ".join(f"{latent} ({gains[latent][0]:+.3f})" for latent in persona.latents),
        "chosen": f"{'all' if record.top is None else f'up to {record.top}'} of positive gain, of {len(gains)}",
        "prompts": record.n_prompts,
        "alpha": f"{record.alpha:g}",
        "layer": record.layer,
        "SAE": f"{sae.path if sae else UNKNOWN}, fingerprint {record.sae}",
        "model": record.model_name or UNKNOWN,
        "weights of the model": record.model_digest or UNKNOWN,
    }


def _approximator(path: Path) -> dict[str, Any]:
    from dspa.sae_ts.approximator import EffectApproximator

    made = EffectApproximator.load(path)
    record = made.record
    method = "adam" if record.settings.method == "adam" else f"ridge, penalty {record.ridge:g}"
    return {
        "kind": "effect approximator",
        "layer": record.layer,
        "SAE": f"{made.d_sae} latents of {made.d_in} numbers, fingerprint {record.sae}",
        "directions": f"{record.n_directions} fitted by {method}; {record.n_held_out} held out",
        "texts per direction": record.rollouts,
        "scale of the directions": f"{record.scale:g}",
        **scores(record),
        "model": record.model_name or UNKNOWN,
        "weights": record.model_digest or UNKNOWN,
    }


def scores(record: ApproximatorRecord) -> dict[str, str]:
    """Return the scores of an approximator on held-out directions, by what they mean."""
    return {
        "R^2 beyond the mean effect": f"{record.r2:.4f}",
        "R^2 with shuffled directions": f"{record.r2_shuffled:.4f} (control)",
        "explained by the mean effect alone": f"{record.mean_alone:.4f}",
    }


def _map(path: Path) -> dict[str, Any]:
    from dspa.maps.cdmap import ConditionalDifferenceMap
    from dspa.maps.reports import origin

    cdmap = ConditionalDifferenceMap.load(path)
    rows: dict[str, Any] = {"kind": "map; dspa map show has more"}
    return rows | {name: value for name, value, _ in origin(cdmap.meta)} | {"weights": cdmap.model_digest or UNKNOWN}


def _adapter(path: Path) -> dict[str, Any]:
    from dspa.fsrl.adapter import read_record

    record = read_record(path)
    sae, model = record.sae, record.sources.get("model")
    return {
        "kind": "FSRL adapter",
        "layer": sae.layer,
        "SAE": f"{sae.d_sae} latents of {sae.d_in} numbers, fingerprint {sae.fingerprint}",
        "activation": record.config.activation,
        "model": model.path if model else sae.model_name or UNKNOWN,
        "weights": record.model_digest or (model.digest if model else UNKNOWN),
        "package": record.package or UNKNOWN,
    }
