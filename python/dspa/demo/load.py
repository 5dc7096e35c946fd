"""The demo's model, SAEs and data, and the measures of a method on them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dspa.baselines.static_sae import static_map
from dspa.config import SteeringConfig
from dspa.data.records import read_records
from dspa.data.triples import load_triples
from dspa.demo import language
from dspa.demo.train import MODEL_NAME
from dspa.maps.build import build_map
from dspa.maps.cdmap import ConditionalDifferenceMap
from dspa.models.load import load_model
from dspa.saes.frozen import FrozenSAE
from dspa.steering.dspa import Steering

ASSETS = Path(__file__).parent / "assets"
N_TRIPLES = 250
N_NEW_TOKENS = 32


@dataclass(frozen=True)
class Method:
    """One line of the table: steering by DSPA or with the static set, or the base model without a config."""

    name: str
    config: SteeringConfig | None = None
    static: bool = False


class World:
    """The demo's model, SAEs and data, loaded as a user would load them."""

    def __init__(self, assets: Path = ASSETS) -> None:
        self.triples = assets / "preferences.jsonl"
        loaded: tuple[Any, Any] = load_model(assets / MODEL_NAME, dtype="float32", device="cpu")
        self.model, self.tokenizer = loaded
        self.sae_in = FrozenSAE.load(assets / "sae_in", dtype=torch.float32)
        self.sae_out = FrozenSAE.load(assets / "sae_out", dtype=torch.float32)
        self.held_out: list[Any] = [row for _, row in read_records(assets / "heldout.jsonl", ValueError)]
        self.wanted = [language.preferred_style(row["register"]) for row in self.held_out]

    def build_map(self, *, progress: bool = True) -> ConditionalDifferenceMap:
        """Build the map of the first 250 triples."""
        triples = islice(load_triples(self.triples), N_TRIPLES)
        cdmap = build_map(self.model, self.tokenizer, triples, self.sae_in, self.sae_out, progress=progress)
        # None only on the other ranks of several processes.
        assert cdmap is not None
        return cdmap

    def steering(self, method: Method, cdmap: ConditionalDifferenceMap, *, record: bool = False) -> Steering:
        """Return the steering of a method, ready to attach."""
        cdmap = static_map(cdmap) if method.static else cdmap
        return Steering(self.sae_in, self.sae_out, cdmap, method.config, record=record)

    def generate(self, seed: int) -> Tensor:
        """Sample answers to every held-out prompt, [N, tokens], as the model is steered now."""
        inputs = self.tokenizer([row["prompt"] for row in self.held_out], return_tensors="pt", padding=True)
        torch.manual_seed(seed)
        output: Tensor = self.model.generate(
            **inputs, max_new_tokens=N_NEW_TOKENS, do_sample=True, top_k=0, pad_token_id=self.tokenizer.pad_token_id
        )
        return output[:, inputs["input_ids"].shape[1] :]

    def share(self, answers: Tensor) -> float:
        """Return the share of style words in all answers that are of the style that their prompt prefers."""
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        counts = [language.count_style_words(text, style) for text, style in zip(texts, self.wanted, strict=True)]
        return sum(preferred for preferred, _ in counts) / max(1, sum(total for _, total in counts))

    def neutral_perplexity(self, steering: Steering | None) -> float:
        """Return the perplexity on the style-neutral words of given answers, teacher-forced."""
        prompts = [self.tokenizer(row["prompt"])["input_ids"] for row in self.held_out]
        answers = [self.tokenizer(row["response"], add_special_tokens=False)["input_ids"] for row in self.held_out]
        rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        width = max(map(len, rows))
        tokens = torch.tensor([row + [self.tokenizer.pad_token_id] * (width - len(row)) for row in rows])
        inputs = {"input_ids": tokens, "attention_mask": (tokens != self.tokenizer.pad_token_id).long()}
        with torch.no_grad():
            if steering is None:
                logits = self.model(**inputs).logits
            else:
                with steering.responses([len(prompt) for prompt in prompts]):
                    logits = self.model(**inputs).logits
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
        neutral = torch.zeros_like(tokens, dtype=torch.bool)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            words = self.tokenizer.convert_ids_to_tokens(answer)
            neutral[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(language.neutral_positions(words))
        return math.exp(float(losses[neutral[:, 1:]].mean()))
