"""Training by TRL: the loss, the files, the state of the model afterwards, precision, and refusals."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid

from dspa.data.tokens import tokenize_triple
from dspa.data.triples import Triple, load_triples
from dspa.errors import ModelError, PreferenceError, TrainingError
from dspa.fsrl import FSRLAdapter, FSRLConfig, TrainingConfig, held_out, read_held_out, score_triples
from dspa.testing import D_IN, D_SAE_OUT, L_OUT, make_model, make_sae, word_tokenizer

from ...rounding import PASS, rounding
from ..support.trainings import HELD_OUT, TINY, TRIPLES, data_of, logged, new_adapter, run, same_weights, tiny

pytest.importorskip("trl")


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture
def model():
    return make_model("qwen3")


# The loss


def by_hand(model, tokenizer, adapter: FSRLAdapter, triples: list[Triple], loss: str) -> tuple[float, float, float]:
    """Preference loss, L1 and L0 of one batch, from rows that run alone."""

    def response(triple: Triple, field: str) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = tokenize_triple(triple, tokenizer)
        ids, start = tokens.prompt + getattr(tokens, field), len(tokens.prompt)
        with torch.no_grad():
            logps = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(dim=-1)
        places = torch.arange(start, len(ids))
        return logps[places - 1, torch.tensor(ids)[places]], places

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


def margin_terms(model, tokenizer, triples: list[Triple]) -> float:
    """Size of the two log-probabilities per token whose difference is a margin."""
    scores = score_triples(model, tokenizer, triples, progress=False)
    return float((scores.chosen.abs() + scores.rejected.abs()).max())


def n_response_tokens(tokenizer, triples: list[Triple]) -> int:
    tokens = [tokenize_triple(triple, tokenizer) for triple in triples]
    return sum(len(triple.chosen) + len(triple.rejected) for triple in tokens)


# A moved latent is a sum of D_IN terms of either sign, which are sqrt(D_IN) times its size.
L1_ROUNDING = rounding(PASS, D_IN**0.5)
# A value at its threshold falls on either side by rounding. Fewer than one in 10 000 is that near, of as many.
N_AT_THRESHOLD = 1.5


@pytest.mark.parametrize("loss", ["simpo", "dpo"])
def test_the_loss_is_the_formula(model, tokenizer, tmp_path, loss, monkeypatch):
    """With a rate near 0, the adapter stays as it came; a batch of all triples is the only one."""
    # TRL's telemetry, which the tests would also prevent by HF_HUB_OFFLINE.
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *_args, **_options: pytest.fail("sent"))
    config = replace(TINY, loss=loss, lr=1e-30, batch_size=15, micro_batch_size=15, max_steps=1)
    adapter = new_adapter(FSRLConfig(l1=0.3, initial_threshold=0.05))
    with torch.no_grad():
        adapter.W_a.mul_(10)
    _, record = run(model, tokenizer, tmp_path / "out", config, adapter, eval_triples=TRIPLES)
    with adapter.attach(model):
        preference, l1, l0 = by_hand(model, tokenizer, adapter, TRIPLES, loss)
        terms = margin_terms(model, tokenizer, TRIPLES)
    assert l1 > 0.05 and l0 > 1
    # The loss falls by at most 1 per unit of beta times the margin; DPO's is of sums of up to 13 tokens of two models.
    terms *= 10 if loss == "simpo" else 0.1 * 13 * 2
    for prefix in ("", "eval_"):
        (total,) = logged(record, f"{prefix}loss")
        (bare,) = logged(record, f"{prefix}preference_loss")
        assert bare == pytest.approx(preference, abs=rounding(PASS, terms))
        assert total == pytest.approx(preference + 0.3 * l1, abs=rounding(PASS, terms) + L1_ROUNDING * 0.3 * l1)
        assert logged(record, f"{prefix}l1") == pytest.approx([l1], rel=L1_ROUNDING)
        n_tokens = n_response_tokens(tokenizer, TRIPLES)
        assert logged(record, f"{prefix}l0") == pytest.approx([l0], abs=N_AT_THRESHOLD / n_tokens)
        assert (
            len(logged(record, f"{prefix}rewards/accuracies")) == len(logged(record, f"{prefix}rewards/margins")) == 1
        )


@pytest.mark.parametrize("loss", ["simpo", "dpo"])
@pytest.mark.parametrize("n_held_out", [1, 5])
def test_every_held_out_triple_counts_once_in_the_log(model, tokenizer, tmp_path, loss, n_held_out):
    """Held-out triples that do not fill a micro-batch count like any other, and L1 is per token of all of them."""
    held = HELD_OUT[:n_held_out]
    adapter = new_adapter(FSRLConfig(l1=0.3))
    config = replace(TINY, loss=loss, lr=1e-3, max_steps=3, eval_every=3)
    _, record = run(model, tokenizer, tmp_path / "out", config, adapter, eval_triples=held)
    with adapter.attach(model):
        preference, l1, l0 = by_hand(model, tokenizer, adapter, held, loss)
        terms = margin_terms(model, tokenizer, held) * (10 if loss == "simpo" else 0.1 * 13 * 2)
    assert logged(record, "eval_preference_loss") == pytest.approx([preference], abs=rounding(PASS, terms))
    apart = rounding(PASS, terms) + L1_ROUNDING * 0.3 * l1
    assert logged(record, "eval_loss") == pytest.approx([preference + 0.3 * l1], abs=apart)
    assert logged(record, "eval_l1") == pytest.approx([l1], rel=L1_ROUNDING)
    n_near = N_AT_THRESHOLD / n_response_tokens(tokenizer, held)
    assert logged(record, "eval_l0") == pytest.approx([l0], abs=n_near)
    (accuracy,) = logged(record, "eval_rewards/accuracies")
    assert accuracy * n_held_out == pytest.approx(round(accuracy * n_held_out))


def test_the_penalty_has_a_gradient(model, tokenizer, tmp_path):
    weights = {}
    for l1 in (0.0, 5.0):
        _, record = run(
            model, tokenizer, tmp_path / str(l1), replace(TINY, max_steps=20), new_adapter(FSRLConfig(l1=l1))
        )
        weights[l1] = logged(record, "l1")[-1]
    assert weights[5.0] < 0.2 * weights[0.0]


@pytest.mark.parametrize("loss", ["simpo", "dpo", "pro"])
@pytest.mark.parametrize("activation", ["soft_threshold", "relu", "jumprelu"])
def test_training_learns(model, tokenizer, tmp_path, loss, activation):
    config, start = tiny(loss, max_steps=30, log_every=10), new_adapter(FSRLConfig(activation, l1=1e-3))
    adapter, record = run(model, tokenizer, tmp_path / "out", config, start, **data_of(loss))
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
    """They are means over all tokens of all triples, whatever their length, and the last in the log."""
    adapter, record = run(model, tokenizer, tmp_path / "out", replace(TINY, eval_every=6))
    figures = read_held_out(tmp_path / "out")
    with adapter.attach(model):
        loss, l1, l0 = by_hand(model, tokenizer, adapter, HELD_OUT, "simpo")
        # A margin is much smaller than what it is the difference of.
        apart = rounding(PASS, 10 * margin_terms(model, tokenizer, HELD_OUT))
    assert figures.simpo_loss == pytest.approx(loss, abs=apart)
    assert figures.l1 == pytest.approx(l1, rel=L1_ROUNDING)
    assert figures.l0 == pytest.approx(l0, abs=N_AT_THRESHOLD / n_response_tokens(tokenizer, HELD_OUT))
    assert figures.simpo_loss == pytest.approx(logged(record, "eval_preference_loss")[-1], abs=apart)
    assert figures.accuracy == pytest.approx(logged(record, "eval_rewards/accuracies")[-1])
    assert 10 * figures.margin == pytest.approx(logged(record, "eval_rewards/margins")[-1], abs=apart)
    base = held_out(model, tokenizer, HELD_OUT, progress=False)
    assert (base.l0, base.l1) == (0, 0) and base.simpo_loss != figures.simpo_loss


def test_responses_are_cut_and_counted(model, tokenizer, tmp_path):
    _, record = run(model, tokenizer, tmp_path / "out", replace(TINY, max_length=16))
    lengths = [
        len(tokens.prompt) + len(ids)
        for tokens in (tokenize_triple(t, tokenizer) for t in TRIPLES)
        for ids in (tokens.chosen, tokens.rejected)
    ]
    assert record["data"]["n_full"] == sum(length >= 16 for length in lengths) > 0
    assert record["settings"]["max_length"] == 16


# The model afterwards


def state_of(model, tokenizer) -> dict[str, Any]:
    """Everything of a model and tokenizer that a caller can see; of hooks, their number."""
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


@pytest.mark.parametrize("loss", ["simpo", "dpo", "pro"])
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
            run(model, tokenizer, tmp_path / "out", config, adapter, **data_of(loss))
        assert all(torch.equal(a, b) for a, b in zip(start, adapter.parameters(), strict=True))
    else:
        run(model, tokenizer, tmp_path / "out", config, adapter, **data_of(loss))
        assert not any(torch.equal(a, b) for a, b in zip(start, adapter.parameters(), strict=True))
    assert state_of(model, tokenizer) == before
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())
    assert list(model.state_dict()) == list(tensors)
    model.save_pretrained(tmp_path / "model")


@pytest.mark.parametrize(("family", "name"), [("gpt2", "p"), ("qwen3", "attention_dropout")])
def test_no_dropout(tmp_path, tokenizer, family, name):
    """With dropout, the base model would not be the frozen one."""
    model = make_model(family)
    base = score_triples(model, tokenizer, TRIPLES, progress=False)
    dropping = [module for module in model.modules() if isinstance(getattr(module, name, None), float)]
    for module in dropping:
        setattr(module, name, 0.5)
    config = replace(TINY, lr=1e-30, batch_size=15, micro_batch_size=15, max_steps=1)
    adapter = new_adapter()
    torch.nn.init.zeros_(adapter.W_a)
    _, record = run(model, tokenizer, tmp_path / "out", config, adapter)
    terms = float((base.chosen.abs() + base.rejected.abs()).max())
    assert logged(record, "preference_loss") == pytest.approx([base.loss], abs=rounding(PASS, 10 * terms))
    assert dropping and all(getattr(module, name) == 0.5 for module in dropping)


# Numbers


@pytest.mark.parametrize("loss", ["simpo", "dpo"])
def test_gradient_checkpointing_changes_nothing(tokenizer, tmp_path, loss):
    runs = []
    for on in (False, True):
        config = replace(TINY, loss=loss, gradient_checkpointing=on)
        runs.append(run(make_model("gemma2"), tokenizer, tmp_path / str(on), config))
    (plain, record), (checkpointed, other) = runs
    assert same_weights(plain, checkpointed)
    assert record["history"] == other["history"]


def test_layers_are_run_again(model, tokenizer, tmp_path):
    """Only layers from the adapter's on are, since below it nothing needs a gradient."""
    runs = {}
    for n, layer in enumerate(model.model.layers):
        layer.input_layernorm.register_forward_hook(lambda *_, n=n: runs.__setitem__(n, runs.get(n, 0) + 1))
    run(model, tokenizer, tmp_path / "out", replace(TINY, gradient_checkpointing=True), eval_triples=None)
    # 15 triples are seven batches of two, or four steps, of which the last is of one batch. Attaching runs the layers
    # up to the adapter's once, to see what that returns.
    assert runs == {0: 12, 1: 12, 2: 12, 3: 22}


@pytest.mark.parametrize("loss", ["simpo", "dpo", "pro"])
def test_bf16(tokenizer, tmp_path, loss):
    model = make_model("gemma2").to(torch.bfloat16)
    adapter = new_adapter(FSRLConfig(l1=1e-3), torch.bfloat16)
    config = tiny(loss, max_steps=30, log_every=10)
    _, record = run(model, tokenizer, tmp_path / "out", config, adapter, **data_of(loss))
    assert all(p.dtype == torch.float32 for p in adapter.parameters())
    assert model.dtype == torch.bfloat16 and adapter.sae.dtype == torch.bfloat16
    losses = logged(record, "preference_loss")
    assert all(map(math.isfinite, losses)) and losses[-1] < 0.8 * losses[0]


def test_bf16_log_probabilities_are_exact(tokenizer, tmp_path):
    """A mean over tokens of numbers with 8 bits would be off by more.

    So would the same responses in another batch, whose hidden states are rounded to bf16 otherwise: what is compared
    is made of the training's own logits.
    """
    model, passes = make_model("qwen3").to(torch.bfloat16), []
    model.register_forward_hook(
        lambda _model, args, kwargs, output: passes.append((args[0], kwargs["attention_mask"].bool(), output.logits)),
        with_kwargs=True,
    )
    config = replace(TINY, lr=1e-30, batch_size=15, micro_batch_size=15, max_steps=1)
    _, record = run(model, tokenizer, tmp_path / "out", config, new_adapter(dtype=torch.bfloat16), eval_triples=None)
    ((ids, mask, logits),) = passes
    assert logits.dtype == torch.bfloat16 and len(logits) == 30
    tokens = [tokenize_triple(triple, tokenizer) for triple in TRIPLES]
    starts = {tuple(t.prompt + answer): len(t.prompt) for t in tokens for answer in (t.chosen, t.rejected)}
    means = []
    for row, real, row_logits in zip(ids, mask, logits.detach().double(), strict=True):
        row, logps = row[real], row_logits[real].log_softmax(dim=-1)
        places = torch.arange(starts[tuple(row.tolist())], len(row))
        means.append(logps[places - 1, row[places]].mean())
    chosen, rejected = torch.stack(means).view(2, 15)
    loss = float(-logsigmoid(10 * (chosen - rejected) - 5).mean())
    # A log-softmax adds 61 numbers above 0, and a mean up to 13 of one sign.
    terms = float(10 * (chosen.abs() + rejected.abs()).max())
    assert logged(record, "preference_loss") == pytest.approx([loss], abs=rounding(61 + 13, terms))


# Refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "ipo"}, r"`loss` is 'ipo'; accepted: simpo, dpo, pro\."),
        ({"loss": "pro", "beta": 1.0}, "`beta` is 1.0 for `loss` pro; accepted: none, except for simpo and dpo"),
        ({"loss": "pro", "gamma_beta_ratio": 0.1}, "`gamma_beta_ratio` is 0.1 for `loss` pro"),
        ({"loss": "dpo", "gamma_beta_ratio": 0.1}, "`gamma_beta_ratio` is 0.1 for `loss` dpo"),
        ({"sft_weight": 1.0}, "`sft_weight` is 1.0 for `loss` simpo; accepted: none, except for pro"),
        ({"plain": True}, "`plain` is True for `loss` simpo"),
        ({"loss": "pro", "sft_weight": -1.0}, "`sft_weight` is -1.0; accepted: a finite number >= 0"),
        ({"lr": 0}, "`lr` is 0; accepted: a finite number > 0"),
        ({"lr": math.inf}, "`lr` is inf"),
        ({"beta": -1.0}, "`beta` is -1.0"),
        ({"warmup": 1.0}, "`warmup` is 1.0; accepted: a fraction of the steps"),
        ({"batch_size": 0}, "`batch_size` is 0; accepted: a whole number >= 1"),
        ({"max_steps": 2.5}, "`max_steps` is 2.5"),
        ({"epochs": True}, "`epochs` is True"),
        ({"seed": -1}, "`seed` is -1"),
        ({"seed": 2**32}, "`seed` is 4294967296; accepted: a whole number from 0 to"),
        ({"report_to": "foo"}, "`report_to` is 'foo'; accepted: none, .*Other trackers have to be installed"),
        ({"batch_size": 32, "micro_batch_size": 3}, "`micro_batch_size` 3 does not divide; accepted: a multiple of 3"),
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
    message = "`batch_size` is 32, which `micro_batch_size` 2 x 3 processes does not divide"
    with pytest.raises(ValueError, match=message):
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
    with pytest.raises(TrainingError, match=r"The number of triples is 3; accepted: a batch \(4\) or more"):
        run(model, tokenizer, tmp_path / "out", triples=TRIPLES[:3])
    bare = word_tokenizer()
    bare.pad_token = None
    with pytest.raises(TrainingError, match="no padding token and no end token"):
        run(model, bare, tmp_path / "out")
    with pytest.raises(TrainingError, match="holds no finished training"):
        read_held_out(tmp_path)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "trl", None)
        with pytest.raises(RuntimeError, match="Training an adapter needs the package trl"):
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
    """Neither TRL nor transformers prints or warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for loss in ("simpo", "dpo", "pro"):
            config = replace(TINY, loss=loss, gradient_checkpointing=True)
            run(model, tokenizer, tmp_path / loss, config, **data_of(loss))
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
