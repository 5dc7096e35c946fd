"""PRO in the demo's world, next to SimPO on the same rankings and to controls: `python -m dspa.demo.pro`."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console

from dspa.data.triples import Triple, load_triples
from dspa.demo import language
from dspa.demo.fsrl import N_TRAIN, TRAINING
from dspa.demo.load import N_NEW_TOKENS, World
from dspa.fsrl.adapter import FSRLAdapter
from dspa.fsrl.config import TrainingConfig
from dspa.fsrl.results import held_out_rankings
from dspa.fsrl.training import train

SEEDS = (0, 1, 2)
N_SAMPLED = 2
# The reward of an answer whose style words are all of the preferred style. It is SimPO's beta for the best and worst.
SCALE = 10.0
PRO = replace(TRAINING, loss="pro")
BARE = replace(PRO, sft_weight=0.0)


def rankings_of(world: World, *, scale: float = SCALE) -> list[dict[str, Any]]:
    """Return rankings of both answers of each triple and two that the model samples, by their share of style words.

    Of equal answers, the first is kept.
    """
    triples = list(load_triples(world.triples))
    drawn = [_samples(world, triples, seed) for seed in range(N_SAMPLED)]
    return [_ranking(triple, list(texts), scale) for triple, *texts in zip(triples, *drawn, strict=True)]


def _samples(world: World, triples: list[Triple], seed: int) -> list[str]:
    inputs = world.tokenizer([triple.prompt for triple in triples], return_tensors="pt", padding=True)
    torch.manual_seed(seed)
    output = world.model.generate(
        **inputs, max_new_tokens=N_NEW_TOKENS, do_sample=True, top_k=0, pad_token_id=world.tokenizer.pad_token_id
    )
    texts = world.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [f" {text.strip()}" for text in texts]


def _ranking(triple: Triple, drawn: list[str], scale: float) -> dict[str, Any]:
    style = max(language.STYLES, key=lambda style: _share(str(triple.chosen), style))
    responses = list(dict.fromkeys([str(triple.chosen), str(triple.rejected), *drawn]))
    return {
        "prompt": triple.prompt,
        "responses": responses,
        "rewards": [scale * _share(text, style) for text in responses],
    }


def _share(text: str, style: language.Style) -> float:
    preferred, total = language.count_style_words(text, style)
    return preferred / max(1, total)


def trainings(rankings: list[dict[str, Any]]) -> Iterator[tuple[str, TrainingConfig, list[dict[str, Any]]]]:
    """Yield the name, the settings and the data of each training."""
    rng = random.Random(0)
    shuffled = [row | {"rewards": rng.sample(row["rewards"], len(row["rewards"]))} for row in rankings]
    yield "SimPO, best and worst", TRAINING, rankings
    yield "PRO", PRO, rankings
    yield "PRO without SFT", BARE, rankings
    yield "PRO without SFT, plain", replace(BARE, plain=True), rankings
    yield "PRO without SFT, shuffled", BARE, shuffled


def main() -> None:
    """Train the adapters, and print a line of figures for each and for the base model."""
    torch.set_num_threads(1)
    world, console = World(), Console(markup=False, emoji=False, width=140)
    rankings = rankings_of(world)

    def report(name: str, adapter: FSRLAdapter | None) -> None:
        figures = held_out_rankings(world.model, world.tokenizer, rankings[N_TRAIN:], adapter, progress=False)
        style = sum(world.share(world.generate(seed)) for seed in SEEDS) / len(SEEDS)
        perplexity = world.neutral_perplexity(None)
        console.print(
            f"{name:26}  best likeliest {figures.accuracy:.2f}  pairs {figures.pair_accuracy:.3f}  margin "
            f"{figures.margin:.3f}  L0 {figures.l0:.0f}  style {style:.3f}  perplexity {perplexity:.2f}"
        )

    report("base model", None)
    for name, config, data in trainings(rankings):
        adapter = FSRLAdapter(world.sae_in)
        with TemporaryDirectory() as folder:
            out = Path(folder) / "adapter"
            train(world.model, world.tokenizer, data[:N_TRAIN], adapter, out, config=config, progress=False)
        with adapter.attach(world.model):
            report(name, adapter)


if __name__ == "__main__":
    main()
