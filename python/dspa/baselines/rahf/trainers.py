"""transformers' Trainer with RAHF's two losses. Importing this needs the extra `train`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer

from dspa.baselines.rahf.config import AlignmentConfig, TuningConfig
from dspa.baselines.rahf.instructions import Instructed, digest, read_instructed
from dspa.baselines.rahf.losses import IGNORED, alignment_loss, clean_loss, code_loss, paper_loss, token_losses
from dspa.baselines.trainers import BaselineTrainer, Examples, load_lora
from dspa.models.operations import Cost, forward
from dspa.models.reading import layer_outputs
from dspa.resuming import check_loss, row_lengths

# A prompt with a response, as token ids.
Pair = tuple[list[int], list[int]]


def padded(pairs: Sequence[Pair]) -> dict[str, Tensor]:
    """Return `input_ids`, `attention_mask` and `labels` [B, T], padded on the right; only responses have labels."""
    length = max(len(prompt) + len(response) for prompt, response in pairs)
    ids, mask, labels = [], [], []
    for prompt, response in pairs:
        n, rest = len(prompt) + len(response), length - len(prompt) - len(response)
        ids.append(prompt + response + [0] * rest)
        mask.append([1] * n + [0] * rest)
        labels.append([IGNORED] * len(prompt) + response + [IGNORED] * rest)
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "labels": torch.tensor(labels),
    }


class RAHFTrainer(BaselineTrainer, Trainer):
    """A trainer of one of the two stages."""

    @classmethod
    def read(
        cls,
        triples: Any,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        chat_template_kwargs: Mapping[str, Any] | None,
        config: Any,
        progress: bool,
    ) -> Examples:
        """Read triples after both instructions and neither."""
        made = read_instructed(triples, tokenizer, max_length, chat_template_kwargs, progress)
        return Examples(cls.rows(made, config), digest(made), {"n_triples": len(made)})

    @staticmethod
    @abstractmethod
    def rows(triples: Sequence[Instructed], config: Any) -> list[Any]:
        """Return the examples of triples."""


class TuningTrainer(RAHFTrainer):
    """Stage 1. A row is a response with its own and with the opposite prompt."""

    method = "RAHF-SCIT, stage 1"

    @staticmethod
    def rows(triples: Sequence[Instructed], _config: TuningConfig) -> list[tuple[Pair, Pair]]:
        """Return the chosen response of each triple as good, then the rejected one of each as bad."""
        chosen = [((t.good, t.chosen), (t.bad, t.chosen)) for t in triples]
        return chosen + [((t.bad, t.rejected), (t.good, t.rejected)) for t in triples]

    @staticmethod
    def collate(rows: Sequence[tuple[Pair, Pair]]) -> dict[str, Tensor]:
        """Return a batch of B rows, [2 B, T]: after the own instructions, then after the opposite ones."""
        return padded([own for own, _ in rows] + [opposite for _, opposite in rows])

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Return the configured loss."""
        labels = inputs.pop("labels")
        if self.config.loss == "rahf_code_compat":
            # The code reads the opposite ones only as far as the longest of the own ones, and masks nothing.
            n_rows = len(labels) // 2
            length = int(inputs["attention_mask"][:n_rows].sum(dim=1).max())
            logits = model(input_ids=inputs["input_ids"][:, :length], use_cache=False).logits
            loss = code_loss(logits, labels[:n_rows, :length], self.config.epsilon)
        else:
            logits = model(**inputs, use_cache=False).logits
            own, opposite = token_losses(logits[:, :-1], labels[:, 1:]).chunk(2)
            lengths = (labels != IGNORED).sum(dim=1).chunk(2)[0]
            clean = self.config.loss == "clean"
            loss = clean_loss(own, opposite, lengths, self.config.epsilon) if clean else paper_loss(own, opposite)
        check_loss(loss)
        return loss

    def operations(self, inputs: Mapping[str, Tensor]) -> Cost:
        """Return those of a pass over all rows, with all logits."""
        lengths = row_lengths(inputs["attention_mask"])
        if self.config.loss == "rahf_code_compat":
            longest = max(lengths[: len(lengths) // 2])
            lengths = [min(n, longest) for n in lengths]
        return self.trained_pass(lengths, n_logits=sum(lengths))


class Residuals(nn.Module):
    """The residuals of a model with a LoRA, as a module whose outputs several processes can train.

    Args:
        model: a PEFT model.
        targets: layers whose inputs are read, in ascending order.
    """

    def __init__(self, model: Any, targets: Sequence[int]) -> None:
        super().__init__()
        self.model, self.targets = model, targets

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the residuals before each of the target layers, [L, B, T, d_in]. Nothing above them runs."""
        outputs = [target - 1 for target in self.targets]
        read = layer_outputs(self.model, outputs, input_ids=input_ids, attention_mask=attention_mask)
        return torch.stack([read[layer] for layer in outputs])

    @contextmanager
    def base(self) -> Iterator[None]:
        """Let the model run without its LoRA, without dropout and without gradients, within a `with` block."""
        self.eval()
        with self.model.disable_adapter(), torch.no_grad():
            yield
        self.train()


class AlignmentTrainer(RAHFTrainer):
    """Stage 2. A row is a response after the three prompts. The base is the same model without its LoRA."""

    method = "RAHF-SCIT, stage 2"
    model: Residuals

    @staticmethod
    def rows(triples: Sequence[Instructed], config: AlignmentConfig) -> list[tuple[Pair, Pair, Pair]]:
        """Return one response of each triple, drawn once, without an instruction, as good and as bad."""
        generator = torch.Generator().manual_seed(config.seed)
        chosen = torch.randint(2, (len(triples),), generator=generator).tolist()
        drawn = [t.chosen if is_chosen else t.rejected for t, is_chosen in zip(triples, chosen, strict=True)]
        return [((t.plain, r), (t.good, r), (t.bad, r)) for t, r in zip(triples, drawn, strict=True)]

    @staticmethod
    def collate(rows: Sequence[tuple[Pair, Pair, Pair]]) -> dict[str, Tensor]:
        """Return a batch of B rows, [3 B, T]: without an instruction, as good, as bad."""
        return padded([row[n] for n in range(3) for row in rows])

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Return the distance of residuals from `h + alpha (h_good - h_bad)`, over the response tokens."""
        response = inputs.pop("labels") != IGNORED
        n_rows = len(response) // 3
        with self.model.base():
            plain, good, bad = self.model(**inputs)[:, response].chunk(3, dim=1)
        target = plain + self.config.alpha * (good - bad)
        length = int(inputs["attention_mask"][:n_rows].sum(dim=1).max())
        h = model(**{name: tensor[:n_rows, :length] for name, tensor in inputs.items()})
        places = n_rows * int(response.sum(dim=1).max())
        loss = alignment_loss(h[:, response[:n_rows, :length]], target, self.config.loss, places)
        check_loss(loss)
        return loss

    def operations(self, inputs: Mapping[str, Tensor]) -> Cost:
        """Return those of the base on all three texts, and of the LoRA on the one without an instruction."""
        lengths, layers = row_lengths(inputs["attention_mask"]), slice(self.model.targets[-1])
        plain = lengths[: len(lengths) // 3]
        return forward(self.sizes, lengths, layers=layers) + self.trained_pass(plain, layers=layers)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            self.model.model.save_pretrained(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_lora(self.model.model, Path(resume_from_checkpoint))
