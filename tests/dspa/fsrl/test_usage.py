"""What adapters do: use by rank, fractions, masks, coherence, and the commands that write them."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from dspa.cli import main
from dspa.errors import ModelError
from dspa.evaluate.coherence import METRICS, Coherence, distinct, repetition
from dspa.fsrl import (
    FSRLAdapter,
    Scores,
    Usage,
    ablations,
    compare_texts,
    fit_decay,
    fraction_curve,
    latent_usage,
    mask_effect,
    responses_of,
    score_responses,
)
from dspa.fsrl.ablations import MaskEffect
from dspa.testing import D_SAE_OUT, L_OUT, make_model, make_sae

from ..support.adapters import TRIPLES, acting_adapter, ending_tokenizer, hidden_states

UNUSED = 20


@pytest.fixture(scope="module")
def model():
    return make_model("gemma2")


@pytest.fixture(scope="module")
def tokenizer():
    return ending_tokenizer()


@pytest.fixture(scope="module")
def responses(model, tokenizer):
    return responses_of(model, tokenizer, TRIPLES)


@pytest.fixture
def adapter(model, responses):
    with acting_adapter(model, responses, unused=UNUSED) as made:
        yield made.attach(model)


@pytest.fixture
def used(model, adapter, responses):
    return latent_usage(model, adapter, responses, progress=False)


# Use


def test_usage_counts_the_tokens_of_responses(model, adapter, responses):
    with adapter.disabled():
        h = hidden_states(model, responses)
    u = h @ adapter.W_a.T
    v = u.sign() * (u.abs() - adapter.threshold).clamp(min=0)
    for batch_tokens in (1, 100, 8192):
        found = latent_usage(model, adapter, responses, batch_tokens=batch_tokens, progress=False)
        assert found.n_tokens == len(h) == sum(len(each.ids) for each in responses)
        # A value at its threshold falls on either side by rounding.
        near = ((u.abs() - adapter.threshold).abs() < 1e-4).sum(dim=0)
        assert ((found.active - (v != 0).sum(dim=0)).abs() <= near).all()
        torch.testing.assert_close(found.mass, v.abs().double().sum(dim=0), rtol=1e-4, atol=1e-3)
    assert len(found.ranked) == D_SAE_OUT - UNUSED


def test_ranks_and_rows():
    usage = Usage(torch.tensor([2, 0, 5, 2]), torch.tensor([1.0, 0.0, 2.0, 4.0]).double(), 10)
    assert usage.ranked.tolist() == [2, 0, 3]
    assert usage.rows() == [(1, 2, 0.5, 0.2), (2, 0, 0.2, 0.1), (3, 3, 0.2, 0.4)]


def test_masked_latents_are_not_used(model, adapter, used, responses):
    adapter.mask = torch.arange(D_SAE_OUT) >= 50
    masked = latent_usage(model, adapter, responses, progress=False)
    assert not masked.active[:50].any() and not masked.mass[:50].any()
    assert torch.equal(masked.active[50:], used.active[50:])


def test_a_decay_is_found_again():
    n_tokens = 10**9
    ranks = torch.arange(1, 41)
    exact = (0.6 * torch.exp(-ranks.double() / 12) * n_tokens).round().long()
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    active = torch.zeros(60, dtype=torch.int64).index_copy(0, order[:40], exact)
    found = fit_decay(Usage(active, active.double(), n_tokens))
    assert (found.a, found.tau, found.r2) == pytest.approx((0.6, 12, 1), rel=1e-5)
    assert (found.first, found.last) == (1, 40)


def test_a_fit_is_the_best_in_squares_and_says_how_good(used):
    found = fit_decay(used)
    share = used.share[used.ranked].numpy()
    ranks = np.arange(1, len(share) + 1)

    def rest(a: float, tau: float) -> float:
        return float(((share - a * np.exp(-ranks / tau)) ** 2).sum())

    best = rest(found.a, found.tau)
    assert found.r2 == pytest.approx(1 - best / float(((share - share.mean()) ** 2).sum()))
    assert 0.9 < found.r2 < 1
    for a, tau in ((0.99, 1), (1.01, 1), (1, 0.99), (1, 1.01)):
        assert rest(found.a * a, found.tau * tau) > best


def test_what_cannot_be_fitted():
    with pytest.raises(ValueError, match="moves 3 latents on 10 tokens; accepted for a fit: 8 or more"):
        fit_decay(Usage(torch.tensor([1, 2, 3, 0]), torch.zeros(4), 10))
    with pytest.raises(ValueError, match=r"Each of 9 latents is moved on 50\.0% of the tokens"):
        fit_decay(Usage(torch.full((9,), 5), torch.zeros(9), 10))


def test_an_sae_of_another_model_is_refused(tokenizer, responses):
    narrow = FSRLAdapter(make_sae(L_OUT, 32, d_in=24))
    with pytest.raises(ModelError, match="reads 24 dimensions"):
        latent_usage(make_model("gemma2"), narrow, responses, progress=False)


# Fractions


def test_fraction_0_is_the_base_model_and_1_the_adapter(model, adapter, responses):
    curve = fraction_curve(model, adapter, responses, fractions=(0.0, 0.1, 1.0), progress=False)
    nothing, some, whole = curve.scores
    with adapter.disabled():
        base = score_responses(model, responses, progress=False)
    assert torch.equal(nothing.margins, base.margins) and torch.equal(curve.base.margins, base.margins)
    assert torch.equal(whole.margins, score_responses(model, responses, progress=False).margins)
    assert float((some.margins - base.margins).abs().mean()) > 1e-4
    assert float((some.margins - whole.margins).abs().mean()) > 1e-4
    rows = curve.rows()
    assert [row["fraction"] for row in rows] == ["", 0.0, 0.1, 1.0]
    assert (rows[0]["win_rate"], rows[1]["win_rate"]) == (0.5, 0.5)
    assert rows[2]["loss"] == some.loss and rows[2]["win_rate"] == some.win_rate(base)


def test_mask_and_fraction_come_back_after_an_error(model, adapter, responses, used, monkeypatch):
    mask = torch.arange(D_SAE_OUT) < 100
    adapter.mask, adapter.fraction = mask, 0.7
    calls = []

    def failing(*_args, **_settings):
        calls.append((adapter.mask, adapter.fraction))
        if len(calls) % 4 == 0:
            raise RuntimeError("stopped")
        return Scores(torch.zeros(14), torch.zeros(14))

    monkeypatch.setattr(ablations, "score_responses", failing)
    with pytest.raises(RuntimeError, match="stopped"):
        fraction_curve(model, adapter, responses, progress=False)
    assert calls[-1][1] != 0.7 and (adapter.mask, adapter.fraction) == (mask, 0.7)
    with pytest.raises(RuntimeError, match="stopped"):
        mask_effect(model, adapter, responses, [0, 1], used, progress=False)
    assert calls[-1][0] is not mask and adapter.mask is mask


@pytest.mark.parametrize("fractions", [(), (0.5, 1.1), (-0.1,), (math.nan,)])
def test_fractions_that_are_none(model, adapter, responses, fractions):
    with pytest.raises(ValueError, match="accepted: one or more numbers from 0 to 1"):
        fraction_curve(model, adapter, responses, fractions=fractions, progress=False)


def test_an_adapter_has_to_be_attached(model, tokenizer, responses):
    loose = acting_adapter(model, responses)
    usage = Usage(torch.ones(D_SAE_OUT, dtype=torch.int64), torch.ones(D_SAE_OUT), 1)
    with pytest.raises(ModelError, match="not attached"):
        fraction_curve(model, loose, responses, progress=False)
    with pytest.raises(ModelError, match="not attached"):
        mask_effect(model, loose, responses, [1], usage, progress=False)
    with pytest.raises(ModelError, match="not attached"):
        compare_texts(model, tokenizer, loose, [[1, 5], [1, 6]], progress=False)


# Masks


def test_all_latents_masked_are_the_base_model(model, adapter, responses, used):
    effect = mask_effect(model, adapter, responses, range(D_SAE_OUT), used, n_random=2, progress=False)
    assert effect.n_given == D_SAE_OUT and len(effect.latents) == D_SAE_OUT - UNUSED
    for masked in (effect.given, *effect.random):
        assert torch.equal(masked.margins, effect.base.margins)
    assert not torch.equal(effect.whole.margins, effect.base.margins)


def test_random_sets_are_as_large_and_of_latents_that_are_used(model, adapter, responses, used, monkeypatch):
    own = torch.ones(D_SAE_OUT, dtype=torch.bool)
    own[3] = False
    adapter.mask = own
    masks = []

    def seen(*_args, **_settings):
        masks.append(adapter.mask)
        return Scores(torch.rand(14), torch.rand(14))

    monkeypatch.setattr(ablations, "score_responses", seen)

    def drawn(seed: int) -> list[list[int]]:
        masks.clear()
        given = [0, 5, 5, 40, D_SAE_OUT - 1]  # one of them twice, and one that is never moved
        mask_effect(model, adapter, responses, given, used, n_random=30, seed=seed, progress=False)
        base, whole, *rest = masks
        assert base is own and whole is own
        assert not any(bool(mask[3]) for mask in rest)
        return [[n for n in range(D_SAE_OUT) if n != 3 and not mask[n]] for mask in rest]

    given, *random = drawn(0)
    assert given == [0, 5, 40]
    # Latent 3, which may be drawn, is masked anyway.
    assert {len(each) for each in random} <= {2, 3}
    assert {n for each in random for n in each} <= set(used.ranked.tolist())
    assert len({tuple(each) for each in random}) > 25
    assert drawn(0)[1:] == random != drawn(1)[1:]


def effect_of(losses: list[float], given: float) -> MaskEffect:
    """An effect whose losses are these."""

    def scores(loss: float) -> Scores:
        return Scores(torch.tensor([0.5 - math.log(math.expm1(loss))], dtype=torch.float64), torch.zeros(1), beta=1.0)

    return MaskEffect(scores(1.0), scores(1.0), scores(given), tuple(map(scores, losses)), torch.tensor([0]), 1)


def test_a_set_beside_random_ones_by_hand():
    # Of 1, 2, 3: mean 2, standard error 1 / sqrt 3, and t is 4.302653 at 97.5 % with two degrees of freedom.
    found = effect_of([1.0, 2.0, 3.0], 2.5).compare("loss")
    assert (found.mean, found.low, found.high) == pytest.approx((2, 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
    assert (found.given, found.percentile) == pytest.approx((2.5, 200 / 3))
    same = effect_of([2.0, 2.0], 2.0).compare("loss")
    assert (same.mean, same.low, same.high, same.percentile) == pytest.approx((2, 2, 2, 50))


def test_sets_that_cannot_be_masked(model, adapter, responses, used):
    for latents, settings, message in (
        ([], {}, "`latents` are none; accepted: one or more numbers from 0 to 127"),
        ([4, 128, -1], {}, r"`latents` hold \[128, -1\]"),
        ([D_SAE_OUT - 1], {}, "None of the 1 given latents is moved"),
        ([4], {"n_random": 1}, "`n_random` is 1; accepted: 2 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            mask_effect(model, adapter, responses, latents, used, progress=False, **settings)


# Coherence

PROMPTS = [[1, 5, 9], [1, 7], [1, 12, 13, 14, 20], [1, 30, 4], [1, 8, 40, 41, 42, 43, 44, 9], [1, 33]]


def test_n_grams_by_hand():
    text = [1, 2, 1, 2, 1, 2, 3]
    assert distinct(text, 1) == 3 / 7
    # 12, 21, 12, 21, 12, 23.
    assert distinct(text, 2) == 3 / 6
    # 1212, 2121, 1212, 2123.
    assert repetition(text) == 1 / 4
    assert repetition([1, 1, 1, 1, 1]) == 1 / 2
    assert math.isnan(distinct([1, 2], 3))


def test_texts_and_their_measures(tokenizer):
    model = make_model("gemma2")
    responses = responses_of(model, tokenizer, TRIPLES)
    with torch.no_grad():
        alone = [model.generate(torch.tensor([p]), max_new_tokens=12, do_sample=False)[0, len(p) :] for p in PROMPTS]
    # The last new word of the greedy texts ends texts from now on.
    firsts = [(ids.index(token), token) for ids in (text.tolist() for text in alone) for token in ids]
    end = max(firsts)[1]
    model.generation_config.eos_token_id = [end]
    with acting_adapter(model, responses) as adapter:
        adapter.attach(model)
        settings = {"max_new_tokens": 12, "batch_size": 4, "progress": False}
        found = compare_texts(model, tokenizer, adapter, PROMPTS, **settings)
    assert any(found.base["ended"]) and min(found.base["length"]) > 0
    for n, (prompt, ids) in enumerate(zip(PROMPTS, (text.tolist() for text in alone), strict=True)):
        kept = ids[: ids.index(end)] if end in ids else ids
        rated = [*kept, end] if end in ids else kept
        assert found.base_texts[n] == tokenizer.decode(rated, skip_special_tokens=True)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + rated])).logits[0].double().log_softmax(dim=-1)
        nll = -sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(rated)) / len(rated)
        values = {name: float(found.base[name][n]) for name in METRICS}
        assert values["perplexity"] == pytest.approx(math.exp(nll), rel=1e-4)
        assert (values["length"], values["ended"]) == (len(kept), end in ids)
        assert values["distinct_1"] == len(set(kept)) / len(kept)
    assert found.base_texts != found.steered_texts


def test_an_adapter_that_does_nothing_changes_nothing(model, tokenizer):
    still = FSRLAdapter(make_sae(L_OUT, D_SAE_OUT, seed=2))
    torch.nn.init.zeros_(still.W_a)
    with still.eval().attach(model):
        found = compare_texts(model, tokenizer, still, PROMPTS, max_new_tokens=8, temperature=1.0, progress=False)
    assert found.base_texts == found.steered_texts
    for metric in METRICS:
        each = found.compare(metric)
        assert (each.difference, each.low, each.high, each.n) == (0, 0, 0, len(PROMPTS))


def test_paired_differences_leave_out_what_is_too_short():
    values = {"repetition": np.array([0.1, 0.2, math.nan, 0.4])}, {"repetition": np.array([0.3, math.nan, 0.5, 0.8])}
    found = Coherence([], [], *values).compare("repetition")
    assert (found.n, found.base, found.steered, found.difference) == pytest.approx((2, 0.25, 0.55, 0.3))
    # A mean of two draws from 0.2 and 0.4 is either of them a quarter of the time.
    assert (found.low, found.high) == pytest.approx((0.2, 0.4))
    values[0]["repetition"][0] = math.nan
    with pytest.raises(ValueError, match="1 of 4 prompts have two texts that are long enough for repetition"):
        Coherence([], [], *values).compare("repetition")


def test_prompts_that_cannot_be_continued(model, tokenizer, adapter):
    for prompts, settings, message in (
        ([[1, 5]], {}, "`prompts` are 1; accepted: two or more"),
        ([[1, 5], []], {}, "none of them empty"),
        (PROMPTS, {"max_new_tokens": 124}, "are 132 tokens; accepted: 128"),
    ):
        with pytest.raises(ValueError, match=message):
            compare_texts(model, tokenizer, adapter, prompts, progress=False, **settings)


# Commands


@pytest.fixture(scope="module")
def folder(model, tokenizer, responses, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    model.save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    sae = make_sae(L_OUT, D_SAE_OUT, seed=2)
    sae.save(folder / "sae")
    make_sae(L_OUT, D_SAE_OUT, seed=5).save(folder / "other_sae")
    acting_adapter(model, responses, sae, unused=UNUSED).save(folder / "adapter")
    (folder / "triples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TRIPLES))
    (folder / "labels.json").write_text(json.dumps({str(n): ("style", "topic")[n % 2] for n in range(100)}))
    (folder / "hand.json").write_text(json.dumps({str(n): ("style", "topic")[n < 3] for n in range(8)}))
    (folder / "prompts.txt").write_text("the cat\nis a dog of\nwe see it run\n")
    return folder


@pytest.fixture
def run(folder, capsys, monkeypatch):
    def go(command: str, *arguments: object, **changed: object) -> tuple[int, str]:
        options = {"model": folder / "tiny", "sae": folder / "sae", "adapter": folder / "adapter", "device": "cpu"}
        options |= changed
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        monkeypatch.setattr("sys.argv", ["dspa", "fsrl", "analyse", command, *map(str, arguments), *words])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), " ".join((captured.out + captured.err).split())

    return go


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_commands_write_what_the_library_says(run, folder, model, adapter, responses, used, tmp_path):
    triples = folder / "triples.jsonl"
    code, said = run("usage", triples, out=tmp_path / "usage")
    assert code == 0, said
    rows = table(tmp_path / "usage" / "usage.csv")
    assert [int(row["latent"]) for row in rows] == used.ranked.tolist()
    assert float(table(tmp_path / "usage" / "decay.csv")[0]["tau"]) == pytest.approx(fit_decay(used).tau)

    code, said = run("fraction", triples, "--fraction", 0, "--fraction", 0.5, out=tmp_path / "fraction")
    assert code == 0, said
    base, nothing, half = table(tmp_path / "fraction" / "fraction.csv")
    assert base["loss"] == nothing["loss"] != half["loss"]
    curve = fraction_curve(model, adapter, responses, fractions=(0.5,), progress=False)
    assert float(half["loss"]) == pytest.approx(curve.scores[0].loss, rel=1e-5)

    asked = ("--labels", folder / "labels.json", "--category", "style", "--n-random", 3)
    code, said = run("mask", triples, *asked, out=tmp_path / "mask")
    assert code == 0, said
    assert "50 latents masked (of 50 given" in said
    sets = [row["masked"] for row in table(tmp_path / "mask" / "mask.csv")]
    assert sets == ["base model", "whole adapter", "given", "random 1", "random 2", "random 3"]
    style = mask_effect(model, adapter, responses, range(0, 100, 2), used, n_random=2, progress=False)
    (loss, *_) = table(tmp_path / "mask" / "comparison.csv")
    assert float(loss["given"]) == pytest.approx(style.given.loss, rel=1e-5)

    settings = ("--file", folder / "prompts.txt", "--max-new-tokens", 10)
    code, said = run("coherence", *settings, out=tmp_path / "coherence")
    assert code == 0, said
    assert [row["metric"] for row in table(tmp_path / "coherence" / "coherence.csv")] == list(METRICS)
    assert len(table(tmp_path / "coherence" / "texts.csv")) == 6
    for name in ("usage", "fraction", "mask", "coherence"):
        assert (tmp_path / name / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_shares_without_a_score_of_the_labels_say_so(run, folder, used, tmp_path):
    asked = (folder / "triples.jsonl", "--labels", folder / "labels.json")
    code, said = run("categories", *asked, out=tmp_path / "a")
    assert code == 0, said
    rows = {row["category"]: row for row in table(tmp_path / "a" / "categories.csv")}
    assert list(rows) == ["style", "topic", "unlabelled"]
    assert all(row["label_quality"].startswith("NOT MEASURED") for row in rows.values())
    assert "Quality of the labels: NOT MEASURED" in said
    assert float(rows["topic"]["mass"]) == pytest.approx(float(used.mass[1:100:2].sum() / used.mass.sum()), rel=1e-4)
    assert sum(float(row["active"]) for row in rows.values()) == pytest.approx(1)

    code, said = run("categories", *asked, "--hand", folder / "hand.json", out=tmp_path / "b")
    assert code == 0, said
    (quality,) = table(tmp_path / "b" / "quality.csv")
    # By hand the first three of eight are topics, of which the labels have one; of the five others three.
    assert (int(quality["n"]), float(quality["accuracy"])) == (8, 3 / 8)
    assert "NOT MEASURED" not in said and "accuracy 0.375" in said
    assert (tmp_path / "b" / "categories.png").read_bytes().startswith(b"\x89PNG")


def test_bad_input_is_one_message(run, folder, tmp_path):
    triples, labels = folder / "triples.jsonl", tmp_path / "labels.json"
    labels.write_text(json.dumps({"3": "style", "128": "style", "-1": "topic"}))
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "file").write_text("")
    out = tmp_path / "out"
    for arguments, changed, message in (
        (("usage", triples), {"out": tmp_path / "file"}, "--out is"),
        (("usage", triples), {"sae": folder / "other_sae"}, "was trained with an SAE of fingerprint"),
        (("usage", triples), {"adapter": folder}, "holds no adapter.json"),
        (("fraction", tmp_path / "none.jsonl"), {}, "does not exist; accepted: a JSON Lines file"),
        (("fraction", triples, "--fraction", 2), {}, "accepted: one or more numbers from 0 to 1"),
        (("mask", triples), {}, "What to mask is not told"),
        (("mask", triples, "--latent", 1, "--labels", labels), {}, "What to mask is not told"),
        (("mask", triples, "--labels", folder / "labels.json", "--category", "x"), {}, "accepted: style, topic"),
        (("categories", triples, "--labels", labels), {}, "labels latents 128, -1; accepted: 0 to 127"),
        (("categories", triples, "--labels", tmp_path / "none"), {}, "is not a file"),
        (("coherence", "--file", tmp_path / "empty.txt"), {}, "holds no prompt"),
    ):
        code, said = run(*arguments, **({"out": out} | changed))
        assert code == 2 and message in said and said.count("Error:") == 1, said
