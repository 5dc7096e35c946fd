"""Checks that SAEs fit a model: its layers, its width and its name."""

from __future__ import annotations

from torch import nn

from dspa.errors import ModelError
from dspa.models.layers import base_model, check_model_name, has_layer_norm, hidden_size, loaded_name
from dspa.saes.frozen import FrozenSAE
from dspa.saes.metadata import CENTERED, check_place, refused_hook


def check_saes(
    sae_in: FrozenSAE, sae_out: FrozenSAE, model: nn.Module, n_layers: int, model_name: str | None = None
) -> None:
    """Raise `ModelError` unless both SAEs fit their layers of `model`, the input SAE first.

    Args:
        sae_in: the input SAE.
        sae_out: the output SAE.
        model: a transformers model, or one in a PEFT wrapper.
        n_layers: its number of decoder layers.
        model_name: name of the model, if its own name or path does not give it.
    """
    for name, sae in (("sae_in", sae_in), ("sae_out", sae_out)):
        check_sae(name, sae, model, n_layers, model_name)
    if required_layer(sae_in) > required_layer(sae_out):
        raise ModelError(
            f"The input SAE sits at layer {sae_in.layer} and the output SAE at layer {sae_out.layer}. The output SAE "
            "has to be of the same layer or a later one, since a prompt is read before it is steered."
        )


def required_layer(sae: FrozenSAE) -> int:
    """Return the decoder layer after which `sae` reads and edits the residual stream.

    Everything that steers, collects or trains on residuals asks for it.

    Raises:
        SAEError: as for `check_residual`.
        ModelError: an SAE that does not say where it reads.
    """
    check_residual(sae)
    if sae.layer is None:
        raise ModelError(f"{sae!r} does not say its layer. Load it with FrozenSAE.load(path, layer=...).")
    return sae.layer


def check_residual(sae: FrozenSAE) -> None:
    """Raise `SAEError` for an SAE of a place that is not, or may not be, the output of a decoder layer."""
    check_place(repr(sae), sae)
    if sae.layer is None and sae.hook_name is not None:
        advice = "If it is the residual stream after a decoder layer, load it with the number of that layer: `layer`."
        raise refused_hook(repr(sae), sae.hook_name, advice)


def check_sae(name: str, sae: FrozenSAE, model: nn.Module, n_layers: int, model_name: str | None) -> None:
    """Raise `ModelError` unless `sae` fits its layer of `model`. `name` is its name in messages."""
    if not 0 <= required_layer(sae) < n_layers:
        raise ModelError(f"`{name}` sits at layer {sae.layer}; accepted: 0 to {n_layers - 1}, the model's layers.")
    check_made_for(name, sae, model, model_name)


def check_made_for(name: str, sae: FrozenSAE, model: nn.Module, model_name: str | None) -> None:
    """Raise `ModelError` unless `sae` has the width of `model` and can read it, and was not made for another one.

    Raise `SAEError` if `sae` was changed after it was made, or is not of the residual stream.
    """
    check_residual(sae)
    sae.check_unchanged()
    if sae.d_in != hidden_size(model):
        raise ModelError(
            f"`{name}` reads {sae.d_in} dimensions and the model's hidden size is {hidden_size(model)}: it is an SAE "
            "of another model."
        )
    if sae.centered and not has_layer_norm(model):
        raise ModelError(
            f"`{name}` is an SAE of residuals less their mean ({CENTERED}), and {type(base_model(model)).__name__} has "
            "no LayerNorm. TransformerLens does not centre such a model, so the setting meant nothing: load the SAE "
            f"with FrozenSAE.load(path, {CENTERED}=False). For the command line, save that and name its folder."
        )
    check_model_name(f"`{name}` was made for", sae.model_name or "", model_name or loaded_name(model))
