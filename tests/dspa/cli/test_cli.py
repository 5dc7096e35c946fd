"""The command line: its commands on small files, and its errors as one message with exit code 2."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from dspa.audit.evidence import top_contexts
from dspa.cli import main
from dspa.cli.loading import triple_source
from dspa.data.token_texts import quoted
from dspa.fsrl import FSRLAdapter
from dspa.maps.cdmap import ConditionalDifferenceMap
from dspa.steering.trace import read_trace
from dspa.steering.vector import SteeringVector
from dspa.testing import ENGLISH, L_IN, L_OUT, make_map, make_model, make_sae, word_tokenizer
from dspa_kernels import available_backends

from ..support.files import save_model_and_saes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, two SAEs, triples and prompts, as a user has them."""
    folder = tmp_path_factory.mktemp("user")
    save_model_and_saes(folder)
    rows = [
        {
            "prompt": " ".join(ENGLISH[n : n + 5]),
            "chosen": " " + " ".join(ENGLISH[n + 9 : n + 14]),
            "rejected": " " + ENGLISH[n + 3],
        }
        for n in range(12)
    ]
    (folder / "triples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompts.txt").write_text("the cat\nis a dog of\n")
    return folder


def dspa(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[int, str]:
    """Exit code and everything printed, its line breaks folded."""
    monkeypatch.setattr("sys.argv", ["dspa", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    return int(stop.value.code or 0), " ".join((captured.out + captured.err).split())


@pytest.fixture
def run(capsys, monkeypatch):
    return lambda *arguments: dspa(capsys, monkeypatch, *arguments)


def common(folder: Path) -> list[object]:
    return [
        "--model",
        folder / "tiny",
        "--sae-in",
        folder / "sae_in",
        "--sae-out",
        folder / "sae_out",
        "--device",
        "cpu",
    ]


@pytest.fixture(scope="module")
def built(folder: Path) -> Path:
    path = folder / "map.dspa.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "sys.argv", ["dspa", "map", "build", *map(str, [folder / "triples.jsonl", *common(folder), "--out", path])]
        )
        with pytest.raises(SystemExit) as stop:
            main()
    assert stop.value.code == 0
    return path


def test_map_build(built):
    cdmap = ConditionalDifferenceMap.load(built)
    assert (cdmap.meta.n_triples, cdmap.meta.layer_in, cdmap.meta.layer_out) == (12, L_IN, L_OUT)


@pytest.fixture(scope="module")
def counts(folder: Path) -> Path:
    path = folder / "counts"
    with pytest.MonkeyPatch.context() as patch:
        arguments = ["map", "collect", folder / "triples.jsonl", *common(folder), "--out", path]
        patch.setattr("sys.argv", ["dspa", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
    assert stop.value.code == 0
    return path


def same_map(one: Path, other: Path) -> bool:
    return one.read_bytes() == other.read_bytes()


def test_collect_and_reduce_are_build(run, folder, counts, built, tmp_path):
    code, text = run("map", "reduce", counts, "--out", tmp_path / "m")
    assert code == 0 and "Next: dspa map show" in text and same_map(tmp_path / "m", built)
    # Once more goes on from what is there, which is all.
    before = {path: path.stat().st_mtime_ns for path in counts.iterdir()}
    code, text = run("map", "collect", folder / "triples.jsonl", *common(folder), "--out", counts)
    assert code == 0 and "12 triples counted" in text
    assert {path: path.stat().st_mtime_ns for path in counts.iterdir()} == before


def test_a_warning_is_its_text_and_names_options(run, folder, counts, monkeypatch):
    # Prints warnings, as pytest does not.
    monkeypatch.setattr("warnings.showwarning", lambda *given: print(warnings.formatwarning(*given[:4])))
    words = ("map", "collect", folder / "triples.jsonl", *common(folder), "--out", counts.with_name("more"))
    code, text = run(*words, "--first", 13)
    assert code == 0
    assert "Warning: --first is 13 and the data hold 12 triples: all were counted. 12 triples counted" in text


def test_subsets(run, folder, counts, tmp_path):
    (tmp_path / "numbers.txt").write_text("3\n1\n2\n5\n4\n")
    assert run("map", "reduce", counts, "--out", tmp_path / "a", "--only", tmp_path / "numbers.txt")[0] == 0
    assert run("map", "reduce", counts, "--out", tmp_path / "b", "--first", 5)[0] == 0
    assert same_map(tmp_path / "a", tmp_path / "b")
    assert ConditionalDifferenceMap.load(tmp_path / "b").meta.n_triples == 5
    for name, seed in (("c", 1), ("d", 1), ("e", 2)):
        assert run("map", "reduce", counts, "--out", tmp_path / name, "--random", 6, "--seed", seed)[0] == 0
    assert same_map(tmp_path / "c", tmp_path / "d") and not same_map(tmp_path / "c", tmp_path / "e")


def test_merge(run, folder, counts, built, tmp_path):
    lines = (folder / "triples.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("one", lines[:5]), ("two", lines[5:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
        assert run("map", "collect", tmp_path / f"{name}.jsonl", *common(folder), "--out", tmp_path / name)[0] == 0
    code, text = run("map", "merge", tmp_path / "both", tmp_path / "one", tmp_path / "two")
    assert code == 0 and "12 triples" in text
    assert run("map", "reduce", tmp_path / "both", "--out", tmp_path / "m")[0] == 0
    assert same_map(tmp_path / "m", built)


@pytest.mark.parametrize("stream", [[], ["--stream"]], ids=["whole", "streamed"])
def test_a_data_set(run, folder, built, tmp_path, stream):
    """A folder that `datasets` loads stands for one of the Hub."""
    pytest.importorskip("datasets", reason="datasets is not installed")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_bytes((folder / "triples.jsonl").read_bytes())
    code, text = run("map", "build", tmp_path / "data", *common(folder), *stream, "--out", tmp_path / "m")
    assert code == 0, text
    assert same_map(tmp_path / "m", built)


def test_a_data_set_that_was_saved_to_disk(folder, tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    rows = [json.loads(line) for line in (folder / "triples.jsonl").read_text().splitlines()]
    data = datasets.Dataset.from_list(rows)
    data.save_to_disk(tmp_path / "data")
    datasets.DatasetDict(test=data).save_to_disk(tmp_path / "splits")
    for name, split in (("data", "train"), ("splits", "test")):
        assert list(triple_source(str(tmp_path / name), split, stream=False)) == rows
    with pytest.raises(ValueError, match="--split is 'train'; accepted: test"):
        triple_source(str(tmp_path / "splits"), "train", stream=False)


def test_a_file_is_a_file_whether_it_exists_or_not(tmp_path):
    for name in ("a.jsonl", "a.jsonl.gz", "a.PARQUET", "a.csv", "a.ndjson", "a.zip"):
        assert triple_source(str(tmp_path / name), "train", stream=False) == tmp_path / name


def test_diff(run, counts, built, tmp_path):
    assert run("map", "reduce", counts, "--out", tmp_path / "m", "--percentile", 50)[0] == 0
    code, text = run("map", "diff", built, tmp_path / "m", "--plot", tmp_path / "d.png")
    assert code == 0 and "90.0 and 50.0" in text and "correlation" in text and (tmp_path / "d.png").is_file()


def test_map_show(run, built, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")  # No cell of a table is broken into lines.
    code, text = run("map", "show", built, "--top", 3)
    assert code == 0 and "percentile" in text and "column sum" in text and "gates ever open" in text
    assert run("map", "show", built, "--plot", tmp_path / "m.png")[0] == 0 and (tmp_path / "m.png").is_file()
    cdmap = ConditionalDifferenceMap.load(built)
    assert f"{len(cdmap.hot)}; the first" in text and f"{cdmap.meta.n_inactive} of 96" in text
    uncalibrated = cdmap.replaced(hot=cdmap.hot[:0], hot_counts=cdmap.hot_counts[:0])
    uncalibrated.save(built.parent / "uncalibrated")
    assert "the map has no calibration" in run("map", "show", built.parent / "uncalibrated")[1]


def test_map_show_with_labels(run, built, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    cdmap = ConditionalDifferenceMap.load(built)
    latent = int(cdmap.columns[cdmap.values.double().sum(dim=0).argmax()])
    (tmp_path / "labels.json").write_text(json.dumps({latent: "letters [to] friends"}))
    code, text = run("map", "show", built, "--top", 1, "--labels", tmp_path / "labels.json")
    assert code == 0 and "letters [to] friends" in text
    # Also where an input latent moves it.
    moved = cdmap.columns[cdmap.values[largest(cdmap)[1]].abs().argmax()]
    (tmp_path / "labels.json").write_text(json.dumps({int(moved): "that is moved"}))
    code, text = run("map", "show", built, "--top", 1, "--labels", tmp_path / "labels.json")
    assert code == 0 and "that is moved" in text
    assert run("map", "show", built, "--explainer", "x")[0] == 2
    code, text = run("map", "show", built, "--tokens", 9)
    assert code == 2 and "--tokens is 9 without --texts; accepted: both, or neither" in text


def largest(cdmap: ConditionalDifferenceMap) -> tuple[int, int]:
    """The output latent of the largest column sum, and the input latent of the largest entry, of a partly open gate."""
    latents = cdmap.gate_latents.long()
    row = int(latents[cdmap.values[latents].abs().amax(dim=1).argmax()])
    return int(cdmap.columns[cdmap.values.double().sum(dim=0).argmax()]), row


def test_map_show_says_what_latents_mean(run, folder, built, tmp_path, monkeypatch):
    """From the map alone; of one without tokens, from the model."""
    monkeypatch.setenv("COLUMNS", "300")
    cdmap = ConditionalDifferenceMap.load(built)
    column, row = largest(cdmap)
    told = (quoted(cdmap.promoted["sae_out"][column]), quoted(cdmap.promoted["sae_in"][row]))
    code, text = run("map", "show", built, "--top", 1)
    assert code == 0 and all(tokens in text for tokens in told) and "Loading" not in text
    cdmap.promoted.clear()
    cdmap.save(tmp_path / "without")
    code, text = run("map", "show", tmp_path / "without", "--top", 1)
    assert code == 0 and not any(tokens in text for tokens in told) and "--model shows them" in text
    code, text = run("map", "show", tmp_path / "without", "--top", 1, "--model", folder / "tiny", "--device", "cpu")
    assert code == 0 and all(tokens in text for tokens in told) and "--model shows them" not in text


def test_map_show_with_texts(run, folder, built, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    texts = folder / "prompts.txt"
    column, row = largest(ConditionalDifferenceMap.load(built))
    # The model and the SAEs are those that the map records.
    code, text = run("map", "show", built, "--top", 1, "--device", "cpu", "--texts", texts)
    assert code == 0 and "strongest in" in text
    model, tokenizer = make_model("gemma2"), word_tokenizer()
    for sae, latent in ((make_sae(L_OUT, 128, seed=2), column), (make_sae(L_IN, 96, seed=1), row)):
        contexts = top_contexts(sae, model, tokenizer, texts, [latent], progress=False)[latent]
        assert contexts
        for context in contexts:
            assert " ".join(f"{context.before}**{context.token}**{context.after}".split()) in text
            assert f"{context.value:.4g}" in text
    assert "contexts" in text and "token/s" in text
    code, text = run("map", "show", built, "--device", "cpu", "--texts", tmp_path / "none.txt")
    assert code == 2 and "none.txt" in text


def test_map_show_takes_no_model_or_sae_that_is_another(run, folder, built, tmp_path):
    code, text = run("map", "show", built, "--device", "cpu", "--sae-out", folder / "sae_in")
    assert code == 2 and "--sae-out has fingerprint" in text
    cdmap = ConditionalDifferenceMap.load(built)
    cdmap.meta = replace(cdmap.meta, model_name="meta/one")
    cdmap.save(tmp_path / "named")
    code, text = run("map", "show", tmp_path / "named", "--device", "cpu", "--model-name", "meta/other")
    assert code == 2 and "made with 'meta/one' and the model is 'meta/other'" in text


def test_generate(run, folder, built, tmp_path):
    arguments = ["generate", *common(folder), "--map", built, "--max-new-tokens", 3]
    code, text = run(*arguments, "--prompt", "the cat is")
    assert code == 0 and text
    code, screened = run(*arguments, "--prompt", "the cat is", "--screen", "int5")
    assert code == 0 and screened.split("Loading")[0] == text.split("Loading")[0] != ""
    code, _ = run(
        *arguments, "--file", folder / "prompts.txt", "--out", tmp_path / "o.jsonl", "--trace", tmp_path / "t.jsonl"
    )
    answers = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert code == 0 and [answer["prompt"] for answer in answers] == ["the cat", "is a dog of"]
    edits, texts = read_trace(tmp_path / "t.jsonl")
    assert {(edit.call, edit.row) for edit in edits} == {(0, 0), (1, 0)}
    digest = ConditionalDifferenceMap.load(built).digest
    assert [(text.call, text.n_tokens, text.map_digest) for text in texts] == [(0, 3, digest), (1, 3, digest)]


def test_interactive(run, folder, built, monkeypatch):
    lines = iter(["the cat", "", "is a dog"])

    def typed(_: str = "") -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", typed)
    code, _ = run("generate", *common(folder), "--map", built, "--max-new-tokens", 2)
    assert code == 0


def test_sae_show_and_info(run, folder):
    code, text = run("sae", "show", folder / "sae_out")
    assert code == 0 and "jumprelu" in text and make_sae(L_OUT, 128, seed=2).fingerprint in text
    assert "folded │ nothing" in " ".join(text.split()) and "dtype │ float32" in " ".join(text.split())
    code, text = run("info")
    assert code == 0 and "plain PyTorch" in text and "auto takes triton" in text and "has run on GPUs" in text


@pytest.mark.parametrize(
    "command", [("sae", "train"), ("sae", "finetune"), ("fsrl", "train"), ("fsrl", "analyse", "layers")]
)
def test_a_package_that_training_needs_is_missed_before_the_model(run, folder, tmp_path, monkeypatch, command):
    monkeypatch.setattr("dspa.errors.find_spec", lambda _name: None)
    for module in ("sae", "fsrl_train"):
        monkeypatch.setattr(f"dspa.cli.{module}.load_model", lambda _on: pytest.fail("The model was loaded."))
    given = {"--sae": folder / "sae_out", "--layer": L_OUT, "--held-out": folder / "triples.jsonl"}
    wanted = {"train": ["--layer"], "finetune": ["--sae"]} if command[0] == "sae" else {}
    names = wanted.get(command[-1], ["--sae", "--held-out"])
    options = [part for name in names for part in (name, given[name])]
    model = ("--model", folder / "model", "--out", tmp_path / "out")
    code, text = run(*command, folder / "triples.jsonl", *model, *options)
    package = "sae-lens" if command[0] == "sae" else "trl"
    assert code == 2 and f"needs the package {package}" in " ".join(text.split())


def test_info_says_how_to_get_what_is_missing(run, monkeypatch):
    def version(package: str) -> str:
        if package == "trl":
            raise PackageNotFoundError
        return "1.0"

    monkeypatch.setattr("dspa.cli.version", version)
    text = run("info")[1]
    assert "trl │ not installed" in text and 'For training FSRL adapters: pip install "trl' in text
    assert "sae-lens │ 1.0" in text and 'pip install "sae-lens' not in text


def test_info_of_files(run, tmp_path):
    """A vector, a map and an adapter say what they are of; anything else is refused by name."""
    sae_in, sae_out = make_sae(L_IN, 96), make_sae(L_OUT, 128, seed=2)
    vector = SteeringVector(torch.ones(4), 7, 2.5, "response", model_name="google/gemma-2-2b")
    vector.save(tmp_path / "vector")
    make_map(sae_in, sae_out).save(tmp_path / "map")
    FSRLAdapter(sae_out).save(tmp_path / "adapter")
    for name, rows in {
        "vector": [
            "kind │ vector",
            "layer │ 7",
            "norm │ 2",
            "scale │ 2.5",
            "positions │ response",
            "google/gemma-2-2b",
        ],
        "map": ["kind │ map", sae_in.fingerprint, sae_out.fingerprint, "triples │ 50"],
        "adapter": ["kind │ FSRL adapter", f"layer │ {L_OUT}", sae_out.fingerprint, "weights │ not recorded"],
    }.items():
        code, text = run("info", tmp_path / name)
        assert code == 0 and all(row in " ".join(text.split()) for row in rows), text
    save_file({"a": torch.ones(1)}, tmp_path / "other")
    for name, message in {"none": "where there is nothing", "other": "a file of another format (None)"}.items():
        code, text = run("info", tmp_path / name)
        assert code == 2 and message in text and "accepted: the file of a map, a vector, a persona" in text


def test_info_cuts_nothing_off_in_a_narrow_terminal(run, monkeypatch):
    monkeypatch.setattr("dspa.cli.console", Console(width=80, markup=False))
    text = run("info")[1]
    assert "…" not in text
    for op in available_backends()["reference"].ops:
        assert op in text


def test_help_lists_the_commands_in_the_order_of_their_use(run):
    text = run("--help")[1]
    places = [text.index(f"│ {name} ") for name in ("demo", "map", "generate", "fsrl", "sae", "info")]
    assert places == sorted(places)


@pytest.mark.parametrize("command", [("map", "collect"), ("map", "build"), ("fsrl", "train")])
@pytest.mark.parametrize("value", ["polite", "[1]", "{polite: true}"])
def test_settings_of_the_chat_template_that_are_no_object(run, command, value):
    code, text = run(*command, "prefs.jsonl", "--chat-template-kwargs", value)
    assert code == 2 and "Invalid value for '--chat-template-kwargs'" in text and "Traceback" not in text
    assert value in text and "enable_thinking" in text


def test_errors(run, folder, counts, built, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": \n')
    (tmp_path / "far.txt").write_text("13\n3\n")
    (tmp_path / "messages.jsonl").write_text('{"prompt": "the cat"}\n{"prompt": [{"role": "user"}]}\n')
    other = ["--model", folder / "tiny", "--sae-in", folder / "sae_in", "--device", "cpu"]
    make_sae(L_OUT, 128, seed=9).save(tmp_path / "other")
    data, template = folder / "triples.jsonl", ["--out", tmp_path / "t", "--chat-template-kwargs"]
    for arguments, message in (
        (["map", "show", tmp_path / "none"], "There is no map file at"),
        (["map", "build", tmp_path / "bad.jsonl", *common(folder)], "bad.jsonl line 2"),
        (["map", "build", folder / "triples.jsonl", *common(folder), "--percentile", 101], "--percentile is 101.0"),
        (["map", "reduce", folder, "--out", tmp_path / "m"], "holds no counts"),
        (["map", "reduce", counts, "--out", tmp_path / "m", "--first", 13], "--first is 13; accepted: 1 to 12"),
        (["map", "reduce", counts, "--out", tmp_path / "m", "--first", 3, "--random", 3], "--first and --random"),
        (["map", "reduce", counts, "--out", tmp_path / "m", "--only", tmp_path / "bad.jsonl"], "bad.jsonl line 1 is"),
        (["map", "reduce", counts, "--out", tmp_path / "m", "--only", tmp_path / "far.txt"], "from 3 to 13; accepted"),
        (["map", "collect", " ", *common(folder)], "accepted: a file, a folder, or the name"),
        (["map", "show", counts], "dspa map reduce"),
        (["map", "merge", tmp_path / "m", counts, counts], "would count twice"),
        (
            ["map", "collect", folder / "triples.jsonl", *common(folder), "--out", folder / "prompts.txt"],
            "cannot be made",
        ),
        (["map", "collect", tmp_path / "none.jsonl", *common(folder)], "does not exist"),
        (["map", "collect", data, *common(folder), *template, '{"polite": true}'], "tokenizer has no chat template"),
        (["map", "stability", counts, "--size", 99], "accepted: sizes from 1 to"),
        (["sae", "show", tmp_path / "nothing"], "nothing"),
        (["map", "build", folder / "triples.jsonl", *common(folder), "--out", tmp_path / "no" / "x"], "--out is"),
        (["generate", *common(folder), "--map", built, "--prompt", " "], "--prompt is empty"),
        (["generate", *common(folder), "--map", built, "--file", tmp_path / "messages.jsonl"], "messages.jsonl line 2"),
        (["generate", *common(folder), "--map", built, "--file", tmp_path / "no.txt"], "not a file"),
        (["demo", "--json", tmp_path / "no" / "demo.json"], "--json is"),
        (["generate", *common(folder), "--map", built, "--prompt", "a", "--alpha", -1], "--alpha is -1.0"),
        (["generate", *common(folder), "--map", built, "--prompt", "a", "--device", "cuda"], "no CUDA device"),
        (["generate", *other, "--sae-out", tmp_path / "other", "--map", built, "--prompt", "a"], "fingerprint"),
    ):
        code, text = run(*arguments)
        assert code == 2 and "Error:" in text and message in text and "Traceback" not in text


def test_a_folder_without_a_data_set_is_refused(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "a.jsonl").write_text('{"prompt": 1}\n')
    (tmp_path / "b.jsonl").write_text("[1, 2\n")
    with pytest.raises(ValueError, match=r"cannot be read as a data set .*accepted: a file of triples, a folder of"):
        triple_source(str(tmp_path), "train", stream=False)
