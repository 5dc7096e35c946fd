"""Cost of making a map, in closed form: floating-point operations of the model's matrix products.

Counted are products with weights and attention's two products, a multiplication and an addition each, as
`torch.utils.flop_counter` counts them. Not counted are embeddings (no products), norms, and the SAEs (equal for all).
"""

from __future__ import annotations

from dataclasses import dataclass

# RAHF-SCIT, per preference triple and parameter (its two stages): contrastive tuning on 768 tokens, and a LoRA trained
# on 2 % of the data with 64 x 512 tokens.
RAHF_SCIT = 48 * 768 + 12 * 64 * 512 * 0.02


@dataclass(frozen=True)
class Tokens:
    """Numbers of tokens of one triple."""

    prompt: int = 1000
    chosen: int = 1000
    rejected: int = 1000


@dataclass(frozen=True)
class Geometry:
    """Shape of a decoder-only model with gated MLPs, and the layer of its output SAE."""

    name: str
    d_model: int
    d_mlp: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    vocabulary: int
    layer_out: int

    @property
    def layer_weights(self) -> int:
        """Weights of one layer that multiply each token: query, key, value, output, and the three of the MLP."""
        attention = 2 * self.d_model * self.d_head * (self.n_heads + self.n_kv_heads)
        return attention + 3 * self.d_model * self.d_mlp

    @property
    def weights(self) -> int:
        """Weights that multiply each token of a full pass: all layers and the language-model head."""
        return self.n_layers * self.layer_weights + self.vocabulary * self.d_model

    @property
    def weights_read(self) -> int:
        """Weights that multiply each token up to the output SAE."""
        return (self.layer_out + 1) * self.layer_weights

    def _attention(self, queries: int, keys: int) -> int:
        """Return the operations of one layer's two attention products, all pairs computed."""
        return 4 * self.n_heads * self.d_head * queries * keys


# The models of the publication and the layers of their output SAEs; sizes are from the models' configurations.
PUBLISHED = (
    Geometry("Gemma-2-2B", 2304, 9216, 26, 8, 4, 256, 256_000, 24),
    Geometry("Gemma-2-9B", 3584, 14336, 42, 16, 8, 256, 256_000, 39),
    Geometry("Qwen3-8B", 4096, 12288, 36, 32, 8, 128, 151_936, 18),
)


@dataclass(frozen=True)
class Cost:
    """Operations of one triple: products with weights, and attention's own."""

    weights: float
    attention: float = 0.0

    @property
    def total(self) -> float:
        """Sum of both."""
        return self.weights + self.attention


def three_passes(g: Geometry, t: Tokens) -> Cost:
    """Return the cost of DSPA as published, `F = 2 P (3 p + c + r)`.

    Prompt, prompt + chosen and prompt + rejected each run through the whole model.

    Args:
        g: the model.
        t: tokens of the triple.
    """
    passes = (t.prompt, t.prompt + t.chosen, t.prompt + t.rejected)
    return Cost(2 * g.weights * sum(passes), g.n_layers * sum(g._attention(n, n) for n in passes))


def shared_prompt(g: Geometry, t: Tokens) -> Cost:
    """Return the cost of `collect`, `F = 2 P_out (p + c + r)`.

    The prompt runs once, both responses continue from its cache, and nothing runs above the output SAE.

    Args:
        g: the model.
        t: tokens of the triple.
    """
    answers = sum(g._attention(n, t.prompt + n) for n in (t.chosen, t.rejected))
    attention = (g.layer_out + 1) * (g._attention(t.prompt, t.prompt) + answers)
    return Cost(2 * g.weights_read * (t.prompt + t.chosen + t.rejected), attention)


def rahf_scit(g: Geometry) -> Cost:
    """Return the cost of RAHF-SCIT, `F = (48 * 768 + 12 * 64 * 512 * 0.02) P`, which does not depend on the triple.

    Args:
        g: the model.
    """
    return Cost(RAHF_SCIT * g.weights)
