"""The scale at which steering raises the cross-entropy of ordinary text by a given amount.

Methods whose strengths mean different things can be compared at one cost of this kind (arXiv 2411.02193: 0.5 nats).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn
from tqdm import tqdm

from dspa.errors import refusal
from dspa.evaluate.responses import Response, batches, log_probabilities
from dspa.models.attachment import Attachable
from dspa.models.layers import CausalLM, base_model, check_eval
from dspa.schemas import Positive, PositiveInt, check
from dspa.steering.vector import SteeringVector

# Largest width of the bracket, as a share of its upper end, before the scale is interpolated.
PRECISION = 0.05


@dataclass(frozen=True)
class Tried:
    """A scale, and the cross-entropy of the texts at it, in nats per token."""

    scale: float
    cross_entropy: float


@dataclass(frozen=True)
class FoundScale:
    """The scale at which the cross-entropy of texts rises by `delta`.

    Attributes:
        scale: the scale, by linear interpolation between `below` and `above`.
        delta: rise of the cross-entropy, in nats per token.
        base: cross-entropy without steering.
        below: largest scale tried whose cross-entropy is below `base + delta`.
        above: smallest scale tried whose cross-entropy is not.
        n_tokens: number of tokens over which cross-entropies are means.
    """

    scale: float
    delta: float
    base: float
    below: Tried
    above: Tried
    n_tokens: int


def find_scale(
    model: nn.Module,
    scaled: SteeringVector | Callable[[float], Attachable],
    texts: Sequence[Sequence[int]],
    *,
    delta: float = 0.5,
    start: float = 1.0,
    maximum: float = 1024.0,
    prompt_tokens: int = 1,
    batch_tokens: int = 8192,
    progress: bool = False,
    layers: str | None = None,
    model_name: str | None = None,
) -> FoundScale:
    """Find the scale at which steering raises the cross-entropy of texts by `delta` nats per token.

    The scale is doubled from `start` until the cross-entropy has risen by `delta`. The bracket is then halved until it
    is within 5 % of its upper end, and the scale interpolated. The cross-entropy is taken to rise with the scale.

    ```python
    find_scale(model, vector, texts)
    find_scale(model, lambda alpha: Steering(*parts, replace(config, alpha=alpha)), texts, start=0.1, prompt_tokens=16)
    ```

    Args:
        model: a transformers causal language model in evaluation mode.
        scaled: a vector, whose own scale does not matter; or a function that returns what steers at a scale.
        texts: token ids of ordinary texts.
        delta: rise of the cross-entropy.
        start: first scale to try.
        maximum: largest scale to try.
        prompt_tokens: tokens at the start of each text that are its prompt: they are not scored, and methods that
            plan per prompt read them.
        batch_tokens: tokens per batch, padding included.
        progress: show a bar.
        layers: dotted path of the decoder layers, for an unknown architecture.
        model_name: name of the model, if its own name or path does not give it.

    Raises:
        ValueError: the cross-entropy does not rise by `delta` up to `maximum`, invalid settings, or no text that is
            longer than `prompt_tokens`.
        ModelError: a model in training mode, or what steers does not fit it.
    """
    inner = base_model(model)
    check_eval(inner)
    for name, value in (("`delta`", delta), ("`start`", start), ("`maximum`", maximum)):
        check(Positive, float(value), ValueError, name)
    check(PositiveInt, prompt_tokens, ValueError, "`prompt_tokens`")
    if maximum < start:
        raise refusal(ValueError, "`maximum`", maximum, f"`start` ({start:g}) or more")
    scored = [Response([*ids[:prompt_tokens]], [*ids[prompt_tokens:]]) for ids in texts if len(ids) > prompt_tokens]
    if not scored:
        raise refusal(ValueError, "`texts`", "without one that is long enough", f"{prompt_tokens + 1} tokens or more")
    with tqdm(unit="scale", desc="scale", disable=not progress) as bar:
        base = cross_entropy(inner, scored, batch_tokens)

        def tried(scale: float) -> Tried:
            made = scaled.replaced(scale=scale) if isinstance(scaled, SteeringVector) else scaled(scale)
            with made.attach(inner, layers=layers, model_name=model_name):
                at = Tried(scale, cross_entropy(inner, scored, batch_tokens))
            bar.set_postfix(scale=f"{scale:.4g}", rise=f"{at.cross_entropy - base:+.3f}")
            bar.update()
            return at

        below, above = _bracket(tried, Tried(0.0, base), delta, start, maximum)
    goal = base + delta
    share = (goal - below.cross_entropy) / (above.cross_entropy - below.cross_entropy)
    scale = below.scale + share * (above.scale - below.scale)
    return FoundScale(scale, float(delta), base, below, above, sum(len(text.ids) for text in scored))


def _bracket(
    tried: Callable[[float], Tried], unsteered: Tried, delta: float, start: float, maximum: float
) -> tuple[Tried, Tried]:
    """Return scales close to each other, of which the second alone raises the cross-entropy by `delta`."""
    base = unsteered.cross_entropy
    below, above = unsteered, tried(start)
    while above.cross_entropy < base + delta:
        if above.scale >= maximum:
            got = f"{above.cross_entropy - base:+.3g} at {maximum:g}, the largest scale"
            advice = "Raise `maximum`, or lower `delta`."
            raise refusal(ValueError, "The rise of the cross-entropy", got, f"{delta:g} at some scale", advice)
        below, above = above, tried(min(2 * above.scale, maximum))
    while above.scale - below.scale > PRECISION * above.scale:
        middle = tried((below.scale + above.scale) / 2)
        below, above = (middle, above) if middle.cross_entropy < base + delta else (below, middle)
    return below, above


def cross_entropy(model: CausalLM, texts: Sequence[Response], batch_tokens: int = 8192) -> float:
    """Return the mean cross-entropy per token of texts after their prompts, infinite where it is not a number.

    All that is attached to the model acts on them.
    """
    total = 0.0
    for numbers in batches(texts, batch_tokens):
        batch = [texts[n] for n in numbers]
        for value, text in zip(log_probabilities(model, batch).tolist(), batch, strict=True):
            total -= value * len(text.ids)
    mean = total / sum(len(text.ids) for text in texts)
    return mean if math.isfinite(mean) else math.inf
