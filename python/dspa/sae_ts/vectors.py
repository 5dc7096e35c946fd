"""Vectors that target latents: `s = Mt / |Mt| - lambda Mb / |Mb|`, and the variants that it is compared with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dspa.errors import VectorError, refusal
from dspa.sae_ts.approximator import EffectApproximator
from dspa.sae_ts.settings import VARIANTS
from dspa.saes.frozen import FrozenSAE
from dspa.schemas import Count, NonNegative, Number, check
from dspa.steering.vector import SteeringVector


def targeted_vector(
    approximator: EffectApproximator,
    target: Mapping[int, float],
    *,
    variant: str = "targeted",
    side_effects: float = 1.0,
    scale: float = 1.0,
    positions: str = "all",
    sae: FrozenSAE | None = None,
) -> SteeringVector:
    """Return the unit vector that is expected to raise some latents and no others.

    With t the weights of the target and |.| the length of a vector, before it is normalised:

    - targeted: `M t / |M t| - side_effects * M b / |M b|`. The second part steers away from what any direction does.
    - pseudo-inverse: `(t - b) pinv(M)`, the least vector whose predicted effect is nearest to t.
    - rotation: `R d / |R d| - side_effects * M b / |M b|`, with d the sum of decoder rows by t, and R the rotation that
      takes unit decoder rows nearest to the unit columns of M. It needs no effect on the target to have been seen.

    Args:
        approximator: the approximator.
        target: weights by latent, negative for a latent to lower.
        variant: one of VARIANTS.
        side_effects: weight of the second part, 1 as published; 0 leaves it out. The pseudo-inverse has none.
        scale: how many times the vector is added, as for `SteeringVector`.
        positions: tokens to which it is added, likewise.
        sae: the SAE of the approximator, for rotation.

    Raises:
        VectorError: an unknown variant, an invalid target, another SAE, or a target on which no direction acts.
    """
    weights = _weights(target, approximator.d_sae)
    check(NonNegative, side_effects, VectorError, "`side_effects`")
    M, b = approximator.M.double(), approximator.b.double()
    if variant == "targeted":
        s = _unit(M @ weights, "effect on the target") - side_effects * _away(M, b, side_effects)
    elif variant == "rotation":
        d = _unit_decoder(approximator, sae).T @ weights
        s = _unit(_rotation(M, _unit_decoder(approximator, sae)) @ d, "direction of the target")
        s = s - side_effects * _away(M, b, side_effects)
    elif variant == "pseudo-inverse":
        s = torch.linalg.lstsq(M.T, (weights - b)[:, None], driver="gelsd").solution[:, 0]
    else:
        raise refusal(VectorError, "`variant`", repr(variant), ", ".join(VARIANTS))
    record = approximator.record
    return SteeringVector(
        *(_unit(s, "vector").float(), record.layer, scale, positions),
        model_name=record.model_name,
        model_digest=record.model_digest,
    )


def _weights(target: Mapping[int, float], d_sae: int) -> Tensor:
    """Return the weights of a target [d_sae] fp64."""
    check(dict[Count, Number], dict(target), VectorError, "`target`")
    if outside := [latent for latent in target if latent >= d_sae]:
        raise refusal(VectorError, "A latent of `target`", outside[0], f"0 to {d_sae - 1}")
    if not any(target.values()):
        raise refusal(VectorError, "`target`", "empty or 0", "a weight other than 0 for one latent or more")
    weights = torch.zeros(d_sae, dtype=torch.float64)
    weights[torch.tensor(list(target))] = torch.tensor(list(target.values()), dtype=torch.float64)
    return weights


def _unit(vector: Tensor, what: str) -> Tensor:
    length = float(vector.norm())
    if not length > 0:
        raise refusal(VectorError, f"The {what}", "0", "one that is not, such as of latents that some direction moved")
    return vector / length


def _away(M: Tensor, b: Tensor, side_effects: float) -> Tensor:
    return _unit(M @ b, "mean side effect") if side_effects else torch.zeros(len(M), dtype=M.dtype)


def _unit_decoder(approximator: EffectApproximator, sae: FrozenSAE | None) -> Tensor:
    """Return the unit decoder rows [d_sae, d_in] of the approximator's SAE, fp64."""
    if sae is None or sae.fingerprint != approximator.record.sae:
        got = "missing" if sae is None else f"an SAE of fingerprint {sae.fingerprint}"
        raise refusal(VectorError, "`sae`, for rotation,", got, f"that of the approximator, {approximator.record.sae}")
    return torch.nn.functional.normalize(sae.W_dec.double().cpu(), dim=1)


def _rotation(M: Tensor, decoder: Tensor) -> Tensor:
    """Return R [d_in, d_in] for which `R d_j` is nearest to the unit column j of M, over all decoder rows d_j."""
    U, _, Vh = torch.linalg.svd(torch.nn.functional.normalize(M, dim=0) @ decoder)
    rotation: Tensor = U @ Vh
    return rotation
