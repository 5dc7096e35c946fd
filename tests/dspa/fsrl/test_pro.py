"""PRO through the trainers: SimPO's equal for two responses, its own formula for more, and its held-out figures."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dspa.data.tokens import response_tokens
from dspa.data.triples import load_rankings
from dspa.errors import PreferenceError, TrainingError
from dspa.fsrl import FSRLAdapter, FSRLConfig, held_out_rankings, read_held_out, train_sweep
from dspa.testing import make_model, make_sae, word_tokenizer

from ...rounding import PASS, rounding
from ..support.trainings import (
    HELD_OUT_RANKINGS,
    RANKINGS,
    TINY,
    TRIPLES,
    data_of,
    logged,
    new_adapter,
    run,
)

pytest.importorskip("trl")

PRO = replace(TINY, loss="pro")
# Log-probabilities per token of the tiny models are above -7.
LEAST = 7.0


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


@pytest.fixture
def model() -> PreTrainedModel:
    return make_model("qwen3")


@pytest.mark.parametrize("gap", [1.0, 2.0])
def test_two_responses_are_simpo_without_a_margin(tokenizer, tmp_path, gap):
    """The losses, the gradients' norms and the weights after two steps, with SimPO's beta as the gap in reward."""
    simpo = replace(TINY, beta=gap, gamma_beta_ratio=0.0, warmup=0.0, max_steps=2)
    pro = replace(PRO, sft_weight=0.0, warmup=0.0, max_steps=2)
    pairs = [{"prompt": t.prompt, "responses": [t.rejected, t.chosen], "rewards": [3.0, 3.0 + gap]} for t in TRIPLES]
    (one, first), (other, second) = (
        run(make_model("qwen3"), tokenizer, tmp_path / config.loss, config, triples=data, eval_triples=None)
        for config, data in ((simpo, TRIPLES), (pro, pairs))
    )
    apart = 2 * rounding(PASS, gap * 2 * LEAST)
    for name in ("loss", "preference_loss", "rewards/accuracies"):
        assert logged(second, name) == pytest.approx(logged(first, name), abs=apart), name
    # Adam's first steps hardly depend on the size of a gradient, which its norm shows.
    assert logged(second, "grad_norm") == pytest.approx(logged(first, "grad_norm"), rel=1e-4)
    moved = [(a - b).detach().abs().max() for a, b in zip(one.parameters(), new_adapter().parameters(), strict=True)]
    assert min(map(float, moved)) > 0.5 * TINY.lr
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        # Where a gradient is near 0, its ratio to its own size is not.
        assert (a - b).abs().float().quantile(0.99) < 1e-3 * TINY.lr


def by_hand(
    model: PreTrainedModel, tokenizer: Any, adapter: FSRLAdapter, rows: list[dict[str, Any]], weight: float, plain: bool
) -> dict[str, float]:
    """Losses and figures of rankings, from responses that run alone and the published loop."""
    ranked, tuned, best, pairs, margins, l1 = [], [], [], [], [], list[torch.Tensor]()
    for row in rows:
        sums, scores = [], []
        (example,) = load_rankings([row])
        prompt, *responses = response_tokens(example, tokenizer)
        for ids in responses:
            with adapter.recording() as moves, torch.no_grad():
                logps = model(input_ids=torch.tensor([prompt + ids])).logits[0].double().log_softmax(dim=-1)
            places = torch.arange(len(prompt), len(prompt) + len(ids))
            values = logps[places - 1, torch.tensor(ids)]
            l1.append(moves.l1[0][0, places])
            sums.append(float(values.sum()))
            scores.append(float(values.mean()))
        order = sorted(range(len(scores)), key=lambda i: -row["rewards"][i])
        r, R = [scores[i] for i in order], [row["rewards"][i] for i in order]
        loss = 0.0
        for k in range(len(r) - 1):
            T = {i: float(R[k] > R[i]) if plain else R[k] - R[i] for i in range(k + 1, len(r))}
            own = r[k] * max(T.values())
            loss += math.log(1e-10 + math.exp(own) + sum(math.exp(r[i] * T[i]) for i in T)) - own
        ranked.append(loss)
        tuned.append(-weight * (len(r) - 1) ** 2 * sums[order[0]])
        best.append(R[r.index(max(r))] == R[0])
        right = [r[i] > r[j] for i in range(len(r)) for j in range(i) if R[i] > R[j]]
        right += [r[j] > r[i] for i in range(len(r)) for j in range(i) if R[j] > R[i]]
        pairs.append(sum(right) / len(right))
        margins.append(r[0] - sum(r[1:]) / (len(r) - 1))
    n = len(rows)
    figures = {"ranking_loss": ranked, "rewards/accuracies": best, "rewards/pairs": pairs, "rewards/margins": margins}
    means = {name: sum(values) / n for name, values in figures.items()}
    return means | {"preference_loss": (sum(ranked) + sum(tuned)) / n, "l1": float(torch.cat(l1).mean())}


@pytest.mark.parametrize(("weight", "plain"), [(0.05, False), (0.0, False), (0.2, True)])
def test_the_loss_is_the_formula(model, tokenizer, tmp_path, weight, plain):
    """Rankings of two to four responses share a batch; with a rate near 0, the adapter stays as it came."""
    config = replace(PRO, lr=1e-30, batch_size=15, micro_batch_size=15, max_steps=1, sft_weight=weight, plain=plain)
    adapter = new_adapter(FSRLConfig(l1=0.3, initial_threshold=0.05))
    with torch.no_grad():
        adapter.W_a.mul_(10)
    _, record = run(model, tokenizer, tmp_path / "out", config, adapter, triples=RANKINGS, eval_triples=RANKINGS)
    with adapter.attach(model):
        expected = by_hand(model, tokenizer, adapter, RANKINGS, weight, plain)
    expected["loss"] = expected["preference_loss"] + 0.3 * expected["l1"]
    # Up to three terms of exponents up to 2.5 LEAST, and 13 tokens with a weight of 9 or less.
    apart = rounding(PASS, 3 * 2 * 2.5 * LEAST + 9 * weight * 13 * LEAST) + rounding(PASS, 8) * expected["l1"]
    for prefix in ("", "eval_"):
        for name, value in expected.items():
            assert logged(record, prefix + name) == pytest.approx([value], abs=apart), prefix + name


@pytest.mark.parametrize("n_held_out", [1, 5])
def test_held_out_figures(model, tokenizer, tmp_path, n_held_out):
    """Those of the record are those of `held_out_rankings`, by hand, and the last ones in the log."""
    rows = HELD_OUT_RANKINGS[:n_held_out]
    adapter, record = run(model, tokenizer, tmp_path / "out", PRO, triples=RANKINGS, eval_triples=rows)
    figures = read_held_out(tmp_path / "out")
    with adapter.attach(model):
        expected = by_hand(model, tokenizer, adapter, rows, 0.05, False)
        measured = held_out_rankings(model, tokenizer, rows, adapter, max_length=64, progress=False)
    assert figures == measured and figures.n_rankings == n_held_out
    apart = rounding(PASS, 3 * 2 * 2.5 * LEAST)
    assert figures.pro_loss == pytest.approx(expected["ranking_loss"], abs=apart)
    assert (figures.accuracy, figures.pair_accuracy) == pytest.approx(
        (expected["rewards/accuracies"], expected["rewards/pairs"])
    )
    assert figures.margin == pytest.approx(expected["rewards/margins"], abs=apart)
    assert figures.l1 == pytest.approx(expected["l1"], rel=rounding(PASS, 8))
    for name, value in (("ranking_loss", figures.pro_loss), ("rewards/pairs", figures.pair_accuracy)):
        assert logged(record, f"eval_{name}")[-1] == pytest.approx(value, abs=apart)
    base = held_out_rankings(model, tokenizer, rows, progress=False)
    assert (base.l0, base.l1) == (0, 0) and base.pro_loss != figures.pro_loss


def test_what_is_recorded(model, tokenizer, tmp_path):
    _, record = run(model, tokenizer, tmp_path / "out", PRO, **data_of("pro"))
    settings = record["settings"]
    assert (settings["loss"], settings["sft_weight"], settings["plain"]) == ("pro", 0.05, False)
    assert not settings.keys() & {"beta", "gamma_beta_ratio"}
    assert record["data"] == {"n_rankings": 15, "n_full": 0} and record["costs"]["n_triples"] == 15
    others = [{**RANKINGS[0], "rewards": [1.0, 0.0]}, *RANKINGS[1:]]
    with pytest.raises(TrainingError, match=r"data: '.*' there, '.*' now"):
        run(model, tokenizer, tmp_path / "out", PRO, triples=others, eval_triples=HELD_OUT_RANKINGS)


def test_refusals(model, tokenizer, tmp_path):
    with pytest.raises(PreferenceError, match=r"ranking 1 is without 'score_chosen' and 'score_rejected'.*`plain`"):
        run(model, tokenizer, tmp_path / "out", PRO)
    with pytest.raises(TrainingError, match=r"The number of rankings is 3; accepted: a batch \(4\) or more"):
        run(model, tokenizer, tmp_path / "out", PRO, triples=RANKINGS[:3], eval_triples=None)


def test_triples_without_scores_in_the_plain_form(model, tokenizer, tmp_path):
    _, record = run(model, tokenizer, tmp_path / "out", replace(PRO, plain=True))
    assert record["held_out"]["n_rankings"] == 5 and record["data"]["n_rankings"] == 15


def test_a_sweep(model, tokenizer, tmp_path):
    sweep = train_sweep(
        *(model, tokenizer, RANKINGS, [make_sae(1, 128, seed=2)], [FSRLConfig(l1=0.0), FSRLConfig(l1=5.0)]),
        tmp_path / "sweep",
        eval_triples=HELD_OUT_RANKINGS,
        config=PRO,
        progress=False,
    )
    assert sweep.base == held_out_rankings(model, tokenizer, HELD_OUT_RANKINGS, max_length=64, progress=False)
    assert (tmp_path / "sweep" / "sweep.csv").read_text().startswith("layer,activation,lambda,n_rankings,pro_loss,")
    assert (tmp_path / "sweep" / "sweep.png").read_bytes().startswith(b"\x89PNG")
