"""The two gate rules on synthetic counts: `python -m bench.offline.gates`.

What the rule changes where many latents are dead and where prompts are short: the cut of the sparsification, what the
map keeps, and how alike prompts are steered.
"""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.console import Console
from torch import Tensor

from bench.harness.machine import describe
from bench.offline.synthetic_counts import PROMPT, write_counts
from dspa import Collection, SteeringConfig, reduce
from dspa.intervals import jaccard
from dspa.maps.cdmap import GATE_RULES, prompt_latents
from dspa.maps.stability import selected_latents
from dspa.maps.table import DensityTable

N_TRIPLES, N_HELD_OUT, D_SAE_IN, D_SAE_OUT = 250, 50, 4096, 2048
# Tokens per prompt and dead latents of the input SAE.
CASES = {"long prompts": (PROMPT, 0), "dead latents": (PROMPT, 3834), "short prompts": (16, 0)}


def compare_rules(counts: Collection) -> list[dict[str, Any]]:
    """Reduce all but the held-out triples by either rule, and steer the held-out prompts by the maps."""
    held_out, rest = range(N_HELD_OUT), range(N_HELD_OUT, N_TRIPLES)
    prompts = DensityTable(counts, "all", held_out).prompt_counts()
    return [describe_rule(counts, rule, rest, prompts) for rule in GATE_RULES]


def describe_rule(counts: Collection, rule: str, subset: range, prompts: Tensor) -> dict[str, Any]:
    """The map of a rule, and the sets of latents that it selects for prompts."""
    config = SteeringConfig()
    cdmap = reduce(counts, gate_rule=rule, subset=subset)
    always, sets = cdmap.n_open == len(subset), selected_latents(cdmap, prompts, config)
    kept = cdmap.values[cdmap.values != 0]
    return {
        "gate_rule": rule,
        "inactive_latents": cdmap.meta.n_inactive,
        "percentiles_0": cdmap.meta.n_zero_percentile,
        "always_open": int(always.sum()),
        # The cut is the smallest entry that it keeps.
        "cut": float(kept.abs().min()),
        "columns": len(cdmap.columns),
        "entries": len(kept) / (D_SAE_IN * D_SAE_OUT),
        "always_open_of_a_prompt": fmean(int(always[some].sum()) for some in prompt_latents(prompts, config.k_prompt)),
        "jaccard_of_two_prompts": fmean(jaccard(a, b) for a, b in combinations(sets, 2)),
    }


def main(out: Annotated[Path | None, typer.Option(help="Write results here, as JSON.")] = None) -> None:
    """Compare the rules on each kind of counts."""
    results = []
    for name, (prompt_tokens, n_dead) in CASES.items():
        with TemporaryDirectory() as folder:
            counts = write_counts(
                Path(folder) / "counts", N_TRIPLES, D_SAE_IN, D_SAE_OUT, prompt_tokens=prompt_tokens, n_dead=n_dead
            )
            results += [{"counts": name} | result for result in compare_rules(counts)]
    Console().print_json(json.dumps(results))
    if out is not None:
        out.write_text(json.dumps(describe("") | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
