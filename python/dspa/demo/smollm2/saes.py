"""The SAEs that the package ships: those that `dspa sae train` wrote, in bf16 and with the name of their model.

`python -m dspa.demo.smollm2.saes FOLDER_IN FOLDER_OUT` makes them of two folders.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dspa.demo.smollm2.prompts import ASSETS
from dspa.schemas import read_json

MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
WEIGHTS, CONFIG = "sae_weights.safetensors", "cfg.json"


def ship(folder: Path, out: Path) -> None:
    """Write an SAE with its matrices in bf16 and the name of its model, which a GGUF file does not say.

    Biases and thresholds stay as they are, and so do its figures.
    """
    out.mkdir(parents=True, exist_ok=True)
    weights = load_file(folder / WEIGHTS)
    half = {name: weight.to(torch.bfloat16) if weight.ndim == 2 else weight for name, weight in weights.items()}
    save_file(half, out / WEIGHTS)
    config = read_json(folder / CONFIG, ValueError)
    config["metadata"]["model_name"] = MODEL_NAME
    (out / CONFIG).write_text(json.dumps(config), encoding="utf-8")


if __name__ == "__main__":
    for trained, name in zip(map(Path, sys.argv[1:]), ("sae_in", "sae_out"), strict=True):
        ship(trained, ASSETS / name)
