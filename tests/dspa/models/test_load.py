"""`load_model` on files that run code, hold more than tensors, or are damaged."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import dspa
from dspa.cli import main
from dspa.models.sizes import empty_model

from ..support.files import save_model_and_saes

PACKAGE = Path(dspa.__file__).parent
CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path(__file__).with_name("ran").touch()
Path({marker!r}).touch()

class Config(LlamaConfig):
    model_type = "own"

class Model(LlamaForCausalLM):
    config_class = Config
"""


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    save_model_and_saes(folder)
    return folder


@pytest.fixture
def model(user: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(user / "tiny", tmp_path / "model"))


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def own_code(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Bring code with the model; returns the file that exists once it has run."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (model / "own.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    config = json.loads((model / "config.json").read_text())
    sizes = {name: config[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")}
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "dtype": "float32"}
    (model / "config.json").write_text(json.dumps(sizes | own | heads))
    return tmp_path / "ran"


def test_code_of_a_model_runs_only_if_it_is_trusted(model: Path, own_code: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("A question was asked."))
    for load in (dspa.load_model, empty_model):
        with pytest.raises(ValueError, match=r"`model` is .*brings Python code of its own; .*pass `trust_remote_code`"):
            load(str(model))
        assert not own_code.exists()
    empty_model(str(model), trust_remote_code=True)
    assert own_code.exists()


def test_the_command_line_asks_nothing(
    user: Path, model: Path, own_code: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A prompt that is piped in would be the answer."""
    monkeypatch.setattr("builtins.input", lambda *_: "yes, of course")
    triples, saes = user / "triples.jsonl", ["--sae-in", user / "sae_in", "--sae-out", user / "sae_out"]
    triples.write_text('{"prompt": "the", "chosen": " cat", "rejected": " dog"}\n')
    for command in (["map", "cost", *saes], ["map", "collect", triples, *saes, "--out", user / "counts"]):
        monkeypatch.setattr("sys.argv", ["dspa", *map(str, command), "--model", str(model)])
        with pytest.raises(SystemExit, match="2"):
            main()
        assert "pass --trust-remote-code." in " ".join(capsys.readouterr().err.split()) and not own_code.exists()
    monkeypatch.setattr(
        "sys.argv", ["dspa", "map", "cost", *map(str, saes), "--model", str(model), "--trust-remote-code"]
    )
    with pytest.raises(SystemExit, match="0"):
        main()
    assert own_code.exists()


def test_every_model_is_loaded_with_a_word_on_its_code():
    """Without one, transformers asks on standard input."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                loads = node.func.attr == "from_pretrained" and "Auto" in ast.unparse(node.func)
                given = ast.unparse(node)
                assert not loads or "trust_remote_code=" in given or "**place" in given, f"{path}: {given}"


class Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("zipped", [False, True])
def test_pickles_are_refused_in_our_words(model: Path, zipped: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(model)
    (model / "model.safetensors").unlink()
    weights = model / "pytorch_model.bin"
    if zipped:
        torch.save({"model.embed_tokens.weight": Harm()}, weights)
    else:
        weights.write_bytes(pickle.dumps(Harm()))
    with pytest.raises(ValueError, match=r"pickled with other objects; accepted: weights in safetensors") as raised:
        dspa.load_model(model, device="cpu")
    assert not (model / "harm").exists()
    assert "weights_only" not in str(raised.value) and raised.value.__suppress_context__


def test_pickles_of_tensors_alone_are_read(model: Path):
    loaded, _ = dspa.load_model(model, device="cpu")
    torch.save(loaded.state_dict(), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    again, _ = dspa.load_model(model, device="cpu")
    assert all(torch.equal(one, other) for one, other in zip(loaded.parameters(), again.parameters(), strict=True))


DAMAGED: dict[str, tuple[str, Any]] = {
    "model_type": ("config.json", {"model_type": ["x"]}),
    "hidden_size": ("config.json", {"hidden_size": "x"}),
    "10**400": ("config.json", {"query_pre_attn_scalar": 10**400}),
    "10**400 layers": ("config.json", {"num_hidden_layers": 10**400}),
    "2**62 tokens": ("config.json", {"vocab_size": 2**62}),
    "a list": ("config.json", "[]"),
    "deep configuration": ("config.json", "[" * 100_000),
    "weights": ("model.safetensors", "x" * 100),
    "tokenizer": ("tokenizer.json", "{"),
    "deep tokenizer": ("tokenizer.json", "[" * 100_000),
    "tokenizer's model": ("tokenizer.json", '{"model": {"type": 3}}'),
    "tokenizer's class": ("tokenizer_config.json", {"tokenizer_class": ["x"]}),
}


@pytest.mark.parametrize(("file", "content"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_files_are_one_error(model: Path, file: str, content: Any):
    if isinstance(content, str):
        (model / file).write_text(content)
    else:
        change(model / file, **content)
    with pytest.raises((ValueError, OSError)) as raised:
        dspa.load_model(model, device="cpu")
    assert str(model) in str(raised.value)
