"""Several processes that collect together, started by real launchers, and their communication."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore
from transformers import AutoModelForCausalLM, AutoTokenizer

from dspa import ConditionalDifferenceMap, collect, distributed, reduce
from dspa.distributed import Team, device_named
from dspa.testing import D_SAE_IN, D_SAE_OUT, L_IN, L_OUT, make_model, make_sae, make_tokenizer

from .support.counts import SEED, as_rows, make_ids, shards, write_lines

TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]
# Eight triples are eight pieces.
SMALL = {"TRIPLES_PER_WINDOW": 4, "TRIPLES_PER_PIECE": 1}
# Every process records the pieces that it counted. It waits with its first piece until all have one, so that none comes
# too late. The process that is to die does so after its first piece, and the others finish one more.
SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dspa import FrozenSAE, collect, reduce
from dspa.maps import pieces
from dspa.maps.collection import Collection

torch.set_num_threads(1)
here, out, options = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
for name, value in options.pop("small").items():
    setattr(pieces, name, value)
rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
dies, refused, stream = (options.pop(name, None) for name in ("dies", "refused", "stream"))
model = AutoModelForCausalLM.from_pretrained(here / "model", dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(here / "model")
saes = [FrozenSAE("jumprelu", **weights) for weights in torch.load(here / "saes.pt")]
mine, write = [], Collection.write

def until(done):
    since = time.monotonic()
    while not done():
        assert time.monotonic() - since < 60
        time.sleep(0.01)

def written(self, piece, digest, shard):
    mine.append(piece)
    (out / f"claimed-{rank}").touch()
    until(lambda: len(list(out.glob("claimed-*"))) == size)
    if dies is not None and rank != dies:
        until((out / "dead").exists)
    write(self, piece, digest, shard)
    if rank == dies:
        (out / "dead").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    elif dies is not None:
        time.sleep(60)

Collection.write = written
data = here / "prefs.jsonl"
if refused:
    try:
        collect(model, tokenizer, data, *saes, progress=False)
    except ValueError as error:
        (out / f"refused-{rank}").write_text(str(error))
if stream:
    data = (json.loads(line) for line in data.open())
counts = collect(model, tokenizer, data, *saes, work_dir=out / "work", **options)
(out / f"pieces-{rank}").write_text(json.dumps(mine))
if rank == 0:
    reduce(counts, percentile=60.0, k_diff=3).save(out / "map")
"""
# Builds a map with the function or the command, and records which process reduced and what every process got.
BUILD_SCRIPT = """
import json, os, sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dspa import FrozenSAE, build_map, cli
from dspa.maps import pieces
from dspa.maps import reduce as reduction

torch.set_num_threads(1)
here, out, options = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
for name, value in options["small"].items():
    setattr(pieces, name, value)
rank, reduce_table = os.environ.get("RANK", "0"), reduction.reduce_table

def watched(*args, **kwargs):
    with (out / "reduced").open("a") as file:
        file.write(f"{rank}\\n")
    return reduce_table(*args, **kwargs)

reduction.reduce_table = watched
if options["how"] == "command":
    sys.argv[1:] = ["map", "build", *map(str, options["arguments"])]
    cli.main()
model = AutoModelForCausalLM.from_pretrained(here / "model", dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(here / "model")
saes = [FrozenSAE.load(here / name) for name in ("sae_in", "sae_out")]
cdmap = build_map(model, tokenizer, here / "prefs.jsonl", *saes, work_dir=out / "work", percentile=60.0, k_diff=3)
(out / f"returned-{rank}").write_text(type(cdmap).__name__)
if cdmap is not None:
    cdmap.save(out / "map")
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, SAEs, data and the script."""
    here = tmp_path_factory.mktemp("ranks")
    make_model("qwen3").save_pretrained(here / "model")
    make_tokenizer().save_pretrained(here / "model")
    names = ("W_enc", "b_enc", "W_dec", "threshold", "layer")
    saes = [make_sae(L_IN, D_SAE_IN, seed=1), make_sae(L_OUT, D_SAE_OUT, seed=2)]
    for sae, name in zip(saes, ("sae_in", "sae_out"), strict=True):
        sae.save(here / name)
    torch.save([{name: getattr(sae, name) for name in names} for sae in saes], here / "saes.pt")
    write_lines(here / "prefs.jsonl", as_rows(make_ids(SEED)))
    (here / "script.py").write_text(SCRIPT)
    (here / "build.py").write_text(BUILD_SCRIPT)
    return here


@pytest.fixture(scope="module")
def alone(here: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Counts and map that this process makes alone, in other pieces and batches than the launched ones."""
    out = tmp_path_factory.mktemp("alone")
    model = AutoModelForCausalLM.from_pretrained(here / "model", dtype=torch.float32).eval()
    saes = [make_sae(L_IN, D_SAE_IN, seed=1), make_sae(L_OUT, D_SAE_OUT, seed=2)]
    tokenizer = AutoTokenizer.from_pretrained(here / "model")
    counts = collect(model, tokenizer, here / "prefs.jsonl", *saes, work_dir=out / "work", progress=False)
    reduce(counts, percentile=60.0, k_diff=3).save(out / "map")
    return out


def launch(
    launcher: list[str], here: Path, out: Path, *, script: str = "script.py", **options: Any
) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    arguments = [here / script, here, out, json.dumps({"small": SMALL, **options})]
    return subprocess.run(
        [sys.executable, *launcher, *map(str, arguments)],
        env=env | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )


def counted(out: Path) -> list[list[int]]:
    return [json.loads(path.read_text()) for path in sorted(out.glob("pieces-*"))]


@pytest.mark.parametrize(
    ("n", "options"), [(2, {"batch_tokens": 1, "refused": True}), (3, {"stream": True})], ids=["2", "3"]
)
def test_torchrun(here: Path, alone: Path, tmp_path: Path, n: int, options: dict[str, Any]) -> None:
    done = launch([*TORCHRUN, f"--nproc-per-node={n}"], here, tmp_path, **options)
    assert done.returncode == 0, done.stderr
    by_rank = counted(tmp_path)
    assert len(by_rank) == n and all(by_rank) and sorted(itertools.chain(*by_rank)) == list(range(8))
    assert len(shards(tmp_path / "work")) == 8
    assert (tmp_path / "map").read_bytes() == (alone / "map").read_bytes()
    # One bar, for all processes.
    assert "8/8" in done.stderr or options.get("stream")
    assert done.stderr.count("collect:   0%") + done.stderr.count("collect: 0triple") == 1
    assert "continues alone" not in done.stderr
    if options.get("refused"):
        messages = {path.read_text() for path in tmp_path.glob("refused-*")}
        assert messages == {
            f"`work_dir` is None for {n} processes; accepted: a folder that all of them share. Their counts are "
            "joined there."
        }


@pytest.mark.parametrize("how", ["function", "command"])
def test_a_map_is_reduced_once(here: Path, alone: Path, tmp_path: Path, how: str) -> None:
    """Rank 0 reduces, to the file that a process alone makes."""
    saes = ["--sae-in", here / "sae_in", "--sae-out", here / "sae_out"]
    paths = [here / "prefs.jsonl", "--model", here / "model", *saes, "--out", tmp_path / "map"]
    settings = ["--percentile", 60, "--k-diff", 3, "--device", "cpu", "--work-dir", tmp_path / "work"]
    options = {"script": "build.py", "how": how, "arguments": [str(argument) for argument in (*paths, *settings)]}
    done = launch([*TORCHRUN, "--nproc-per-node=2"], here, tmp_path, **options)
    assert done.returncode == 0, done.stderr
    assert len(shards(tmp_path / "work")) == 8
    assert (tmp_path / "reduced").read_text().split() == ["0"]
    cdmap = ConditionalDifferenceMap.load(tmp_path / "map")
    # Alone, the SAEs come from no files.
    assert [cdmap.sources.pop(name).path for name in ("sae_in", "sae_out")] == [str(saes[1]), str(saes[3])]
    cdmap.save(tmp_path / "map")
    assert (tmp_path / "map").read_bytes() == (alone / "map").read_bytes()
    returned = [path.read_text() for path in sorted(tmp_path.glob("returned-*"))]
    assert returned == (["ConditionalDifferenceMap", "NoneType"] if how == "function" else [])
    assert done.stdout.count("Written to") == (how == "command")


def test_a_process_that_dies(here: Path, alone: Path, tmp_path: Path) -> None:
    """The launcher ends the other process. The next start, of one process, counts only what is missing."""
    done = launch([*TORCHRUN, "--nproc-per-node=2"], here, tmp_path, batch_tokens=1, dies=1)
    assert done.returncode != 0 and "SIGKILL" in done.stderr
    before = {path: path.stat().st_mtime_ns for path in shards(tmp_path / "work")}
    assert 1 <= len(before) <= 2 and not counted(tmp_path)
    for path in tmp_path.glob("claimed-*"):
        path.unlink()
    done = launch([*TORCHRUN, "--nproc-per-node=1"], here, tmp_path, batch_tokens=1)
    assert done.returncode == 0, done.stderr
    after = {path: path.stat().st_mtime_ns for path in shards(tmp_path / "work")}
    assert before.items() <= after.items() and len(after) == 8
    finished = {int(path.stem.removeprefix("shard-")) for path in before}
    assert counted(tmp_path) == [sorted(set(range(8)) - finished)]
    assert (tmp_path / "map").read_bytes() == (alone / "map").read_bytes()


def test_accelerate_starts_one_process_on_cpus(here: Path, alone: Path, tmp_path: Path) -> None:
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1"]
    done = launch([*launcher, "--mixed_precision=no", "--dynamo_backend=no"], here, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "It continues alone. For K processes: torchrun --nproc-per-node K" in " ".join(done.stderr.split())
    assert counted(tmp_path) == [list(range(8))]
    assert (tmp_path / "map").read_bytes() == (alone / "map").read_bytes()


# Communication


@pytest.fixture
def team(monkeypatch: pytest.MonkeyPatch) -> list[Team]:
    """Three ranks in one process."""
    store = HashStore()
    monkeypatch.setattr(distributed, "_launcher_store", lambda: store)
    monkeypatch.setattr(distributed, "_teams", itertools.repeat(7))
    monkeypatch.setenv("WORLD_SIZE", "3")
    team = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        team.append(Team())
    assert [(member.rank, member.size) for member in team] == [(0, 3), (1, 3), (2, 3)]
    return team


def test_claims(team: list[Team]) -> None:
    assert [team[rank].claim() for rank in (1, 0, 0, 2, 1)] == [0, 1, 2, 3, 4]


def test_two_teams_do_not_share_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    store = HashStore()
    monkeypatch.setattr(distributed, "_launcher_store", lambda: store)
    monkeypatch.setenv("WORLD_SIZE", "2")
    one, other = Team(), Team()
    assert (one.claim(), one.claim(), other.claim()) == (0, 1, 0)
    assert (one.add_finished(1, 5), other.add_finished(1, 2)) == (5, 2)


def in_a_thread(work: Any) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_rank_0_comes_first(team: list[Team]) -> None:
    order: list[int] = []
    others = [in_a_thread(lambda rank=rank: team[rank].in_turn("x", lambda: order.append(rank))) for rank in (1, 2)]
    time.sleep(0.2)
    assert order == []
    assert team[0].in_turn("x", lambda: order.append(0) or "done") == "done"
    for thread in others:
        thread.join(10)
    assert order[0] == 0 and sorted(order) == [0, 1, 2]


def test_waiting_for_the_others(team: list[Team], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "POLL", 0.01)
    shown: list[int] = []
    assert team[1].add_finished(1, 10) == 10
    waiting = in_a_thread(lambda: team[0].wait(3, shown.append))
    time.sleep(0.1)
    assert team[2].add_finished(1, 7) == 17
    time.sleep(0.1)
    assert waiting.is_alive()
    team[2].add_finished(1, 4)
    waiting.join(10)
    assert not waiting.is_alive() and shown[0] == 10 and 17 in shown and shown[-1] == 21


def test_waiting_ends(team: list[Team], monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting continues as long as pieces are finished now and then."""
    monkeypatch.setattr(distributed, "POLL", 0.01)
    monkeypatch.setattr(distributed, "PATIENCE", timedelta(seconds=0.5))

    def work() -> None:
        for _ in range(3):
            time.sleep(0.3)
            team[1].add_finished(1, 1)

    since = time.monotonic()
    in_a_thread(work)
    with pytest.raises(RuntimeError, match=r"Another process has stopped: 2 of 5 pieces are not finished.*Start again"):
        team[0].wait(5, lambda _: None)
    assert 1.3 < time.monotonic() - since < 10


def test_rank_0_leaves_last(team: list[Team], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "POLL", 0.01)
    leaving = in_a_thread(team[0].leave)
    team[1].leave()
    time.sleep(0.1)
    assert leaving.is_alive()
    team[2].leave()
    leaving.join(10)
    assert not leaving.is_alive()


def test_a_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        team = Team()
    assert (team.rank, team.size, team.claim(), team.claim()) == (0, 1, 0, 1)
    assert team.in_turn("x", lambda: 5) == 5 and team.add_finished(2, 9) == 9
    team.wait(2, lambda _: None)
    team.leave()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.warns(UserWarning, match="asked for several processes and started only this one"):
        Team()
    monkeypatch.setenv("WORLD_SIZE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Team()


def test_each_process_has_its_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert device_named("auto") == device_named("cuda") == "cuda:0"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device_named("auto") == "cuda:1" and device_named("cuda:0") == "cuda:0" and device_named("cpu") == "cpu"
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="process 2 on a machine of 2 GPUs"):
        device_named("auto")


@pytest.mark.parametrize("name", ["xyz", "meta"])
def test_an_invalid_device_is_refused(name):
    with pytest.raises(ValueError, match=f"`device` is '{name}'; accepted: auto, cuda, cuda:1, cpu, mps"):
        device_named(name)
