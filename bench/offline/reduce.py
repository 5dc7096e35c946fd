"""Time and memory of reducing synthetic counts of realistic sparsity to a map: `python -m bench.offline.reduce`."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from bench.harness.machine import describe
from bench.offline.synthetic_counts import write_counts
from dspa import reduce
from dspa.maps.collection import Collection
from dspa.maps.table import DensityTable


def measure(folder: str, gate_rule: str) -> None:
    """Print the result as JSON; runs in a process of its own."""
    start = time.perf_counter()
    cdmap = reduce(folder, gate_rule=gate_rule, progress=True)
    seconds = time.perf_counter() - start
    result = {
        "gate_rule": gate_rule,
        "seconds": seconds,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "n_columns": len(cdmap.columns),
        "partly_open_gates": len(cdmap.gate_latents),
        "open_gates_a_prompt": float(cdmap.n_open[cdmap.gate_latents.long()].sum() / cdmap.meta.n_triples),
    }
    print(json.dumps(result))


def describe_counts(folder: Path) -> dict[str, Any]:
    """Size and sparsity of the counts."""
    collection = Collection.open(folder)
    table = DensityTable(collection, "all", None)
    names = ("prompt", "chosen", "rejected")
    return {
        "triples": table.n_triples,
        "d_sae": [table.width("prompt"), table.width("chosen")],
        "active_latents_a_text": {name: float(table.entries(name).sum() / table.n_triples) for name in names},
        "tokens_a_text": {name: float(collection.triples()[name].double().mean()) for name in names},
        "gb": sum(path.stat().st_size for path in collection.paths()) / 1e9,
    }


def main(
    folder: Annotated[Path | None, typer.Option(help="Keep the counts here, or use those that are here.")] = None,
    triples: Annotated[int, typer.Option(help="Number of triples.")] = 61_000,
    d_sae: Annotated[int, typer.Option(help="Width of both SAEs.")] = 65_536,
    gate_rule: Annotated[str, typer.Option(help="published or active.")] = "published",
    out: Annotated[Path | None, typer.Option(help="Write results here, as JSON.")] = None,
) -> None:
    """Make counts, reduce them, and report time and peak memory."""
    with TemporaryDirectory() as other:
        counts = folder or Path(other) / "counts"
        if not counts.exists():
            write_counts(counts, triples, d_sae, d_sae)
        code = "import sys; from bench.offline.reduce import measure; measure(*sys.argv[1:])"
        command = [sys.executable, "-c", code, str(counts), gate_rule]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        result = json.loads(done.stdout) | describe_counts(counts)
    Console().print_json(json.dumps(result))
    if out is not None:
        record = describe("") | {"threads": torch.get_num_threads(), "results": [result]}
        out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
