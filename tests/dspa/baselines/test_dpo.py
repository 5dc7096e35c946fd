"""DPO on a tiny model: its loss by a plain computation, what it trains, and that it goes on after a stop."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dspa.baselines.dpo.config import DPOSettings
from dspa.baselines.dpo.training import train_dpo
from dspa.data.triples import Triple, load_triples
from dspa.errors import ModelError, TrainingError
from dspa.testing import make_model, word_tokenizer

from ..support.trainings import TEMPLATE, TRIPLES, Stopped, conversations

pytest.importorskip("trl")

TINY = DPOSettings(
    lr=1e-3, batch_size=4, micro_batch_size=2, epochs=2.0, max_length=64, checkpoint_every=2, log_every=1
)
MODES = pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])


@pytest.fixture(scope="module")
def tokenizer():
    return with_end_token()


def with_end_token():
    tokenizer = word_tokenizer()
    tokenizer.eos_token = "<unk>"
    return tokenizer


def fresh(**config: Any):
    return make_model("qwen3", initializer_range=0.05, **config)


def losses(out: Path) -> list[float]:
    history = json.loads((out / "training.json").read_text())["history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def stop_at(monkeypatch, step: int) -> None:
    from dspa.resuming import Steps

    on_step_end = Steps.on_step_end

    def stop(self: Any, args: Any, state: Any, control: Any, **options: Any) -> None:
        if state.global_step == step:
            raise Stopped
        on_step_end(self, args, state, control, **options)

    monkeypatch.setattr(Steps, "on_step_end", stop)


def weights(model) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def log_probability(model, tokenizer, prompt: str, response: str) -> float:
    """Sum over the tokens of a response with its end token, each text run alone."""
    whole = tokenizer(prompt + response + tokenizer.eos_token)["input_ids"]
    start = len(tokenizer(prompt)["input_ids"])
    ids = torch.tensor([whole])
    with torch.no_grad():
        logp = model(ids).logits[0].double().log_softmax(dim=-1)
    return sum(float(logp[place - 1, whole[place]]) for place in range(start, len(whole)))


def margins(model, tokenizer, triples: list[Triple]) -> list[float]:
    texts = [(str(t.prompt), str(t.chosen), str(t.rejected)) for t in triples]
    score = lambda prompt, response: log_probability(model, tokenizer, prompt, response)  # noqa: E731
    return [score(prompt, chosen) - score(prompt, rejected) for prompt, chosen, rejected in texts]


@MODES
def test_the_first_loss_is_log_2_and_the_second_that_of_a_plain_computation(tokenizer, tmp_path, monkeypatch, lora):
    """Both steps read all of four triples, so their order does not matter."""
    triples = TRIPLES[:4]
    config = replace(TINY, lora=lora, checkpoint_every=1, beta=0.3, lr=1e-2)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 2)
        train_dpo(fresh(), tokenizer, triples, tmp_path / "one", config=config, progress=False)
    (checkpoint,) = (tmp_path / "one").glob("checkpoint-*")
    if lora:
        from peft import PeftModel

        after_one = PeftModel.from_pretrained(fresh(), str(checkpoint))
    else:
        after_one = type(fresh()).from_pretrained(checkpoint)
    train_dpo(fresh(), tokenizer, triples, tmp_path / "two", config=config, progress=False)
    before, now = margins(fresh(), tokenizer, triples), margins(after_one.eval(), tokenizer, triples)
    expected = [math.log1p(math.exp(-0.3 * (m - m0))) for m, m0 in zip(now, before, strict=True)]
    logged = losses(tmp_path / "two")
    assert logged[0] == pytest.approx(math.log(2), abs=1e-6)
    assert logged[1] == pytest.approx(sum(expected) / 4, rel=1e-4) and logged[1] < 0.99 * logged[0]


@MODES
def test_margins_rise(tokenizer, tmp_path, lora):
    model = fresh()
    before, start = margins(model, tokenizer, TRIPLES), weights(model)
    config = replace(TINY, lora=lora, epochs=4.0, lr=3e-3)
    trained = train_dpo(model, tokenizer, TRIPLES, tmp_path / "out", config=config, progress=False)
    rises = [now - was for now, was in zip(margins(trained, tokenizer, TRIPLES), before, strict=True)]
    assert sum(rise > 0 for rise in rises) >= 14 and not trained.training
    if lora:
        # TRL's copy of the LoRA is gone.
        assert list(trained.peft_config) == ["default"] and not (tmp_path / "out" / "ref").exists()
        assert same(weights(trained.unload()), start)


@MODES
def test_it_goes_on_after_a_stop_and_leaves_nothing_of_the_trainer(tokenizer, tmp_path, monkeypatch, lora):
    config = replace(TINY, lora=lora, gradient_checkpointing=lora)

    def run(name: str):
        return train_dpo(
            fresh(attention_dropout=0.5), tokenizer, TRIPLES, tmp_path / name, config=config, progress=False
        )

    trained = run("whole")
    whole, inner = weights(trained), trained.get_base_model() if lora else trained
    assert "forward" not in vars(inner) and not inner.is_gradient_checkpointing
    assert (
        inner.config.pad_token_id == fresh().config.pad_token_id and tokenizer.pad_token == word_tokenizer().pad_token
    )
    assert {m.attention_dropout for m in inner.modules() if hasattr(m, "attention_dropout")} == {0.5}
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 5)
        run("out")
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-000000004"]
    assert same(weights(run("out")), whole)
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")
    # A finished one is loaded.
    assert same(weights(run("out")), whole)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files >= {"training.json", "adapter_model.safetensors" if lora else "model.safetensors"}
    with pytest.raises(TrainingError, match=r"beta: 0\.1 there, 0\.2 now"):
        train_dpo(fresh(), tokenizer, TRIPLES, tmp_path / "out", config=replace(config, beta=0.2), progress=False)


@pytest.mark.parametrize("kind", ["text", "conversation"])
def test_the_trainer_reads_the_ids_that_trl_makes_of_the_triples(tmp_path, monkeypatch, kind):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from dspa.baselines.dpo.trainer import BaselineDPOTrainer

    tokenizer = with_end_token()
    tokenizer.chat_template = TEMPLATE
    names = ("prompt", "chosen", "rejected")
    rows = [{name: getattr(triple, name) for name in names} for triple in TRIPLES[:4]]
    rows = rows if kind == "text" else conversations(TRIPLES[:4])
    seen = []
    collate = BaselineDPOTrainer.collate
    monkeypatch.setattr(BaselineDPOTrainer, "collate", staticmethod(lambda rows: seen.extend(rows) or collate(rows)))
    train_dpo(fresh(), tokenizer, rows, tmp_path / "out", config=replace(TINY, epochs=1.0), progress=False)

    args = DPOConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False, max_length=None)
    theirs = DPOTrainer(fresh(), fresh(), args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    ids = lambda row: tuple(tuple(row[f"{name}_ids"]) for name in names)  # noqa: E731
    assert len(seen) == 4 and {ids(row) for row in seen} == {ids(row) for row in theirs.train_dataset}
    assert len(list(load_triples(rows))) == 4


def test_what_is_refused(tokenizer, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(TrainingError, match=r"number of examples.*3.*a batch \(4\) or more"):
        train_dpo(fresh(), tokenizer, TRIPLES[:3], out, config=TINY, progress=False)
    with pytest.raises(ModelError, match="training mode"):
        train_dpo(fresh().train(), tokenizer, TRIPLES, out, config=TINY, progress=False)
    model = fresh()
    model.lm_head = torch.nn.Sequential(model.lm_head)
    model.lm_head.weight = model.lm_head[0].weight
    with pytest.raises(ModelError, match="output layer"):
        train_dpo(model, tokenizer, TRIPLES, out, config=TINY, progress=False)
