"""Bytes that steps read with the int5 screen, at a reduced width: two passes leave few rows of the encoder to read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench.offline import screen
from dspa_kernels.testing import Activity, realistic_activity


@pytest.fixture(scope="module")
def activity() -> Activity:
    return realistic_activity(512, 8192, screen.ROWS, n_calibration=2048)


def test_few_bytes_are_read_in_the_hard_case(activity: Activity) -> None:
    """The copy is 0.336 of the encoder here, and the latents that are evaluated first are 0.010 and 0.027."""
    counted = screen.count(activity)
    assert 0.7 < counted.streamed < 0.8 and 1 <= counted.candidates < 8
    assert counted.one_row < 0.27 and counted.batch < 0.41
    easy = screen.count(activity, "easy")
    assert easy.one_row < 0.5 * counted.one_row


def test_a_mean_row_saves_candidates(activity: Activity) -> None:
    without = screen.count(replace(activity, mean=torch.zeros(512)))
    assert without.candidates > 2 * screen.count(activity).candidates


def test_a_lost_maximum_is_noticed(activity: Activity, monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = screen.bounds

    def too_tight(*arguments: object) -> object:
        lower, upper = bounds(*arguments)  # type: ignore[arg-type]
        middle = (lower + upper) / 2
        return middle, middle

    monkeypatch.setattr(screen, "bounds", too_tight)
    with pytest.raises(AssertionError, match="a maximum was lost"):
        screen.count(activity)
