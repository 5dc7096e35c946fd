"""The activity that stands in for a real model's."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from dspa_kernels import steer
from dspa_kernels.testing import CASES, L0, MOST_FREQUENT, Activity, realistic_activity, same_bits, tensors
from dspa_kernels.weights import PATHS

from ..rounding import rounding

D_IN, D_SAE, N = 256, 8192, 1500


@pytest.fixture(scope="module")
def activity() -> Activity:
    return realistic_activity(D_IN, D_SAE, N, n_calibration=2048)


def latents(activity: Activity) -> Tensor:
    pre = activity.h.float() @ activity.sae.W_enc.float() + activity.sae.b_enc
    return torch.where((pre > activity.sae.threshold) & (pre > 0), pre, 0)


def shares(activity: Activity, case: str) -> dict[str, float]:
    """Shares of rows, by what became of them."""
    cdmap, plan = activity.steered(case, N)
    paths = torch.zeros(len(PATHS) + 1, dtype=torch.int64)
    steer(activity.h, activity.sae, cdmap, plan, stream=activity.stream(), paths=paths, backend="reference")
    return {name: count / N for name, count in zip(PATHS, paths.tolist(), strict=False)}


def test_frequencies_fall_with_the_rank(activity: Activity) -> None:
    ranked = activity.frequencies[activity.by_frequency]
    assert float(ranked.sum()) == pytest.approx(L0, rel=rounding(D_SAE, 1.0))
    assert float(ranked.max()) <= MOST_FREQUENT + rounding(1, MOST_FREQUENT)
    tail = ranked[100:]
    assert torch.allclose(tail[0] / tail[-1], torch.tensor((D_SAE / 101) ** 0.7), rtol=rounding(2, 1.0))


def test_latents_are_active_at_their_frequency(activity: Activity) -> None:
    active = (latents(activity) > 0).float()
    assert float(active.sum(dim=1).mean()) == pytest.approx(L0, rel=0.08)
    often, wanted = (shares[activity.by_frequency] for shares in (active.mean(dim=0), activity.frequencies))
    for band in (slice(0, 20), slice(20, 160), slice(160, 1600)):
        assert float(often[band].mean()) == pytest.approx(float(wanted[band].mean()), rel=0.1)


def test_hot_latents_hold_the_maximum(activity: Activity) -> None:
    holders = latents(activity).argmax(dim=1)
    share = torch.isin(holders, activity.hot).float().mean()
    assert len(activity.hot) == 64 == len(activity.hot.unique())
    assert float(share) > 4 * torch.isin(holders, activity.by_frequency[-64:]).float().mean() + 0.1


def test_mean_and_massive_dimensions(activity: Activity) -> None:
    rows = activity.h.float()
    assert torch.allclose(activity.mean, rows.mean(dim=0), atol=1.0)
    size = rows.abs().mean(dim=0).sort(descending=True).values
    assert size[3] > 5 * size[4]


@pytest.mark.parametrize("case", CASES)
def test_a_plan_ablates_latents_of_its_ranks(activity: Activity, case: str) -> None:
    cdmap, plan = activity.steered(case, 10)
    rank = activity.by_frequency.argsort()[cdmap.columns.long()]
    assert int(rank.min()) >= CASES[case][0] and int(rank.max()) < CASES[case][1] and len(rank) == 160
    assert plan.slots.shape == (10, 16) and (plan.signs == -1).all()
    assert all(len(set(slots)) == 16 for slots in plan.slots.tolist())


def test_every_path_is_taken(activity: Activity) -> None:
    """Most rows of the hard case need their maximum, and few of the easy one."""
    hard, easy = shares(activity, "hard"), shares(activity, "easy")
    for share in (hard, easy):
        assert share["unsteered"] == share["not_finite"] == 0
        assert share["settled"] > 0.005
    assert 0.1 < hard["inactive"] < 0.35 and 0.4 < hard["streamed"] < 0.75
    assert 0.6 < easy["inactive"] < 0.9 and 0.05 < easy["streamed"] < 0.3


def test_the_seed_decides_everything() -> None:
    first, again, other = (realistic_activity(32, 300, 20, n_calibration=64, seed=seed) for seed in (1, 1, 2))
    names = [field.name for field in fields(Activity) if field.name != "sae"]
    assert all(same_bits(getattr(first, name), getattr(again, name)) for name in names)
    assert all(same_bits(*pair) for pair in zip(tensors(first.sae), tensors(again.sae), strict=True))
    assert not same_bits(first.h, other.h)


def test_no_rows() -> None:
    activity = realistic_activity(32, 300, 0, n_calibration=64, dtype=torch.float32)
    assert activity.h.shape == (0, 32) and activity.h.dtype == torch.float32
