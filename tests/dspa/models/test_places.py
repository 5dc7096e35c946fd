"""`dspa.models.places`: the meaning of a model's name, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from dspa.models import places
from dspa.models.places import ModelPlace, model_place


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Work in an empty folder, as if the Hub could be asked and GGUF files be read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(places, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(places, "require_package", lambda *_: None)


def folder(*names: str) -> Path:
    path = Path("models")
    path.mkdir()
    for name in names:
        (path / name).touch()
    return path


@pytest.mark.parametrize(
    "name",
    [
        "./x",
        "../x",
        "/x",
        "~/x",
        "x/y/z",
        "x/",
        "x.gguf",
        "x/y.GGUF",
        "a\\b",
        "x/m.bin",
        "x.json",
        "a b",
        "a--b",
        "[x]",
    ],
)
def test_a_path_where_there_is_nothing(name: str) -> None:
    with pytest.raises(ValueError, match=r"--model is .*, where there is nothing; accepted: a folder with config.json"):
        model_place(name, "--model")


def test_a_path_into_a_folder_that_is_here() -> None:
    folder()
    with pytest.raises(ValueError, match=r"models/gemma, where there is nothing; .* Start in another folder"):
        model_place("models/gemma")
    assert model_place("model/gemma") == ModelPlace("model/gemma")


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name(name: str) -> None:
    with pytest.raises(ValueError, match="`model` is an empty name"):
        model_place(name)


@pytest.mark.parametrize("name", ["gpt2", "google/gemma-2-2b", "org/model.v1"])
def test_names_on_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model_place(name) == ModelPlace(name)
    monkeypatch.setattr(places, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(places, "try_to_load_from_cache", lambda *_: None)
    with pytest.raises(ValueError, match=f"'{name}', which is no folder here .*HF_HUB_OFFLINE is set.*Unset"):
        model_place(name)
    monkeypatch.setattr(places, "try_to_load_from_cache", lambda _name, file: f"/cache/{file}")
    assert model_place(name) == ModelPlace(name)


@pytest.mark.parametrize(
    "names",
    [("config.json",), ("adapter_config.json",), ("config.json", "model.safetensors", "q4.gguf")],
    ids=lambda names: "+".join(names),
)
def test_folders_that_transformers_knows(names: tuple[str, ...]) -> None:
    place = model_place(str(folder(*names)))
    assert place == ModelPlace("models") and place.arguments == {} and place.path == "models"


@pytest.mark.parametrize("names", [("q4.gguf",), ("config.json", "tokenizer.json", "q4.GGUF")], ids="+".join)
def test_a_folder_of_one_gguf_file(names: tuple[str, ...]) -> None:
    path = folder(*names) / names[-1]
    place = model_place("models")
    assert place == model_place(str(path)) == ModelPlace("models", names[-1])
    assert place.arguments == {"gguf_file": names[-1]} and Path(place.path) == path


def test_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder("q4.gguf")
    assert model_place("~/models/q4.gguf") == ModelPlace(str(tmp_path / "models"), "q4.gguf")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "models, a folder without config.json and without a GGUF file"),
        (("a.gguf", "b.gguf"), "holds several GGUF files; accepted: the path of one of a.gguf, b.gguf"),
        (("m-00001-of-00002.gguf",), r"one of several parts of a model; .*Join the parts"),
    ],
)
def test_folders_without_a_model_to_load(names: tuple[str, ...], message: str) -> None:
    folder(*names)
    with pytest.raises(ValueError, match=message):
        model_place("models")


def test_a_file_of_another_kind() -> None:
    path = folder("model.safetensors") / "model.safetensors"
    with pytest.raises(ValueError, match=r"a file of another kind; accepted: a folder with config\.json, a GGUF file"):
        model_place(str(path))


def test_the_package_that_reads_gguf_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    path = Path(__file__).with_suffix(".gguf")
    monkeypatch.setattr("dspa.errors.find_spec", lambda _name: None)
    monkeypatch.setattr(Path, "is_file", lambda _path: True)
    with pytest.raises(RuntimeError, match="needs the package gguf, which is not installed: pip install"):
        model_place(str(path))
