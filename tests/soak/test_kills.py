"""Long work that is killed by SIGKILL at any moment, again and again, ends with the files of work that was not."""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from dspa.config import SteeringConfig
from dspa.evaluate.compare.methods import Method
from dspa.evaluate.compare.run import compare
from dspa.maps.collect import collect
from dspa.saes.config import SAETrainingConfig
from dspa.saes.training import train_sae
from dspa.testing import ENGLISH, L_IN, L_OUT, make_map, make_model, make_sae, word_tokenizer

from ..dspa.support.trainings import TRIPLES, run
from .conftest import SEED, TIMES

N_KILLS = 3 * max(1, TIMES)
TEXTS = [{"text": " ".join(ENGLISH[n % 7 : n % 7 + 5 + n % 19])} for n in range(200)]
SAE_TRAINING = SAETrainingConfig(
    n_tokens=1200, batch_size=64, dead_feature_window=5, held_out_tokens=100, buffer_tokens=300, checkpoint_every=3
)


def count(folder: Path) -> None:
    """Collect the counts of a map."""
    saes = make_sae(L_IN, 24, seed=1), make_sae(L_OUT, 32, seed=2)
    rows = [vars(triple) | {"prompt": f"{triple.prompt} {ENGLISH[n]}"} for n in range(20) for triple in TRIPLES]
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
    collect(make_model("gemma2"), word_tokenizer(), rows, *saes, work_dir=folder, progress=False)


def train_an_sae(folder: Path) -> None:
    """Train an SAE."""
    path = folder.parent / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in TEXTS))
    options: dict[str, Any] = {"d_sae": 96, "k": 8, "config": SAE_TRAINING, "progress": False}
    train_sae(make_model("gemma2"), word_tokenizer(), path, 2, folder, **options)


def train_an_adapter(folder: Path) -> None:
    """Train an FSRL adapter."""
    run(make_model("qwen3"), word_tokenizer(), folder)


def compare_methods(folder: Path) -> None:
    """Compare DSPA with the base model and controls."""
    folder.mkdir(exist_ok=True)
    sae_in, sae_out = make_sae(L_IN, 24, seed=1), make_sae(L_OUT, 32, seed=2)
    method = Method.dspa(
        sae_in, sae_out, make_map(sae_in, sae_out, n_columns=8), SteeringConfig(alpha=1.0, k_prompt=8, k_diff=4)
    )
    prompts = [" ".join(ENGLISH[n : n + 4]) for n in range(8)]
    settings: dict[str, Any] = {"max_new_tokens": 6, "batch_size": 4, "progress": False}
    compare(make_model("gemma2"), word_tokenizer(), prompts, [method], results=folder / "results.json", **settings)


def files(folder: Path) -> dict[str, Any]:
    """Return what is in a folder, without times and memory."""
    return {str(path.relative_to(folder)): content(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def content(path: Path) -> Any:
    """Return what is in a file, without times and memory; None where it is missing, or a kill left a part of it."""
    if path.suffix != ".json":
        return path.read_bytes() if path.is_file() else None
    with suppress(OSError, json.JSONDecodeError):
        return _without_measured(json.loads(path.read_bytes()))


def _without_measured(value: Any) -> Any:
    if isinstance(value, dict):
        measured = ("seconds", "tokens_per_second", "speed", "peak_rss_bytes")
        return {name: _without_measured(inner) for name, inner in value.items() if name not in measured}
    return [_without_measured(inner) for inner in value] if isinstance(value, list) else value


def forked(work: Callable[[Path], None], folder: Path) -> Any:
    """Start work in a process of its own, which has imported everything already."""
    process = multiprocessing.get_context("fork").Process(target=work, args=(folder,))
    process.start()
    return process


@pytest.mark.parametrize(
    "work", [count, train_an_sae, train_an_adapter, compare_methods], ids=lambda work: work.__name__
)
def test_work_that_is_killed_ends_with_the_same_files(work, tmp_path, done):
    pytest.importorskip("sae_lens")
    pytest.importorskip("trl")
    torch.set_num_threads(1)
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    since = time.monotonic()
    whole = forked(work, tmp_path / "a" / "out")
    whole.join()
    seconds, wanted = time.monotonic() - since, files(tmp_path / "a" / "out")
    assert whole.exitcode == 0 and wanted
    draw, folder, n_kills, tries = random.Random(SEED), tmp_path / "b" / "out", 0, 0
    while n_kills < N_KILLS or tries:
        # After many kills the work is left to end.
        process, tries = forked(work, folder), tries + 1
        if n_kills < N_KILLS and tries < 12:
            process.join(timeout=draw.random() * seconds)
            process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            n_kills += 1
            # Killed after its last file: what it had not removed lies beside, and a finished SAE is not trained again.
            if any(content(folder / name) != whole for name, whole in wanted.items()):
                continue
        else:
            assert process.exitcode == 0
            ended = files(folder)
            assert ended.keys() == wanted.keys()
            assert [name for name in wanted if ended[name] != wanted[name]] == []
        shutil.rmtree(folder)
        tries = 0
        done[f"times that killed work ended: {work.__name__}"] += 1
    done["kills"] += n_kills
