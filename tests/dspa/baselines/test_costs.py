"""The operations that trainings record against those that PyTorch counts, and what runs of one training add up to."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dspa.baselines.dpo.config import DPOSettings
from dspa.baselines.dpo.training import train_dpo
from dspa.baselines.rahf.config import AlignmentConfig, TuningConfig
from dspa.baselines.rahf.instructions import Instructed
from dspa.baselines.rahf.training import align, tune
from dspa.baselines.repe import repe_vector
from dspa.data.tokens import response_tokens
from dspa.fsrl import FSRLAdapter, TrainingConfig, train
from dspa.models.sizes import sizes_of
from dspa.testing import D_SAE_OUT, L_OUT, make_model, make_sae, word_tokenizer

from ..support.trainings import TRIPLES, data_of

pytest.importorskip("trl")

SMALL = {"batch_size": 1, "micro_batch_size": 1, "max_length": 512, "log_every": 1}


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def fresh():
    model = make_model("qwen3", initializer_range=0.05, max_position_embeddings=512)
    # Eager attention computes all pairs, as the formulas say.
    model.set_attn_implementation("eager")
    return model


@pytest.fixture
def counted(monkeypatch):
    """Operations that PyTorch counts, of all training steps."""
    from transformers import Trainer

    total, step = [], Trainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        with FlopCounterMode(display=False) as counter:
            loss = step(self, *args, **kwargs)
        total.append(counter.get_total_flops())
        return loss

    monkeypatch.setattr(Trainer, "training_step", training_step)
    return total


def flops(out) -> int:
    return json.loads((out / "training.json").read_text())["costs"]["flops"]


def per_token(model, n_layers: int = 4) -> int:
    """Weights of the first layers that multiply a token, by a count of its own."""
    return sum(p.numel() for layer in model.model.layers[:n_layers] for p in layer.parameters() if p.dim() > 1)


def pairs(model, *lengths: int, n_layers: int = 4) -> int:
    """Operations of attention in a pass over some texts: q k^T and its product with v in each layer."""
    config = model.config
    return sum(n_layers * 2 * 2 * config.num_attention_heads * config.head_dim * n * n for n in lengths)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_stage_1(tokenizer, tmp_path, counted, checkpointing):
    model = fresh()
    config = TuningConfig(epochs=1.0, gradient_checkpointing=checkpointing, **SMALL)
    tune(model, tokenizer, TRIPLES[:3], tmp_path / "out", config=config, progress=False)
    made = [Instructed.of(triple, tokenizer, 512) for triple in TRIPLES[:3]]
    rows = [(len(t.good) + len(r), len(t.bad) + len(r)) for t in made for r in (t.chosen, t.rejected)]
    head, layers = model.lm_head.weight.numel(), per_token(model)

    def expected(lengths: list[tuple[int, int]]) -> int:
        total = 0
        for n in [n for pair in lengths for n in pair]:
            total += 3 * (2 * (layers + head) * n + pairs(model, n))
            total += checkpointing * (2 * layers * n + pairs(model, n))
        return total

    assert flops(tmp_path / "out") == expected(rows)
    # The shorter one of both instructions is padded, and a layer's last product is not needed again.
    last = checkpointing * 2 * sum(layer.mlp.down_proj.weight.numel() for layer in model.model.layers)
    padded = [(max(pair), max(pair)) for pair in rows]
    never = last * sum(map(sum, padded))
    assert sum(counted) == pytest.approx(expected(padded) - never, rel=1e-6)
    assert never < 0.05 * expected(padded)


def test_stage_2(tokenizer, tmp_path, counted):
    model = fresh()
    config = AlignmentConfig(max_steps=3, targets=(1, 3), rank=2, **SMALL)
    adapted = align(model, tokenizer, TRIPLES[:3], tmp_path / "out", config=config, progress=False)
    model = adapted.unload()
    layers, config_ = per_token(model, 3), model.config
    made = [Instructed.of(triple, tokenizer, 512) for triple in TRIPLES[:3]]
    draws = torch.randint(2, (3,), generator=torch.Generator().manual_seed(config.seed)).tolist()
    attention = model.model.layers[0].self_attn
    q, k, v = (getattr(attention, f"{name}_proj").weight for name in "qkv")
    lora_A, lora_B = 2 * 2 * config_.hidden_size, 2 * (len(q) + len(v))
    total = padded = never = 0
    for triple, is_chosen in zip(made, draws, strict=True):
        response = triple.chosen if is_chosen else triple.rejected
        plain, *others = (len(prompt) + len(response) for prompt in (triple.plain, triple.good, triple.bad))
        base = [2 * layers * n + pairs(model, n, n_layers=3) for n in (plain, *others)]
        trained = 2 * 2 * layers * plain + 3 * pairs(model, plain, n_layers=3) + 6 * 3 * (lora_A + lora_B) * plain
        total += sum(base) + trained
        padded += 3 * max(base) + trained
        # Below the first layer's LoRA nothing has a gradient: its inputs and its keys.
        never += 2 * (q.numel() + k.numel() + v.numel() + lora_A) * plain + pairs(model, plain, n_layers=1) // 2
    assert flops(tmp_path / "out") == total
    assert sum(counted) == pytest.approx(padded - never, rel=1e-6)
    assert never < 0.1 * total


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_dpo(tokenizer, tmp_path, counted, lora):
    model = fresh()
    config = DPOSettings(epochs=1.0, lora=lora, rank=2, **SMALL)
    train_dpo(model, tokenizer, TRIPLES[:3], tmp_path / "out", config=config, progress=False)
    model = fresh()
    head, layers = model.lm_head.weight.numel(), per_token(model)
    linear = [m for layer in model.model.layers for m in layer.modules() if isinstance(m, torch.nn.Linear)]
    lora_weights = sum(2 * (m.in_features + m.out_features) for m in linear) if lora else 0
    attention = model.model.layers[0].self_attn
    first = sum(p.weight.numel() + 2 * p.in_features for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    total = padded = never = 0
    for triple in TRIPLES[:3]:
        prompt, *responses = response_tokens(triple, tokenizer)
        lengths, n_logits = [len(prompt) + len(response) for response in responses], sum(map(len, responses))

        def in_layers(lengths: list[int]) -> int:
            passes = (3 if lora else 4) * 2 * layers * sum(lengths) + 4 * pairs(model, *lengths)
            return passes + 6 * lora_weights * sum(lengths)

        # The reference has no way back, on which TRL computes the logits of the model again.
        total += in_layers(lengths) + (4 if lora else 5) * 2 * head * n_logits
        # Without Triton, TRL computes logits at all places, and PyTorch does not count a product that adds in place.
        padded += in_layers([max(lengths)] * 2) + 3 * 2 * head * 2 * (max(lengths) - 1)
        # Below the first layer's LoRA nothing has a gradient.
        never += lora * 2 * first * 2 * max(lengths)
    assert flops(tmp_path / "out") == total
    assert sum(counted) == pytest.approx(padded - never, rel=1e-6)


@pytest.mark.parametrize("loss", ["simpo", "pro"])
def test_fsrl(tokenizer, tmp_path, counted, loss):
    model, sae = fresh(), make_sae(L_OUT, D_SAE_OUT, seed=2)
    config = TrainingConfig(loss=loss, batch_size=1, micro_batch_size=1, max_length=512)
    examples = list(config.load(data_of(loss).get("triples", TRIPLES)[:3]))
    train(model, tokenizer, examples, FSRLAdapter(sae), tmp_path / "out", config=config, progress=False)
    layers, below, head = per_token(model), per_token(model, L_OUT + 1), model.lm_head.weight.numel()

    def expected(lengths: list[int]) -> int:
        # Up to the adapter there is no way back, and above it none to the weights.
        total = 2 * below * sum(lengths) + pairs(model, *lengths, n_layers=L_OUT + 1)
        return total + 4 * (layers - below + head) * sum(lengths) + 3 * pairs(model, *lengths, n_layers=3 - L_OUT)

    total = padded = 0
    for example in examples:
        prompt, *responses = response_tokens(example, tokenizer)
        lengths = [len(prompt) + len(response) for response in responses]
        # f = h W_enc, v = h W_a, v W_dec, and back from there to v and to W_a.
        total += expected(lengths) + 5 * 2 * sae.d_in * sae.d_sae * sum(lengths)
        # PyTorch does not look into the ops of an adapter.
        padded += expected([max(lengths)] * len(lengths))
    assert flops(tmp_path / "out") == total
    assert sum(counted) == padded


def test_repe(tokenizer):
    model, layer, n = fresh(), 2, 8
    with FlopCounterMode(display=False) as counter:
        # One response at a time, without padding.
        vector = repe_vector(model, tokenizer, TRIPLES[:n], layer, n_directions=2, batch_tokens=1, progress=False)
    width, lengths = model.config.hidden_size, list[int]()
    for triple in TRIPLES[:n]:
        prompt, *responses = response_tokens(triple, tokenizer)
        lengths += [len(prompt) + len(response) for response in responses]

    def reading(*lengths: int) -> int:
        return 2 * per_token(model, layer + 1) * sum(lengths) + pairs(model, *lengths, n_layers=layer + 1)

    assert vector.costs is not None and vector.costs.flops == reading(*lengths) + 2 * n * width**2
    # Not recorded: a token on which the layer is checked, and the sides of the 2 directions.
    assert counter.get_total_flops() == vector.costs.flops + reading(1) + 2 * n * width * 2


def test_sizes_are_those_of_the_model():
    model = fresh()
    sizes = sizes_of(model, "float32")
    assert sum(sizes.layers) == per_token(model) and sizes.head == model.lm_head.weight.numel()


def test_runs_add_up(tokenizer, tmp_path, monkeypatch):
    from ..support.trainings import Stopped
    from .test_dpo import stop_at

    config = replace(DPOSettings(epochs=2.0, **SMALL), checkpoint_every=2)
    train_dpo(fresh(), tokenizer, TRIPLES[:3], tmp_path / "whole", config=config, progress=False)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 3)
        train_dpo(fresh(), tokenizer, TRIPLES[:3], tmp_path / "out", config=config, progress=False)
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    before = json.loads((checkpoint / "measured.json").read_text())
    (checkpoint / "measured.json").write_text(json.dumps(before | {"seconds": 1000.0, "machine": "another"}))
    train_dpo(fresh(), tokenizer, TRIPLES[:3], tmp_path / "out", config=config, progress=False)
    whole, costs = (json.loads((tmp_path / name / "training.json").read_text())["costs"] for name in ("whole", "out"))
    assert costs["flops"] == whole["flops"] and costs["triples"] == whole["triples"] and costs["n_triples"] == 3
    measured = costs["measured"]
    assert (
        1000 < measured["seconds"] < 1000 + 100 and measured["machine"].startswith("another; ")
    ) or "; another" in measured["machine"]
    assert measured["peak_rss_bytes"] > 1e8 and measured["peak_gpu_bytes"] is None and measured["processes"] == 1
    assert costs["trained_digest"] not in ("", costs["model_digest"])
