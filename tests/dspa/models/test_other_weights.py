"""Things made with a model are refused for other weights of the same name, unless they are meant."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import dspa
from dspa.cli import main
from dspa.errors import MapError, ModelError, TrainingError
from dspa.files import read_header, read_tensors, write_tensors
from dspa.fsrl import FSRLAdapter
from dspa.maps.cdmap import TENSORS, ConditionalDifferenceMap
from dspa.maps.collection import MANIFEST
from dspa.maps.merge import merge
from dspa.models.sources import Source, model_digest
from dspa.saes.training import train_sae
from dspa.testing import L_IN, L_OUT, make_map, make_model, make_sae, word_tokenizer

from ..maps.conftest import small_pieces  # noqa: F401
from ..saes import test_training as sae_trainings
from ..support import trainings
from ..support.adapters import TRIPLES
from ..support.counts import Calls, as_rows, make_case, make_ids, shards
from ..support.quantised import quantise
from ..support.saes import Stopped, stop_after

PROMPT = torch.tensor([[1, 5, 9, 33, 20, 7]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models that are called alike, and what was made with the first."""
    folder = tmp_path_factory.mktemp("models")
    make_model("gemma2").save_pretrained(folder / "one" / "tiny")
    make_model("gemma2", seed=1).save_pretrained(folder / "other" / "tiny")
    for name in ("one", "other"):
        word_tokenizer().save_pretrained(folder / name / "tiny")
    make_sae(L_IN, 64, seed=1).save(folder / "sae_in")
    make_sae(L_OUT, 64, seed=2).save(folder / "sae_out")
    cdmap = dspa.build_map(load(folder, "one"), word_tokenizer(), TRIPLES, *saes(), progress=False)
    assert cdmap is not None
    cdmap.save(folder / "map")
    return folder


def load(folder: Path, name: str, **options: Any) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder / name / "tiny", **options).eval()
    return model


def saes() -> tuple[dspa.FrozenSAE, dspa.FrozenSAE]:
    return make_sae(L_IN, 64, seed=1), make_sae(L_OUT, 64, seed=2)


def steering(folder: Path) -> dspa.Steering:
    return dspa.Steering(*saes(), ConditionalDifferenceMap.load(folder / "map"))


def merged(model: PreTrainedModel) -> PreTrainedModel:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    whole: PreTrainedModel = peft.get_peft_model(model, config).merge_and_unload().eval()
    return whole


def with_lora(model: PreTrainedModel) -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()


def quantised(model: PreTrainedModel) -> PreTrainedModel:
    return quantise(model)[0].eval()


OTHERS: dict[str, Callable[[Path], Any]] = {
    "another model": lambda folder: load(folder, "other"),
    "merged": lambda folder: merged(load(folder, "one")),
    "with a LoRA": lambda folder: with_lora(load(folder, "one")),
    "quantised": lambda folder: quantised(load(folder, "one")),
    "float16": lambda folder: load(folder, "one", dtype=torch.float16),
}
SAME: dict[str, Callable[[Path], Any]] = {
    "loaded again": lambda folder: load(folder, "one"),
    "bfloat16": lambda folder: load(folder, "one", dtype=torch.bfloat16),
    "never saved": lambda _: make_model("gemma2"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_map_is_refused_for_other_weights_unless_they_are_meant(folder: Path, other: str) -> None:
    model, ours = OTHERS[other](folder), steering(folder)
    with pytest.raises(ModelError, match=r"The Steering was made with other weights.*pass `other_weights` \(True\)"):
        ours.attach(model)
    with pytest.raises(ModelError, match="made with other weights"):
        ours.attach(model, model_name="./tiny")  # a name is no evidence
    ours.attach(model, other_weights=True).detach()


@pytest.mark.parametrize("same", SAME)
def test_the_same_weights_are_known_again(folder: Path, same: str) -> None:
    steering(folder).attach(SAME[same](folder)).detach()


def test_the_digest_stays_without_the_sources(folder: Path) -> None:
    """Those are removed from a map before it is published."""
    cdmap = ConditionalDifferenceMap.load(folder / "map")
    cdmap.sources.clear()
    with pytest.raises(ModelError, match="made with other weights"):
        dspa.Steering(*saes(), cdmap).attach(load(folder, "other"))


def test_offloaded_weights_warn(folder: Path, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    placed = accelerate.disk_offload(load(folder, "one"), str(tmp_path), execution_device=torch.device("cpu"))
    with pytest.warns(UserWarning, match="weights of this model are offloaded"):
        steering(folder).attach(placed).detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steering(folder).attach(placed, other_weights=True).detach()


# Maps and adapters of earlier versions


def without_digest(folder: Path, path: Path, sources: dict[str, Any]) -> Path:
    header = read_header(folder / "map")
    del header["sha256"], header["meta"]["model_digest"]
    write_tensors(path, read_tensors(folder / "map", TENSORS), {**header, "sources": sources})
    return path


def test_a_map_without_a_digest_warns_and_is_accepted(folder: Path, tmp_path: Path) -> None:
    path = without_digest(folder, tmp_path / "map", {})
    with pytest.warns(UserWarning, match="does not record the weights of its model.*not checked, but for its name"):
        cdmap = ConditionalDifferenceMap.load(path)
    dspa.Steering(*saes(), cdmap).attach(load(folder, "other")).detach()


def test_a_map_with_an_earlier_digest_is_compared_by_its_rule(folder: Path, tmp_path: Path) -> None:
    digest = model_digest(load(folder, "one"), "0" * 16)
    assert digest is not None and len(digest) == 16
    path = without_digest(folder, tmp_path / "map", {"model": dataclasses.asdict(Source("elsewhere", digest))})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = dspa.Steering(*saes(), ConditionalDifferenceMap.load(path))
    ours.attach(load(folder, "one")).detach()
    with pytest.raises(ModelError, match=f"digest {digest} there"):
        ours.attach(load(folder, "other"))


def test_the_demo_s_saes_load_without_a_digest() -> None:
    assets = Path(dspa.__file__).parent / "demo" / "assets"
    model = AutoModelForCausalLM.from_pretrained(assets / "dspa-demo").eval()
    sae_in, sae_out = (dspa.FrozenSAE.load(assets / name, dtype=torch.float32) for name in ("sae_in", "sae_out"))
    dspa.Steering(sae_in, sae_out, make_map(sae_in, sae_out)).attach(model).detach()


# Work that goes on


@pytest.mark.usefixtures("small_pieces")
def test_a_collection_does_not_go_on_with_other_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, other = make_case("qwen3"), make_case("qwen3")
    other.model = make_model("qwen3", seed=1)
    folder = tmp_path / "counts"
    with monkeypatch.context() as patch:
        Calls(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            case.collect(batch_tokens=1, work_dir=folder)
    assert len(shards(folder)) == 1
    with pytest.raises(MapError, match=r"holds shards of other settings \(model_digest: 'sampled-.* there, 'sampled-"):
        other.collect(batch_tokens=1, work_dir=folder)
    case.collect(batch_tokens=1, work_dir=folder)
    assert dspa.reduce(folder, progress=False).meta.model_digest == model_digest(case.model)


def test_a_collection_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    case = make_case("qwen3")
    case.collect(work_dir=tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    del manifest["model_digest"]
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    case.collect(work_dir=tmp_path)
    assert dspa.reduce(tmp_path, progress=False).meta.model_digest == ""


@pytest.mark.parametrize("unknown", [0, 1])
def test_counts_merge_to_what_is_known_of_any(tmp_path: Path, unknown: int) -> None:
    case, other = make_case("qwen3"), make_case("qwen3")
    other.model = make_model("qwen3", seed=1)
    for n in range(2):
        case.collect(triples=as_rows(make_ids(n + 5)), work_dir=tmp_path / str(n))
    other.collect(triples=as_rows(make_ids(9)), work_dir=tmp_path / "other")
    parts = [tmp_path / "0", tmp_path / "1"]
    assert merge(tmp_path / "all", parts, progress=False).settings.model_digest == model_digest(case.model)
    with pytest.raises(MapError, match="model_digest"):
        merge(tmp_path / "mixed", [*parts, tmp_path / "other"], progress=False)
    manifest = json.loads((parts[unknown] / MANIFEST).read_text())
    (parts[unknown] / MANIFEST).write_text(json.dumps(manifest | {"model_digest": ""}))
    assert merge(tmp_path / "half", parts, progress=False).settings.model_digest == model_digest(case.model)
    # The one that is not known does not hide that two others differ.
    with pytest.raises(MapError, match="model_digest"):
        merge(tmp_path / "mixed", [parts[unknown], parts[1 - unknown], tmp_path / "other"], progress=False)


def test_a_training_of_an_sae_does_not_go_on_with_other_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sae_lens")
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"{sae_trainings.sentence(n)}\n" for n in range(200)))

    def run(seed: int) -> object:
        model = make_model("gemma2", seed=seed)
        options: dict[str, Any] = {"d_sae": 64, "k": 6, "config": sae_trainings.TINY, "progress": False}
        return train_sae(model, word_tokenizer(), texts, L_OUT, tmp_path / "sae", **options)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 7)
        run(0)
    with pytest.raises(TrainingError, match=r"training of other settings \(model_digest: 'sampled-.* there, "):
        run(1)
    record = json.loads((tmp_path / "sae" / "training.json").read_text())
    del record["settings"]["model_digest"]
    (tmp_path / "sae" / "training.json").write_text(json.dumps(record))
    run(0)


def test_an_adapter_knows_the_weights_that_it_was_trained_with(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    model, other, tokenizer = make_model("qwen3"), make_model("qwen3", seed=1), word_tokenizer()
    adapter, record = trainings.run(model, tokenizer, tmp_path / "out")
    assert adapter.model_digest == record["settings"]["model_digest"] == model_digest(model)
    with pytest.raises(TrainingError, match=r"training of other settings .*model_digest: "):
        trainings.run(other, tokenizer, tmp_path / "out")
    loaded = FSRLAdapter.load(tmp_path / "out", adapter.sae)
    with pytest.raises(ModelError, match=r"The FSRLAdapter was made with other weights.*`other_weights` \(True\)"):
        loaded.attach(other)
    loaded.attach(model).detach()
    loaded.attach(other, other_weights=True).detach()
    # As a start of a training, it is trained for them.
    again, _ = trainings.run(other, tokenizer, tmp_path / "again", adapter=loaded)
    assert again.model_digest == model_digest(other)
    # A folder of an earlier version records none.
    path = tmp_path / "out" / "adapter.json"
    earlier = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("model_digest", "seal")}
    path.write_text(json.dumps(earlier))
    FSRLAdapter.load(tmp_path / "out", adapter.sae).attach(other).detach()


# The command line


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    def go(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["dspa", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0), " ".join(capsys.readouterr().err.split())

    return go


@pytest.mark.parametrize("command", [("generate", "--prompt", "the cat", "--max-new-tokens", 2), ("map", "show")])
def test_the_command_line_names_its_option(run: Any, folder: Path, command: tuple[object, ...]) -> None:
    given = [*command, *(["--map"] if command[0] == "generate" else []), folder / "map", "--device", "cpu"]
    given += ["--sae-in", folder / "sae_in", "--sae-out", folder / "sae_out", "--model"]
    assert run(*given, folder / "one" / "tiny")[0] == 0
    code, err = run(*given, folder / "other" / "tiny")
    assert code == 2 and "made with other weights" in err and "pass --other-weights (True)" in err
    assert run(*given, folder / "other" / "tiny", "--other-weights")[0] == 0


def test_other_weights_in_the_recorded_place(run: Any, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "one" / "tiny", tmp_path / "tiny")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny").eval()
    cdmap = ConditionalDifferenceMap.load(folder / "map")
    digest = model_digest(model)
    assert digest is not None
    cdmap.sources["model"] = Source(str(tmp_path / "tiny"), digest)
    cdmap.save(tmp_path / "map")
    given = ["generate", "--map", tmp_path / "map", "--prompt", "the cat", "--max-new-tokens", 2, "--device", "cpu"]
    given += ["--sae-in", folder / "sae_in", "--sae-out", folder / "sae_out"]
    assert run(*given)[0] == 0
    make_model("gemma2", seed=1).save_pretrained(tmp_path / "tiny")
    code, err = run(*given)
    assert code == 2 and "another one now" in err
    assert run(*given, "--other-weights")[0] == 0
