"""Trainings in several processes, and one that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dspa.errors import TrainingError
from dspa.fsrl import FSRLAdapter, TrainingConfig
from dspa.testing import D_IN, D_SAE_OUT, L_OUT, make_model, make_sae, word_tokenizer

from ...rounding import PASS, rounding
from ..support.trainings import TINY, logged, run, same_weights, save_inputs

pytest.importorskip("trl")

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
def tokenizer():
    return word_tokenizer()


@pytest.fixture
def model():
    return make_model("qwen3")


@pytest.fixture(scope="module")
def here(tmp_path_factory, tokenizer) -> Path:
    """A folder with a model, an SAE, data and the script."""
    here = tmp_path_factory.mktemp("processes")
    save_inputs(here, tokenizer)
    sae = make_sae(L_OUT, D_SAE_OUT, seed=2)
    torch.save(
        {name: getattr(sae, name) for name in ("W_enc", "b_enc", "W_dec", "threshold", "layer")}, here / "sae.pt"
    )
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


@pytest.mark.parametrize("loss", ["simpo", "dpo", "pro"])
def test_two_processes_are_one_with_twice_the_accumulation(here, tmp_path, tokenizer, loss):
    # The triples have no scores.
    config = replace(TINY, loss=loss, micro_batch_size=1, plain=loss == "pro")
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
    # A gradient is a sum over about 60 tokens of what came back as sums of D_IN terms, each of either sign. A step of
    # Adam is `lr` times a ratio of gradients.
    gradient = rounding(2 * PASS, (60 * D_IN) ** 0.5)
    # Log-probabilities per token are above -7, and a margin is 10 times the difference of two.
    terms = 10 * (7.0 + 7.0)
    for name in (
        "loss",
        "preference_loss",
        "l1",
        "rewards/margins",
        "eval_preference_loss",
        "eval_rewards/margins",
        "eval_l1",
    ):
        apart = {"rel": gradient} if "l1" in name else {"rel": 0, "abs": 2 * rounding(PASS, terms)}
        assert logged(record, name) == pytest.approx(logged(alone, name), **apart), name
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=config.max_steps * config.lr * gradient)
    # One bar.
    assert done.stderr.count("train:   0%") <= 2


def test_a_process_that_is_killed(here, tmp_path, tokenizer):
    """It is killed while it writes a checkpoint, which is then ignored."""
    config = replace(TINY, max_steps=5)
    done = launch(here, tmp_path / "killed", [], config, killed=4)
    assert done.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "killed").glob(".dspa-partial-*/checkpoint-4"))) == 1
    done = launch(here, tmp_path / "killed", [], config)
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "killed").glob(".*"))
    killed, again = loaded(tmp_path / "killed")
    data = {"triples": here / "train.jsonl", "eval_triples": here / "held.jsonl"}
    whole, record = run(make_model("qwen3"), tokenizer, tmp_path / "whole", config, **data)
    assert same_weights(whole, killed)
    assert (record["history"], record["held_out"]) == (again["history"], again["held_out"])


def test_accelerate_starts_one_process_on_cpus(here, tmp_path):
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1"]
    done = launch(here, tmp_path / "out", [*launcher, "--mixed_precision=no", "--dynamo_backend=no"], TINY)
    assert done.returncode == 0, done.stderr
    assert "It continues alone. For K processes: torchrun --nproc-per-node K" in " ".join(done.stderr.split())


def test_other_processes_than_asked_for(model, tokenizer, tmp_path, monkeypatch):
    from dspa.fsrl import trainers

    arguments = trainers.arguments

    def alone(*args: Any, **kwargs: Any) -> Any:
        settings = arguments(*args, **kwargs)
        monkeypatch.setenv("WORLD_SIZE", "2")
        return settings

    monkeypatch.setattr(trainers, "arguments", alone)
    with pytest.raises(TrainingError, match="asked for 2 processes and 1 train together"):
        run(model, tokenizer, tmp_path / "out")
