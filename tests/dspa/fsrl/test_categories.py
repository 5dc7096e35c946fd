"""Shares of the use of latents by category."""

from __future__ import annotations

import pytest
import torch

from dspa.fsrl import Labels, Usage, category_shares


def test_shares_by_hand():
    usage = Usage(torch.tensor([6, 2, 0, 4, 8]), torch.tensor([3.0, 1.0, 0.0, 1.0, 5.0]).double(), 10)
    style, topic, rest = category_shares(usage, Labels({0: "style", 1: "topic", 2: "topic", 3: "topic"}, 5))
    assert (style.category, style.n_latents, style.n_used) == ("style", 1, 1)
    assert (style.latents, style.active, style.mass) == (0.25, 6 / 20, 3 / 10)
    # Of the use of labelled latents, 12 tokens and a mass of 5, over a quarter of them.
    assert (style.active_enrichment, style.mass_enrichment) == (6 / 12 / 0.25, 3 / 5 / 0.25)
    assert (topic.n_latents, topic.n_used, topic.latents, topic.active, topic.mass) == (3, 2, 0.75, 6 / 20, 2 / 10)
    assert (topic.active_enrichment, topic.mass_enrichment) == (6 / 12 / 0.75, 2 / 5 / 0.75)
    assert (rest.category, rest.n_latents, rest.active, rest.mass) == ("unlabelled", 1, 8 / 20, 5 / 10)
    assert rest.latents is rest.active_enrichment is rest.mass_enrichment is None


def test_shares_of_nothing():
    nothing = Usage(torch.tensor([0, 3]), torch.tensor([0.0, 1.0]), 10)
    with pytest.raises(ValueError, match="moves 1 latents and none of the labelled ones"):
        category_shares(nothing, Labels({0: "a"}, 2))
    with pytest.raises(ValueError, match="labels are of 3 latents and the usage is of 2"):
        category_shares(nothing, Labels({0: "a"}, 3))
