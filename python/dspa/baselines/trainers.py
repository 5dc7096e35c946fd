"""Base of the trainers of all baselines. Importing this needs the extra `train`."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainingArguments

from dspa.models.operations import Cost, forward, with_backward
from dspa.models.sizes import ModelSizes
from dspa.resuming import SETTINGS, Resumable, Steps, deprecations_silenced
from dspa.training_folder import TrainingFolder, reading_checkpoint

# Number of a layer in the name of a parameter.
LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Examples:
    """Rows that a trainer reads.

    Attributes:
        rows: the examples, as the trainer's collator takes them.
        digest: SHA-256 of the token ids of the triples.
        counts: numbers for the training's record, `n_triples` among them.
    """

    rows: Sequence[Any]
    digest: str
    counts: Mapping[str, int]


class BaselineTrainer(Resumable):
    """A trainer whose loss is a mean over micro-batches, with a bar.

    Attributes:
        method: name of the method in its `Costs`.
    """

    method: str
    model: Any
    settings: type[TrainingArguments] = TrainingArguments
    remove_callback: Callable[[Any], None]

    def __init__(self, config: Any, folder: TrainingFolder, sizes: ModelSizes, bar: tqdm[Any], **options: Any) -> None:
        self.config, self.folder, self.sizes = config, folder, sizes
        super().__init__(callbacks=[Steps(bar)], **options)  # type: ignore[call-arg]
        self.model_accepts_loss_kwargs = False
        self.remove_callback(PrinterCallback)

    @classmethod
    @abstractmethod
    def read(
        cls,
        triples: Any,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        chat_template_kwargs: Mapping[str, Any] | None,
        config: Any,
        progress: bool,
    ) -> Examples:
        """Read and tokenize triples.

        Raises:
            PreferenceError: a bad triple.
        """

    @staticmethod
    @abstractmethod
    def collate(rows: Sequence[Any]) -> dict[str, Any]:
        """Return a batch of rows."""

    def trained_pass(self, lengths: Sequence[int], *, layers: slice = slice(None), n_logits: int = 0) -> Cost:
        """Return the operations of a pass forward and backward, of the model or of a LoRA on it.

        With gradient checkpointing, the layers run forward twice.

        Args:
            lengths: tokens of each row.
            layers: layers that run.
            n_logits: number of tokens whose logits are computed.
        """
        lora = lora_weights(self.model)
        cost = with_backward(forward(self.sizes, lengths, layers=layers, n_logits=n_logits), frozen=bool(lora))
        if self.args.gradient_checkpointing:
            cost += forward(self.sizes, lengths, layers=layers)
        n_layers = len(self.sizes.layers[layers])
        return cost + Cost(6 * sum(lengths) * sum(size for layer, size in lora if layer < n_layers))

    @classmethod
    def arguments(cls, config: Any, out: Path, *, on_cpu: bool, **settings: Any) -> Any:
        """Return the trainer's settings. Making them joins the processes of a launcher."""
        with deprecations_silenced():
            args = cls.settings(
                **SETTINGS,
                **settings,
                learning_rate=config.lr,
                per_device_train_batch_size=config.micro_batch_size,
                seed=config.seed,
                logging_steps=config.log_every,
                save_steps=config.checkpoint_every,
                report_to="none",
                use_cpu=on_cpu,
                output_dir=str(out),
            )
        args.gradient_accumulation_steps = config.accumulation(args.world_size)
        return args

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with reading_checkpoint(Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]


def lora_weights(model: nn.Module) -> list[tuple[int, int]]:
    """Return the layer and the size of each matrix of a LoRA on a model, none for a model without one."""
    names = ((LAYER.search(name), parameter) for name, parameter in model.named_parameters() if ".lora_" in name)
    return [(int(layer[1]), parameter.numel()) for layer, parameter in names if layer]


def load_lora(model: Any, folder: Path) -> None:
    """Give the LoRA of a PEFT model the weights that are in a folder.

    Raises:
        TrainingError: the folder is damaged.
    """
    from peft import load_peft_weights, set_peft_model_state_dict

    with reading_checkpoint(folder):
        set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
