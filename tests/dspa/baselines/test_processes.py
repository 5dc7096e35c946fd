"""RAHF's two stages and DPO in two processes, against one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dspa.testing import make_model, word_tokenizer

from ..support.trainings import TRIPLES

pytest.importorskip("trl")

SCRIPT = """
import sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from dspa.baselines.dpo.config import DPOSettings
from dspa.baselines.dpo.training import train_dpo
from dspa.baselines.rahf.config import AlignmentConfig, TuningConfig
from dspa.baselines.rahf.training import align, tune

torch.set_num_threads(1)
here, out = Path(sys.argv[1]), Path(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(here / "model", dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(here / "model")
small = dict(batch_size=4, micro_batch_size=1, max_length=512, log_every=1)
tune(model, tokenizer, here / "train.jsonl", out / "tuned", config=TuningConfig(lr=1e-3, epochs=0.3, **small))
config = AlignmentConfig(lr=1e-3, dropout=0.0, max_steps=2, targets=(1, 2), **small)
align(model, tokenizer, here / "train.jsonl", out / "aligned", config=config).unload()
for name, lora in (("lora", True), ("full", False)):
    config = DPOSettings(lr=1e-3, epochs=0.7, lora=lora, **small)
    train_dpo(model, tokenizer, here / "train.jsonl", out / name, config=config)
"""


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "training.json").read_text())["history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def test_two_processes_are_one_with_twice_the_accumulation(tmp_path):
    make_model("qwen3", initializer_range=0.05, max_position_embeddings=512).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    names = ("prompt", "chosen", "rejected")
    rows = [json.dumps({name: getattr(triple, name) for name in names}) for triple in TRIPLES]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    (tmp_path / "script.py").write_text(SCRIPT)
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    for name, launcher in (("one", []), ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"])):
        (tmp_path / name).mkdir()
        done = subprocess.run(
            [sys.executable, *launcher, str(tmp_path / "script.py"), str(tmp_path), str(tmp_path / name)],
            env=env | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
    whole, lora = "model.safetensors", "adapter_model.safetensors"
    for stage, file in {"tuned": whole, "aligned": lora, "lora": lora, "full": whole}.items():
        one, two = tmp_path / "one" / stage, tmp_path / "two" / stage
        assert len(losses(one)) >= 2
        assert losses(two) == pytest.approx(losses(one), rel=1e-4)
        assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
        expected, got = load_file(one / file), load_file(two / file)
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], atol=1e-3, rtol=0)
