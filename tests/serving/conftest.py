"""Small worlds that vLLM serves, what transformers answers in them, and engines in processes of their own."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch

import dspa
from dspa.fsrl import FSRLAdapter
from dspa.serving import vllm_options
from dspa.steering.decisions import Gate
from dspa.steering.latent_sets import LatentSet
from dspa.testing import (
    BOS,
    D_SAE_IN,
    D_SAE_OUT,
    FAMILIES,
    L_IN,
    L_OUT,
    VOCAB,
    make_map,
    make_model,
    make_sae,
    make_tokenizer,
)
from tests.dspa.support.adapters import make_adapter

HERE = Path(__file__).parent
D_IN = 128
# What vLLM needs on a machine without a GPU, see docs/serving.md.
NO_GPU = {
    "TRITON_INTERPRET": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # Two ranks would bind themselves to two sockets.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
# Below the largest entropy of ten logits, so that gates open at some tokens and not at others.
H_MEDIAN = 2.2
STRONG = dspa.SteeringConfig(alpha=1.0, mode="both")


@dataclass(frozen=True)
class Joint:
    """Settings of a `dspa.JointSteering`, and the names of its maps."""

    config: dspa.SteeringConfig
    maps: tuple[str, ...]


# What transformers answers with: settings of `dspa.Steering` or several, or the name of an adapter, a vector or a set
# of latents, or one of them and a gate.
Asked: TypeAlias = dspa.SteeringConfig | Joint | str | tuple[dspa.SteeringConfig | str, Gate] | None
# By the name of its settings, what a request asks for, and the same for transformers.
ASKED: dict[str, tuple[dict[str, Any] | None, Asked]] = {
    "base": (None, None),
    "ablate": ({"dspa": "on"}, dspa.SteeringConfig()),
    "ablate 1": ({"dspa_alpha": 1.0}, dspa.SteeringConfig(alpha=1.0)),
    "augment": ({"dspa_alpha": 0.4, "dspa_mode": "augment"}, dspa.SteeringConfig(alpha=0.4, mode="augment")),
    "both": ({"dspa_alpha": 1.0, "dspa_mode": "both"}, STRONG),
    "generated": (
        {"dspa_alpha": 1.0, "dspa_mode": "both", "dspa_positions": "generated"},
        dspa.SteeringConfig(alpha=1.0, mode="both", positions="generated"),
    ),
    # The first reads and edits at one layer, below the edits of the second.
    "two maps": ({"dspa_map": "same+low", "dspa_alpha": 1.0, "dspa_mode": "both"}, Joint(STRONG, ("low", "same"))),
    # The last is chosen by latents of a layer that the second edits, before it does.
    "three maps": (
        {"dspa_map": "low+same+high", "dspa_alpha": 1.0, "dspa_mode": "both", "dspa_positions": "generated"},
        Joint(dspa.SteeringConfig(alpha=1.0, mode="both", positions="generated"), ("low", "same", "high")),
    ),
    "early": ({"dspa_adapter": "early"}, "early"),
    "late": ({"dspa": "on", "dspa_adapter": "late"}, "late"),
    "all": ({"dspa_vector": "all"}, "all"),
    "answer": ({"dspa_vector": "answer"}, "answer"),
    "undecided": (
        {"dspa_alpha": 1.0, "dspa_mode": "both", "dspa_gate": "entropy", "dspa_gate_threshold": H_MEDIAN},
        (dspa.SteeringConfig(alpha=1.0, mode="both"), dspa.EntropyGate(H_MEDIAN)),
    ),
    "decided": (
        {"dspa_vector": "answer", "dspa_gate": "entropy", "dspa_gate_threshold": 1.85, "dspa_gate_k": 7}
        | {"dspa_gate_complement": "on"},
        ("answer", dspa.EntropyGate(1.85, k=7, complement=True)),
    ),
    "random": (
        {"dspa_adapter": "late", "dspa_gate": "random", "dspa_gate_share": 0.5, "dspa_gate_seed": 3},
        ("late", dspa.RandomGate(0.5, seed=3)),
    ),
    "first": ({"dspa_vector": "all", "dspa_gate": "first", "dspa_gate_n": 3}, ("all", dspa.FirstTokens(3))),
    "loud": ({"dspa_latents": "loud", "dspa_positions": "all"}, "loud"),
    "mute": ({"dspa_latents": "mute"}, "mute"),
    "mute, undecided": (
        {"dspa_latents": "mute", "dspa_gate": "entropy", "dspa_gate_threshold": H_MEDIAN},
        ("mute", dspa.EntropyGate(H_MEDIAN)),
    ),
}
# By the name of a set of latents of the output SAE, its file, and its positions in the request above.
LATENTS: dict[str, tuple[dict[str, Any], str]] = {
    "loud": ({"strengths": {str(j): 2.0 - j / 32 for j in range(0, 96, 7)}, "when": "always"}, "all"),
    "mute": ({"strengths": {str(j): None for j in range(128)}}, "response"),
}
# By the name of a map, its SAEs; by that of an SAE, its layer and width.
MAPS = {"low": ("sae_in", "sae_out"), "same": ("sae_in", "sae_mid"), "high": ("sae_gate", "sae_top")}
SAES = {
    "sae_in": (L_IN, D_SAE_IN),
    "sae_out": (L_OUT, D_SAE_OUT),
    "sae_mid": (L_IN, 80),
    "sae_top": (L_OUT + 1, 72),
    "sae_gate": (L_OUT, 64),
}
# By the name of a vector, its layer and its positions.
VECTORS = {"all": (L_IN, "all"), "answer": (L_OUT, "response")}
VECTOR_SCALE = 3.0
# By the name of an adapter, its SAE, and the activation of its latents' movements.
ADAPTERS = {"early": ("sae_in", "soft_threshold"), "late": ("sae_out", "jumprelu")}


def make_prompts(lengths: Sequence[int]) -> list[list[int]]:
    """Return prompts of words, of which the long ones begin alike."""
    words = random.Random(0)
    shared = [BOS, *(words.randrange(3, VOCAB) for _ in range(70))]
    return [
        ((shared if length > len(shared) else [BOS]) + [words.randrange(3, VOCAB) for _ in range(length)])[:length]
        for length in lengths
    ]


PROMPTS = make_prompts([3, 11, 11, 40, 75, 75, 75, 100])


@dataclass(frozen=True)
class World:
    """A model, its SAEs, maps, and two adapters, vectors and sets of latents, in files.

    All maps but `map` say where their SAEs are.
    """

    folder: Path

    @property
    def model(self) -> str:
        return str(self.folder / "model")

    @property
    def map(self) -> str:
        return str(self.folder / "map.safetensors")

    @property
    def maps(self) -> dict[str, str]:
        return {name: self.place(f"{name}.safetensors") for name in MAPS}

    @property
    def adapters(self) -> dict[str, str]:
        return {name: self.place(name) for name in ADAPTERS}

    @property
    def vectors(self) -> dict[str, str]:
        return {name: self.place(f"{name}.safetensors") for name in VECTORS}

    @property
    def latents(self) -> dict[str, str]:
        return {name: self.place(f"{name}.json") for name in LATENTS}

    def place(self, name: str) -> str:
        return str(self.folder / name)

    def options(self, **settings: Any) -> dict[str, Any]:
        """Options of an engine that steers."""
        steering: dict[str, Any] = {"maps": self.maps, "adapters": self.adapters, "vectors": self.vectors}
        steering["latents"] = self.latents
        return self.plain() | vllm_options(self.model, **(steering | settings))

    def plain(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "dtype": "float32",
            "enforce_eager": True,
            "block_size": 32,
            "max_num_seqs": 16,
            "max_num_batched_tokens": 128,
            "max_model_len": 128,
            "seed": 0,
            "enable_prefix_caching": False,
            "disable_log_stats": False,
        }

    def steering(self, asked: dspa.SteeringConfig | Joint | str, name: str = "low") -> Any:
        """`dspa.Steering` by the map of a name or several, an adapter, a vector or a set of latents, not attached."""
        if asked in self.vectors:
            return dspa.SteeringVector.load(self.vectors[asked])
        if asked in LATENTS:
            sae, chosen = dspa.FrozenSAE.load(self.place("sae_out")), LatentSet.read(self.latents[asked])
            return dspa.Steering.of_latents(sae, chosen, positions=LATENTS[asked][1])
        if isinstance(asked, str):
            return FSRLAdapter.load(self.place(asked), dspa.FrozenSAE.load(self.place(ADAPTERS[asked][0])))
        if isinstance(asked, Joint):
            return dspa.JointSteering([self.steering(asked.config, name) for name in asked.maps])
        saes = [dspa.FrozenSAE.load(self.place(sae)) for sae in MAPS[name]]
        return dspa.Steering(*saes, dspa.ConditionalDifferenceMap.load(self.maps[name]), asked)

    def answers(self, prompt: list[int], asked: Asked, n: int = 16) -> list[int]:
        """Tokens that transformers generates greedily, with what is asked for."""
        model = load(self.model)
        steered, gate = asked if isinstance(asked, tuple) else (asked, None)
        steering: Any = nullcontext()
        if steered is not None:
            steering = self.steering(steered)
            if gate is not None:
                steering.gate = gate
            steering.attach(model)
        ids = torch.tensor([prompt])
        with steering:
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False)
        return out[0, len(prompt) :].tolist()


@cache
def load(path: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="session")
def make_world(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], World]:
    """Return a function that makes the world of a family once."""
    made: dict[str, World] = {}

    def make(family: str) -> World:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            # vLLM's attention on CPUs takes heads of few sizes, 32 the smallest.
            # Gemma, which scales its embeddings by it, is not moved by these SAEs if it is wider.
            sizes: dict[str, Any] = ({} if family.startswith("gemma") else {"hidden_size": D_IN}) | (
                {"head_dim": 32} if "head_dim" in FAMILIES[family] else {}
            )
            if family == "gemma3_text":
                # As real ones, which are deeper, it has layers that attend to all tokens.
                sizes["layer_types"] = ["sliding_attention", "full_attention"] * 2
            model = make_model(family, **sizes)
            d_in = model.config.hidden_size
            model.save_pretrained(folder / "model")
            tokenizer = make_tokenizer()
            tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
            tokenizer.save_pretrained(folder / "model")
            for seed, (name, (layer, d_sae)) in enumerate(SAES.items()):
                make_sae(layer, d_sae, d_in=d_in, seed=seed).save(folder / name)
            for seed, (name, pair) in enumerate(MAPS.items()):
                saes = [dspa.FrozenSAE.load(folder / sae) for sae in pair]
                cdmap = make_map(*saes, seed=seed)
                if name == "low":
                    cdmap.save(folder / "map.safetensors")
                cdmap.sources = {place: sae.source for place, sae in zip(("sae_in", "sae_out"), saes, strict=True)}
                cdmap.save(folder / f"{name}.safetensors")
            for seed, (name, (sae, activation)) in enumerate(ADAPTERS.items()):
                # Loaded, so that the adapter records where it is.
                make_adapter(dspa.FrozenSAE.load(folder / sae), activation, seed=seed).save(folder / name)
            made[family] = World(folder)
            for name, (record, _) in LATENTS.items():
                (folder / f"{name}.json").write_text(json.dumps(record))
            for name, (layer, positions) in VECTORS.items():
                vector = torch.randn(d_in, generator=torch.Generator().manual_seed(2))
                dspa.SteeringVector(vector, layer, VECTOR_SCALE, positions).save(made[family].vectors[name])
        return made[family]

    return make


@pytest.fixture
def run_engine(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Return a function that runs an engine on a job, see `engine.py`."""

    def run(**job: Any) -> dict[str, Any]:
        source, target = tmp_path / "job.json", tmp_path / "answers.json"
        source.write_text(json.dumps(job))
        environment = engine_environment()
        done = subprocess.run(
            [sys.executable, "-m", "tests.serving.engine", str(source), str(target)],
            env=environment,
            cwd=HERE.parents[1],
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stderr[-6000:]
        return json.loads(target.read_text())

    return run


def engine_environment() -> dict[str, str]:
    """Variables of a process that runs an engine."""
    paths = [str(HERE / "no_gpu"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | NO_GPU | {"PYTHONPATH": os.pathsep.join(paths)}
