"""Does an SAE fit a model?"""

from __future__ import annotations

from torch import nn

from dspa.errors import ModelError
from dspa.models.layers import check_model_name, hidden_size, loaded_name
from dspa.saes.frozen import FrozenSAE


def check_saes(
    sae_in: FrozenSAE, sae_out: FrozenSAE, model: nn.Module, n_layers: int, called: str | None = None
) -> None:
    """Raise unless both SAEs can sit at their layers of `model`, the input SAE first.

    `called` is what the model is, where its own name or path does not tell.
    """
    for name, sae in (("sae_in", sae_in), ("sae_out", sae_out)):
        check_sae(name, sae, model, n_layers, called)
    if required_layer(sae_in) >= required_layer(sae_out):
        raise ModelError(
            f"The input SAE sits at layer {sae_in.layer} and the output SAE at layer {sae_out.layer}. The input SAE "
            "has to come first, since a prompt is read before it is steered."
        )


def required_layer(sae: FrozenSAE) -> int:
    """The layer of an SAE that has to say one."""
    if sae.layer is None:
        raise ModelError(f"{sae!r} does not say its layer. Load it with FrozenSAE.load(path, layer=...).")
    return sae.layer


def check_sae(name: str, sae: FrozenSAE, model: nn.Module, n_layers: int, called: str | None) -> None:
    """Raise unless the SAE can sit at its layer of `model`."""
    if not 0 <= required_layer(sae) < n_layers:
        raise ModelError(f"`{name}` sits at layer {sae.layer}; accepted: 0 to {n_layers - 1}, the model's layers.")
    check_made_for(name, sae, model, called)


def check_made_for(name: str, sae: FrozenSAE, model: nn.Module, called: str | None) -> None:
    """Raise unless an SAE is of the width of `model`, and was not made for another one."""
    if sae.d_in != hidden_size(model):
        raise ModelError(
            f"`{name}` reads {sae.d_in} dimensions and the model's hidden size is {hidden_size(model)}: it is an SAE "
            "of another model."
        )
    check_model_name(f"`{name}` was made for", sae.model_name or "", called or loaded_name(model))
