"""What a map edits in texts, against plain loops over its entries and over the records of a trace."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import dspa
from dspa.audit.edits import audited_latents, presumed_effects, read_edits, summarise, unions
from dspa.errors import TraceError
from dspa.maps.cdmap import ConditionalDifferenceMap
from dspa.steering.edits import Edit, SteeredText
from dspa.testing import D_SAE_OUT, make_map


@pytest.fixture
def trace(cdmap: ConditionalDifferenceMap) -> tuple[list[Edit], list[SteeredText]]:
    """Edits of three texts, of which the third has none, made of a draw."""
    draw, columns = random.Random(0), cdmap.columns.tolist()
    edits = []
    for call, row in ((0, 0), (0, 1)):
        for position in range(4, 12):
            latents = draw.sample(columns, draw.randint(1, 5))
            before = [draw.uniform(0.5, 3) for _ in latents]
            after = [value + (0.7 if latent % 2 else -0.4) for latent, value in zip(latents, before, strict=True)]
            token = draw.randint(5, 7)
            text = None if token == 7 else f" {token}"
            edits.append(Edit(call, row, position, 5.0, latents, before, after, token, text))
    texts = [
        SteeredText(0, 0, 10, cdmap.digest),
        SteeredText(0, 1, 8, cdmap.digest),
        SteeredText(1, 0, 6, cdmap.digest),
    ]
    return edits, texts


def test_edits_are_summed_per_latent(trace: Any) -> None:
    edits, texts = trace
    got = summarise(edits, texts)
    assert (got.n_edited, got.n_tokens, got.n_texts, got.share) == (16, 24, 3, 16 / 24)
    sizes = []
    for latent in {latent for edit in edits for latent in edit.latents}:
        n = n_change = total_before = total_after = 0.0
        names, places = Counter[str](), set()
        for edit in edits:
            for which, before, after in zip(edit.latents, edit.before, edit.after, strict=True):
                if which == latent:
                    n, total_before, total_after = n + 1, total_before + before, total_after + after
                    n_change += after - before
                    names[edit.text or str(edit.token)] += 1
                    places.add((edit.call, edit.row))
        one = got.latents[latent]
        assert (one.n_tokens, one.n_texts) == (n, len(places))
        assert (one.before, one.after) == pytest.approx((total_before / n, total_after / n))
        assert one.change == pytest.approx(n_change) and dict(one.tokens) == dict(names)
        sizes.append(abs(n_change))
    assert [abs(one.change) for one in got.latents.values()] == pytest.approx(sorted(sizes, reverse=True))
    assert {latent % 2 for latent in got.with_sign(1)} == {1} and {latent % 2 for latent in got.with_sign(-1)} == {0}


def test_the_share_needs_the_length_of_every_text(trace: Any) -> None:
    edits, texts = trace
    without = summarise(edits, texts[1:])
    assert without.n_tokens is None and without.share is None and without.n_texts == 3
    nothing = summarise([])
    assert (nothing.n_edited, nothing.n_tokens, nothing.share, nothing.latents) == (0, 0, None, {})


def test_audited_latents_are_the_ends_of_the_columns_and_others(cdmap: ConditionalDifferenceMap) -> None:
    sums = {int(latent): sum(cdmap.values[:, j].double().tolist()) for j, latent in enumerate(cdmap.columns)}
    rising = sorted(sums, key=lambda latent: sums[latent])
    groups = audited_latents(cdmap, 6, seed=3)
    assert groups["ablate"] == rising[:6] and groups["augment"] == rising[::-1][:6]
    assert len(set(groups["control"])) == 6 and not set(groups["control"]) & {*groups["augment"], *groups["ablate"]}
    assert set(groups["control"]) <= set(range(D_SAE_OUT))
    assert groups == audited_latents(cdmap, 6, seed=3) and groups != audited_latents(cdmap, 6, seed=4)
    with pytest.raises(ValueError, match="`n` is -1"):
        audited_latents(cdmap, -1)


@pytest.mark.parametrize("k_diff", [1, 3, 1000])
def test_effects_are_presumed_of_the_ends_of_rows(cdmap: ConditionalDifferenceMap, trace: Any, k_diff: int) -> None:
    largest, smallest = set(), set()
    for row in cdmap.values.tolist():
        order = sorted(range(len(row)), key=lambda j: row[j])
        smallest |= {int(cdmap.columns[j]) for j in order[:k_diff] if row[j] < 0}
        largest |= {int(cdmap.columns[j]) for j in order[-k_diff:] if row[j] > 0}
    assert unions(cdmap, k_diff) == {"augment": largest, "ablate": smallest}
    groups, edits = audited_latents(cdmap, 5), summarise(*trace)
    augment, ablate = presumed_effects(cdmap, edits, groups, k_diff)
    for effect, parity, union, sign in ((augment, 1, largest, 1), (ablate, 0, smallest, -1)):
        moved = {latent for edit in trace[0] for latent in edit.latents if latent % 2 == parity}
        ends = set(groups[effect.direction])
        changes = [
            (latent, sign * (after - before))
            for edit in trace[0]
            for latent, before, after in zip(edit.latents, edit.before, edit.after, strict=True)
            if latent % 2 == parity
        ]
        assert effect.n_latents == len(moved) and effect.n_union == len(union)
        assert effect.outside == tuple(sorted(moved - union)) and effect.n_extreme == len(moved & ends)
        assert effect.change == pytest.approx(sum(change for _, change in changes))
        assert effect.extreme_change == pytest.approx(sum(change for latent, change in changes if latent in ends))


def test_what_is_edited_is_in_the_unions(model: Any, sae_in: Any, sae_out: Any, cdmap: Any, tmp_path: Path) -> None:
    """Of one row at a time, as a prompt of one latent looks up: then it cannot be otherwise."""
    config = dspa.SteeringConfig(k_prompt=1, k_diff=4, alpha=0.5, mode="both")
    with dspa.Steering(sae_in, sae_out, cdmap, config, record=True).attach(model) as steering:
        import torch

        model.generate(torch.tensor([[5, 9, 30, 12]]), max_new_tokens=12, do_sample=False)
    steering.trace.save(tmp_path / "t.jsonl")
    edits = read_edits(tmp_path / "t.jsonl", cdmap)
    assert edits.n_edited == len(steering.trace) > 0 and edits.n_tokens is None
    effects = presumed_effects(cdmap, edits, audited_latents(cdmap, 5), 4)
    assert sum(effect.n_latents for effect in effects) > 0 and all(effect.outside == () for effect in effects)


def test_a_trace_of_another_map_is_refused(trace: Any, cdmap: Any, sae_in: Any, sae_out: Any, tmp_path: Path) -> None:
    edits, texts = trace
    path = tmp_path / "t.jsonl"

    def write(*records: Any) -> None:
        path.write_text("".join(json.dumps(record.__dict__) + "\n" for record in records))

    write(*edits, *texts)
    assert read_edits(path, cdmap).share == 16 / 24
    other = make_map(sae_in, sae_out, seed=5)
    with pytest.raises(TraceError, match=f"of the map with digest {cdmap.digest}; accepted: a trace of this map"):
        read_edits(path, other)
    # Without texts, as Python may write one, its latents show it.
    write(*edits)
    with pytest.raises(TraceError, match=r"edits of latents .*, which the map cannot edit"):
        read_edits(path, other)
    write(*texts)
    with pytest.raises(TraceError, match="a trace without edits"):
        read_edits(path, cdmap)
