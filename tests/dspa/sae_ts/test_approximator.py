"""Fits of effects, compared with NumPy's least squares, and their file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dspa
from dspa.errors import VectorError
from dspa.files import write_tensors
from dspa.sae_ts import EffectApproximator, Effects, fit_effects
from dspa.sae_ts.effects import BASE, FILES, PER_FILE, EffectsRecord
from dspa.sae_ts.settings import FitSettings, RolloutSettings

D_IN, D_SAE, N, HELD_OUT = 6, 9, 150, 20


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


M, B, BASE_LATENTS = drawn(D_IN, D_SAE, seed=1), 2 + drawn(D_SAE, seed=2), drawn(D_SAE, seed=4).abs()


def write_effects(folder: Path, noise: float, n: int = N) -> Effects:
    """A folder of effects that are linear but for noise."""
    x = torch.nn.functional.normalize(drawn(n, D_IN, seed=3), dim=1)
    y = x @ M + B + noise * drawn(n, D_SAE, seed=5)
    record = EffectsRecord("s", 2, D_IN, D_SAE, 3.0, "d", n, [[1]], RolloutSettings(), "m", "digest")
    header = {name: value for name, value in asdict(record).items() if name not in ("sha256", "seal")}
    folder.mkdir()
    zero = torch.zeros(1, D_IN)
    write_tensors(folder / BASE, {"directions": zero, "latents": BASE_LATENTS[None].float()}, header)
    for start in range(0, n, PER_FILE):
        part = slice(start, start + PER_FILE)
        tensors = {"directions": x[part].float(), "latents": (y[part] + BASE_LATENTS).float()}
        write_tensors(folder / FILES.format(start // PER_FILE), tensors, header)
    return Effects.open(folder)


@pytest.fixture(scope="module")
def effects(tmp_path_factory: pytest.TempPathFactory) -> Effects:
    return write_effects(tmp_path_factory.mktemp("made") / "e", 0.1)


def arrays(effects: Effects) -> tuple[Any, Any]:
    x, y = (torch.cat(parts).double().numpy() for parts in zip(*effects, strict=True))
    return x, y


def test_without_a_penalty_it_is_least_squares(effects: Effects) -> None:
    x, y = arrays(effects)
    n = N - HELD_OUT
    wanted = np.linalg.lstsq(np.hstack([x[:n], np.ones((n, 1))]), y[:n], rcond=None)[0]
    made = fit_effects(effects, FitSettings(ridge=0.0, held_out=HELD_OUT), progress=False)
    np.testing.assert_allclose(made.M.numpy(), wanted[:-1], atol=1e-5)
    np.testing.assert_allclose(made.b.numpy(), wanted[-1], atol=1e-5)
    error = ((y[n:] - x[n:] @ wanted[:-1] - wanted[-1]) ** 2).sum()
    of_mean = ((y[n:] - y[:n].mean(axis=0)) ** 2).sum()
    assert made.record.r2 == pytest.approx(1 - error / of_mean, abs=1e-6) and made.record.r2 > 0.9
    assert made.record.mean_alone == pytest.approx(1 - of_mean / (y[n:] ** 2).sum(), abs=1e-6)
    assert made.record.r2_shuffled < 0.1
    assert (made.record.n_directions, made.record.n_held_out) == (n, HELD_OUT)


def test_a_penalty_shrinks_M_and_not_b(effects: Effects) -> None:
    x, y = arrays(effects)
    n, penalty = N - HELD_OUT, 0.5
    centred = x[:n] - x[:n].mean(axis=0)
    gram = centred.T @ centred
    added = penalty * np.trace(gram) / D_IN * np.eye(D_IN)
    wanted = np.linalg.solve(gram + added, centred.T @ (y[:n] - y[:n].mean(axis=0)))
    made = fit_effects(effects, FitSettings(ridge=penalty, held_out=HELD_OUT), progress=False)
    np.testing.assert_allclose(made.M.numpy(), wanted, atol=1e-5)
    np.testing.assert_allclose(made.b.numpy(), y[:n].mean(axis=0) - x[:n].mean(axis=0) @ wanted, atol=1e-5)


@pytest.mark.parametrize("noise", [0.01, 30.0])
def test_the_penalty_is_the_one_of_cross_validation(tmp_path: Path, noise: float) -> None:
    """Little noise needs no penalty, and effects that are noise a large one."""
    made = fit_effects(write_effects(tmp_path / "e", noise), FitSettings(held_out=HELD_OUT), progress=False)
    assert made.record.ridge < 1e-2 if noise < 1 else made.record.ridge >= 1


def test_adam_ends_where_the_closed_form_is(effects: Effects) -> None:
    exact = fit_effects(effects, FitSettings(ridge=0.0, held_out=HELD_OUT), progress=False)
    settings = FitSettings("adam", held_out=HELD_OUT, epochs=1500, lr=0.05, batch_size=N)
    made = fit_effects(effects, settings, progress=False)
    torch.testing.assert_close(made.M, exact.M, rtol=0, atol=2e-3)
    torch.testing.assert_close(made.b, exact.b, rtol=0, atol=2e-3)
    short = fit_effects(effects, FitSettings("adam", held_out=HELD_OUT), progress=False)
    assert short.record.r2 < exact.record.r2 and short.record.settings.lr == 2e-4


def test_few_directions(tmp_path: Path) -> None:
    effects = write_effects(tmp_path / "e", 0.1, n=4)
    made = fit_effects(effects, progress=False)
    assert (made.record.n_directions, made.record.n_held_out) == (3, 1)
    with pytest.raises(VectorError, match="number of measured directions is 4, of which 3 are held out"):
        fit_effects(effects, FitSettings(held_out=3), progress=False)
    with pytest.raises(ValueError, match="`ridge` is 1 with `method` adam"):
        FitSettings("adam", ridge=1.0)


def test_file(tmp_path: Path, effects: Effects) -> None:
    made = fit_effects(effects, progress=False)
    made.save(tmp_path / "a")
    loaded = EffectApproximator.load(tmp_path / "a")
    assert loaded.record.r2 == made.record.r2 and loaded.record.model_digest == "digest"
    assert torch.equal(loaded.M, made.M) and torch.equal(loaded.b, made.b)
    x, y = next(iter(effects))
    assert float((loaded.predict(7 * x) - y).abs().max()) < 1
    dspa.SteeringVector(torch.ones(3), 1).save(tmp_path / "v")
    with pytest.raises(VectorError, match="is not a linear model of effects"):
        EffectApproximator.load(tmp_path / "v")
