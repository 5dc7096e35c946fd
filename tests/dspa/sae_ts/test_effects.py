"""Effects of directions, compared with texts that a plain loop writes with a hook of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dspa
from dspa.errors import ModelError, VectorError
from dspa.models.layers import decoder_layers
from dspa.sae_ts import Effects, measure_effects
from dspa.sae_ts.rollouts import STRIDE
from dspa.sae_ts.settings import RolloutSettings
from dspa.testing import D_IN, D_SAE_OUT, L_OUT, make_model, make_sae, make_tokenizer

from ...rounding import PASS, rounding

SAMPLING = RolloutSettings(rollouts=3, length=7, top_k=6, top_p=0.8, seed=4)
OPENERS = ("w3 w4", "w9", "w5 w6")
SCALE, N = 30.0, 18


@pytest.fixture(scope="module")
def model() -> Any:
    # An end token that is likely, and at which no text must end.
    return make_model("qwen3", initializer_range=0.1, eos_token_id=[2, 7, 8, 9, 10, 11, 12])


@pytest.fixture(scope="module")
def sae() -> dspa.FrozenSAE:
    return make_sae(L_OUT, D_SAE_OUT, seed=2)


@pytest.fixture(scope="module")
def directions() -> Tensor:
    return torch.randn(N, D_IN, generator=torch.Generator().manual_seed(5))


def measured(folder: Path, model: Any, sae: dspa.FrozenSAE, directions: Tensor, **others: Any) -> Effects:
    settings = {"openers": OPENERS, "sampling": SAMPLING, "progress": False, "batch_size": 5} | others
    return measure_effects(model, make_tokenizer(), sae, directions, SCALE, folder, **settings)


@pytest.fixture(scope="module")
def effects(tmp_path_factory: pytest.TempPathFactory, model: Any, sae: Any, directions: Tensor) -> Effects:
    return measured(tmp_path_factory.mktemp("effects") / "e", model, sae, directions)


@torch.no_grad()
def plainly(model: Any, sae: dspa.FrozenSAE, vector: Tensor, seed: int, rollouts: int) -> Tensor:
    """The mean latents of texts with `vector` added, one by one and without a cache."""
    g = torch.Generator().manual_seed(SAMPLING.seed * STRIDE + seed)
    numbers = torch.rand(rollouts, SAMPLING.length, generator=g, dtype=torch.float64)
    total = torch.zeros(sae.d_sae, dtype=torch.float64)
    for r in range(rollouts):
        ids = list(make_tokenizer()(OPENERS[r % len(OPENERS)])["input_ids"])

        def add(_module: Any, _args: Any, output: Any) -> Any:
            h = output[0] if isinstance(output, tuple) else output
            return (h + vector, *output[1:]) if isinstance(output, tuple) else h + vector

        handle = decoder_layers(model)[L_OUT].register_forward_hook(add)
        while len(ids) < SAMPLING.length:
            p = model(torch.tensor([ids])).logits[0, -1].double().softmax(dim=0)
            likely = sorted(range(len(p)), key=lambda j: -float(p[j]))[: SAMPLING.top_k]
            share = sum(float(p[j]) for j in likely)
            kept, reached = [], 0.0
            for j in likely:
                if reached < SAMPLING.top_p:
                    kept.append(j)
                reached += float(p[j]) / share
            left = float(numbers[r, len(ids) - 1]) * sum(float(p[j]) for j in kept)
            for j in kept:
                left -= float(p[j])
                if left < 0:
                    break
            ids.append(j)
        handle.remove()
        h = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[L_OUT + 1][0]
        total += sae.encode(h).double().mean(dim=0)
    return total / rollouts


def test_effects_are_those_of_a_plain_loop(model: Any, sae: Any, directions: Tensor, effects: Effects) -> None:
    x, y = (torch.cat(parts) for parts in zip(*effects, strict=True))
    unit = directions / directions.norm(dim=1, keepdim=True)
    torch.testing.assert_close(x, unit)
    base = plainly(model, sae, torch.zeros(D_IN), 0, 10 * SAMPLING.rollouts)
    size = float(base.abs().max())
    torch.testing.assert_close(effects.base.double(), base, rtol=0, atol=rounding(PASS, size))
    assert effects.n == N and y.shape == (N, D_SAE_OUT)
    for n in (0, 1, 16, 17):
        own = plainly(model, sae, SCALE * unit[n], 1 + n, SAMPLING.rollouts) - base
        assert float(own.abs().max()) > 100 * rounding(PASS, size)
        torch.testing.assert_close(y[n].double(), own, rtol=0, atol=rounding(PASS, 3 * size))


def test_batches_do_not_matter(tmp_path: Path, model: Any, sae: Any, directions: Tensor, effects: Effects) -> None:
    other = measured(tmp_path / "e", model, sae, directions, batch_size=64)
    for (_, one), (_, two) in zip(effects, other, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=rounding(PASS, 3 * float(effects.base.max())))


def test_a_stopped_measurement_goes_on(
    tmp_path: Path, model: Any, sae: Any, directions: Tensor, effects: Effects, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, generate = [0], model.generate

    def stopped(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 18:
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(type(model), "generate", lambda _self, *args, **kwargs: stopped(*args, **kwargs))
        with pytest.raises(KeyboardInterrupt):
            measured(tmp_path / "e", model, sae, directions)
    part = Effects.open(tmp_path / "e")
    assert part.n == 16
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "e").iterdir()}
    whole = measured(tmp_path / "e", model, sae, directions)
    assert all((tmp_path / "e" / name).stat().st_mtime_ns == time for name, time in before.items())
    for (x, y), (own_x, own_y) in zip(effects, whole, strict=True):
        assert torch.equal(x, own_x) and torch.equal(y, own_y)


def test_other_settings_are_refused(model: Any, sae: Any, directions: Tensor, effects: Effects) -> None:
    with pytest.raises(VectorError, match=r"holds effects with other `sampling`; accepted: a new folder"):
        measured(effects.folder, model, sae, directions, sampling=RolloutSettings(rollouts=4, length=7))
    with pytest.raises(VectorError, match="other `directions`"):
        measured(effects.folder, model, sae, directions.flip(0))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"openers": ()}, ValueError, "`openers` is empty"),
        ({"openers": ("w3 w4 w5 w6 w7 w8 w9",)}, ValueError, "Opener 1 is 8 tokens long; accepted: 1 to 6"),
        ({"batch_size": 0}, ValueError, "`batch_size` is 0"),
        ({"directions": torch.zeros(2, D_IN)}, ValueError, "partly 0"),
        ({"directions": torch.ones(2, 3)}, ValueError, r"\[2, 3\]; accepted: \[n, 48\]"),
        ({"sae": make_sae(9, D_SAE_OUT)}, ModelError, "layer 9; accepted: 0 to 3"),
        ({"sampling": RolloutSettings(length=500)}, ValueError, "`length` is 500; accepted: up to 128"),
    ],
)
def test_bad_input(
    tmp_path: Path, model: Any, sae: Any, directions: Tensor, change: Any, error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        measured(tmp_path / "e", **({"model": model, "sae": sae, "directions": directions} | change))
    assert not (tmp_path / "e").exists()


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(VectorError, match="There is no file at"):
        Effects.open(tmp_path)
