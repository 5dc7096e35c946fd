"""DSPA written out plainly for one row, as an independent check: no cache, no batch, no ops of the package."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dspa.config import SteeringConfig
from dspa.maps.cdmap import ConditionalDifferenceMap
from dspa.saes.frozen import FrozenSAE


def encode(sae: FrozenSAE, h: Tensor) -> Tensor:
    pre = h @ sae.W_enc + sae.b_enc
    return pre * (pre > sae.threshold) * (pre > 0)


class Plain:
    """Steers one row by full passes over the whole sequence, alone or with others beside it."""

    def __init__(
        self,
        model: PreTrainedModel,
        layers: torch.nn.ModuleList,
        sae_in: FrozenSAE,
        sae_out: FrozenSAE,
        cdmap: ConditionalDifferenceMap,
        config: SteeringConfig,
        beside: Sequence[Plain] = (),
    ) -> None:
        self.model, self.layers, self.config, self.beside = model, layers, config, beside
        self.sae_in, self.sae_out, self.cdmap = sae_in, sae_out, cdmap

    def select(self, prompt: list[int]) -> tuple[list[int], list[int]]:
        """Latents to augment and to ablate."""
        with torch.no_grad():
            hidden = self.model(torch.tensor([prompt]), output_hidden_states=True).hidden_states
        counts = (encode(self.sae_in, hidden[self.sae_in.layer + 1][0]) > 0).sum(0).tolist()
        ranked = sorted((i for i, n in enumerate(counts) if n), key=lambda i: (-counts[i], i))
        score = self.cdmap.dense()[ranked[: self.config.k_prompt]].sum(0).tolist()
        by_score = sorted(range(len(score)), key=lambda j: (-score[j], j))
        augment = [j for j in by_score if score[j] > 0][: self.config.k_diff]
        ablate = sorted((j for j in range(len(score)) if score[j] < 0), key=lambda j: (score[j], j))
        return (
            augment if self.config.mode in ("augment", "both") else [],
            ablate[: self.config.k_diff] if self.config.mode in ("ablate", "both") else [],
        )

    @contextlib.contextmanager
    def steered(self, prompt: list[int]) -> Iterator[None]:
        """Edit every pass over the whole sequence of one row, or of its beams, within a `with` block."""
        all_of_them = (self, *self.beside)
        # All of them before any edit.
        chosen = [plain.select(prompt) for plain in all_of_them]
        with contextlib.ExitStack() as edits:
            for plain, (augment, ablate) in zip(all_of_them, chosen, strict=True):
                edits.enter_context(plain._edited(prompt, augment, ablate))
            yield

    @contextlib.contextmanager
    def _edited(self, prompt: list[int], augment: list[int], ablate: list[int]) -> Iterator[None]:
        start = len(prompt) - {"response": 1, "generated": 0, "all": len(prompt)}[self.config.positions]

        def edit(_module: object, _args: object, output: Tensor | tuple[Tensor, ...]) -> object:
            h = (output[0] if isinstance(output, tuple) else output).clone()
            for b in range(h.shape[0]):
                for t in range(start, h.shape[1]):
                    f = encode(self.sae_out, h[b, t])
                    step = self.config.alpha * f.max()
                    new = f.clone()
                    for j in augment:
                        new[j] = f[j] + step if f[j] > 0 else 0
                    for j in ablate:
                        new[j] = max(f[j] - step, torch.zeros(()))
                    if not torch.equal(new, f):
                        h[b, t] += (new - f) @ self.sae_out.W_dec
            return (h, *output[1:]) if isinstance(output, tuple) else h

        handle = self.layers[self.sae_out.layer].register_forward_hook(edit)
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def generate(self, prompt: list[int], n_tokens: int, *, sample: bool = False) -> list[int]:
        """The next tokens, greedy or sampled from torch's default generator."""
        tokens = list(prompt)
        with self.steered(prompt):
            for _ in range(n_tokens):
                logits = self.model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
                if sample:
                    tokens.append(int(torch.multinomial(logits.softmax(-1), 1)))
                else:
                    tokens.append(int(logits.argmax()))
        return tokens[len(prompt) :]
