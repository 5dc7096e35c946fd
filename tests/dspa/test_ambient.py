"""Settings of PyTorch that hold for a whole program, autocast and the default dtype, change no result and no dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import dspa
from dspa.data.triples import Triple
from dspa.evaluate.responses import responses_of
from dspa.evaluate.scores import score_responses
from dspa.fsrl import FSRLAdapter
from dspa.maps.cdmap import TENSORS
from dspa.models.logit_lens import LogitLens
from dspa.testing import D_IN, L_IN, L_OUT, make_map, make_model, make_sae
from dspa_kernels import EncoderStream
from dspa_kernels.nn import FusedSAE

from .support.adapters import TRIPLES, ending_tokenizer

H = torch.randn(9, D_IN, generator=torch.Generator().manual_seed(1)) * 2


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SETTINGS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "fp64": lambda: default_dtype(torch.float64),
    "bf16": lambda: default_dtype(torch.bfloat16),
}
SAE_IN, SAE_OUT = make_sae(L_IN, 96, seed=1), make_sae(L_OUT, 128, seed=2)
MAP = make_map(SAE_IN, SAE_OUT)
COUNTS = torch.randint(0, 9, (3, 96), generator=torch.Generator().manual_seed(2), dtype=torch.int32)
MODEL = make_model("llama")


def adapter() -> FSRLAdapter:
    made = FSRLAdapter(SAE_OUT)
    with torch.no_grad():
        made.W_a.normal_(generator=torch.Generator().manual_seed(3))
    return made


def built() -> list[Tensor]:
    triples = [Triple(**triple) for triple in TRIPLES[:5]]
    cdmap = dspa.build_map(MODEL, ending_tokenizer(), triples, SAE_IN, SAE_OUT, progress=False)
    assert cdmap is not None
    return [getattr(cdmap, name) for name in TENSORS]


def screened() -> dict[str, Any]:
    return EncoderStream.of(SAE_OUT.weights, screen="int5").arguments()


# What reads a model is left out under autocast, which is a setting of that model.
RESULTS: dict[str, Callable[[], Tensor | list[Tensor]]] = {
    "encode": lambda: SAE_IN.encode(H),
    "decode": lambda: SAE_IN.decode(SAE_IN.encode(H)),
    "kernel weights": lambda: SAE_IN.weights.latents(H),
    "fused": lambda: (fused := FusedSAE(SAE_IN.weights, SAE_IN.b_dec)).decode(fused.encode(H)),
    "score": lambda: MAP.score((COUNTS > 4).float()),
    "dense": MAP.dense,
    "demixed": lambda: MAP.select(COUNTS, dspa.SteeringConfig(scoring="demixed")).slots,
    "whitened": lambda: MAP.select(COUNTS, dspa.SteeringConfig(scoring="whitened")).slots,
    "adapter": lambda: [*FSRLAdapter(SAE_OUT).parameters()],
    "steering vector": lambda: adapter().steering_vector(H),
    "screen": lambda: [tensor for tensor in screened().values() if torch.is_tensor(tensor)],
    "logit lens": lambda: LogitLens(MODEL).top(SAE_OUT.W_dec, 5, 61),
}
OF_MODELS: dict[str, Callable[[], Tensor | list[Tensor]]] = {
    "map": built,
    "scores": lambda: score_responses(MODEL, responses_of(MODEL, ending_tokenizer(), TRIPLES[:3])).chosen,
}
CASES = [(name, setting) for name in RESULTS for setting in SETTINGS]
CASES += [(name, setting) for name in OF_MODELS for setting in SETTINGS if setting != "autocast"]


@pytest.mark.parametrize(("name", "setting"), CASES, ids=[f"{name}, {setting}" for name, setting in CASES])
@torch.no_grad()
def test_what_holds_for_a_program_changes_no_result(name: str, setting: str) -> None:
    make = (RESULTS | OF_MODELS)[name]
    expected = make()
    with SETTINGS[setting]():
        got = make()
    for one, other in zip(*(x if isinstance(x, list) else [x] for x in (got, expected)), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
