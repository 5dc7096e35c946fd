"""Trainings of adapters that take a second: settings, triples, and how to run and read one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dspa.data.triples import Triple
from dspa.fsrl import FSRLAdapter, FSRLConfig, TrainingConfig, train
from dspa.testing import D_SAE_OUT, ENGLISH, L_OUT, make_model, make_sae

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


TRIPLES = [Triple(sentence(n), f" {sentence(n + 100)} cat", f" {sentence(n + 200)} dog") for n in range(15)]
HELD_OUT = [Triple(sentence(n), f" {sentence(n + 100)} cat", f" {sentence(n + 200)} dog") for n in range(15, 20)]


# Rewards of responses by their last word, two of which are equal.
REWARDS = {"dog": 0.5, "cat": 2.0, "rain": -0.5, "sun": 0.5}


def ranking(n: int) -> dict[str, Any]:
    """Two to four responses of different lengths, not in the order of their rewards."""
    ends = list(REWARDS)[: 2 + n % 3]
    responses = [f" {sentence(n + 100 * k)} {end}" for k, end in enumerate(ends, 1)]
    return {"prompt": sentence(n), "responses": responses, "rewards": [REWARDS[end] for end in ends]}


RANKINGS, HELD_OUT_RANKINGS = [ranking(n) for n in range(15)], [ranking(n) for n in range(15, 20)]


def tiny(loss: str, **settings: Any) -> TrainingConfig:
    """`TINY` with a loss; PRO without its SFT term, whose size hides that of the ranking."""
    return replace(TINY, loss=loss, **({"sft_weight": 0.0} if loss == "pro" else {}), **settings)


def data_of(loss: str) -> dict[str, Any]:
    """The data of `run` for a loss."""
    return {"triples": RANKINGS, "eval_triples": HELD_OUT_RANKINGS} if loss == "pro" else {}


# Of words of `word_tokenizer`.
TEMPLATE = "{% for m in messages %}we {{ m.content }} {% endfor %}{% if add_generation_prompt %}we {% endif %}"


def conversations(triples: list[Triple]) -> list[dict[str, Any]]:
    """The triples as messages."""
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return [
        {name: [{"role": role, "content": getattr(triple, name)}] for name, role in roles.items()} for triple in triples
    ]


class Stopped(Exception):
    pass


def new_adapter(config: FSRLConfig = ADAPTER, dtype: torch.dtype = torch.float32) -> FSRLAdapter:
    return FSRLAdapter(make_sae(L_OUT, D_SAE_OUT, seed=2).to(dtype=dtype), config)


def run(model, tokenizer, out: Path, config: TrainingConfig = TINY, adapter: FSRLAdapter | None = None, **options: Any):
    """A training's adapter and its record, without what depends on the time and the machine."""
    adapter = adapter or new_adapter()
    options = {"triples": TRIPLES, "eval_triples": HELD_OUT, "progress": False} | options
    trained = train(model, tokenizer, options.pop("triples"), adapter, out, config=config, **options)
    assert trained is adapter
    record = json.loads((out / "training.json").read_text())
    assert set(record["costs"].pop("measured")) > {"seconds", "peak_rss_bytes"}
    return adapter, record


def logged(record: dict[str, Any], name: str) -> list[float]:
    return [entry[name] for entry in record["history"] if name in entry]


def same_weights(one: FSRLAdapter, other: FSRLAdapter) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def save_inputs(folder: Path, tokenizer) -> None:
    """A user's files: a model with its tokenizer, and triples: 16 are four batches, and two processes share 3."""
    make_model("qwen3").save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, triples in (("train", [*TRIPLES, HELD_OUT[0]]), ("held", HELD_OUT[2:])):
        rows = [{"prompt": t.prompt, "chosen": t.chosen, "rejected": t.rejected} for t in triples]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
