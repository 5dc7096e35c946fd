"""`dspa.models.logit_lens`, against logits of the models themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dspa import ModelError
from dspa.models import logit_lens
from dspa.models.layers import find_layers
from dspa.models.logit_lens import LogitLens, final_norm
from dspa.models.reading import read_layers
from dspa.testing import FAMILIES, VOCAB, make_model

N = 5
LAYERS = {"mamba": "backbone.layers"}
# What stands between residual and logits has other names in these: ln_f, final_layer_norm, embedding_norm, norm_f, ...
KINDS = [*FAMILIES, "lfm2", "jamba", "recurrent_gemma", "mamba"]


def make(family: str, dtype: torch.dtype = torch.float64) -> Any:
    """A model whose norms have weights and biases of their own."""
    model = make_model(family, dtype=dtype)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and ("norm" in name or "ln_f" in name):
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=g))
    return model


@pytest.fixture(scope="module", params=KINDS)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@torch.no_grad()
def test_the_final_norm_gives_the_logits(family: str) -> None:
    model, ids = make(family, torch.float32), torch.tensor([[5, 9, 3, 40, 8]])
    last = len(find_layers(model, LAYERS.get(family))) - 1
    h = read_layers(model, [last], LAYERS.get(family), input_ids=ids)[last]
    logits = model.get_output_embeddings()(final_norm(model, LAYERS.get(family))(h))
    if cap := getattr(model.config, "final_logit_softcapping", getattr(model.config, "logits_soft_cap", None)):
        logits = cap * torch.tanh(logits / cap)
    torch.testing.assert_close(logits.float(), model(ids, use_cache=False).logits.float(), atol=1e-3, rtol=1e-4)


@torch.no_grad()
def plain(model: Any, path: str | None, directions: torch.Tensor) -> torch.Tensor:
    """The change of logits by a small step, where neither the step nor its residual moves the other's size or mean."""
    norm, head = final_norm(model, path), model.get_output_embeddings()
    h = torch.randn(directions.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    h = h - h.mean(dim=1, keepdim=True)
    d = directions - directions.mean(dim=1, keepdim=True)
    h = h - d * (h * d).sum(dim=1, keepdim=True) / (d * d).sum(dim=1, keepdim=True)
    # Norms compute in fp32, whatever the dtype.
    step = 1e-2
    return (head(norm((h + step * directions)[None])) - head(norm((h - step * directions)[None])))[0] / (2 * step)


def check_top(top: torch.Tensor, rise: torch.Tensor) -> None:
    """Check that tokens are those of the largest rises, but for the order of equal ones."""
    assert all(len(set(row)) == N for row in top.tolist())
    torch.testing.assert_close(rise.gather(1, top), rise.topk(N, dim=1).values, atol=1e-4, rtol=2e-3)


def test_promoted_tokens_are_those_whose_logits_rise_most(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logit_lens, "TOKENS_PER_BLOCK", 7)
    monkeypatch.setattr(logit_lens, "DIRECTIONS_PER_BLOCK", 9)
    model, path = make(family), LAYERS.get(family)
    lens = LogitLens(model, path)
    directions = torch.randn(20, lens.gamma.numel(), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    # RMSNorm keeps the mean of a direction, which then changes the size of the residual that `plain` chose.
    if not lens.centered:
        directions = directions - directions.mean(dim=1, keepdim=True)
    rise = plain(model, path, directions)
    check_top(lens.top(directions, N, VOCAB), rise)
    check_top(lens.top(directions, N, 40), rise[:, :40])
    check_top(lens.top(-directions, N, VOCAB), -rise)
    assert lens.centered == (family in ("gpt2", "gpt_neox"))


def test_the_mean_of_a_direction_counts_with_rms_norm() -> None:
    """Without a norm's weight and at a residual orthogonal to it, the head itself says what is promoted."""
    model = make_model("llama", dtype=torch.float64)
    direction = 1 + torch.randn(1, 48, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    logits = direction @ model.get_output_embeddings().weight.T
    assert torch.equal(LogitLens(model).top(direction, N, VOCAB), logits.topk(N, dim=1).indices)


def test_a_bias_of_the_head_promotes_nothing() -> None:
    model: Any = make("llama")
    direction = torch.randn(3, 48, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    before = LogitLens(model).top(direction, N, VOCAB)
    model.lm_head.bias = nn.Parameter(torch.arange(float(VOCAB), dtype=torch.float64))
    assert torch.equal(LogitLens(model).top(direction, N, VOCAB), before)


def test_tied_embeddings_and_bfloat16() -> None:
    model: Any = make_model("qwen3", dtype=torch.bfloat16, tie_word_embeddings=True)
    W = model.get_input_embeddings().weight
    direction = torch.randn(30, 48, generator=torch.Generator().manual_seed(2))
    logits = direction.bfloat16().double() @ W.double().T
    top = LogitLens(model).top(direction, N, VOCAB)
    # The n-th best is as good as the true one, up to the rounding of a logit to bf16.
    best = logits.topk(N, dim=1).values
    assert ((logits.gather(1, top) - best).abs() <= best.abs() / 64).all()


def test_models_that_do_not_show_their_end() -> None:
    model: Any = make_model("llama")
    model.model.norm = nn.Identity()
    with pytest.raises(ModelError, match=r"final norm of LlamaForCausalLM is not known.*norm \(Identity\)"):
        LogitLens(model)
    model = make_model("llama")
    model.lm_head.weight = nn.Parameter(torch.zeros(VOCAB, 48, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match="neither quantized nor offloaded"):
        LogitLens(model)
    model.lm_head.to("meta")
    with pytest.raises(ModelError, match="neither quantized nor offloaded"):
        LogitLens(model)
