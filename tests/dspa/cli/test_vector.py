"""`dspa vector` from effects to a vector that generates, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dspa
from dspa.cli import main
from dspa.maps.cdmap import ConditionalDifferenceMap
from dspa.sae_ts import EffectApproximator, Effects
from dspa.testing import ENGLISH

from ..support.files import save_map_and_adapter

PROMPTS = [" ".join(ENGLISH[n : n + 1 + n * 5 % 9]) for n in range(5)]


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run `dspa` in an empty folder; returns its exit code and all of its output on one line."""

    def go(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["dspa", *map(str, arguments)])
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), " ".join((captured.out + captured.err).split())

    return go


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, SAEs, a map, prompts, openers and texts."""
    folder = tmp_path_factory.mktemp("user")
    save_map_and_adapter(folder, PROMPTS)
    (folder / "openers.txt").write_text("the cat\nmy\nsome red tree\n")
    (folder / "texts.txt").write_text("".join(" ".join(ENGLISH[n : n + 12]) + "\n" for n in range(20)))
    return folder


def measuring(folder: Path, *arguments: object) -> tuple[Any, ...]:
    given = ("--model", folder / "tiny", "--sae", folder / "sae_out", "--device", "cpu", "--rollouts", 2)
    return ("vector", "effects", *given, "--length", 6, "--openers", folder / "openers.txt", *arguments)


@pytest.fixture
def fitted(run, folder) -> Path:
    path = folder / "effects.model"
    if not path.exists():
        code, text = run(*measuring(folder, "--scale", 20, "--directions", 30, "--out", folder / "effects"))
        assert code == 0 and f"Next: dspa vector fit {folder / 'effects'} --out" in text, text
        code, text = run("vector", "fit", folder / "effects", "--held-out", 4, "--out", path)
        assert code == 0 and "4 held-out directions, after a fit of 26" in text, text
    return path


def test_from_effects_to_text(run, folder, fitted, tmp_path):
    made = EffectApproximator.load(fitted)
    assert Effects.open(folder / "effects").n == 30 and f"{made.record.r2:.4f}" in run("info", fitted)[1]
    given = ("--latent", 3, "--latent", "7=-0.5", "--scale", 40)
    code, text = run("vector", "target", fitted, *given, "--out", "v")
    vector = dspa.SteeringVector.load(tmp_path / "v")
    assert code == 0 and f"{float(made.predict(vector.vector[None])[0, 7]):+.4f}" in text
    wanted = dspa.sae_ts.targeted_vector(made, {3: 1.0, 7: -0.5}, scale=40.0)
    assert torch.equal(vector.vector, wanted.vector) and (vector.scale, vector.layer) == (40, wanted.layer)
    assert run("vector", "target", fitted, *given, "--variant", "rotation", "--out", "r")[0] == 0
    sae = dspa.FrozenSAE.load(folder / "sae_out")
    wanted = dspa.sae_ts.targeted_vector(made, {3: 1.0, 7: -0.5}, variant="rotation", sae=sae)
    assert torch.equal(dspa.SteeringVector.load(tmp_path / "r").vector, wanted.vector)
    texts = [
        run("generate", "--model", folder / "tiny", "--vector", path, "--prompt", "the cat", "--max-new-tokens", 8)
        for path in ("v", "r")
    ]
    assert texts[0][0] == 0 and texts[0] != texts[1]


def test_imitations(run, folder, fitted, tmp_path):
    cdmap = ConditionalDifferenceMap.load(folder / "map")
    code, text = run("vector", "imitate", fitted, "--map", folder / "map", "--k-diff", 5, "--out", "static")
    lowest = int(cdmap.columns[cdmap.values.double().sum(dim=0).argmin()])
    assert code == 0 and f"latent {lowest} (weight -" in text, text
    given = ("--prompts", folder / "prompts.txt", "--mode", "both", "--device", "cpu")
    code, text = run("vector", "imitate", fitted, "--map", folder / "map", *given, "--out", "prompts")
    assert code == 0 and "(weight +" in text and "(weight -" in text, text
    vectors = [dspa.SteeringVector.load(tmp_path / name).vector for name in ("static", "prompts")]
    assert not torch.allclose(*vectors)


def test_scale(run, folder, tmp_path):
    for seed in range(20):
        vector = torch.randn(48, generator=torch.Generator().manual_seed(seed))
        dspa.SteeringVector(vector, 2, 3.0).save(tmp_path / "v")
        given = ("vector", "scale", "v", folder / "texts.txt", "--model", folder / "tiny", "--device", "cpu")
        code, text = run(*given, "--delta", 0.05, "--out", "w")
        if code == 0:
            break
        assert "The rise of the cross-entropy is" in text and "Raise --maximum, or lower --delta." in text
    assert "without the vector" in text and "Next: dspa compare PROMPTS --vector w" in text
    found = dspa.SteeringVector.load(tmp_path / "w")
    assert torch.equal(found.vector, vector) and f"{found.scale:.4g}" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--scale", 0, "--directions", 5), "--scale is 0.0; accepted: a finite number > 0"),
        (("--scale", 1, "--directions", 129), "--directions is 129; accepted: 1 to 128, the rows of the decoder"),
        (("--scale", 1, "--directions", 5, "--top-p", 2), "--top-p is 2.0; accepted: a number above 0, up to 1"),
        (("--scale", 1, "--directions", 5, "--length", 4), "Opener 3 is 4 tokens long; accepted: 1 to 3"),
    ],
)
def test_bad_measurements(run, folder, tmp_path, arguments, message):
    code, text = run(*measuring(folder, *arguments, "--out", "e"))
    assert code == 2 and message in text and not (tmp_path / "e").exists(), text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("target", "A", "--latent", "x", "--out", "v"), "--latent is 'x'; accepted: LATENT or LATENT=WEIGHT"),
        (("target", "A", "--latent", 500, "--out", "v"), "A latent of --latent is 500; accepted: 0 to 127"),
        (("target", "A", "--latent", 3, "--latent", "3=2", "--out", "v"), "--latent is one latent twice"),
        (("target", "A", "--latent", 3, "--variant", "pinv", "--out", "v"), "--variant is 'pinv'; accepted: targeted"),
        (("target", "A", "--latent", 3, "--sae", "s", "--out", "v"), "Without --variant rotation there is no use"),
        (("target", "A", "--latent", 3, "--out", "A"), "as EFFECTS is"),
        (("imitate", "A", "--map", "MAP", "--k-prompt", 4, "--out", "v"), "Without --prompts there is no use for"),
        (("imitate", "A", "--map", "MAP", "--mode", "x", "--out", "v"), "--mode is 'x'; accepted: ablate"),
        (("imitate", "MAP", "--map", "MAP", "--out", "v"), "is not a linear model of effects"),
        (("fit", "nothing", "--out", "f"), "There is no file at nothing/base.safetensors"),
        (("fit", "EFFECTS", "--method", "adam", "--ridge", 1, "--out", "f"), "--ridge is 1 with --method adam"),
        (("fit", "EFFECTS", "--held-out", 29, "--out", "f"), "is 30, of which 29 are held out; accepted"),
    ],
)
def test_what_is_refused(run, folder, fitted, arguments, message):
    names = {"A": fitted, "MAP": folder / "map", "EFFECTS": folder / "effects"}
    code, text = run("vector", *(names.get(str(argument), argument) for argument in arguments))
    assert code == 2 and message in text, text


def test_a_map_of_another_sae_is_not_imitated(run, folder, tmp_path):
    given = measuring(folder, "--scale", 20, "--directions", 6, "--out", "e")
    given = tuple(folder / "sae_in" if argument == folder / "sae_out" else argument for argument in given)
    assert run(*given)[0] == 0
    assert run("vector", "fit", "e", "--out", "f")[0] == 0
    code, text = run("vector", "imitate", "f", "--map", folder / "map", "--out", "v")
    assert code == 2 and "accepted: a map of the SAE whose effects were measured" in text
