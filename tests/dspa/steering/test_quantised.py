"""Models in 8 and 4 bits: a map is made with them, they are steered as a plain loop steers them, and come back."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import dspa
from dspa.cli import main
from dspa.maps.cdmap import ConditionalDifferenceMap
from dspa.models.layers import decoder_layers
from dspa.saes.frozen import FrozenSAE
from dspa.testing import D_SAE_IN, D_SAE_OUT, ENGLISH, L_IN, L_OUT, make_sae, word_tokenizer

from ..support.plain import Plain
from ..support.quantisers import KINDS, SIZES, quantised

CONFIG = dspa.SteeringConfig(alpha=0.6, k_diff=8, k_prompt=12, mode="both")
PROMPTS = [[1, 5, 9, 33, 20, 7], [1, 44, 12, 40], [1, 8, 8, 21, 30, 17, 3, 29, 11]]
N_NEW = 6
TRIPLES = [
    {"prompt": " ".join(ENGLISH[n : n + 5]), "chosen": f" {ENGLISH[n + 9]}", "rejected": f" {ENGLISH[n + 3]}"}
    for n in range(12)
]


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return quantised(request.param, tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def saes() -> tuple[FrozenSAE, FrozenSAE]:
    width = SIZES["hidden_size"]
    return make_sae(L_IN, D_SAE_IN, d_in=width, seed=1), make_sae(L_OUT, D_SAE_OUT, d_in=width, seed=2)


@pytest.fixture(scope="module")
def cdmap(model: PreTrainedModel, saes: tuple[FrozenSAE, FrozenSAE]) -> ConditionalDifferenceMap:
    made = dspa.build_map(model, word_tokenizer(), TRIPLES, *saes, progress=False)
    assert made is not None
    return made


@pytest.fixture
def steering(saes, cdmap) -> Iterator[dspa.Steering]:
    steering = dspa.Steering(*saes, cdmap, CONFIG, record=True)
    yield steering
    steering.detach()


def residuals(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Residuals at the output of the edited layer, as the layers after it read them."""
    read: list[Tensor] = []
    handle = decoder_layers(model)[L_OUT + 1].register_forward_pre_hook(
        lambda _module, args, kwargs: read.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with handle, torch.no_grad():
        model(input_ids=ids)
    return read[0][0]


def quantised_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers whose weights are of another type than a plain parameter's, or not of its numbers."""
    return [m for m in model.modules() if type(getattr(m, "weight", None)) not in (nn.Parameter, type(None))]


def test_the_tokens_are_those_of_a_plain_loop(model, saes, cdmap, steering):
    assert len(quantised_layers(model)) == 28
    loop = Plain(model, decoder_layers(model), *saes, cdmap, CONFIG)
    expected = [loop.generate(prompt, N_NEW) for prompt in PROMPTS]
    with steering.attach(model):
        steered = [generate(model, prompt) for prompt in PROMPTS]
    assert steered == expected and [generate(model, prompt) for prompt in PROMPTS] != expected


def generate(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    output = model.generate(torch.tensor([prompt]), max_new_tokens=N_NEW, do_sample=False, pad_token_id=0)
    return output[0, len(prompt) :].tolist()


def test_where_nothing_is_edited_no_bit_changes(model, steering):
    """At the positions before the response, at those without an edit, and everywhere after `detach`."""
    ids = torch.tensor([PROMPTS[0] + PROMPTS[2]])
    before, logits = residuals(model, ids), model(ids).logits
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with steering.attach(model):
        with steering.responses([len(PROMPTS[0])]):
            after = residuals(model, ids)
        with steering.disabled():
            assert torch.equal(model(ids).logits, logits)
    edited = (after != before).any(dim=1).nonzero().flatten().tolist()
    assert edited == sorted(edit.position for edit in steering.trace)
    assert edited and min(edited) >= len(PROMPTS[0]) - 1
    assert torch.equal(model(ids).logits, logits)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


@pytest.mark.parametrize("kind", KINDS)
def test_a_map_finds_its_quantised_model_again(kind, saes, tmp_path, monkeypatch, capsys):
    """Also after passes, in which bitsandbytes changes the layout of its weights. Another one is noticed."""
    monkeypatch.chdir(tmp_path)
    folder = Path("tiny")
    quantised(kind, Path("plain"), dtype=torch.bfloat16).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    for sae, name in zip(saes, ("sae_in", "sae_out"), strict=True):
        sae.save(name)
    model, tokenizer = dspa.load_model(folder, device="cpu")
    generate(model, PROMPTS[0])
    made = dspa.build_map(
        model, tokenizer, TRIPLES, FrozenSAE.load("sae_in"), FrozenSAE.load("sae_out"), progress=False
    )
    assert made is not None
    made.save("map")

    def run(*options: str) -> tuple[int, str]:
        command = ["generate", "--map", "map", "--prompt", "the cat is", "--max-new-tokens", "3", "--device", "cpu"]
        monkeypatch.setattr("sys.argv", ["dspa", *command, *options])
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0), " ".join(capsys.readouterr().err.split())

    assert run()[0] == 0
    code, text = run("--dtype", "float32")
    assert code == 2 and "--dtype is 'float32', and" in text and "accepted: auto, bfloat16" in text
    shutil.rmtree(folder)
    quantised(kind, Path("plain"), dtype=torch.bfloat16, scale=1.1).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    code, text = run()
    assert code == 2 and "another one now" in text
