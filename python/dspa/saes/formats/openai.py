"""OpenAI's sparse_autoencoder: a `.pt` file with the state dict of its `Autoencoder`, which names the activation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import torch
from typing_extensions import TypedDict

from dspa.errors import SAEError, refusal
from dspa.saes.formats.source import SourceSAE, agreed, check_names, check_stated, check_tensors, transposed
from dspa.schemas import OneOf, PositiveInt, check

# By which the file is known.
OPENAI_TENSORS = frozenset({"pre_bias", "latent_bias"})
ACTIVATION, ACTIVATION_STATE = "activation", "activation_state_dict"
DECODER, TIED_DECODER = "decoder.weight", "decoder.linear.weight"
STATISTICS = frozenset({"stats_last_nonzero", "latents_activation_frequency", "latents_mean_square"})

Activation: TypeAlias = Annotated[str, OneOf(("ReLU", "TopK"))]


class _TopK(TypedDict):
    k: PositiveInt
    postact_fn: Annotated[str, OneOf(("ReLU",))]


def read_openai(file: Path, state: Mapping[str, Any]) -> SourceSAE:
    """Read a state dict. Its maker normalises the input of the TopK ones, and does not say the place or layer."""
    is_topk = check(Activation, state.get(ACTIVATION, "ReLU"), SAEError, f"{file}: `{ACTIVATION}`") == "TopK"
    tensors = {
        name: value for name, value in state.items() if name.partition(".")[0] not in (ACTIVATION, ACTIVATION_STATE)
    }
    decoder = TIED_DECODER if TIED_DECODER in tensors else DECODER
    check_names(str(file), tensors, OPENAI_TENSORS | {"encoder.weight", decoder}, STATISTICS)
    check_tensors(file, tensors)
    # Tied, the decoder is the transposed encoder, which the file holds twice.
    is_tied = decoder == TIED_DECODER
    if is_tied and not torch.equal(tensors["encoder.weight"], tensors[TIED_DECODER]):
        raise refusal(SAEError, f"{file}: `{TIED_DECODER}`", "not `encoder.weight`", "the same matrix twice")
    renamed = {
        "W_enc": transposed(tensors["encoder.weight"]),
        "b_enc": tensors["latent_bias"],
        "W_dec": tensors[TIED_DECODER] if is_tied else transposed(tensors[DECODER]),
        "b_dec": tensors["pre_bias"],
    }
    d_in = tensors["pre_bias"].numel()
    check_stated(str(file), renamed, d_in=d_in, d_sae=tensors["latent_bias"].numel(), d_out=d_in)
    return SourceSAE(
        name=str(file),
        arch="topk" if is_topk else "standard",
        tensors=renamed,
        k=_k(file, state) if is_topk else None,
        apply_b_dec_to_input=True,
        normalize_activations="layer_norm" if is_topk else "none",
        owned=True,
    )


def _k(file: Path, state: Mapping[str, Any]) -> int:
    """Return the k of a TopK activation. A module that is saved now has it twice."""
    nested = {name.partition(".")[2]: value for name, value in state.items() if name.startswith(f"{ACTIVATION}.")}
    settings = [state.get(ACTIVATION_STATE, {}), *([nested] if nested else [])]
    checked = [check(_TopK, given, SAEError, f"{file}: `{ACTIVATION_STATE}`") for given in settings]
    k: int = agreed(str(file), "k", checked[0]["k"], checked[-1]["k"])
    return k
