"""Small SAEs, maps and models with random weights."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import dspa
from dspa.evaluate.responses import Response
from dspa.fsrl import FSRLAdapter, Usage, latent_usage, responses_of
from dspa.maps.cdmap import ConditionalDifferenceMap
from dspa.saes.frozen import FrozenSAE
from dspa.testing import D_IN, D_SAE_IN, D_SAE_OUT, L_IN, L_OUT, make_map, make_model, make_sae, with_tensors

from .support.adapters import TRIPLES, acting_adapter, ending_tokenizer


@pytest.fixture(scope="session")
def sae_in() -> FrozenSAE:
    return make_sae(L_IN, D_SAE_IN, seed=1)


@pytest.fixture(scope="session")
def sae_out() -> FrozenSAE:
    return make_sae(L_OUT, D_SAE_OUT, seed=2)


@pytest.fixture(scope="session")
def cdmap(sae_in: FrozenSAE, sae_out: FrozenSAE) -> ConditionalDifferenceMap:
    return make_map(sae_in, sae_out)


@pytest.fixture(scope="session")
def calibrated(cdmap: ConditionalDifferenceMap) -> ConditionalDifferenceMap:
    """A map with a mean and more hot latents than are evaluated first."""
    g = torch.Generator().manual_seed(4)
    return with_tensors(
        cdmap,
        hot=torch.randperm(D_SAE_OUT, generator=g)[:90].to(torch.int32),
        hot_counts=torch.arange(90, 0, -1),
        mean=torch.randn(D_IN, generator=g),
    )


@pytest.fixture(scope="session", params=["gemma2", "qwen3"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make_model(request.param)


@pytest.fixture(scope="module")
def gemma() -> PreTrainedModel:
    return make_model("gemma2")


@pytest.fixture
def steering(sae_in: FrozenSAE, sae_out: FrozenSAE, cdmap: ConditionalDifferenceMap) -> Iterator[dspa.Steering]:
    steering = dspa.Steering(sae_in, sae_out, cdmap, dspa.SteeringConfig(alpha=0.6, mode="both"))
    yield steering
    steering.detach()


# Responses with an adapter that acts on them, for the `model` of a test file, which names a single one.


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return ending_tokenizer()


@pytest.fixture(scope="module")
def responses(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> list[Response]:
    return responses_of(model, tokenizer, TRIPLES)


@pytest.fixture
def adapter(model: PreTrainedModel, responses: list[Response]) -> Iterator[FSRLAdapter]:
    with acting_adapter(model, responses) as made:
        yield made.attach(model)


@pytest.fixture
def used(model: PreTrainedModel, adapter: FSRLAdapter, responses: list[Response]) -> Usage:
    return latent_usage(model, adapter, responses, progress=False)
