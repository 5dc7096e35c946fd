"""`dspa generate`: files in batches, streams, comparisons, adapters, and what is refused."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from dspa.cli import main
from dspa.config import SteeringConfig
from dspa.evaluate import generation
from dspa.maps.cdmap import ConditionalDifferenceMap
from dspa.models.sources import model_source
from dspa.saes.frozen import FrozenSAE
from dspa.steering.dspa import Steering
from dspa.steering.trace import read_trace
from dspa.testing import ENGLISH, make_model, word_tokenizer

from ..support.files import save_map_and_adapter, save_second_map

PROMPTS = [" ".join(ENGLISH[n : n + 1 + n * 5 % 9]) for n in range(7)]
SHORT = ["--max-new-tokens", 6, "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A map and an adapter that know their model and SAEs, and prompts."""
    folder = tmp_path_factory.mktemp("user")
    save_map_and_adapter(folder, PROMPTS, strength=20)
    return folder


@pytest.fixture
def run(capsys, monkeypatch):
    """Run `dspa generate`, and return its exit code, standard output, and standard error with line breaks folded."""

    def go(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["dspa", "generate", *map(str, [*arguments, *SHORT])])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, " ".join(captured.err.split())

    return go


def records(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_file_in_batches_is_its_prompts_one_by_one(run, folder, tmp_path):
    alone = [run("--map", folder / "map", "--prompt", prompt)[1].rstrip("\n") for prompt in PROMPTS[:3]]
    expected = [{"prompt": prompt, "response": text} for prompt, text in zip(PROMPTS, alone, strict=False)]
    for size in (1, 3, 50):
        code, out, err = run("--map", folder / "map", "--file", folder / "prompts.txt", "--batch-size", size)
        assert code == 0 and records(out)[:3] == expected and len(records(out)) == len(PROMPTS)
        assert "7/7" in err and "prompt" in err
    code, out, _ = run("--map", folder / "map", "--file", folder / "prompts.txt", "--out", tmp_path / "o.jsonl")
    assert (code, out) == (0, "") and records((tmp_path / "o.jsonl").read_text())[:3] == expected


def test_no_option_overwrites_the_file_of_another(run, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    before = {name: (folder / name).read_bytes() for name in ("map", "prompts.txt")}
    (tmp_path / "link").symlink_to(folder / "map")
    given = ["--map", folder / "map", "--file", folder / "prompts.txt"]
    for option, path, other in (
        ("--out", "prompts.txt", "--file"),
        ("--out", tmp_path / "link", "--map"),
        ("--trace", "prompts.txt", "--file"),
        ("--trace", tmp_path / "new", "--out"),
    ):
        code, _, err = run(*given, *(["--out", tmp_path / "new"] if other == "--out" else []), option, path)
        assert code == 2 and f"{option} is {path}, as {other} is; accepted: " in err
    assert before == {name: (folder / name).read_bytes() for name in before} and not (tmp_path / "new").exists()


def test_a_stream_is_the_text(run, folder):
    code, text, err = run("--map", folder / "map", "--prompt", PROMPTS[1])
    assert run("--map", folder / "map", "--prompt", PROMPTS[1], "--stream")[:2] == (code, text)
    assert "prompt/s" not in err


def test_compare(run, folder, tmp_path):
    arguments = ["--map", folder / "map", "--alpha", 1, "--mode", "both"]
    code, text, _ = run(*arguments, "--prompt", PROMPTS[1], "--compare")
    assert code == 0
    steered = run(*arguments, "--prompt", PROMPTS[1])[1].strip()
    # A strength of 0 leaves the model as it is.
    base = run("--map", folder / "map", "--alpha", 0, "--prompt", PROMPTS[1])[1].strip()
    lines = text.splitlines()
    assert lines[0] == f"base: {base}" and lines[1].replace("**", "") == f"steered: {steered}" and "**" in lines[1]
    code, _, _ = run(*arguments, "--file", folder / "prompts.txt", "--compare", "--out", tmp_path / "o.jsonl")
    record = records((tmp_path / "o.jsonl").read_text())[1]
    assert (record["base"], record["response"]) == (base, steered) and record["edited"] == [[0, len(steered)]]


def test_a_comparison_on_a_terminal(run, folder, monkeypatch):
    """A table whose edited words are bold."""
    from rich.console import Console

    monkeypatch.setattr("dspa.cli.texts.console", Console(force_terminal=True, width=100))
    code, text, _ = run("--map", folder / "map", "--alpha", 1, "--mode", "both", "--prompt", PROMPTS[1], "--compare")
    assert code == 0 and "steered" in text and "\x1b[1m" in text and "**" not in text


def test_an_adapter_alone_and_with_a_map(run, folder, monkeypatch):
    prompt = ["--prompt", PROMPTS[1]]
    base = run("--map", folder / "map", "--alpha", 0, *prompt)[1]
    code, text, err = run("--adapter", folder / "adapter", *prompt)
    assert code == 0 and text != base, err
    given = ["--model", folder / "tiny", "--sae", folder / "sae_out"]
    assert run("--adapter", folder / "adapter", *given, *prompt)[1] == text
    code, both, err = run("--adapter", folder / "adapter", "--map", folder / "map", "--alpha", 0, *prompt)
    assert code == 0 and both == text, err
    assert f"base: {base}" in run("--adapter", folder / "adapter", "--compare", *prompt)[1]


def test_a_map_and_an_adapter_of_different_models(run, folder, tmp_path):
    other = tmp_path / "other"
    make_model("gemma2", seed=1).save_pretrained(other)
    cdmap = ConditionalDifferenceMap.load(folder / "map")
    source = model_source(AutoModelForCausalLM.from_pretrained(other))
    assert source is not None
    cdmap.sources["model"] = source
    cdmap.save(tmp_path / "map")
    code, _, err = run("--adapter", folder / "adapter", "--map", tmp_path / "map", "--prompt", "the cat")
    assert code == 2 and "different models. Pass --model" in err
    given = ["--model", folder / "tiny", "--prompt", "the cat"]
    code, _, err = run("--adapter", folder / "adapter", "--map", tmp_path / "map", *given)
    assert code == 2 and "The Steering was made with other weights than this model's" in err
    assert "If you mean to use this one, pass --other-weights" in err
    assert run("--adapter", folder / "adapter", "--map", tmp_path / "map", *given, "--other-weights")[0] == 0


def test_other_values_for_the_chat_template_than_the_map_was_made_with(run, folder, tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% if polite %}good {% endif %}{% for m in messages %}we {{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    make_model("gemma2").save_pretrained(tmp_path)
    cdmap = ConditionalDifferenceMap.load(folder / "map")
    cdmap.meta = replace(cdmap.meta, chat_template_kwargs={"polite": True})
    cdmap.save(tmp_path / "map")
    arguments = ("--map", tmp_path / "map", "--model", tmp_path, "--prompt", "the cat", "--chat")
    message = '--map was made with {"polite": true} for the chat template, and these prompts get '
    for given in ('{"polite": true}', '{"polite": false}', "{}"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert run(*arguments, "--chat-template-kwargs", given)[0] == 0
        assert any(f"{message}{given}" in str(warning.message) for warning in caught) == (given != '{"polite": true}')
    with pytest.warns(UserWarning, match=r"--map was made with .* prompts get \{\}") as caught:
        assert run(*arguments, "--adapter", folder / "adapter")[0] == 0
    assert not any("--adapter was made" in str(warning.message) for warning in caught)


def test_what_was_done_before_a_stop_is_kept(run, folder, tmp_path, monkeypatch):
    continue_prompts, calls = generation.continue_prompts, []

    def stop_at_third(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return continue_prompts(*args, **kwargs)

    monkeypatch.setattr(generation, "continue_prompts", stop_at_third)
    arguments = ["--map", folder / "map", "--alpha", 1, "--file", folder / "prompts.txt", "--batch-size", 2]
    code, _, err = run(*arguments, "--out", tmp_path / "o.jsonl", "--trace", tmp_path / "t.jsonl")
    assert code != 0 and "The answers so far are kept." in err
    assert [record["prompt"] for record in records((tmp_path / "o.jsonl").read_text())] == PROMPTS[:4]
    assert {record["call"] for record in records((tmp_path / "t.jsonl").read_text())} == {0, 1}


def test_typed_prompts_stream(run, folder, monkeypatch):
    import io
    import sys

    stdin = io.TextIOWrapper(io.BytesIO(f"{PROMPTS[1]}\n\n{PROMPTS[3]}\n".encode()))
    expected = [run("--map", folder / "map", "--prompt", PROMPTS[n])[1] for n in (1, 3)]
    monkeypatch.setattr(sys, "stdin", stdin)
    code, text, _ = run("--map", folder / "map", "--stream")
    assert code == 0 and text == "".join(expected)


def test_nothing_is_answered_where_a_prompt_of_a_file_cannot_be(run, folder, tmp_path):
    (tmp_path / "p.txt").write_text("the cat\n" + " ".join(["cat"] * 200) + "\n")
    code, out, err = run("--map", folder / "map", "--file", tmp_path / "p.txt", "--out", tmp_path / "o.jsonl")
    assert code == 2 and "Prompt 2 with --max-new-tokens, 201 + 6, is 207 tokens; accepted: up to 128" in err
    assert out == "" and not (tmp_path / "o.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "None of --map (DSPA), --adapter (FSRL), --persona, --vector, --latent and --latents was given"),
        (["--adapter", "a", "--alpha", "1"], "Without --map there is no use for --alpha."),
        (["--adapter", "a", "--sae-in", "s", "--trace", "t"], "Without --map there is no use for --sae-in, --trace."),
        (["--map", "m", "--sae", "s"], "Without --adapter or --latent there is no use for --sae."),
        (["--map", "m", "--stream", "--file", "f"], "--stream prints one text"),
        (["--map", "m", "--stream", "--compare", "--prompt", "p"], "--stream prints one text"),
        (["--map", "m", "--top-p", "0.9"], "--top-p is 0.9 for greedy decoding"),
        (["--map", "m", "--top-p", "0", "--temperature", "1"], "--top-p is 0.0; accepted: a number above 0, up to 1"),
        (["--map", "m", "--top-p", "nan", "--temperature", "1"], "--top-p is nan; accepted"),
        (["--map", "m", "--temperature", "inf"], "--temperature is inf; accepted: a finite number >= 0"),
        (["--map", "m", "--batch-size", "0"], "Invalid value for '--batch-size'"),
    ],
)
def test_refused_options(run, arguments, message):
    code, _, err = run(*arguments)
    assert code == 2 and message in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--latent", "5"], "--sae is missing; accepted: the SAE of --latent or --latents."),
        (["--latent", "5=x"], "--latent is '5=x'; accepted: LATENT=STRENGTH, such as 971=4"),
        (["--latent", "-5"], "--latent is '-5'; accepted: LATENT=STRENGTH"),
        (["--latent", "5=nan"], "The strength of latent 5 is nan; accepted: a finite number"),
        (["--latent", "5=1", "--latent", "5"], "--latent is 5=1, 5; accepted: different latents."),
        (["--latent", "5=-1", "--latent-mode", "ablate"], "The strength of latent 5 is -1.0; accepted: a number >= 0"),
        (["--latents", "set", "--latent-mode", "clamp"], "Without --latent there is no use for --latent-mode."),
        (["--latents", "set"], "set is not JSON"),
        (["--latent", "5", "--latents", "set.json"], "--latents is one of 2 sets; accepted: one set"),
        (["--latent", "5", "--alpha", "1"], "Without --map there is no use for --alpha."),
        (["--latent", "5", "--trace", "a", "--trace", "b"], "--trace is given 2 times; accepted: 1 files"),
        (["--latent", "999=1", "--sae", "sae_out"], "A set of latents is with 999; accepted: latents of the SAE, 0 to"),
    ],
)
def test_refused_latents(run, folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    (folder / "set").write_text("nothing")
    (folder / "set.json").write_text('{"strengths": {"1": 2}}')
    code, _, err = run("--model", "tiny", *arguments, "--prompt", "a")
    assert code == 2 and message in err, err


def test_chosen_latents(run, folder, tmp_path):
    """The text is that of `Steering.of_latents`, alone and beside a map that leaves the latents to it."""
    strengths = {1: 30.0, 2: -4.0, 9: None, 33: 25.0}
    given = [item for j, s in strengths.items() for item in ("--latent", j if s is None else f"{j}={s}")]
    given += ["--latent-when", "always"]
    trace = tmp_path / "trace.jsonl"
    sae = ["--model", folder / "tiny", "--sae", folder / "sae_out"]
    code, out, err = run(*sae, *given, "--prompt", PROMPTS[1], "--trace", trace)
    assert code == 0, err
    model = AutoModelForCausalLM.from_pretrained(folder / "tiny").eval()
    steering = Steering.of_latents(FrozenSAE.load(folder / "sae_out"), strengths, when="always")
    inputs = word_tokenizer()(PROMPTS[1], return_tensors="pt")

    def text() -> str:
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        return word_tokenizer().decode(ids, skip_special_tokens=True)

    base = text()
    with steering.attach(model):
        assert out.rstrip("\n") == text() != base
    edits, texts = read_trace(trace)
    assert len(edits) == 6 and texts[0].n_tokens == 6 and {1, 2, 33} <= set(edits[0].latents)
    assert edits[0].promoted is not None and all(edit.maximum is None for edit in edits)
    (tmp_path / "set.json").write_text(json.dumps({"strengths": strengths, "when": "always"}))
    assert run(*sae, "--latents", tmp_path / "set.json", "--prompt", PROMPTS[1])[1] == out
    # The SAE of the map.
    code, both, err = run("--map", folder / "map", *given, "--prompt", PROMPTS[1])
    assert code == 0 and both != run("--map", folder / "map", "--prompt", PROMPTS[1])[1], err


def test_maps_of_several_layers(run, folder, tmp_path):
    """They steer together, each writes a trace of its own, and they share an SAE."""
    save_second_map(tmp_path, folder / "map")
    maps = ["--map", folder / "map", "--map", tmp_path / "second", "--alpha", 3, "--mode", "both"]
    traces = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    code, out, err = run(*maps, "--prompt", PROMPTS[1], "--trace", traces[0], "--trace", traces[1])
    assert code == 0, err
    model = AutoModelForCausalLM.from_pretrained(folder / "tiny").eval()
    config = SteeringConfig(alpha=3.0, mode="both")
    loaded = [ConditionalDifferenceMap.load(path) for path in (folder / "map", tmp_path / "second")]
    sae_in = FrozenSAE.load(folder / "sae_in")
    saes_out = [FrozenSAE.load(path) for path in (folder / "sae_out", tmp_path / "sae_top")]
    parts = [Steering(sae_in, sae_out, cdmap, config) for sae_out, cdmap in zip(saes_out, loaded, strict=True)]
    inputs = word_tokenizer()(PROMPTS[1], return_tensors="pt")
    for part in parts:
        part.attach(model)
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert out.rstrip("\n") == word_tokenizer().decode(ids, skip_special_tokens=True)
    assert out != run("--map", folder / "map", "--alpha", 3, "--mode", "both", "--prompt", PROMPTS[1])[1]
    for path, cdmap in zip(traces, loaded, strict=True):
        edits, (text,) = read_trace(path)
        assert edits and text.map_digest == cdmap.digest
    for given, message in (
        ([*maps, "--trace", traces[0]], "--trace is given 1 times; accepted: 2 files, one for each map"),
        ([*maps, "--trace", traces[0], "--trace", traces[0]], "--trace is"),
        ([*maps, "--map", folder / "map"], "--map is with 2 of layer 2; accepted: one for each output layer"),
        ([*maps, "--trace", tmp_path / "second", "--trace", traces[0]], "as --map"),
    ):
        code, _, err = run(*given, "--prompt", "cat")
        assert code == 2 and message in err, err
