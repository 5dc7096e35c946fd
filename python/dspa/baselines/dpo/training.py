"""DPO as a baseline: TRL's trainer on the triples, templates and token ids of the rest of the package.

A training that was stopped resumes from its last checkpoint, and ends in the same weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from dspa.baselines.dpo.config import DPOSettings
from dspa.baselines.training import Training, Triples
from dspa.errors import require_package
from dspa.models.gradients import check_gradients, check_output_layer
from dspa.models.layers import base_model


def train_dpo(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    triples: Triples,
    out: str | Path,
    *,
    config: DPOSettings | None = None,
    progress: bool = True,
    model_name: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Train a model with DPO: all its weights, or a LoRA.

    The loss of a triple is `-log sigmoid(beta (log p(c)/p0(c) - log p(r)/p0(r)))` with the chosen response c and the
    rejected one r after the prompt, and the model before the training as p0. There is no dropout. Triples are tokenized
    as everywhere in this package: an end token follows a text response, and prompts are never cut. In several processes
    (torchrun), each calls this with the same arguments.

    Args:
        model: a transformers causal language model in evaluation mode, on the device to train on. Unless a LoRA is
            trained, its weights change, also where the training fails, and a copy of them is in memory.
        tokenizer: the model's tokenizer.
        triples: what `load_triples` takes.
        out: the folder to write: the model with its tokenizer, or the LoRA in PEFT's format, and `training.json` with
            the settings and what TRL logged. A training that was stopped resumes in its folder, and a finished one is
            loaded.
        config: the published settings by default.
        progress: show bars.
        model_name: name of the model, if its own name or path does not give it.
        chat_template_kwargs: values of the chat template's variables by name, for conversations.

    Returns:
        `model`, or the PEFT model of it with the LoRA, in evaluation mode. The latter's `unload()` returns `model`
        without the LoRA.

    Raises:
        RuntimeError: the packages that train are not installed.
        TrainingError: an `out` with other files or a training of other settings, fewer triples than a batch, or devices
            or processes that training cannot use.
        ModelError: a model in training mode, one that is quantised without gradients, an output layer that is quantised
            or adapted, or a loss that is not finite.
        PreferenceError: a bad triple.
        ValueError: a batch that the processes do not divide.
    """
    require_package("trl", "Training with DPO")
    config, inner = config or DPOSettings(), base_model(model)
    check_output_layer(inner)
    check_gradients(inner)
    settings = {
        "beta": config.beta,
        "lr_scheduler_type": "linear",
        "warmup_steps": config.warmup,
        "num_train_epochs": config.epochs,
        "gradient_checkpointing": config.gradient_checkpointing,
        # Responses are cut before.
        "max_length": None,
        "ddp_find_unused_parameters": False,
    }
    training = Training(*("dpo", inner, tokenizer, triples, out, config, progress, model_name, chat_template_kwargs))

    def run(trained: Any, load: Any, save: Any, weights: dict[str, str]) -> Any:
        from dspa.baselines.dpo.trainer import BaselineDPOTrainer

        training.run(BaselineDPOTrainer, lambda _n_triples: settings, trained, load, save, weights)
        return trained.eval()

    with training.held() as weights:
        if not config.lora:
            return run(inner, training.load_weights, training.save_model, weights)
        from peft import LoraConfig

        from dspa.baselines.trainers import load_lora

        # TRL computes the logits from the weights of the output layer, which "all-linear" leaves out.
        lora = LoraConfig(
            r=config.rank, lora_alpha=config.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        with training.lora(lora) as adapted:
            return run(adapted, partial(load_lora, adapted), adapted.save_pretrained, weights)
