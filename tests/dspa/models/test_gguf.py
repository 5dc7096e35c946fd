"""`dspa.models.gguf`: GGUF files as ordinary models, and the cache of their conversions."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaForCausalLM, PreTrainedModel

import dspa
from dspa.models import gguf as module
from dspa.models.gguf import converted_folder
from dspa.models.sizes import empty_model, sizes_of

pytest.importorskip("gguf")
pytest.importorskip("accelerate")

from ..support.gguf_files import CHAT_TEMPLATE, TOKENS, gguf_llama, write_gguf

N_WEIGHTS = len(TOKENS) * 64 + 64 + 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 64 + 2 * 64)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DSPA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


@pytest.fixture
def file(tmp_path: Path, cache: Path) -> Path:
    write_gguf(tmp_path / "tiny.gguf", gguf_llama(), "Q4_1")
    return tmp_path / "tiny.gguf"


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The conversions of a test, each as it begins."""
    begun: list[Path] = []
    convert = module._dequantized
    monkeypatch.setattr(module, "_dequantized", lambda path, dtype: begun.append(path) or convert(path, dtype))
    return begun


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(24).view(2, 12)).logits


@pytest.mark.filterwarnings("ignore:The weights in")
@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_1"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_of_a_file_is_that_of_its_values(kind, dtype, tmp_path, cache):
    """As computed by the model that was written, by transformers from the file, and from the folder in the cache."""
    written = gguf_llama()
    write_gguf(tmp_path / "tiny.gguf", written, kind)
    loaded, _ = dspa.load_model(tmp_path / "tiny.gguf", dtype=dtype, device="cpu")
    rounded = gguf_llama(dtype=getattr(torch, dtype))
    rounded.load_state_dict(written.state_dict())
    expected = logits(rounded)
    assert loaded.dtype == getattr(torch, dtype) and torch.equal(logits(loaded), expected)
    direct = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="tiny.gguf", dtype=dtype, quantization_config=GgufConfig(dequantize=True)
    )
    (folder,) = cache.glob("tiny-*[!k]")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(direct), expected) and torch.equal(logits(plain), expected)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert not hasattr(loaded, "hf_quantizer") and not loaded.training


@pytest.mark.filterwarnings("ignore:The weights in")
def test_the_tokenizer_and_what_ends_an_answer(file):
    model, tokenizer = dspa.load_model(file, device="cpu")
    # The longest merges, and no BOS in front.
    assert tokenizer("the the t")["input_ids"] == [TOKENS.index(token) for token in ("the", "Ġthe", "Ġ", "t")]
    assert tokenizer.chat_template == CHAT_TEMPLATE and tokenizer.bos_token == "<|im_start|>"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2


@pytest.mark.parametrize(("kind", "dtype"), [("F32", "float32"), ("F16", "float16"), ("Q8_0", "bfloat16")])
def test_memory_is_announced_and_auto_is_the_dtype_of_the_file(kind, dtype, tmp_path, cache):
    write_gguf(tmp_path / "tiny.gguf", gguf_llama(), kind)
    megabytes = round(N_WEIGHTS * getattr(torch, dtype).itemsize / 1e6, 1)
    with pytest.warns(UserWarning, match=f"dequantized: in {dtype} they take {megabytes} MB of memory.*converted once"):
        model, _ = dspa.load_model(tmp_path / "tiny.gguf", device="cpu")
    assert sum(weight.numel() for weight in model.parameters()) == N_WEIGHTS
    assert sizes_of(empty_model(str(tmp_path / "tiny.gguf"))).dtype == model.dtype == getattr(torch, dtype)


def test_a_file_is_converted_once(file, conversions):
    with pytest.warns(UserWarning, match="converted once, into"):
        first, _ = dspa.load_model(file, device="cpu")
    with pytest.warns(UserWarning, match="dequantized: in bfloat16 .* They are in"):
        second, _ = dspa.load_model(file, device="cpu")
    assert len(conversions) == 1 and torch.equal(logits(first), logits(second))


@pytest.mark.filterwarnings("ignore:The weights in")
@pytest.mark.parametrize("change", ["content", "dtype", "version"])
def test_another_file_dtype_or_version_is_another_conversion(change, file, conversions, monkeypatch):
    first, dtype = converted_folder(file), "auto"
    if change == "content":
        # Of the same name, size and date.
        stat = file.stat()
        write_gguf(file, gguf_llama(seed=1), "Q4_1")
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert file.stat().st_size == stat.st_size
    elif change == "dtype":
        dtype = "float32"
    else:
        monkeypatch.setattr(module, "version", lambda package: f"{package} 99")
    second = converted_folder(file, dtype)
    assert second != first and len(conversions) == 2 and converted_folder(file, dtype) == second


@pytest.mark.filterwarnings("ignore:The weights in")
@pytest.mark.parametrize("damage", ["weights", "tokenizer", "record", "more", "less"])
def test_a_damaged_conversion_is_made_again(damage, file, conversions):
    folder = converted_folder(file)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    names = {"weights": "model.safetensors", "tokenizer": "tokenizer.json", "record": "conversion.json"}
    if damage in names:
        content = bytearray(before[names[damage]])
        content[-9] ^= 1
        (folder / names[damage]).write_bytes(content)
    elif damage == "more":
        (folder / "adapter_config.json").write_text("{}")
    else:
        (folder / "generation_config.json").unlink()
    with pytest.warns(UserWarning, match="is damaged, or was changed since it was converted"):
        assert converted_folder(file) == folder
    assert len(conversions) == 2 and {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.filterwarnings("ignore:The weights in")
@pytest.mark.parametrize("stop", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_conversion_that_stops_leaves_nothing(stop, file, cache, monkeypatch):
    def save(self: Any, folder: Path) -> None:
        (folder / "config.json").write_text("{")
        raise stop

    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "save_pretrained", save)
        message = (
            None if isinstance(stop, KeyboardInterrupt) else r"\(0\.2 MB\) could not be written: .*No space.*DSPA_CACHE"
        )
        with pytest.raises(type(stop), match=message):
            converted_folder(file)
    assert not [path for path in cache.iterdir() if path.is_dir()]
    AutoTokenizer.from_pretrained(converted_folder(file))


@pytest.mark.filterwarnings("ignore:The weights in")
def test_what_a_killed_conversion_left_is_not_read(file, cache):
    folder = converted_folder(file)
    left = cache / ".dspa-partial-abcdefgh"
    left.mkdir()
    (left / ".dspa-owner").write_text('{"format": "dspa.writer.1", "host": "h", "pid": 1, "since": "then"}')
    shutil.move(folder, left / "content")
    (left / "content" / "model.safetensors").write_bytes(b"half")
    AutoModelForCausalLM.from_pretrained(converted_folder(file))
    assert not left.exists()


def test_two_at_once_convert_once(file, conversions):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        threads = [threading.Thread(target=converted_folder, args=[file]) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(conversions) == 1
        converted_folder(file)
    assert len(conversions) == 1


@pytest.mark.filterwarnings("ignore:The weights in")
def test_a_cache_that_cannot_be_written(file, monkeypatch):
    monkeypatch.setenv("DSPA_CACHE", str(file))
    with pytest.raises(OSError, match=r"could not be written.*set DSPA_CACHE to another folder"):
        converted_folder(file)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"DSPA_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"DSPA_CACHE": "", "XDG_CACHE_HOME": "/b"}, "/b/dspa"),
        ({"HOME": "/c"}, "/c/.cache/dspa"),
    ],
)
def test_the_place_of_the_cache(given, expected, monkeypatch):
    from dspa.files import cache_folder

    for name in ("DSPA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(expected)


@pytest.mark.filterwarnings("ignore:The weights in")
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("kind", r"cannot be read \(.*magic.*accepted: a whole GGUF file"),
        ("empty", "cannot be read"),
        ("header", "cannot be read"),
        ("cut", r"which has \d+ of at least \d+ bytes; .*Download it again"),
        ("architecture", r"transformers \S+ cannot load \(.*clip.*\); accepted: .* an architecture that it reads"),
        ("tokenizer", "a GGUF file without a tokenizer; accepted: a GGUF file with a tokenizer"),
        ("tensors", r"cannot load \(.*it has no model.layers.0.mlp.gate_proj.weight, .* and 1 more"),
    ],
)
def test_files_that_are_refused(fault, message, tmp_path, cache):
    path = tmp_path / "tiny.gguf"
    written: dict[str, Any] = {
        "architecture": {"architecture": "clip"},
        "tokenizer": {"tokenizer": False},
        "tensors": {"without": "ffn_gate"},
    }
    write_gguf(path, gguf_llama(), **written.get(fault, {}))
    whole = path.read_bytes()
    content = {"kind": b"PK" + whole[2:], "empty": b"", "header": whole[:99], "cut": whole[:-99]}.get(fault, whole)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        dspa.load_model(path, device="cpu")
    assert not cache.exists() or not [folder for folder in cache.iterdir() if folder.is_dir()]


def test_an_unknown_dtype_is_refused(file):
    with pytest.raises(ValueError, match="`dtype` is 'int8'; accepted: auto, bfloat16, float16, float32"):
        dspa.load_model(file, dtype="int8")
