"""Floating-point operations that methods take per token of their answers, in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dspa.config import SteeringConfig
from dspa.evaluate.compare.methods import Method
from dspa.evaluate.compare.runs import Answers
from dspa.models.layers import CausalLM, hidden_size
from dspa.models.operations import attention
from dspa.models.sizes import ModelSizes, sizes_of
from dspa.steering.latents import LatentSteering


def operations_per_token(
    model: CausalLM,
    method: Method,
    runs: Sequence[Answers],
    prompts: Sequence[Sequence[int]],
    layers: str | None = None,
) -> float:
    """Return the largest number of operations per token of a method's answers, as `dspa.models.operations` counts.

    Prompts, which are read once, are left out. DSPA is counted as if every edited token read the whole encoder for its
    largest latent; a token without an active selected latent reads the rows of those alone, and one behind a closed
    gate none. An adapter computes its edit behind a closed gate too. Junctions read all tokens before them once more,
    and then their candidates.

    Args:
        model: the model.
        method: the method.
        runs: its answers, one run per seed.
        prompts: token ids of its prompts.
        layers: dotted path of the decoder layers, for an unknown architecture.
    """
    sizes = sizes_of(model, str(model.dtype).removeprefix("torch."), layers)
    n_tokens = sum(len(ids) for run in runs for ids in run.ids)
    touched = _sum(run.touched for run in runs)
    steps = sum(
        _step(sizes, len(prompt), len(ids)) for run in runs for prompt, ids in zip(prompts, run.ids, strict=True)
    )
    share = 1.0 if touched is None else touched / n_tokens
    return steps / n_tokens + _added(model, sizes, method, share, runs, prompts, n_tokens)


def _step(sizes: ModelSizes, n_prompt: int, n_new: int) -> float:
    """Return the operations of the passes that predict an answer's tokens, one token each."""
    keys = n_new * n_prompt + n_new * (n_new - 1) // 2
    return float(2 * sizes.weights * n_new + len(sizes.layers) * attention(sizes, 1, keys))


def _added(
    model: CausalLM,
    sizes: ModelSizes,
    method: Method,
    share: float,
    runs: Sequence[Answers],
    prompts: Sequence[Sequence[int]],
    n_tokens: int,
) -> float:
    """Return what a method adds to the passes of the model, per token."""
    if method.processor is not None:
        whole = [len(prompt) + len(ids) / 2 for run in runs for prompt, ids in zip(prompts, run.ids, strict=True)]
        length, k = sum(whole) / len(whole), method.settings["k"]
        pairs = length * length + k * (length + 1)
        layers = 2 * sum(sizes.layers) * (length + k) + len(sizes.layers) * 4 * sizes.d_attention * pairs
        return float(share * (layers + 2 * k * hidden_size(model)))
    if method.parts:
        edited = (_sum(None if run.edited is None else map(len, run.edited) for run in runs) or 0) / n_tokens
        selected = sum(n_selected(part.config) for part in method.parts)
        read = sum(part.sae_out.d_sae for part in method.parts) + selected
        return 2 * sizes.d_model * (share * selected + edited * read)
    made: Any = None if method.attachable is None else method.attachable(0)
    if isinstance(made, LatentSteering):
        most = max(len(latents.strengths) for latents in made.sets.values())
        return 2 * sizes.d_model * share * (2 * most + made.sae.d_sae)
    # An adapter: both encoders and the decoder. A vector has no product.
    return 6.0 * sizes.d_model * int(made.sae.d_sae) if hasattr(made, "fraction") else 0.0


def n_selected(config: SteeringConfig) -> int:
    """Return the largest number of latents that a prompt selects."""
    return config.k_diff * (2 if config.mode == "both" else 1)


def _sum(numbers: Any) -> float | None:
    """Return the sum of iterables of numbers, None if one of them is None."""
    lists = list(numbers)
    return None if None in lists else float(sum(sum(row) for row in lists))
