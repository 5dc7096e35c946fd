"""`dspa.schemas`: how JSON is read, wherever it is, and how values are checked against schemas."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from safetensors.torch import save_file

import dspa
from dspa import SteeringConfig
from dspa.cli.options import _parse_kwargs
from dspa.data.prompts import read_prompts
from dspa.data.triples import load_triples
from dspa.evaluate.compare.runs import RunStore
from dspa.files import read_header
from dspa.fsrl import FSRLAdapter, FSRLConfig, TrainingConfig, read_labels
from dspa.maps.collection import Collection
from dspa.models.layers import loaded_name
from dspa.saes.config import SAETrainingConfig
from dspa.saes.formats import read_sae
from dspa.saes.labels import read_descriptions, read_rules
from dspa.schemas import parse_json
from dspa.testing import make_model, make_sae
from dspa.training_folder import TrainingFolder

SOURCES = Path(dspa.__file__).parent
# Python's own reader exceeds its stack at 1,000 levels or more, and what walks the values does so earlier.
DEEP = ["[" * 300 + "]" * 300, '{"a":' * 100_000]

Reader = Callable[[Path, str], Any]


def of_file(name: str, read: Callable[[Path], Any]) -> Reader:
    def reader(folder: Path, text: str) -> Any:
        (folder / name).write_text(text)
        return read(folder / name)

    return reader


def read_counts(name: str) -> Reader:
    manifest = {"model_name": "m", "sae_in": "a", "sae_out": "b", "layer_in": 1, "layer_out": 2, "d_sae_in": 8}
    manifest |= {"d_sae_out": 8, "dtypes": "x", "max_length": 9, "tokenizer": "t", "format": "dspa.counts.3"}

    def reader(folder: Path, text: str) -> Any:
        (folder / "manifest.json").write_text(json.dumps(manifest))
        (folder / f"{name}.json").write_text(text)
        counts = Collection.open(folder)
        return counts.data, counts.sources, counts.promoted

    return reader


def read_map_header(folder: Path, text: str) -> Any:
    save_file({"columns": make_sae(1, 8).b_enc}, folder / "map.safetensors", metadata={"dspa": text})
    return read_header(folder / "map.safetensors")


def read_model_name(folder: Path, text: str) -> Any:
    model = make_model("qwen3")
    model.config.name_or_path = str(folder)
    return of_file("config.json", lambda _: loaded_name(model))(folder, text)


def read_dictionary(folder: Path, text: str) -> Any:
    torch.save({"bias": torch.ones(4)}, folder / "ae.pt")
    return of_file("config.json", lambda _: read_sae(folder / "ae.pt"))(folder, text)


def read_tools(folder: Path, text: str) -> Any:
    turns = [{"role": "user", "content": "x"}], [{"role": "assistant", "content": "y"}]
    return list(load_triples([{"prompt": turns[0], "chosen": turns[1], "rejected": turns[1] * 2, "tools": text}]))


READERS: dict[str, Reader] = {
    "manifest": read_counts("manifest"),
    "data": read_counts("data"),
    "sources": read_counts("sources"),
    "tokens": read_counts("tokens"),
    "map": read_map_header,
    "adapter": of_file("adapter.json", lambda path: FSRLAdapter.load(path.parent, make_sae(1, 8))),
    "sae": of_file("cfg.json", read_sae),
    "dictionary": read_dictionary,
    "training": of_file("training.json", lambda path: TrainingFolder(path.parent).read()),
    "labels": of_file("a.json", lambda path: read_labels(path, make_sae(1, 8))),
    "descriptions": of_file("a.jsonl", lambda path: read_descriptions(path, make_sae(1, 8))),
    "rules": of_file("rules.json", read_rules),
    "triples": of_file("a.jsonl", lambda path: list(load_triples(path))),
    "list of triples": of_file("a.json", lambda path: list(load_triples(path))),
    "tools": read_tools,
    "prompts": of_file("a.jsonl", lambda path: list(read_prompts(None, path))),
    "model": read_model_name,
    "comparison": of_file("results.json", RunStore.open),
    "option": lambda _, text: _parse_kwargs(text),
}


@pytest.mark.parametrize("text", DEEP, ids=["closed", "open"])
@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_deep_json_is_refused(tmp_path: Path, reader: Reader, text: str) -> None:
    (tmp_path / "sae_weights.safetensors").touch()
    with pytest.raises(Exception, match=r"not JSON|holds something else") as raised:
        reader(tmp_path, text)
    assert not isinstance(raised.value, RecursionError)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        *((text, "recursion limit exceeded") for text in DEEP),
        ("[1", "EOF while parsing a list"),
        ('{"a": 1, "b": 2, "a": 3}', "'a' is given twice, as 1 and as 3"),
        ("\ud800", "Expected"),
        ("9" * 5000, "number out of range"),
    ],
)
def test_what_is_not_json(text: str, problem: str) -> None:
    with pytest.raises(KeyError) as raised:
        parse_json(text, KeyError, "the file", "a list", "Write it again.")
    message = raised.value.args[0]
    assert message.startswith("the file is not JSON (") and problem in message
    assert message.endswith("accepted: a list. Write it again.")


def test_json_is_what_json_says() -> None:
    value = {"a": [1, 2.5, None, True, "ä\n"], "b": {"a": [[]]}, "n": 10**300}
    assert parse_json(json.dumps(value), ValueError, "x") == value
    assert parse_json('{"a": 1, "a": 1}', ValueError, "x") == {"a": 1}
    assert json.dumps(parse_json('{"a": NaN}', ValueError, "x")) == '{"a": NaN}'
    nested = "[" * 150 + "]" * 150
    assert json.dumps(parse_json(nested, ValueError, "x")) == nested


def test_json_is_read_in_one_place() -> None:
    for path in SOURCES.rglob("*.py"):
        assert path.name == "schemas.py" or "json.load" not in path.read_text(), path


# Every setting of these kinds, and values that it must not have.
WRONG: dict[str, list[Any]] = {
    "int": [True, 3.7, 3.0, "3", -1, math.nan, math.inf, [3]],
    "float": [True, "0.2", -1.0, math.nan, math.inf, -math.inf, 10**400, [0.2]],
    "bool": ["false", "true", 0, 1, None],
    "str": ["x", b"simpo", ["x"], 3, None],
}
SETTINGS = [SteeringConfig, FSRLConfig, TrainingConfig, SAETrainingConfig]
EVERY = [(kind, setting.name) for kind in SETTINGS for setting in dataclasses.fields(kind)]


@pytest.mark.parametrize(("kind", "name"), EVERY, ids=[f"{kind.__name__}.{name}" for kind, name in EVERY])
def test_no_setting_takes_a_value_of_another_kind(kind: type, name: str) -> None:
    hint = get_type_hints(kind)[name]
    hint = next((arg for arg in get_args(hint) if arg is not type(None)), hint)
    for value in WRONG[hint.__name__]:
        with pytest.raises(ValueError, match=rf"^`{name}` is .*; accepted: "):
            kind(**{name: value})
    kind(**{name: getattr(kind(), name)})


def test_a_setting_that_is_not_known() -> None:
    with pytest.raises(ValueError, match="`alhpa` is not known; accepted: names that this version"):
        SteeringConfig(alhpa=0.2)  # type: ignore[call-arg]


def test_a_checked_class_is_a_dataclass() -> None:
    config = SteeringConfig(alpha=1, k_diff=3)
    assert config == pickle.loads(pickle.dumps(config)) == copy.deepcopy(config)
    assert hash(config) == hash(SteeringConfig(k_diff=3, alpha=1.0))
    assert SteeringConfig(**dataclasses.asdict(config)) == config
    with pytest.raises(ValueError, match="`k_diff` is 0; accepted: a whole number >= 1"):
        dataclasses.replace(config, k_diff=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.alpha = 2.0  # type: ignore[misc]
