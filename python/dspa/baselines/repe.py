"""RepE (arXiv 2310.01405): principal directions of paired residual differences, added at one layer as one vector.

The comparison in arXiv 2603.21461 takes 16 directions at the output layer with a scale of 0.5, and does not describe
how they are made and combined. Here they are made as RepE's own code makes them, and added together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dspa.costs import Costs, Meter
from dspa.data.triples import DigestedExamples, Triple, load_triples
from dspa.errors import VectorError, refusal
from dspa.evaluate.responses import Response, batches, padded, responses_of
from dspa.models.layers import (
    CausalLM,
    base_model,
    check_eval,
    check_finite,
    decoder_layers,
    device_of,
    hidden_size,
    loaded_name,
)
from dspa.models.operations import forward
from dspa.models.reading import check_residual, read_layers
from dspa.models.sizes import sizes_of
from dspa.models.sources import model_digest
from dspa.schemas import PositiveInt, check
from dspa.steering.vector import SteeringVector


def repe_vector(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    triples: Iterable[Triple | Mapping[str, Any]] | str | Path,
    layer: int,
    *,
    n_directions: int = 16,
    scale: float = 0.5,
    positions: str = "all",
    max_length: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    batch_tokens: int = 8192,
    progress: bool = True,
    layers: str | None = None,
    model_name: str | None = None,
) -> SteeringVector:
    """Return RepE's vector: the sum of the principal directions from rejected to chosen responses.

    The residual of a response is the mean over its tokens, read after its prompt. Nothing is drawn at random.

    Args:
        model: a transformers causal language model in evaluation mode.
        tokenizer: the model's tokenizer.
        triples: what `load_triples` takes; as many as there are directions, or more.
        layer: decoder layer whose output is read and steered, from 0: that of DSPA's output SAE.
        n_directions: number of principal directions, at most d_in.
        scale: how many times their sum is added, as for `SteeringVector`.
        positions: tokens to which it is added, as for `SteeringVector`.
        max_length: tokens of prompt and response together to which a response is cut; by default the model's positions.
        chat_template_kwargs: values of the chat template's variables by name, for conversations.
        batch_tokens: tokens per batch, padding included.
        progress: show a bar.
        layers: dotted path of the decoder layers, for an unknown architecture.
        model_name: name of the model, if its own name or path does not give it.

    Raises:
        VectorError: settings that `SteeringVector` refuses, a layer that the model does not have, or more directions
            than the differences have.
        PreferenceError: a bad triple.
        ModelError: a model in training mode, or residuals that are not finite.
    """
    inner = base_model(model)
    check_eval(inner)
    check(PositiveInt, n_directions, VectorError, "`n_directions`")
    # Settings that a vector cannot have are refused before any triple is read.
    SteeringVector(torch.zeros(1), layer, scale, positions)
    n_layers = len(decoder_layers(inner, layers))
    if layer >= n_layers:
        raise refusal(VectorError, "`layer`", layer, f"0 to {n_layers - 1}, the model's layers")
    check_residual(inner, layer, layers)
    meter, digested = Meter(device_of(inner.get_input_embeddings())), DigestedExamples(load_triples(triples))
    responses = responses_of(inner, tokenizer, digested, max_length, chat_template_kwargs)
    most = min(digested.n_examples, hidden_size(inner))
    if n_directions > most:
        got = f"{n_directions}, of {digested.n_examples} triples"
        raise refusal(VectorError, "`n_directions`", got, f"1 to {most}", "Give more triples, or lower it.")
    means = response_means(inner, responses, layer, layers=layers, batch_tokens=batch_tokens, progress=progress)
    name, digest, dtype = model_name or loaded_name(inner), model_digest(inner) or "", str(inner.dtype)
    directions = repe_directions(means[0::2] - means[1::2], n_directions)
    vector = SteeringVector(directions.sum(dim=0), layer, scale, positions, model_name=name, model_digest=digest)
    sizes = sizes_of(inner, dtype.removeprefix("torch."), layers)
    reading = forward(sizes, map(len, responses), layers=slice(layer + 1))
    # And D^T D.
    flops = round(reading.total) + 2 * digested.n_examples * sizes.d_model**2
    data = (digested.digest, digested.n_examples)
    vector.costs = Costs("RepE", flops, meter.measured(), *data, name, digest, dtype)
    return vector


def repe_directions(differences: Tensor, n_directions: int = 16) -> Tensor:
    """Return the principal directions of paired differences, each with the sign that the labels give it.

    They are the eigenvectors of `D^T D` with the largest eigenvalues. `D` is not centred: RepE's code shuffles each
    pair, so that its differences have no mean, and keeps the labels for the signs. A direction points to where the
    chosen response lies in most of the pairs, in a tie to where it lies on average.

    Args:
        differences: chosen minus rejected, [N, d_in].
        n_directions: number of directions.

    Returns:
        Unit vectors [n_directions, d_in] fp32 on the CPU, the most important first.

    Raises:
        VectorError: more directions than the differences have, or differences that are not finite.
    """
    rows = differences.detach().double().cpu()
    if not bool(rows.isfinite().all()):
        raise refusal(VectorError, "`differences`", "partly NaN or infinite", "finite numbers")
    # Ascending; below the largest by the precision of fp32 residuals, an eigenvector is noise.
    values, vectors = torch.linalg.eigh(rows.T @ rows)
    rank = int((values > values.max() * len(values) * torch.finfo(torch.float32).eps ** 2).sum())
    if n_directions > rank:
        advice = "Give more triples, or lower `n_directions`."
        got = f"{n_directions}, and the differences of {len(rows)} triples have {rank}"
        raise refusal(VectorError, "`n_directions`", got, f"1 to {rank}", advice)
    directions = vectors.flip(1)[:, :n_directions].T
    sides = rows @ directions.T  # [N, n_directions]
    votes = sides.sign().sum(dim=0)
    signs = torch.where(votes == 0, sides.sum(dim=0), votes).sign()
    signed: Tensor = directions * torch.where(signs == 0, 1.0, signs)[:, None]
    return signed.float()


def response_means(
    model: CausalLM,
    responses: Sequence[Response],
    layer: int,
    *,
    layers: str | None = None,
    batch_tokens: int = 8192,
    progress: bool = False,
) -> Tensor:
    """Return the mean residual of each response's tokens at the output of a layer, [R, d_in] fp32 on the CPU.

    Args:
        model: a transformers causal language model.
        responses: prompts with responses.
        layer: decoder layer, from 0.
        layers: dotted path of the decoder layers, for an unknown architecture.
        batch_tokens: tokens per batch, padding included.
        progress: show a bar.

    Raises:
        ModelError: residuals that are not finite.
    """
    means: list[Tensor] = [torch.empty(0)] * len(responses)
    with tqdm(total=len(responses), unit="response", desc="read", disable=not progress) as bar:
        for numbers in batches(responses, batch_tokens):
            h = read_layers(model, [layer], layers, **padded(model, [responses[n] for n in numbers]))[layer]
            for row, n in zip(h, numbers, strict=True):
                means[n] = row[len(responses[n].prompt) : len(responses[n])].float().mean(dim=0).cpu()
            bar.update(len(numbers))
    stacked = torch.stack(means)
    check_finite(stacked, layer)
    return stacked
