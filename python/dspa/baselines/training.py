"""A training of a baseline in a folder: from the start, from its last checkpoint, or what was trained there before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dspa.baselines.settings import TrainingSettings
from dspa.costs import Meter
from dspa.data.templates import at_date, check_template_kwargs, date_of_today
from dspa.data.triples import DigestedExamples, Triple, load_triples
from dspa.distributed import rank
from dspa.errors import TrainingError, refusal, require_package
from dspa.models.layers import CausalLM, check_eval, context_length, device_of, loaded_name
from dspa.models.sizes import ModelSizes, sizes_of
from dspa.models.sources import model_digest, recorded_weights
from dspa.resuming import (
    Trained,
    check_processes,
    deprecations_silenced,
    finished_before,
    fit,
    lent,
    writing_checkpoints,
)
from dspa.training_folder import TrainingFolder

if TYPE_CHECKING:
    from dspa.baselines.trainers import BaselineTrainer, Examples

Triples = Iterable[Triple | Mapping[str, Any]] | str | Path


@dataclass(frozen=True)
class Training:
    """One training of a baseline.

    Attributes:
        stage: name of the training, for its record and its bar.
        model: a transformers causal language model in evaluation mode.
        tokenizer: the model's tokenizer.
        triples: what `load_triples` takes.
        out: the folder to write.
        config: the settings.
        progress: show bars.
        model_name: name of the model, if its own name or path does not give it.
        chat_template_kwargs: values of the chat template's variables by name, for conversations.
    """

    stage: str
    model: CausalLM
    tokenizer: PreTrainedTokenizerBase
    triples: Triples
    out: str | Path
    config: TrainingSettings
    progress: bool
    model_name: str | None
    chat_template_kwargs: Mapping[str, Any] | None

    @property
    def folder(self) -> TrainingFolder:
        """The folder to write."""
        return TrainingFolder(Path(self.out))

    @cached_property
    def sizes(self) -> ModelSizes:
        """Sizes of the model, without a LoRA on it."""
        return sizes_of(self.model, str(self.model.dtype).removeprefix("torch."))

    @contextmanager
    def held(self) -> Iterator[dict[str, str]]:
        """Check what is quick to check, and hold the folder, within a `with` block. Yield a record of the weights."""
        require_package("accelerate", "Training")
        self.folder.check()
        check_eval(self.model)
        check_template_kwargs(self.tokenizer, self.chat_template_kwargs)
        # Before a LoRA changes the layers.
        _ = self.sizes
        # Of several processes, the first holds the folder for all.
        with self.folder.held() if rank() == 0 else nullcontext():
            yield recorded_weights(self.model)

    def run(
        self,
        kind: type[BaselineTrainer],
        settings: Callable[[int], dict[str, Any]],
        module: nn.Module,
        load: Callable[[Path], None],
        save: Callable[[Path], Any],
        recorded: Mapping[str, Any],
    ) -> None:
        """Train, or continue, or load what was trained. The folder has to be held.

        Args:
            kind: the trainer.
            settings: returns those of the trainer that only this training has, for a number of triples.
            module: what the trainer gets as its model.
            load: reads what was trained from a folder.
            save: writes it to one.
            recorded: what decides the result besides `config`, the data and the name of the model.
        """
        config, folder = self.config, self.folder
        device = device_of(self.model.get_input_embeddings())
        on_cpu = device.type == "cpu"
        args = kind.arguments(config, folder.path, on_cpu=on_cpu)
        check_processes(self.model, args)
        meter = Meter(device, args.world_size)
        with args.main_process_first(local=False):
            date = folder.first_date(date_of_today(self.tokenizer))
        length = min(config.max_length, context_length(self.model) or config.max_length)
        progress = self.progress and args.process_index == 0
        tokenizer = at_date(self.tokenizer, date)
        triples = DigestedExamples(load_triples(self.triples))
        data = kind.read(triples, tokenizer, length, self.chat_template_kwargs, config, progress)
        if len(data.rows) < config.batch_size:
            accepted = f"a batch ({config.batch_size}) or more"
            raise refusal(TrainingError, "The number of examples", len(data.rows), accepted, "Lower `batch_size`.")
        args = kind.arguments(config, folder.path, on_cpu=on_cpu, **settings(data.counts["n_triples"]))
        claimed = {
            "stage": self.stage,
            "model_name": self.model_name or loaded_name(self.model),
            "model_dtype": str(self.model.dtype),
            "data": data.digest,
            "chat_template_kwargs": dict(self.chat_template_kwargs or {}) or None,
            "template_date": date,
            **asdict(config),
            **recorded,
        }
        with args.main_process_first(local=False):
            folder.claim(claimed)
        if folder.finished:
            load(folder.path)
            return
        trained = self._fit(kind, args, module, data, load, meter, progress)
        with args.main_process_first(local=False):
            if args.process_index == 0:
                save(folder.path)
                # A LoRA leaves the weights of the model as they were.
                digest = model_digest(self.model) or "" if module is self.model else ""
                costs = trained.costs(kind.method, triples, claimed, digest)
                folder.finish({**data.counts, "costs": costs, "history": trained.history})

    def _fit(
        self,
        kind: type[BaselineTrainer],
        args: Any,
        module: nn.Module,
        data: Examples,
        load: Callable[[Path], None],
        meter: Meter,
        progress: bool,
    ) -> Trained:
        checkpoint = self.folder.checkpoints()[-1] if self.folder.checkpoints() else None
        if checkpoint and (trained := finished_before(checkpoint)) is not None:
            load(checkpoint)
            return trained
        with (
            deprecations_silenced(),
            writing_checkpoints(args, self.folder),
            lent(module, self.tokenizer),
            tqdm(unit="step", desc=self.stage, disable=not progress) as bar,
        ):
            trainer: Any = kind(
                *(self.config, self.folder, self.sizes, bar),
                model=module,
                args=args,
                train_dataset=data.rows,
                data_collator=kind.collate,
                processing_class=self.tokenizer,
            )
            return fit(trainer, checkpoint, meter)

    def load_weights(self, folder: Path) -> None:
        """Give the model all weights that are in a folder."""
        saved = type(self.model).from_pretrained(folder, dtype=self.model.dtype)
        self.model.load_state_dict(saved.state_dict())

    def save_model(self, folder: Path) -> None:
        """Write the model and its tokenizer to a folder."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @contextmanager
    def lora(self, config: Any) -> Iterator[Any]:
        """Put a LoRA on the model, and yield the PEFT model. If the block fails, take it off again.

        Args:
            config: PEFT's `LoraConfig`.
        """
        from peft import get_peft_model

        required = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        with torch.random.fork_rng(), deprecations_silenced():
            torch.manual_seed(self.config.seed)
            adapted = get_peft_model(self.model, config)
        try:
            yield adapted
        except BaseException:
            adapted.unload()
            raise
        finally:
            for parameter, requires in required:
                parameter.requires_grad_(requires)
