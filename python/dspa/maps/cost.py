"""Cost of making a map and of steering, in closed form: floating-point operations and bytes, counted from sizes.

Operations are those of `dspa.models.operations`. Nothing here is a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dspa.config import SteeringConfig
from dspa.errors import ModelError, refusal
from dspa.maps.cdmap import N_LARGE
from dspa.maps.reports import Figure
from dspa.models.operations import Cost, attention
from dspa.models.sizes import ModelSizes

# RAHF-SCIT, per preference triple and parameter (its two stages): contrastive tuning on 768 tokens, and a LoRA trained
# on 2 % of the data with 64 x 512 tokens.
RAHF_SCIT = 48 * 768 + 12 * 64 * 512 * 0.02
# Bytes of a bias with a threshold, of a value of the map, and of a count.
BIASES, VALUE, COUNT = 8, 4, 4


@dataclass(frozen=True)
class Tokens:
    """Numbers of tokens of one triple."""

    prompt: int = 1000
    chosen: int = 1000
    rejected: int = 1000


@dataclass(frozen=True)
class Setup:
    """A model with its two SAEs, whose weights are in the model's dtype.

    Attributes:
        model: sizes of the model.
        layer_in, layer_out: layers of the SAEs.
        d_sae_in, d_sae_out: widths of the SAEs.
        n_columns: columns of the map, None where there is no map yet.
        shares_prompts: as `passes.shares_prompts` says of the model.

    Raises:
        ModelError: layers that the model does not have, or that are not in order.
    """

    model: ModelSizes
    layer_in: int
    layer_out: int
    d_sae_in: int
    d_sae_out: int
    n_columns: int | None = None
    shares_prompts: bool = True

    def __post_init__(self) -> None:
        last = len(self.model.layers) - 1
        if not 0 <= self.layer_in <= self.layer_out <= last:
            got = f"{self.layer_in} and {self.layer_out}"
            accepted = f"layers of {self.model.name}, 0 to {last}, the output SAE's not below the input SAE's"
            raise refusal(ModelError, "The layers of the SAEs", got, accepted)

    @property
    def row(self) -> int:
        """Bytes of one row of an encoder or decoder."""
        return self.model.d_model * self.model.dtype.itemsize


def _gated(
    name: str, d_model: int, d_mlp: int, n_layers: int, heads: tuple[int, int, int], n_tokens: int
) -> ModelSizes:
    """Return the sizes of a model with gated MLPs.

    Args:
        name: name of the model.
        d_model: width of the residual stream.
        d_mlp: width of the MLPs.
        n_layers: number of layers.
        heads: number of heads, of key and value heads, and width of one.
        n_tokens: size of the vocabulary.
    """
    n_heads, n_kv_heads, d_head = heads
    layer = 2 * d_model * d_head * (n_heads + n_kv_heads) + 3 * d_model * d_mlp
    return ModelSizes(name, d_model, (layer,) * n_layers, n_tokens * d_model, n_heads * d_head, torch.bfloat16)


# The models of the publication with their SAEs; sizes are from the models' configurations.
PUBLISHED = (
    Setup(_gated("Gemma-2-2B", 2304, 9216, 26, (8, 4, 256), 256_000), 7, 24, 16_384, 16_384),
    Setup(_gated("Gemma-2-9B", 3584, 14336, 42, (16, 8, 256), 256_000), 9, 39, 16_384, 16_384),
    Setup(_gated("Qwen3-8B", 4096, 12288, 36, (32, 8, 128), 151_936), 9, 18, 65_536, 65_536),
)


# Making a map


def three_passes(setup: Setup, t: Tokens) -> Cost:
    """Return the cost of DSPA as published, `F = 2 P (3 p + c + r)`, without its SAEs.

    Prompt, prompt + chosen and prompt + rejected each run through the whole model.

    Args:
        setup: the model.
        t: tokens of the triple.
    """
    model, passes = setup.model, (t.prompt, t.prompt + t.chosen, t.prompt + t.rejected)
    return Cost(2 * model.weights * sum(passes), len(model.layers) * sum(attention(model, n, n) for n in passes))


def collecting(setup: Setup, t: Tokens) -> Cost:
    """Return the cost of `collect`, `F = 2 P_out (p + c + r)`, without its SAEs.

    The prompt runs once, both responses continue from its cache, and nothing runs above the output SAE. A model with
    recurrent layers reads the prompt up to the input SAE, and again with each response.

    Args:
        setup: the model and its SAEs.
        t: tokens of the triple.
    """
    if setup.shares_prompts:
        # Layers, tokens that run through them, and tokens that these attend to.
        runs = [(setup.layer_out, t.prompt, t.prompt)]
        runs += [(setup.layer_out, n, t.prompt + n) for n in (t.chosen, t.rejected)]
    else:
        runs = [(setup.layer_in, t.prompt, t.prompt)]
        runs += [(setup.layer_out, t.prompt + n, t.prompt + n) for n in (t.chosen, t.rejected)]
    return Cost(
        2 * sum(setup.model.weights_to(layer) * n for layer, n, _ in runs),
        sum((layer + 1) * attention(setup.model, n, n_keys) for layer, n, n_keys in runs),
    )


def encoding(setup: Setup, t: Tokens) -> int:
    """Return the operations of both SAEs on one triple: the input SAE on its prompt, the output SAE on its responses.

    Args:
        setup: the model and its SAEs.
        t: tokens of the triple.
    """
    return 2 * setup.model.d_model * (setup.d_sae_in * t.prompt + setup.d_sae_out * (t.chosen + t.rejected))


def rahf_scit(setup: Setup) -> Cost:
    """Return the cost of RAHF-SCIT, `F = (48 * 768 + 12 * 64 * 512 * 0.02) P`, which does not depend on the triple.

    Args:
        setup: the model.
    """
    return Cost(RAHF_SCIT * setup.model.weights)


# Steering


def prompt_reading(setup: Setup, n_tokens: int) -> Cost:
    """Return the operations of reading a prompt before generation: up to the input SAE, and its encoder.

    Args:
        setup: the model and its SAEs.
        n_tokens: tokens of the prompt.
    """
    model = setup.model
    per_token = model.weights_to(setup.layer_in) + model.d_model * setup.d_sae_in
    return Cost(2 * per_token * n_tokens, (setup.layer_in + 1) * attention(model, n_tokens, n_tokens))


def lookup_bytes(setup: Setup, config: SteeringConfig) -> int:
    """Return the bytes that the lookup of one prompt reads: its counts, and a row of the map per prompt latent.

    Args:
        setup: the model, its SAEs, and the width of its map.
        config: settings of steering.
    """
    return COUNT * setup.d_sae_in + VALUE * config.k_prompt * (setup.n_columns or 0)


def step_bytes(setup: Setup, config: SteeringConfig) -> tuple[int, int]:
    """Return the fewest and the most bytes of the SAE that a steered token reads, alone in its batch.

    The fewest are the encoder rows of the selected latents, on a token on which none of them is active. The most are
    these, the rows of the hot latents, the whole encoder, and the decoder rows of the selected latents.

    Args:
        setup: the model and its SAEs.
        config: settings of steering.
    """
    n_selected = config.k_diff * (2 if config.mode == "both" else 1)
    encoder_row = setup.row + BIASES
    fewest = n_selected * encoder_row
    return fewest, fewest + (N_LARGE + setup.d_sae_out) * encoder_row + n_selected * setup.row


def figures(setup: Setup, tokens: Tokens, config: SteeringConfig) -> list[Figure]:
    """Describe all costs of a model, in the same lines for every model.

    Args:
        setup: the model, its SAEs, and the width of its map.
        tokens: tokens of one triple.
        config: settings of steering.
    """
    return [*_collecting_figures(setup, tokens), *_steering_figures(setup, tokens, config)]


def _collecting_figures(setup: Setup, tokens: Tokens) -> list[Figure]:
    rahf, three, ours = rahf_scit(setup), three_passes(setup, tokens), collecting(setup, tokens)
    return [
        Figure("RAHF-SCIT, TFLOP per triple", _tera(rahf.weights), "44728 operations per weight, whatever the length"),
        Figure("published DSPA, TFLOP per triple", _tera(three.weights), "three passes through the whole model"),
        Figure(
            "collect, TFLOP per triple",
            _tera(ours.weights),
            "nothing above the output SAE; a prompt runs once where its cache can be shared",
        ),
        Figure("SAEs, TFLOP per triple", _tera(encoding(setup, tokens)), "in addition, for either"),
        Figure("published / collect", f"{three.weights / ours.weights:.2f}x", "products with weights"),
        Figure("the same with attention", f"{three.total / ours.total:.2f}x", "its two products per layer added"),
        Figure("RAHF-SCIT / collect", f"{rahf.weights / ours.weights:.1f}x", "products with weights"),
    ]


def _steering_figures(setup: Setup, tokens: Tokens, config: SteeringConfig) -> list[Figure]:
    model, n_bytes = setup.model, setup.model.weights * setup.model.dtype.itemsize
    dtype = str(model.dtype).removeprefix("torch.") + (", quantized to less" if model.quantized else "")
    # generate() computes the head of a prompt's last token alone.
    reading = prompt_reading(setup, tokens.prompt).weights / (2 * sum(model.layers) * tokens.prompt)
    lookup = "needs a map" if setup.n_columns is None else _mega(lookup_bytes(setup, config))
    fewest, most = step_bytes(setup, config)
    return [
        Figure("data type", dtype, "of the model and the SAEs, for all bytes below"),
        Figure("model, GB", f"{1e-9 * n_bytes:.4g}", "weights that each pass reads: layers and head"),
        Figure("encoder of the input SAE, MB", _mega(setup.d_sae_in * setup.row), "read with the prompts of a batch"),
        Figure("reading a prompt first", f"{reading:.1%}", "of the operations of its pass: to layer_in, and the SAE"),
        Figure("lookup, MB per prompt", lookup, f"its counts, and {config.k_prompt} rows of the map"),
        Figure("steering, least MB per token", _mega(fewest), "where no selected latent is active"),
        Figure("steering, most MB per token", _mega(most), "where the whole encoder is read for the largest latent"),
        Figure("the most, of the model", f"{most / n_bytes:.2%}", "of the bytes that a generated token reads anyway"),
    ]


def _tera(operations: float) -> str:
    return f"{1e-12 * operations:.4g}"


def _mega(n_bytes: int) -> str:
    return f"{1e-6 * n_bytes:.4g}"
