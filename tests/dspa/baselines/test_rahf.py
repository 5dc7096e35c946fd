"""RAHF's two stages on a tiny model: what they train, that they go on after a stop, and what they refuse."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from dspa.baselines.rahf.config import AlignmentConfig, TuningConfig
from dspa.baselines.rahf.instructions import BAD, GOOD, Instructed
from dspa.baselines.rahf.training import align, tune
from dspa.data.triples import Triple
from dspa.errors import PreferenceError, TrainingError
from dspa.testing import make_model, word_tokenizer

from ..support.trainings import TRIPLES, Stopped

pytest.importorskip("peft")

LONG = 512
TUNING = TuningConfig(
    lr=1e-4, batch_size=4, micro_batch_size=2, epochs=1.0, max_length=LONG, checkpoint_every=2, log_every=1
)
ALIGNMENT = AlignmentConfig(
    lr=1e-3, batch_size=4, micro_batch_size=2, max_steps=4, max_length=LONG, checkpoint_every=2, log_every=1
)


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def fresh():
    return make_model("qwen3", initializer_range=0.05, max_position_embeddings=LONG)


def losses(out) -> list[float]:
    history = json.loads((out / "training.json").read_text())["history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def stop_at(monkeypatch, step: int) -> None:
    from dspa.resuming import Steps

    on_step_end = Steps.on_step_end

    def stop(self: Any, args: Any, state: Any, control: Any, **options: Any) -> None:
        if state.global_step == step:
            raise Stopped
        on_step_end(self, args, state, control, **options)

    monkeypatch.setattr(Steps, "on_step_end", stop)


def test_a_triple_is_read_after_both_instructions_and_neither(tokenizer):
    triple = Triple("the cat", " is a dog", " run")
    made = Instructed.of(triple, tokenizer, LONG)
    for prompt, text in ((made.plain, ""), (made.good, f"{GOOD}\n\n"), (made.bad, f"{BAD}\n\n")):
        assert prompt == tokenizer(f"{text}the cat")["input_ids"]
    assert made.chosen == tokenizer(" is a dog")["input_ids"][1:]
    n = max(len(made.good), len(made.bad))
    cut = Instructed.of(triple, tokenizer, n + 2)
    assert (cut.chosen, cut.rejected) == (made.chosen[:2], made.rejected)
    with pytest.raises(
        PreferenceError, match=f"{n} tokens long after RAHF's instruction; accepted: prompts of at most"
    ):
        Instructed.of(triple, tokenizer, n)


def mean_nll(model, prompt: list[int], response: list[int]) -> float:
    """Mean loss per response token of one text alone, by a plain computation."""
    ids = torch.tensor([prompt + response])
    with torch.no_grad():
        logits = model(ids).logits[0]
    return float(cross_entropy(logits[len(prompt) - 1 : -1], ids[0, len(prompt) :]))


@pytest.mark.parametrize("loss", ["clean", "paper"])
def test_the_first_loss_of_stage_1_is_that_of_a_plain_computation(tokenizer, tmp_path, loss):
    """Two triples in one batch of four examples, each text run alone."""
    model, epsilon = fresh(), 0.2
    made = [Instructed.of(triple, tokenizer, LONG) for triple in TRIPLES[:2]]
    rows = [(t.good, t.bad, t.chosen) for t in made] + [(t.bad, t.good, t.rejected) for t in made]
    own = [mean_nll(model, prompt, response) for prompt, _, response in rows]
    opposite = [mean_nll(model, prompt, response) for _, prompt, response in rows]
    lengths = [len(response) for _, _, response in rows]
    if loss == "clean":
        expected = sum(o * n for o, n in zip(own, lengths, strict=True)) / sum(lengths)
        shares = [math.exp(-o) / (math.exp(-o) + math.exp(-p)) for o, p in zip(own, opposite, strict=True)]
        expected += sum(-(1 - epsilon) * math.log(s) - epsilon * math.log(1 - s) for s in shares) / 4
    else:
        sums = [(o * n, p * n) for o, p, n in zip(own, opposite, lengths, strict=True)]
        expected = sum(o + math.log1p(math.exp(o - p)) for o, p in sums) / 4
    config = replace(TUNING, loss=loss, micro_batch_size=4, batch_size=4)
    tune(model, tokenizer, TRIPLES[:2], tmp_path / "out", config=config, progress=False)
    assert losses(tmp_path / "out") == [pytest.approx(expected, rel=1e-4)]


def test_stage_1_lowers_its_loss_by_either_variant(tokenizer, tmp_path):
    for loss in ("clean", "rahf_code_compat"):
        config = replace(TUNING, loss=loss, lr=3e-3, epochs=10.0)
        model = tune(fresh(), tokenizer, TRIPLES, tmp_path / loss, config=config, progress=False)
        logged = losses(tmp_path / loss)
        assert sum(logged[-5:]) < 0.9 * sum(logged[:5]) and not model.training


def test_stage_1_goes_on_after_a_stop(tokenizer, tmp_path, monkeypatch):
    whole = weights(tune(fresh(), tokenizer, TRIPLES, tmp_path / "whole", config=TUNING, progress=False))
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 5)
        tune(fresh(), tokenizer, TRIPLES, tmp_path / "out", config=TUNING, progress=False)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-000000004"]
    assert same(weights(tune(fresh(), tokenizer, TRIPLES, tmp_path / "out", config=TUNING, progress=False)), whole)
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")
    # A finished one is loaded.
    assert same(weights(tune(fresh(), tokenizer, TRIPLES, tmp_path / "out", config=TUNING, progress=False)), whole)
    with pytest.raises(TrainingError, match=r"epsilon: 0\.2 there, 0.1 now"):
        config = replace(TUNING, epsilon=0.1)
        tune(fresh(), tokenizer, TRIPLES, tmp_path / "out", config=config, progress=False)


def lora_weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in weights(model).items() if "lora_" in name}


def mean_direction(model, tokenizer, config: AlignmentConfig, targets: list[int]) -> float:
    """Mean length of `h_good - h_bad` over layers and response tokens, each text run alone."""
    draws = torch.randint(2, (2,), generator=torch.Generator().manual_seed(config.seed)).tolist()
    lengths = []
    for triple, is_chosen in zip(TRIPLES[:2], draws, strict=True):
        made = Instructed.of(triple, tokenizer, LONG)
        response = made.chosen if is_chosen else made.rejected
        with torch.no_grad():
            good, bad = (
                model(torch.tensor([prompt + response]), output_hidden_states=True).hidden_states
                for prompt in (made.good, made.bad)
            )
        lengths += [(good[n][0, -len(response) :] - bad[n][0, -len(response) :]).norm(dim=-1) for n in targets]
    return float(torch.cat(lengths).mean())


def test_stage_2_begins_at_alpha_times_the_direction_and_falls(tokenizer, tmp_path):
    """Two triples in one batch, fitted until little is left of the distance."""
    config = replace(ALIGNMENT, targets=(1, 3), dropout=0.0, batch_size=2, max_steps=400, lr=1e-2, rank=32)
    model = fresh()
    before, start = weights(model), mean_direction(model, tokenizer, config, [1, 3])
    adapted = align(model, tokenizer, TRIPLES[:2], tmp_path / "out", config=config, progress=False)
    logged = losses(tmp_path / "out")
    assert logged[0] == pytest.approx(5 * start, rel=1e-4)
    assert logged[-1] < 0.5 * logged[0]
    assert not adapted.training
    assert same(weights(adapted.unload()), before)


def test_the_lora_of_the_last_target_stays_at_0(tokenizer, tmp_path):
    config = replace(ALIGNMENT, targets=(1, 2))
    adapted = align(fresh(), tokenizer, TRIPLES, tmp_path / "out", config=config, progress=False)
    B = {name: tensor for name, tensor in lora_weights(adapted).items() if "lora_B" in name}
    layers = {int(name.split("layers.")[1].split(".")[0]) for name in B}
    assert layers == {0, 1, 2} and all("q_proj" in name or "v_proj" in name for name in B)
    for name, tensor in B.items():
        assert bool((tensor == 0).all()) is ("layers.2." in name), name


@pytest.mark.parametrize("loss", ["norm", "squared", "rahf_code_compat"])
def test_stage_2_goes_on_after_a_stop(tokenizer, tmp_path, monkeypatch, loss):
    """Dropout draws the same again."""
    config = replace(ALIGNMENT, loss=loss)

    def run(name: str):
        return align(fresh(), tokenizer, TRIPLES, tmp_path / name, config=config, progress=False)

    whole = lora_weights(run("whole"))
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 3)
        run("out")
    assert same(lora_weights(run("out")), whole)
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")
    assert same(lora_weights(run("out")), whole)


def test_a_failed_stage_2_leaves_the_model_as_it_was(tokenizer, tmp_path, monkeypatch):
    model = fresh()
    before = weights(model)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 1)
        align(model, tokenizer, TRIPLES, tmp_path / "out", config=ALIGNMENT, progress=False)
    assert same(weights(model), before) and all(p.requires_grad for p in model.parameters())


def test_steps_and_layers_by_default():
    config = AlignmentConfig()
    assert [config.steps(n) for n in (10, 250, 22_500, 61_000)] == [1, 5, 450, 450]
    assert config.target_layers(26) == (8, 10, 12, 14)
    assert config.target_layers(32) == (10, 12, 14, 16, 18)
    with pytest.raises(ValueError, match=r"`targets`.*layers from 1 to 3"):
        replace(config, targets=(1, 4)).target_layers(4)


def test_too_few_examples_are_refused(tokenizer, tmp_path):
    with pytest.raises(TrainingError, match=r"number of examples.*2.*a batch \(4\) or more"):
        tune(fresh(), tokenizer, TRIPLES[:1], tmp_path / "out", config=TUNING, progress=False)
