"""Triples per second and memory of collecting a map's counts on the CPU: `python -m bench.offline.collect`.

`dspa.collect` is compared with the published three full passes with the same op, and with a script that does the same
with SAELens and TransformerLens in the obvious way. Each runs in a process of its own, on the same triples, and their
counts have to agree.
"""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.harness.machine import describe
from dspa import FrozenSAE, collect, load_triples
from dspa.data.tokens import tokenize_triple
from dspa.demo.load import ASSETS
from dspa.demo.train import MODEL_NAME
from dspa.testing import make_model, make_sae_for, make_tokenizer
from dspa_kernels import activation_counts

# A Gemma-2 of four layers of 512 with the vocabulary of gelu-4l, a model of that size that is much used.
FOUR_LAYERS = {
    "num_hidden_layers": 4,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "vocab_size": 48_262,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "query_pre_attn_scalar": 64,
    "max_position_embeddings": 2048,
    "sliding_window": 4096,
    "initializer_range": 0.02,
}
D_SAE, L0, LAYERS = 16_384, 40, (1, 2)
PROMPT, RESPONSE, SPREAD = 150, 200, 0.5
BATCH_TOKENS = 8192
# Rounding may decide whether a latent is active.
AGREEMENT = 1e-4


@dataclass(frozen=True)
class Case:
    """A model, its SAEs and triples, all in one folder."""

    folder: Path
    n_triples: int

    def load(self) -> tuple[Any, Any, FrozenSAE, FrozenSAE]:
        model = AutoModelForCausalLM.from_pretrained(self.folder / MODEL_NAME, dtype=torch.float32).eval()
        saes = [FrozenSAE.load(self.folder / name, dtype=torch.float32) for name in ("sae_in", "sae_out")]
        return model, AutoTokenizer.from_pretrained(self.folder / MODEL_NAME), *saes

    @property
    def triples(self) -> Path:
        return self.folder / "preferences.jsonl"


def write_four_layers(folder: Path, n_triples: int) -> Case:
    """A Gemma-2 with random weights, and SAEs with about L0 latents active on its residuals."""
    model = make_model("gemma2", **FOUR_LAYERS)
    n_words = model.config.vocab_size
    make_tokenizer(vocab_size=n_words).save_pretrained(folder / MODEL_NAME)
    model.save_pretrained(folder / MODEL_NAME)
    rng = random.Random(0)

    def text(middle: int) -> str:
        n = max(4, min(700, int(rng.lognormvariate(np.log(middle), SPREAD))))
        return "".join(f" w{rng.randrange(3, n_words)}" for _ in range(n))

    rows = [{"prompt": text(PROMPT), "chosen": text(RESPONSE), "rejected": text(RESPONSE)} for _ in range(n_triples)]
    (folder / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with torch.no_grad():
        hidden = model(torch.randint(3, n_words, (8, 256)), output_hidden_states=True).hidden_states
    for name, layer in zip(("sae_in", "sae_out"), LAYERS, strict=True):
        make_sae_for(hidden[layer + 1].flatten(0, 1), layer, D_SAE, L0 / D_SAE, seed=layer).save(folder / name)
    return Case(folder, n_triples)


Counts = tuple[Tensor, Tensor, Tensor]


def ours(case: Case) -> Callable[[], Counts]:
    """`dspa.collect`: tokenizing, checking and writing shards included."""
    model, tokenizer, sae_in, sae_out = case.load()

    def run() -> Counts:
        counts = collect(
            model, tokenizer, case.triples, sae_in, sae_out, first=case.n_triples, batch_tokens=BATCH_TOKENS,
            progress=False,
        )  # fmt: skip
        total = [torch.zeros(sae.d_sae, dtype=torch.int64) for sae in (sae_in, sae_out, sae_out)]
        names = ("prompt", "chosen", "rejected")
        for shard in counts.shards(*(f"{name}.{part}" for name in names for part in ("latents", "counts"))):
            for sums, name in zip(total, names, strict=True):
                sums.index_add_(0, shard[f"{name}.latents"].long(), shard[f"{name}.counts"].long())
        return total[0], total[1], total[2]

    return run


def three_passes(case: Case) -> Callable[[], Counts]:
    """Prompt, prompt + chosen and prompt + rejected through the whole model, with the op of this package, in batches of
    similar lengths within the same budget."""
    model, tokenizer, sae_in, sae_out = case.load()

    def run() -> Counts:
        triples = list(load_triples(case.triples))[: case.n_triples]
        tokens = [tokenize_triple(triple, tokenizer) for triple in triples]
        passes = (
            (sae_in, [(t.prompt, 0) for t in tokens]),
            (sae_out, [(t.prompt + t.chosen, len(t.prompt)) for t in tokens]),
            (sae_out, [(t.prompt + t.rejected, len(t.prompt)) for t in tokens]),
        )
        one, two, three = (counted(model, sae, rows) for sae, rows in passes)
        return one, two, three

    return run


@torch.no_grad()
def counted(model: Any, sae: FrozenSAE, rows: list[tuple[list[int], int]]) -> Tensor:
    """Counts [d_sae] over tokens from each row's start on."""
    total = torch.zeros(sae.d_sae, dtype=torch.int64)
    waiting, kept = sorted(rows, key=lambda row: len(row[0])), []
    assert sae.layer is not None
    hook = model.model.layers[sae.layer].register_forward_hook(lambda _module, _args, out: kept.append(out))
    while waiting:
        n = 1
        while n < len(waiting) and (n + 1) * len(waiting[n][0]) <= BATCH_TOKENS:
            n += 1
        batch, waiting = waiting[:n], waiting[n:]
        width = len(batch[-1][0])
        ids, sequences = torch.zeros(n, width, dtype=torch.long), torch.full((n, width), -1, dtype=torch.int32)
        for row, (tokens, start) in enumerate(batch):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            sequences[row, start : len(tokens)] = row
        model(input_ids=ids, use_cache=False)
        total += activation_counts(kept.pop().flatten(0, 1), sae.weights, sequences.flatten(), n).sum(dim=0)
    hook.remove()
    return total


def sae_lens_script(case: Case) -> Callable[[], Counts]:
    """Triple by triple: TransformerLens' `run_with_cache`, SAELens' `encode`, and a count of what is above zero."""
    from sae_lens import SAE
    from transformer_lens.model_bridge import TransformerBridge

    hf, tokenizer, *saes = case.load()
    name = str(case.folder / MODEL_NAME)
    model = TransformerBridge.boot_transformers(name, hf_model=hf, tokenizer=tokenizer, device="cpu")
    lens = [SAE.load_from_disk(str(case.folder / sae)).float() for sae in ("sae_in", "sae_out")]

    def active(tokens: list[int], which: int, start: int) -> Tensor:
        hook = f"blocks.{saes[which].layer}.hook_resid_post"
        _, cache = model.run_with_cache(torch.tensor([tokens]), names_filter=hook)
        return (lens[which].encode(cache[hook])[0, start:] > 0).sum(dim=0)

    @torch.no_grad()
    def run() -> Counts:
        totals = [torch.zeros(saes[which].d_sae, dtype=torch.int64) for which in (0, 1, 1)]
        for triple in list(load_triples(case.triples))[: case.n_triples]:
            t = tokenize_triple(triple, tokenizer)
            totals[0] += active(t.prompt, 0, 0)
            totals[1] += active(t.prompt + t.chosen, 1, len(t.prompt))
            totals[2] += active(t.prompt + t.rejected, 1, len(t.prompt))
        return totals[0], totals[1], totals[2]

    return run


METHODS = {"dspa.collect": ours, "three passes": three_passes, "SAELens, TransformerLens": sae_lens_script}


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def measure(folder: Path, n_triples: int, method: str, rounds: int, out: Path) -> None:
    """Write seconds of all rounds, peak memory, and the memory after loading; runs in a process of its own."""
    run = METHODS[method](Case(folder, n_triples))
    loaded, seconds = peak_gb(), []
    for _ in range(rounds):
        start = time.perf_counter()
        counts = run()
        seconds.append(time.perf_counter() - start)
    np.savez(out.with_suffix(".npz"), *(tensor.numpy() for tensor in counts))
    out.write_text(json.dumps({"seconds": seconds, "peak_gb": peak_gb(), "loaded_gb": loaded}))


# What a process runs; its arguments are those of `measure`.
MEASURE = """
import sys
from pathlib import Path
from bench.offline.collect import measure

folder, n_triples, method, rounds, out = sys.argv[1:]
measure(Path(folder), int(n_triples), method, int(rounds), Path(out))
"""


def compare(case: Case, name: str, rounds: int) -> list[dict[str, Any]]:
    """Every method on one case. Raises where their counts differ by more than rounding."""
    results, counts = [], []
    for method in METHODS:
        with TemporaryDirectory() as folder:
            out = Path(folder) / "result.json"
            arguments = [str(case.folder), str(case.n_triples), method, str(rounds), str(out)]
            subprocess.run([sys.executable, "-c", MEASURE, *arguments], check=True)
            result = json.loads(out.read_text())
            counts.append([np.asarray(array) for array in np.load(out.with_suffix(".npz")).values()])
        for mine, theirs in zip(counts[0], counts[-1], strict=True):
            off = int(np.abs(mine - theirs).sum())
            assert mine.sum() and off <= AGREEMENT * mine.sum(), f"{method}: {off} of {mine.sum()} counts differ"
        rate = case.n_triples / min(result["seconds"])
        results.append({"case": name, "method": method, "triples": case.n_triples, "triples_s": rate, **result})
    return results


def main(
    out: Annotated[Path | None, typer.Option(help="Write results here, as JSON.")] = None,
    triples: Annotated[int, typer.Option(help="Triples for the four-layer model.")] = 48,
    rounds: Annotated[int, typer.Option(help="Runs of each method; the best counts.")] = 3,
) -> None:
    """Measure all methods on the demo's world and on a 4-layer model of d = 512 with SAEs of 16384 latents."""
    results = compare(Case(ASSETS, 400), "demo", rounds)
    with TemporaryDirectory() as folder:
        case = write_four_layers(Path(folder), triples)
        results += compare(case, "4 layers, d = 512, d_sae = 16384", rounds)
    table = Table(title=f"Collecting on {torch.get_num_threads()} threads")
    for column in ("case", "method", "triples/s", "ours is", "peak GB", "above loading"):
        table.add_column(column, justify="left" if column in ("case", "method") else "right")
    for result in results:
        ours_rate = next(r["triples_s"] for r in results if r["case"] == result["case"])
        cells = (f"{result['triples_s']:.1f}", f"{ours_rate / result['triples_s']:.2f}x", f"{result['peak_gb']:.2f}")
        table.add_row(result["case"], result["method"], *cells, f"{result['peak_gb'] - result['loaded_gb']:.2f}")
    Console().print(table)
    if out is not None:
        record = describe("") | {"threads": torch.get_num_threads(), "results": results}
        out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
