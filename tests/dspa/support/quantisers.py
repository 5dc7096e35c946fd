"""Tiny models in 8 and 4 bits, quantised by the packages that people use, on CPUs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

from dspa.testing import make_model, word_tokenizer

# Rows and columns that the blocks of 4-bit weights divide.
SIZES = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 64}
KINDS = ("torchao-8", "torchao-4", "bitsandbytes-8", "bitsandbytes-4", "bitsandbytes-4-twice")


def _torchao(bits: int) -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

    # Its packed 4-bit kernels are for GPUs; this one computes the same from weights unpacked to int8.
    four = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    return TorchAoConfig(four if bits == 4 else Int8WeightOnlyConfig())


CONFIGS: dict[str, Callable[[], Any]] = {
    "torchao-8": lambda: _torchao(8),
    "torchao-4": lambda: _torchao(4),
    # By default a pass computes the columns of its largest inputs in 16 bits, so tokens depend on what else is in it.
    "bitsandbytes-8": lambda: BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0),
    "bitsandbytes-4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    # The scales quantised too, as for QLoRA.
    "bitsandbytes-4-twice": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True),
}


def quantised(kind: str, folder: Path, *, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> PreTrainedModel:
    """A Llama quantised as it is loaded; `scale` multiplies what will be quantised and nothing else."""
    pytest.importorskip(kind.partition("-")[0])
    model = make_model("llama", **SIZES)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "_proj" in name:
                weight.mul_(scale)
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=CONFIGS[kind]()
    )
    return loaded.eval()
