"""Resuming: a stopped training ends in the same weights, and its folder refuses another training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dspa.errors import TrainingError
from dspa.fsrl import FSRLAdapter, FSRLConfig, train
from dspa.fsrl.training import measure, trained_template
from dspa.testing import D_SAE_OUT, L_OUT, make_model, make_sae, word_tokenizer
from dspa.training_folder import TrainingFolder

from ..support.clock import set_clock
from ..support.trainings import (
    ADAPTER,
    TEMPLATE,
    TINY,
    TRIPLES,
    Stopped,
    conversations,
    data_of,
    new_adapter,
    run,
    same_weights,
)

pytest.importorskip("trl")

# Checkpoints come between lines of the log.
LONGER = replace(TINY, max_steps=9, log_every=3)


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture
def model():
    return make_model("qwen3")


@pytest.fixture(scope="module")
def whole(tokenizer, tmp_path_factory):
    """Trainings that were not stopped, by their loss."""
    configs = {loss: replace(LONGER, loss=loss) for loss in ("simpo", "dpo", "pro")}
    out = tmp_path_factory.mktemp("whole")
    return {
        loss: run(make_model("qwen3"), tokenizer, out / loss, config, **data_of(loss))
        for loss, config in configs.items()
    }


def stop_at(monkeypatch, step: int) -> None:
    from dspa.fsrl.progress import Steps

    on_step_end = Steps.on_step_end

    def stop(self, args, state, control, **options):
        if state.global_step == step:
            raise Stopped
        on_step_end(self, args, state, control, **options)

    monkeypatch.setattr(Steps, "on_step_end", stop)


@pytest.mark.parametrize(("loss", "step"), [("simpo", 2), ("simpo", 5), ("simpo", 8), ("dpo", 5), ("pro", 5)])
def test_a_stopped_training_goes_on(model, tokenizer, tmp_path, monkeypatch, whole, loss, step):
    """Also over the end of an epoch of 15 triples, with the adapter that failed or a new one."""
    config, adapter = replace(LONGER, loss=loss), new_adapter()
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, step)
        run(model, tokenizer, tmp_path / "out", config, adapter, **data_of(loss))
    held = [path.name for path in (tmp_path / "out").glob("checkpoint-*")]
    assert held == ([f"checkpoint-{(step - 1) // 2 * 2:09d}"] if step > 2 else [])
    adapter = adapter if step == 5 else None
    adapter, record = run(model, tokenizer, tmp_path / "out", config, adapter, **data_of(loss))
    assert same_weights(adapter, whole[loss][0])
    assert record == whole[loss][1]


def test_a_training_that_goes_on_after_midnight(model, tmp_path, monkeypatch):
    tokenizer, triples = word_tokenizer(), conversations(TRIPLES)
    # Three dates of three words.
    days = "{% set words = {'20': 'sun', '21': 'rain', '22': 'snow'} %}{{ words[strftime_now('%d')] }} "
    tokenizer.chat_template = days + TEMPLATE

    def start(name, now):
        set_clock(monkeypatch, now)
        config = {"config": TINY, "eval_triples": triples[:4], "progress": False}
        return train(model, tokenizer, triples, new_adapter(), tmp_path / name, **config)

    whole = start("whole", "2026-11-20T09:00")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 4)
        start("stopped", "2026-11-20T23:59")
    assert same_weights(start("stopped", "2026-11-21T00:01"), whole)
    assert same_weights(start("stopped", "2026-11-22T00:01"), whole)
    records = {name: TrainingFolder(tmp_path / name).read() for name in ("whole", "stopped")}
    for record in records.values():
        record["costs"].pop("measured")
    assert records["stopped"] == records["whole"] and records["whole"]["settings"]["template_date"] == "2026-11-20"
    dated, kwargs = trained_template(tokenizer, tmp_path / "stopped")
    assert kwargs is None
    undated, then = (measure(model, reader, triples[:4], None, TINY, progress=False) for reader in (tokenizer, dated))
    assert undated != then
    assert not same_weights(start("later", "2026-11-21T00:01"), whole)


def test_a_training_that_is_stopped_after_its_last_step(model, tokenizer, tmp_path, monkeypatch, whole):
    """It is stopped while its held-out figures are measured."""
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
        *("adapter.json", "adapter.safetensors", "measured.json"),
        *("optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"),
    ]
    n_bytes = 4 * sum(p.numel() for p in new_adapter().parameters())
    assert held["adapter.safetensors"] < n_bytes + 1000 and held["optimizer.pt"] < 2 * n_bytes + 10_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("trainer_state.json", b'{"global_step": 2, "max_steps": 0, "log_history": []}', "its state: `max_steps` is 0"),
        ("trainer_state.json", b'{"global_step": 9, "max_steps": 6, "log_history": []}', "the step is 9; accepted: 1"),
        ("trainer_state.json", b'{"global_step": 3, "max_steps": 6, "log_history": []}', "the step is 3; accepted: 2"),
        ("trainer_state.json", b'{"global_step": 2, "max_steps": 6, "log_history": 3}', "`log_history` is 3"),
        ("trainer_state.json", b"[", "is not JSON"),
        ("optimizer.pt", b"nothing", "UnpicklingError"),
        ("scheduler.pt", b"nothing", "UnpicklingError"),
        ("rng_state.pth", b"nothing", "UnpicklingError"),
        ("adapter.safetensors", b"nothing", "AdapterError"),
    ],
)
def test_damaged_checkpoints(model, tokenizer, tmp_path, monkeypatch, name, content, message):
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 3)
        run(model, tokenizer, tmp_path / "out")
    (tmp_path / "out" / "checkpoint-000000002" / name).write_bytes(content)
    with pytest.raises(TrainingError, match=rf"checkpoint-000000002 is damaged \(.*{message}.*Delete it"):
        run(model, tokenizer, tmp_path / "out")


def test_what_is_finished_is_loaded(model, tokenizer, tmp_path):
    adapter, _ = run(model, tokenizer, tmp_path / "out")
    content = (tmp_path / "out" / "training.json").read_bytes()
    # It was killed before it removed its checkpoint.
    (tmp_path / "out" / "checkpoint-000000006").mkdir()
    again, _ = run(model, tokenizer, tmp_path / "out")
    assert not list((tmp_path / "out").glob("checkpoint-*"))
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


def test_settings_of_the_chat_template(model, tmp_path):
    tokenizer, triples = word_tokenizer(), conversations(TRIPLES)
    tokenizer.chat_template = "{% if polite %}good sir {% endif %}" + TEMPLATE
    short, record = tmp_path / "plain", tmp_path / "polite"
    options = {"config": replace(TINY, max_steps=2), "eval_triples": triples[:4], "progress": False}
    train(model, tokenizer, triples, new_adapter(), short, **options)
    train(model, tokenizer, triples, new_adapter(), record, **options, chat_template_kwargs={"polite": True})
    plain, polite = (TrainingFolder(folder).read() for folder in (short, record))
    assert plain["settings"].pop("chat_template_kwargs") is plain["settings"]["template_date"] is None
    assert polite["settings"].pop("chat_template_kwargs") == {"polite": True}
    differing = {name for name, value in polite["settings"].items() if plain["settings"][name] != value}
    assert differing == {"data", "eval_data"} and plain["held_out"] != polite["held_out"]
    with pytest.raises(TrainingError, match=r"chat_template_kwargs: \{'polite': True\} there, None now"):
        train(model, tokenizer, triples, new_adapter(), record, **options)
    with pytest.raises(ValueError, match=r"with polit, which the chat template does not read"):
        train(model, tokenizer, triples, new_adapter(), short, **options, chat_template_kwargs={"polit": True})


def test_what_never_came_to_a_checkpoint_may_begin_otherwise(model, tokenizer, tmp_path, monkeypatch):
    """A wrong setting can be corrected in the same folder."""
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 1)
        run(model, tokenizer, tmp_path / "out")
    run(model, tokenizer, tmp_path / "out", replace(TINY, lr=1e-4))
    assert TrainingFolder(tmp_path / "out").read()["settings"]["lr"] == 1e-4
