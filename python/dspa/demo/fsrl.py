"""The FSRL demo: train adapters on preference triples, with weak to strong sparsity, and compare them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dspa.data.triples import load_triples
from dspa.demo.load import World
from dspa.fsrl.adapter import FSRLAdapter
from dspa.fsrl.config import FSRLConfig, TrainingConfig
from dspa.fsrl.results import HeldOut, HeldOutRankings
from dspa.fsrl.sweep import train_sweep
from dspa.outputs import write_atomically

# Triples to train on; the others in the file are held out.
N_TRAIN = 300
SEED = 0
ADAPTERS = (
    *(FSRLConfig(l1=l1) for l1 in (0.005, 0.01, 0.02, 0.03, 0.05)),
    FSRLConfig(activation="relu"),
    FSRLConfig(activation="jumprelu"),
)
# The published rate is 5e-5 and the published batch 32, for 2 billion parameters and 60 thousand triples.
TRAINING = TrainingConfig(lr=1e-3, batch_size=8, micro_batch_size=8, max_steps=80)


@dataclass(frozen=True)
class AdapterOutcome:
    """Figures of an adapter, or of the base model, which has no activation.

    Attributes:
        activation: the adapter's activation.
        l1: the adapter's lambda.
        held_out: figures on held-out triples.
        share: share of style words in the preferred style, in sampled answers to held-out prompts.
        perplexity: perplexity on style-neutral words of given answers.
    """

    activation: str | None
    l1: float | None
    held_out: HeldOut | HeldOutRankings
    share: float
    perplexity: float


def measure(
    demo: World,
    out: Path,
    *,
    adapters: tuple[FSRLConfig, ...] = ADAPTERS,
    config: TrainingConfig = TRAINING,
    progress: bool = True,
) -> list[AdapterOutcome]:
    """Train an adapter of each setting on the SAE that reads the prompt, and measure them and the base model.

    The adapters are trained in folders in `out`.
    """
    triples = list(load_triples(demo.triples))
    sweep = train_sweep(
        *(demo.model, demo.tokenizer, triples[:N_TRAIN], [demo.sae_in], adapters, out),
        eval_triples=triples[N_TRAIN:],
        config=config,
        progress=progress,
    )
    outcomes = [AdapterOutcome(None, None, sweep.base, demo.share(demo.generate(SEED)), demo.neutral_perplexity(None))]
    for trained in sweep.adapters:
        with FSRLAdapter.load(trained.folder, demo.sae_in).attach(demo.model):
            share, perplexity = demo.share(demo.generate(SEED)), demo.neutral_perplexity(None)
        outcomes.append(AdapterOutcome(trained.activation, trained.l1, trained.held_out, share, perplexity))
    return outcomes


def run(json_path: Path | None = None, *, progress: bool = True) -> list[AdapterOutcome]:
    """Train and measure, print the table, and write all results as JSON."""
    console, demo = Console(markup=False, emoji=False), World()
    console.print(
        "A small language model answers letters in a formal or a casual style. The preferred answer is in the "
        f"register of its letter. Adapters at layer {demo.sae_in.layer} are trained on {N_TRAIN} triples with SimPO, "
        f"{TRAINING.max_steps} steps of {TRAINING.batch_size} triples at a rate of {TRAINING.lr:g} (published, for a "
        "large model: 5e-5)."
    )
    with TemporaryDirectory() as folder, _one_thread():
        outcomes = measure(demo, Path(folder) / "sweep", progress=progress)
    console.print(_table(outcomes))
    if json_path is not None:
        record = {
            "settings": {"n_train": N_TRAIN, "seed": SEED, "layer": demo.sae_in.layer, **asdict(TRAINING)},
            "outcomes": [asdict(outcome) for outcome in outcomes],
        }
        write_atomically(json_path, json.dumps(record, indent=2).encode())
        console.print(f"All results: {json_path}")
    return outcomes


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run torch in one thread: on tensors this small, several would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _table(outcomes: list[AdapterOutcome]) -> Table:
    title = f"On {outcomes[0].held_out.counted}; preferred share and neutral perplexity of text"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 0))
    columns: dict[str, Callable[[AdapterOutcome], str]] = {
        "adapter": lambda outcome: outcome.activation or "base model",
        "λ": lambda outcome: "" if outcome.l1 is None else f"{outcome.l1:g}",
        "SimPO loss": lambda outcome: f"{outcome.held_out.named['SimPO loss']:.3f}",
        "accuracy": lambda outcome: f"{outcome.held_out.accuracy:.2f}",
        "L0": lambda outcome: f"{outcome.held_out.l0:.1f}",
        "L1": lambda outcome: f"{outcome.held_out.l1:.2f}",
        "share": lambda outcome: f"{outcome.share:.3f}",
        "perplexity": lambda outcome: f"{outcome.perplexity:.2f}",
    }
    for column in columns:
        table.add_column(column, justify="left" if column == "adapter" else "right", no_wrap=True)
    for outcome in outcomes:
        table.add_row(*(cell(outcome) for cell in columns.values()))
    return table
