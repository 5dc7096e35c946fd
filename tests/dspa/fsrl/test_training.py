"""Adapters trained by TRL: the loss, what is left of the model, that a stopped training goes on, several processes."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid

from dspa.cli import main
from dspa.cli.tables import console
from dspa.data.tokens import tokenize_triple
from dspa.data.triples import Triple, load_triples
from dspa.errors import ModelError, PreferenceError, TrainingError
from dspa.fsrl import (
    FSRLAdapter,
    FSRLConfig,
    TrainingConfig,
    held_out,
    read_held_out,
    score_triples,
    train,
    train_sweep,
)
from dspa.testing import D_SAE_OUT, ENGLISH, L_OUT, make_model, make_sae, word_tokenizer
from dspa.training_folder import TrainingFolder

pytest.importorskip("trl")

TINY = TrainingConfig(
    lr=5e-3,
    batch_size=4,
    micro_batch_size=2,
    max_steps=6,
    max_length=64,
    checkpoint_every=2,
    eval_every=3,
    log_every=1,
    seed=3,
)
ADAPTER = FSRLConfig(l1=0.02)


def sentence(n: int, least: int = 3) -> str:
    g = torch.Generator().manual_seed(n)
    length = int(torch.randint(least, 12, (), generator=g))
    return " ".join(ENGLISH[i] for i in torch.randint(len(ENGLISH), (length,), generator=g).tolist())


TRIPLES = [Triple(sentence(n), f"{sentence(n + 100)} cat", f"{sentence(n + 200)} dog") for n in range(15)]
HELD_OUT = [Triple(sentence(n), f"{sentence(n + 100)} cat", f"{sentence(n + 200)} dog") for n in range(15, 20)]


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture
def model():
    return make_model("qwen3")


def new_adapter(config: FSRLConfig = ADAPTER, dtype: torch.dtype = torch.float32) -> FSRLAdapter:
    return FSRLAdapter(make_sae(L_OUT, D_SAE_OUT, seed=2).to(dtype=dtype), config)


def run(model, tokenizer, out: Path, config: TrainingConfig = TINY, adapter: FSRLAdapter | None = None, **options: Any):
    """A training's adapter and log."""
    adapter = adapter or new_adapter()
    options = {"triples": TRIPLES, "eval_triples": HELD_OUT, "progress": False} | options
    trained = train(model, tokenizer, options.pop("triples"), adapter, out, config=config, **options)
    assert trained is adapter
    return adapter, json.loads((out / "training.json").read_text())


def logged(record: dict[str, Any], name: str) -> list[float]:
    return [entry[name] for entry in record["history"] if name in entry]


def same_weights(one: FSRLAdapter, other: FSRLAdapter) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


# The loss


def by_hand(model, tokenizer, adapter: FSRLAdapter, triples: list[Triple], loss: str) -> tuple[float, float, float]:
    """The preference loss, L1 and L0 of one batch, from rows that run alone."""

    def response(triple: Triple, field: str) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = tokenize_triple(triple, tokenizer)
        ids, start = tokens.prompt + getattr(tokens, field), len(tokens.prompt)
        with torch.no_grad():
            found = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(dim=-1)
        places = torch.arange(start, len(ids))
        return found[places - 1, torch.tensor(ids)[places]], places

    losses, l1, l0 = [], [], []
    for triple in triples:
        scores = {}
        for field in ("chosen", "rejected"):
            with adapter.recording() as moves:
                logps, places = response(triple, field)
            with adapter.disabled():
                reference, _ = response(triple, field)
            l1.append(moves.l1[0][0, places])
            l0.append(moves.l0[0][0, places])
            scores[field] = logps.mean() if loss == "simpo" else (logps - reference).sum()
        margin = scores["chosen"] - scores["rejected"]
        losses.append(-logsigmoid(10 * margin - 5 if loss == "simpo" else 0.1 * margin))
    return float(torch.stack(losses).mean()), float(torch.cat(l1).mean()), float(torch.cat(l0).double().mean())


@pytest.mark.parametrize("loss", ["simpo", "dpo"])
def test_the_loss_is_the_formula(model, tokenizer, tmp_path, loss):
    """With a rate of almost nothing, every batch is of the adapter as it came; a batch of all triples is one batch."""
    config = replace(TINY, loss=loss, lr=1e-30, batch_size=15, micro_batch_size=15, max_steps=1)
    adapter = new_adapter(FSRLConfig(l1=0.3, initial_threshold=0.05))
    with torch.no_grad():
        adapter.W_a.mul_(10)
    _, record = run(model, tokenizer, tmp_path / "out", config, adapter, eval_triples=TRIPLES)
    with adapter.attach(model):
        preference, l1, l0 = by_hand(model, tokenizer, adapter, TRIPLES, loss)
    assert l1 > 0.05 and l0 > 1
    for prefix in ("", "eval_"):
        (total,) = logged(record, f"{prefix}loss")
        (bare,) = logged(record, f"{prefix}preference_loss")
        assert bare == pytest.approx(preference, rel=1e-4)
        assert total == pytest.approx(preference + 0.3 * l1, rel=1e-4)
        assert logged(record, f"{prefix}l1") == pytest.approx([l1], rel=1e-4)
        assert logged(record, f"{prefix}l0") == pytest.approx([l0], rel=1e-4)
        assert (
            len(logged(record, f"{prefix}rewards/accuracies")) == len(logged(record, f"{prefix}rewards/margins")) == 1
        )


def test_the_penalty_has_a_gradient(model, tokenizer, tmp_path):
    weights = {}
    for l1 in (0.0, 5.0):
        _, record = run(
            model, tokenizer, tmp_path / str(l1), replace(TINY, max_steps=20), new_adapter(FSRLConfig(l1=l1))
        )
        weights[l1] = logged(record, "l1")[-1]
    assert weights[5.0] < 0.2 * weights[0.0]


@pytest.mark.parametrize("loss", ["simpo", "dpo"])
@pytest.mark.parametrize("activation", ["soft_threshold", "relu", "jumprelu"])
def test_training_learns(model, tokenizer, tmp_path, loss, activation):
    config = replace(TINY, loss=loss, max_steps=30, log_every=10)
    adapter, record = run(model, tokenizer, tmp_path / "out", config, new_adapter(FSRLConfig(activation, l1=1e-3)))
    losses = logged(record, "preference_loss")
    assert losses[-1] < 0.8 * losses[0]
    start = new_adapter(FSRLConfig(activation, l1=1e-3))
    assert all(not torch.equal(a, b) for a, b in zip(adapter.parameters(), start.parameters(), strict=True))
    assert logged(record, "rewards/accuracies")[-1] > 0.9 and logged(record, "l0")[-1] > 1


def test_thresholds_stay_where_they_have_a_gradient(model, tokenizer, tmp_path):
    adapter, _ = run(model, tokenizer, tmp_path / "out", replace(TINY, lr=0.1), new_adapter(FSRLConfig(l1=0.0)))
    assert float(adapter.threshold.min()) == 0 < float(adapter.threshold.max())


# Files, and figures on held-out triples


def test_what_is_written(model, tokenizer, tmp_path):
    adapter, record = run(model, tokenizer, tmp_path / "out")
    held = {path.name for path in (tmp_path / "out").iterdir()}
    assert held == {"adapter.json", "adapter.safetensors", "training.json"}
    assert same_weights(FSRLAdapter.load(tmp_path / "out", adapter.sae), adapter)
    assert not any(p.requires_grad for p in adapter.parameters()) and not adapter.training
    assert record["settings"]["adapter_l1"] == 0.02 and record["settings"]["sae"] == adapter.sae.fingerprint
    assert record["data"] == {"n_triples": 15, "n_full": 0}
    assert [entry["step"] for entry in record["history"] if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert [entry["step"] for entry in record["history"] if "eval_loss" in entry] == [3, 6]
    with adapter.attach(model):
        assert held_out(model, tokenizer, HELD_OUT, adapter, max_length=64, progress=False) == read_held_out(
            tmp_path / "out"
        )


def test_held_out_figures(model, tokenizer, tmp_path):
    """Of all tokens of all batches, whatever their length."""
    adapter, record = run(model, tokenizer, tmp_path / "out", replace(TINY, micro_batch_size=1, eval_every=6))
    found = read_held_out(tmp_path / "out")
    with adapter.attach(model):
        loss, l1, l0 = by_hand(model, tokenizer, adapter, HELD_OUT, "simpo")
    assert (found.simpo_loss, found.l1, found.l0) == pytest.approx((loss, l1, l0), rel=1e-4)
    # TRL's own evaluation is a mean over batches, here of one triple each.
    assert found.simpo_loss == pytest.approx(logged(record, "eval_preference_loss")[-1], rel=1e-4)
    assert found.accuracy == pytest.approx(logged(record, "eval_rewards/accuracies")[-1])
    assert 10 * found.margin == pytest.approx(logged(record, "eval_rewards/margins")[-1], rel=1e-4)
    base = held_out(model, tokenizer, HELD_OUT, progress=False)
    assert (base.l0, base.l1) == (0, 0) and base.simpo_loss != found.simpo_loss


def test_responses_are_cut_and_counted(model, tokenizer, tmp_path):
    _, record = run(model, tokenizer, tmp_path / "out", replace(TINY, max_length=16))
    lengths = [
        len(tokens.prompt) + len(ids)
        for tokens in (tokenize_triple(t, tokenizer) for t in TRIPLES)
        for ids in (tokens.chosen, tokens.rejected)
    ]
    assert record["data"]["n_full"] == sum(length >= 16 for length in lengths) > 0
    assert record["settings"]["max_length"] == 16


# What is left of the model


def state_of(model, tokenizer) -> dict[str, Any]:
    """What a caller can see of a model, hooks by their number."""
    return {
        "modules": [name for name, _ in model.named_modules()],
        "training": [module.training for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "dropout": [vars(module).get("p", vars(module).get("attention_dropout")) for module in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "checkpointing": [getattr(module, "gradient_checkpointing", None) for module in model.modules()],
        "config": model.config.to_dict(),
        "generation_config": model.generation_config.to_dict(),
        "pad_token": tokenizer.pad_token,
    }


@pytest.mark.parametrize("loss", ["simpo", "dpo"])
@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_it_was(tokenizer, tmp_path, monkeypatch, loss, family, fails):
    model, tokenizer = make_model(family), word_tokenizer()
    tokenizer.pad_token, tokenizer.eos_token = None, "tree"
    model.config.pad_token_id = model.generation_config.pad_token_id = None
    # Some that a caller had frozen himself.
    for parameter in list(model.parameters())[::3]:
        parameter.requires_grad_(False)
    before, tensors = state_of(model, tokenizer), {k: v.clone() for k, v in model.state_dict().items()}
    adapter, config = new_adapter(), replace(TINY, loss=loss, gradient_checkpointing=True)
    start = [p.clone() for p in adapter.parameters()]
    if fails:
        from dspa.fsrl.trainers import AdapterTrainer

        def full(*_: Any) -> None:
            raise OSError("disk full")

        monkeypatch.setattr(AdapterTrainer, "_save_checkpoint", full)
        with pytest.raises(OSError, match="disk full"):
            run(model, tokenizer, tmp_path / "out", config, adapter)
        assert all(torch.equal(a, b) for a, b in zip(start, adapter.parameters(), strict=True))
    else:
        run(model, tokenizer, tmp_path / "out", config, adapter)
        assert not any(torch.equal(a, b) for a, b in zip(start, adapter.parameters(), strict=True))
    assert state_of(model, tokenizer) == before
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())
    assert list(model.state_dict()) == list(tensors)
    model.save_pretrained(tmp_path / "model")


@pytest.mark.parametrize(("family", "name"), [("gpt2", "p"), ("qwen3", "attention_dropout")])
def test_no_dropout(tmp_path, tokenizer, family, name):
    """The base model is frozen, which a layer that drops something at random would not be."""
    model = make_model(family)
    base = score_triples(model, tokenizer, TRIPLES, progress=False)
    dropping = [module for module in model.modules() if isinstance(getattr(module, name, None), float)]
    for module in dropping:
        setattr(module, name, 0.5)
    config = replace(TINY, lr=1e-30, batch_size=15, micro_batch_size=15, max_steps=1)
    _, record = run(model, tokenizer, tmp_path / "out", config)
    assert logged(record, "preference_loss") == pytest.approx([base.loss], rel=1e-3)
    assert dropping and all(getattr(module, name) == 0.5 for module in dropping)


# Going on


# Checkpoints come between lines of the log.
LONGER = replace(TINY, max_steps=9, log_every=3)


@pytest.fixture(scope="module")
def whole(tokenizer, tmp_path_factory):
    """Trainings that nothing stopped, by their loss."""
    configs = {loss: replace(LONGER, loss=loss) for loss in ("simpo", "dpo")}
    out = tmp_path_factory.mktemp("whole")
    return {loss: run(make_model("qwen3"), tokenizer, out / loss, config) for loss, config in configs.items()}


class Stopped(Exception):
    pass


def stop_at(monkeypatch, step: int) -> None:
    from dspa.fsrl.trainers import Steps

    on_step_end = Steps.on_step_end

    def stop(self, args, state, control, **options):
        if state.global_step == step:
            raise Stopped
        on_step_end(self, args, state, control, **options)

    monkeypatch.setattr(Steps, "on_step_end", stop)


@pytest.mark.parametrize(("loss", "step"), [("simpo", 2), ("simpo", 5), ("simpo", 8), ("dpo", 5)])
def test_a_stopped_training_goes_on(model, tokenizer, tmp_path, monkeypatch, whole, loss, step):
    """Over the end of an epoch too, of 15 triples; with the adapter that failed, or a new one."""
    config, adapter = replace(LONGER, loss=loss), new_adapter()
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, step)
        run(model, tokenizer, tmp_path / "out", config, adapter)
    held = [path.name for path in (tmp_path / "out").glob("checkpoint-*")]
    assert held == ([f"checkpoint-{(step - 1) // 2 * 2:09d}"] if step > 2 else [])
    adapter, record = run(model, tokenizer, tmp_path / "out", config, adapter if step == 5 else None)
    assert same_weights(adapter, whole[loss][0])
    assert record == whole[loss][1]


def test_a_training_that_is_stopped_after_its_last_step(model, tokenizer, tmp_path, monkeypatch, whole):
    """Amid its held-out figures."""
    from dspa.fsrl import training

    def stop(*_: Any, **__: Any) -> None:
        raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(training, "held_out", stop)
        run(model, tokenizer, tmp_path / "out", LONGER)
    adapter, record = run(model, tokenizer, tmp_path / "out", LONGER)
    assert same_weights(adapter, whole["simpo"][0])
    assert record == whole["simpo"][1]


def test_a_checkpoint_holds_no_model(model, tokenizer, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 3)
        run(model, tokenizer, tmp_path / "out")
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*[0-9]")
    held = {path.name: path.stat().st_size for path in checkpoint.iterdir()}
    assert sorted(held) == [
        *("adapter.json", "adapter.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json")
    ]
    n_bytes = 4 * sum(p.numel() for p in new_adapter().parameters())
    assert held["adapter.safetensors"] < n_bytes + 1000 and held["optimizer.pt"] < 2 * n_bytes + 10_000


def test_what_is_finished_is_loaded(model, tokenizer, tmp_path):
    adapter, _ = run(model, tokenizer, tmp_path / "out")
    content = (tmp_path / "out" / "training.json").read_bytes()
    again, _ = run(model, tokenizer, tmp_path / "out")
    assert same_weights(again, adapter) and (tmp_path / "out" / "training.json").read_bytes() == content
    with pytest.raises(TrainingError, match="max_steps: 6 there, 9 now"):
        run(model, tokenizer, tmp_path / "out", replace(TINY, max_steps=9))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"adapter": FSRLConfig(l1=0.1)}, "adapter_l1: 0.02 there, 0.1 now"),
        ({"adapter": FSRLConfig(activation="relu", l1=0.02)}, "adapter_activation: 'soft_threshold' there, 'relu' now"),
        ({"config": replace(TINY, lr=1e-4)}, "lr: 0.005 there, 0.0001 now"),
        ({"config": replace(TINY, loss="dpo")}, "loss: 'simpo' there, 'dpo' now"),
        ({"triples": TRIPLES[1:]}, "; data: '"),
        ({"triples": [*TRIPLES[:-1], TRIPLES[0]]}, "; data: '"),
        ({"eval_triples": None}, "eval_data: '.*' there, None now"),
        ({"sae": 3}, r"\(sae: '.*' there, '.*' now\)"),
        ({"start": 1}, "adapter_start: "),
    ],
)
def test_another_training_is_refused(model, tokenizer, tmp_path, monkeypatch, changed, message):
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 3)
        run(model, tokenizer, tmp_path / "out")
    sae = make_sae(L_OUT, D_SAE_OUT, seed=changed.pop("sae", 2))
    adapter = FSRLAdapter(sae, changed.pop("adapter", ADAPTER))
    with torch.no_grad():
        adapter.b_a += changed.pop("start", 0)
    message = message.removeprefix("; ")
    with pytest.raises(TrainingError, match=f"training of other settings .*{message}"):
        run(model, tokenizer, tmp_path / "out", changed.pop("config", TINY), adapter, **changed)


def test_what_never_came_to_a_checkpoint_may_begin_otherwise(model, tokenizer, tmp_path, monkeypatch):
    """A setting that was wrong can be mended in the same folder."""
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 1)
        run(model, tokenizer, tmp_path / "out")
    run(model, tokenizer, tmp_path / "out", replace(TINY, lr=1e-4))
    assert TrainingFolder(tmp_path / "out").read()["settings"]["lr"] == 1e-4


# Numbers


@pytest.mark.parametrize("loss", ["simpo", "dpo"])
def test_gradient_checkpointing_changes_nothing(tokenizer, tmp_path, loss):
    found = []
    for on in (False, True):
        config = replace(TINY, loss=loss, gradient_checkpointing=on)
        found.append(run(make_model("gemma2"), tokenizer, tmp_path / str(on), config))
    (plain, record), (checkpointed, other) = found
    assert same_weights(plain, checkpointed)
    assert record["history"] == other["history"]


def test_layers_are_run_again(model, tokenizer, tmp_path):
    """Those from the adapter's on; below it nothing needs a gradient."""
    runs = {}
    for n, layer in enumerate(model.model.layers):
        layer.input_layernorm.register_forward_hook(lambda *_, n=n: runs.__setitem__(n, runs.get(n, 0) + 1))
    run(model, tokenizer, tmp_path / "out", replace(TINY, gradient_checkpointing=True), eval_triples=None)
    # 15 triples are seven batches of two, or four steps, of which the last is of one batch.
    assert runs == {0: 11, 1: 11, 2: 11, 3: 22}


@pytest.mark.parametrize("loss", ["simpo", "dpo"])
def test_bf16(tokenizer, tmp_path, loss):
    model = make_model("gemma2").to(torch.bfloat16)
    adapter = new_adapter(FSRLConfig(l1=1e-3), torch.bfloat16)
    config = replace(TINY, loss=loss, max_steps=30, log_every=10)
    _, record = run(model, tokenizer, tmp_path / "out", config, adapter)
    assert all(p.dtype == torch.float32 for p in adapter.parameters())
    assert model.dtype == torch.bfloat16 and adapter.sae.dtype == torch.bfloat16
    losses = logged(record, "preference_loss")
    assert all(map(math.isfinite, losses)) and losses[-1] < 0.8 * losses[0]


def test_bf16_log_probabilities_are_exact(tokenizer, tmp_path):
    """A mean over tokens of numbers with 8 bits would be off by more."""
    model = make_model("qwen3").to(torch.bfloat16)
    config = replace(TINY, lr=1e-30, batch_size=15, micro_batch_size=15, max_steps=1)
    _, record = run(model, tokenizer, tmp_path / "out", config, new_adapter(dtype=torch.bfloat16))
    base = score_triples(model, tokenizer, TRIPLES, progress=False)
    assert logged(record, "preference_loss") == pytest.approx([base.loss], rel=1e-4)


# Refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "ipo"}, r"`loss` is 'ipo'; accepted: simpo, dpo\."),
        ({"lr": 0}, "`lr` is 0; accepted: a finite number > 0"),
        ({"lr": math.inf}, "`lr` is inf"),
        ({"beta": -1.0}, "`beta` is -1.0"),
        ({"warmup": 1.0}, "`warmup` is 1.0; accepted: a part of the steps"),
        ({"batch_size": 0}, "`batch_size` is 0; accepted: a whole number >= 1"),
        ({"max_steps": 2.5}, "`max_steps` is 2.5"),
        ({"epochs": True}, "`epochs` is True"),
        ({"seed": -1}, "`seed` is -1"),
        ({"seed": 2**32}, "`seed` is 4294967296; accepted: a whole number from 0 to"),
        ({"report_to": "foo"}, "`report_to` is 'foo'; accepted here: none, .*Others have to be installed"),
        ({"batch_size": 32, "micro_batch_size": 3}, "micro_batch_size 3 does not divide; accepted: a multiple of 3"),
    ],
)
def test_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**settings)


def test_published_settings():
    config = TrainingConfig()
    assert (config.loss, config.preference_beta, config.gamma_beta_ratio) == ("simpo", 10.0, 0.5)
    assert (config.lr, config.warmup, config.batch_size) == (5e-5, 0.01, 32)
    assert TrainingConfig(loss="dpo").preference_beta == 0.1
    from dspa.fsrl.trainers import arguments

    args = arguments(config, Path("out"), on_cpu=True, evaluated=False)
    assert (args.beta, args.simpo_gamma, args.cpo_alpha, args.loss_type) == (10.0, 5.0, 0.0, "simpo")
    assert (args.adam_beta1, args.adam_beta2, args.learning_rate) == (0.9, 0.98, 5e-5)
    assert (args.lr_scheduler_type, args.get_warmup_steps(1000), args.bf16) == ("cosine", 10, False)
    args = arguments(TrainingConfig(loss="dpo"), Path("out"), on_cpu=True, evaluated=False)
    assert (args.beta, args.loss_type) == (0.1, ["sigmoid"])


def test_processes_divide_the_batch():
    assert TrainingConfig(batch_size=32, micro_batch_size=4).accumulation(2) == 4
    with pytest.raises(ValueError, match="`batch_size` is 32, which micro_batch_size 2 x 3 processes does not divide"):
        TrainingConfig(batch_size=32).accumulation(3)


def test_what_attach_refuses_comes_first(model, tokenizer, tmp_path):
    def unread():
        raise AssertionError("triples were read")
        yield

    other = FSRLAdapter(make_sae(9, D_SAE_OUT, seed=2))
    with pytest.raises(ModelError, match="sits at layer 9; accepted: 0 to 3"):
        run(model, tokenizer, tmp_path / "out", adapter=other, triples=unread())
    named = FSRLAdapter(make_sae(L_OUT, D_SAE_OUT, model_name="gemma-2-2b"))
    with pytest.raises(ModelError, match="was made for 'gemma-2-2b' and the model is 'qwen'"):
        run(model, tokenizer, tmp_path / "out", adapter=named, triples=unread(), model_name="qwen")
    with pytest.raises(ModelError, match="in training mode"):
        run(model.train(), tokenizer, tmp_path / "out", triples=unread())
    assert not (tmp_path / "out").exists()


def test_refusals(model, tokenizer, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(TrainingError, match=r"holds \['file'\]"):
        run(model, tokenizer, tmp_path / "full")
    with pytest.raises(TrainingError, match=r"There are 3 triples; accepted: a batch \(4\) or more"):
        run(model, tokenizer, tmp_path / "out", triples=TRIPLES[:3])
    bare = word_tokenizer()
    bare.pad_token = None
    with pytest.raises(TrainingError, match="no padding token and no end token"):
        run(model, bare, tmp_path / "out")
    with pytest.raises(TrainingError, match="holds no finished training"):
        read_held_out(tmp_path)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "trl", None)
        with pytest.raises(RuntimeError, match=r'pip install "dspa-kernels\[train\]"'):
            run(model, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite(model, tokenizer, tmp_path):
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(ModelError, match="The loss of a batch is nan"):
        run(model, tokenizer, tmp_path / "out", eval_triples=None)


@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected"])
def test_empty_texts_are_refused_by_name(model, tokenizer, tmp_path, field):
    rows = [{"prompt": t.prompt, "chosen": t.chosen, "rejected": t.rejected} for t in TRIPLES[:6]]
    rows[4] |= {field: ""}
    path = tmp_path / "prefs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(PreferenceError, match=rf"prefs\.jsonl line 5: `{field}` is empty"):
        list(load_triples(path))
    with pytest.raises(PreferenceError, match=rf"prefs\.jsonl line 5: `{field}` is empty"):
        run(model, tokenizer, tmp_path / "out", triples=path)


def test_the_package_imports_without_trl():
    code = "import sys, dspa.fsrl; dspa.fsrl.train, dspa.fsrl.TrainingConfig(); print('trl' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_quiet(model, tokenizer, tmp_path, capfd):
    """Neither TRL nor transformers says anything."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for loss in ("simpo", "dpo"):
            run(model, tokenizer, tmp_path / loss, replace(TINY, loss=loss, gradient_checkpointing=True))
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


# Processes

SCRIPT = """
import json, os, signal, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from dspa import FrozenSAE
from dspa.fsrl import FSRLAdapter, FSRLConfig, TrainingConfig, train, trainers

torch.set_num_threads(1)
here, out, options = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(here / "model", dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(here / "model")
sae = FrozenSAE("jumprelu", **torch.load(here / "sae.pt"))
killed = options.pop("killed", None)
keep = trainers.TrainingFolder.keep

def die(self, written, step):
    if step == killed:
        os.kill(os.getpid(), signal.SIGKILL)
    keep(self, written, step)

trainers.TrainingFolder.keep = die
train(
    *(model, tokenizer, here / "train.jsonl", FSRLAdapter(sae, FSRLConfig(l1=0.02)), out),
    config=TrainingConfig(**options), eval_triples=here / "held.jsonl",
)
(out.parent / f"trained-{os.environ.get('RANK', 0)}").touch()
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory, tokenizer) -> Path:
    """A folder with a model, an SAE, data and the script. 16 triples are four batches."""
    here = tmp_path_factory.mktemp("processes")
    make_model("qwen3").save_pretrained(here / "model")
    tokenizer.save_pretrained(here / "model")
    sae = make_sae(L_OUT, D_SAE_OUT, seed=2)
    torch.save(
        {name: getattr(sae, name) for name in ("W_enc", "b_enc", "W_dec", "threshold", "layer")}, here / "sae.pt"
    )
    for name, triples in (("train", [*TRIPLES, HELD_OUT[0]]), ("held", HELD_OUT[1:])):
        rows = [{"prompt": t.prompt, "chosen": t.chosen, "rejected": t.rejected} for t in triples]
        (here / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (here / "script.py").write_text(SCRIPT)
    return here


def launch(here: Path, out: Path, launcher: list[str], config: TrainingConfig, **options: Any):
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    settings = vars(config) | options
    return subprocess.run(
        [sys.executable, *launcher, str(here / "script.py"), str(here), str(out), json.dumps(settings)],
        env=env | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )


def loaded(out: Path) -> tuple[FSRLAdapter, dict[str, Any]]:
    return FSRLAdapter.load(out, make_sae(L_OUT, D_SAE_OUT, seed=2)), json.loads((out / "training.json").read_text())


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.mark.parametrize("loss", ["simpo", "dpo"])
def test_two_processes_are_one_with_twice_the_accumulation(here, tmp_path, tokenizer, loss):
    config = replace(TINY, loss=loss, micro_batch_size=1)
    done = launch(here, tmp_path / "two", TORCHRUN, config)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.glob("trained-*")} == {"trained-0", "trained-1"}
    two, record = loaded(tmp_path / "two")
    assert {path.name for path in (tmp_path / "two").iterdir()} == {
        "adapter.json",
        "adapter.safetensors",
        "training.json",
    }
    one, alone = run(
        *(make_model("qwen3"), tokenizer, tmp_path / "one", config),
        triples=here / "train.jsonl",
        eval_triples=here / "held.jsonl",
    )
    for name in ("loss", "preference_loss", "l1", "rewards/margins", "eval_preference_loss", "eval_l1"):
        assert logged(record, name) == pytest.approx(logged(alone, name), rel=1e-4, abs=1e-6), name
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    # One bar.
    assert done.stderr.count("train:   0%") <= 2


def test_a_process_that_is_killed(here, tmp_path, tokenizer):
    """Amid a checkpoint, which then counts for nothing."""
    config = replace(TINY, max_steps=5)
    done = launch(here, tmp_path / "killed", [], config, killed=4)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "killed" / "checkpoint.partial" / "checkpoint-4").is_dir()
    done = launch(here, tmp_path / "killed", [], config)
    assert done.returncode == 0, done.stderr
    killed, again = loaded(tmp_path / "killed")
    data = {"triples": here / "train.jsonl", "eval_triples": here / "held.jsonl"}
    whole, record = run(make_model("qwen3"), tokenizer, tmp_path / "whole", config, **data)
    assert same_weights(whole, killed)
    assert (record["history"], record["held_out"]) == (again["history"], again["held_out"])


def test_accelerate_starts_one_process_on_cpus(here, tmp_path):
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1"]
    done = launch(here, tmp_path / "out", [*launcher, "--mixed_precision=no", "--dynamo_backend=no"], TINY)
    assert done.returncode == 0, done.stderr
    assert "It goes on alone. For K processes: torchrun --nproc-per-node K" in " ".join(done.stderr.split())


def test_other_processes_than_asked_for(model, tokenizer, tmp_path, monkeypatch):
    from dspa.fsrl import trainers

    arguments = trainers.arguments

    def alone(*args: Any, **kwargs: Any) -> Any:
        found = arguments(*args, **kwargs)
        monkeypatch.setenv("WORLD_SIZE", "2")
        return found

    monkeypatch.setattr(trainers, "arguments", alone)
    with pytest.raises(TrainingError, match="asked for 2 processes and 1 train together"):
        run(model, tokenizer, tmp_path / "out")


# Sweeps and commands


def test_a_sweep(model, tokenizer, tmp_path, monkeypatch):
    """Stopped after its first adapter, which is not trained again."""
    saes = [make_sae(layer, D_SAE_OUT, seed=2) for layer in (0, L_OUT)]
    settings = [FSRLConfig(l1=l1) for l1 in (0.0, 5.0)]
    out = tmp_path / "sweep"

    def sweep() -> Any:
        config = replace(TINY, max_steps=10)
        return train_sweep(
            model, tokenizer, TRIPLES, saes, settings, out, eval_triples=HELD_OUT, config=config, progress=False
        )

    from dspa.fsrl import sweep as module

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        trained = module.train

        def second(*args: Any, **kwargs: Any) -> Any:
            if (out / "layer-0-soft_threshold-0").exists():
                raise Stopped
            return trained(*args, **kwargs)

        patch.setattr(module, "train", second)
        sweep()
    before = (out / "layer-0-soft_threshold-0" / "adapter.safetensors").stat().st_mtime_ns
    found = sweep()
    assert (out / "layer-0-soft_threshold-0" / "adapter.safetensors").stat().st_mtime_ns == before
    assert [(each.layer, each.l1) for each in found.adapters] == [(0, 0.0), (0, 5.0), (L_OUT, 0.0), (L_OUT, 5.0)]
    assert found.adapters[1].held_out.l0 < found.adapters[0].held_out.l0
    assert found.base == held_out(model, tokenizer, HELD_OUT, max_length=64, progress=False)
    with (out / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows] == ["", "0", "0", "2", "2"]
    for row, each in zip(rows[1:], found.adapters, strict=True):
        assert (row["activation"], float(row["lambda"])) == (each.activation, each.l1)
        figures = {name: float(row[name]) for name in vars(each.held_out)}
        assert figures == vars(each.held_out)
        adapter = FSRLAdapter.load(each.folder, saes[0] if each.layer == 0 else saes[1])
        with adapter.attach(model):
            assert held_out(model, tokenizer, HELD_OUT, adapter, max_length=64, progress=False) == each.held_out
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_sweeps_that_cannot_be(model, tokenizer, tmp_path):
    def sweep(saes, settings, out=tmp_path / "sweep"):
        train_sweep(model, tokenizer, TRIPLES, saes, settings, out, eval_triples=HELD_OUT, config=TINY)

    sae = make_sae(L_OUT, D_SAE_OUT)
    with pytest.raises(TrainingError, match="2 SAEs and 1 settings, of which some are the same: 1 differ"):
        sweep([sae, make_sae(L_OUT, D_SAE_OUT, seed=3)], [ADAPTER])
    with pytest.raises(ModelError, match="sits at layer 7; accepted: 0 to 3"):
        sweep([sae, make_sae(7, D_SAE_OUT)], [ADAPTER])
    with pytest.raises(TrainingError, match="accepted: a folder, in one that exists"):
        sweep([sae], [ADAPTER], tmp_path / "no" / "sweep")
    assert not (tmp_path / "sweep").exists()


def command(monkeypatch, capsys, *arguments: object) -> tuple[int, str]:
    """Exit code and what was said, in one line."""
    monkeypatch.setattr(console, "width", 200)
    monkeypatch.setattr(sys, "argv", ["dspa", "fsrl", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    return stop.value.code or 0, " ".join((captured.out + captured.err).split())


def test_commands(here, tmp_path, monkeypatch, capsys):
    pytest.importorskip("sae_lens")
    saes = []
    for layer in (1, L_OUT):
        make_sae(layer, D_SAE_OUT, seed=2).save(tmp_path / f"sae-{layer}")
        saes += ["--sae", tmp_path / f"sae-{layer}"]
    data = (here / "train.jsonl", "--model", here / "model", "--held-out", here / "held.jsonl", "--device", "cpu")
    small = ("--lr", 5e-3, "--batch-size", 4, "--max-steps", 3, "--max-length", 64)
    code, told = command(monkeypatch, capsys, "train", *data, *small, *saes[:2], "--out", tmp_path / "one")
    assert code == 0 and "On 4 held-out triples" in told and "base model" in told
    assert read_held_out(tmp_path / "one").n_triples == 4
    code, told = command(monkeypatch, capsys, "train", *data, *small, *saes[:2], "--out", tmp_path / "one", "--l1", 0.3)
    assert code == 2 and "training of other settings (adapter_l1: 0.02 there, 0.3 now)" in told
    code, told = command(monkeypatch, capsys, "train", *data, *saes[:2], "--out", tmp_path / "two", "--l1", -1)
    assert code == 2 and "`l1` is -1.0; accepted: a finite number >= 0" in told
    code, told = command(monkeypatch, capsys, "analyse", "layers", *data, *small, *saes, "--out", tmp_path / "layers")
    assert code == 0 and "layer 1, soft_threshold, λ 0.02" in told and "layer 2" in told
    assert {"sweep.csv", "sweep.png"} < {path.name for path in (tmp_path / "layers").iterdir()}
