"""SAEs trained and fine-tuned on streamed activations: what is read and saved, and how a stopped training continues."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import pickle
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from dspa.cli import main
from dspa.data.texts import TextFile
from dspa.errors import ModelError, PreferenceError, TextError, TrainingError
from dspa.outputs import held, workspace
from dspa.saes.activations import Activations, Position
from dspa.saes.batchtopk import begin_at_data, jumprelu, new_sae, started_sae
from dspa.saes.config import SAETrainingConfig
from dspa.saes.frozen import FrozenSAE
from dspa.saes.quality import evaluate_sae
from dspa.saes.training import finetune_sae, read_qualities, train_sae, train_saes
from dspa.testing import D_IN, ENGLISH, make_model, make_sae, word_tokenizer

from ...rounding import PASS, rounding
from ..support.clock import set_clock
from ..support.saes import Stopped, close_but_at_thresholds, decoded_rounding, latent_rounding, stop_after

pytest.importorskip("sae_lens")

ASSETS = Path(__file__).parents[3] / "python" / "dspa" / "demo" / "assets"
LAYER = 2
D_SAE = 96
TINY = SAETrainingConfig(
    n_tokens=1600,
    batch_size=64,
    lr=3e-3,
    dead_feature_window=5,
    held_out_tokens=200,
    buffer_tokens=300,
    batch_tokens=256,
    checkpoint_every=4,
    seed=3,
)


def sentence(n: int) -> str:
    g = torch.Generator().manual_seed(n)
    length = int(torch.randint(4, 20, (), generator=g))
    return " ".join(ENGLISH[i] for i in torch.randint(len(ENGLISH), (length,), generator=g).tolist())


TRIPLES = [{"prompt": sentence(n), "chosen": " the cat", "rejected": f" {sentence(n + 500)}"} for n in range(30)]
MESSAGES = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"]}],
    }
    for row in TRIPLES
]
TEMPLATE = (
    "{% for m in messages %}{{ '<bos> ' if loop.first else '' }}{{ m['role'][:1] }} {{ m['content'] }} {% endfor %}"
    "{{ 'a ' if add_generation_prompt else '' }}"
)


def lines(path: Path, rows: list[object]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def model():
    return make_model("gemma2")


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    return lines(tmp_path_factory.mktemp("texts") / "texts.txt", [sentence(n) for n in range(60)])


@pytest.fixture
def start() -> FrozenSAE:
    return make_sae(LAYER, D_SAE, seed=5)


def stream(model, tokenizer, path, **settings) -> Activations:
    given = {"max_length": 128, "exclude_special_tokens": True, "batch_tokens": 256} | settings
    return Activations(model, tokenizer, TextFile(path), [LAYER], **given)


def residuals(model, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids]), output_hidden_states=True).hidden_states[LAYER + 1][0]


def same_rows(a: torch.Tensor, b: torch.Tensor) -> bool:
    """True if both hold the same rows, in any order."""
    apart = (a[:, None] - b).abs().amax(dim=-1)
    atol = rounding(PASS, float(b.abs().max()))
    return a.shape == b.shape and bool(apart.amin(dim=0).max() < atol) and bool(apart.amin(dim=1).max() < atol)


# Files


def test_triples_are_prompt_and_response(tmp_path, model, tokenizer):
    activations = stream(model, tokenizer, lines(tmp_path / "t.jsonl", TRIPLES), exclude_special_tokens=False)
    rows, n_held_out = activations.held_out(1)
    texts = [TRIPLES[0]["prompt"] + TRIPLES[0][part] for part in ("chosen", "rejected")]
    wanted = torch.cat([residuals(model, tokenizer(text)["input_ids"]) for text in texts])
    assert n_held_out == 1 and same_rows(rows[LAYER], wanted)


def test_conversations(tmp_path, model):
    tokenizer = word_tokenizer()
    file = lines(tmp_path / "t.jsonl", MESSAGES)
    with pytest.raises(PreferenceError, match=r"t\.jsonl line 1.*no chat template"):
        stream(model, tokenizer, file).held_out(1)
    tokenizer.chat_template = TEMPLATE
    rows, _ = stream(model, tokenizer, file).held_out(1)
    assert len(rows[LAYER]) > 0


# The stream


def test_rows_are_the_models_residuals(model, tokenizer, texts):
    ids = [tokenizer(text)["input_ids"] for text in TextFile(texts).entries()]
    rows = stream(model, tokenizer, texts).rows(ids)[LAYER]
    assert same_rows(rows, torch.cat([residuals(model, document)[1:] for document in ids]))
    everything = stream(model, tokenizer, texts, exclude_special_tokens=False).rows(ids)[LAYER]
    assert len(everything) == len(rows) + len(ids)


def test_long_documents_are_cut(model, tokenizer, texts):
    rows, _ = stream(model, tokenizer, texts, max_length=5).held_out(8)
    assert len(rows[LAYER]) == 8


def test_one_pass_has_every_row_once(model, tokenizer, texts):
    """With a buffer as large as the file, a block is everything that is not held out, in another order."""
    activations = stream(model, tokenizer, texts)
    held_out, n = activations.held_out(100)
    ids = [tokenizer(text)["input_ids"] for text in TextFile(texts).entries()]
    left = activations.rows(ids[n:])[LAYER]
    batches = activations.batches(n, 1, len(left), seed=0)
    taken = torch.cat([next(batches)[2] for _ in range(len(left))])
    assert same_rows(taken, left) and not torch.equal(taken, left)
    assert same_rows(held_out[LAYER], activations.rows(ids[:n])[LAYER])
    # The next pass goes on at the same rows, in an order of its own.
    again = torch.cat([next(batches)[2] for _ in range(len(left))])
    assert same_rows(again, left) and not torch.equal(again, taken)


def test_stream_goes_on_from_any_place(model, tokenizer, texts):
    activations = stream(model, tokenizer, texts)

    def batches(start: Position | None, seed: int = 0):
        return ((place, rows) for _, place, rows in activations.batches(5, 32, 100, seed, {LAYER: start}))

    whole = batches(None)
    seen = [next(whole) for _ in range(40)]
    assert seen[-1][0].block > 10
    for stop in (0, 1, 2, 3, 17, 35):
        rest = batches(seen[stop][0])
        for place, rows in seen[stop + 1 : stop + 4]:
            next_place, next_rows = next(rest)
            assert next_place == place and torch.equal(next_rows, rows)
    assert not torch.equal(next(batches(None, seed=1))[1], seen[0][1])


def test_layers_have_the_batches_of_each_alone(model, tokenizer, texts):
    """Also where they go on from places of their own, in any order."""
    alone = {}
    for layer in (0, LAYER):
        activations = Activations(
            *(model, tokenizer, TextFile(texts), [layer]), max_length=128, exclude_special_tokens=True, batch_tokens=256
        )
        batches = activations.batches(5, 32, 100, 0)
        alone[layer] = [next(batches) for _ in range(20)]
    together = Activations(
        *(model, tokenizer, TextFile(texts), [LAYER, 0]), max_length=128, exclude_special_tokens=True, batch_tokens=256
    )
    for n_taken in ({0: 0, LAYER: 0}, {0: 2, LAYER: 7}, {0: 12, LAYER: 1}, {0: 4, LAYER: 4}):
        starts = {layer: alone[layer][n - 1][1] if n else None for layer, n in n_taken.items()}
        left = {layer: list(alone[layer][n:]) for layer, n in n_taken.items()}
        for layer, place, rows in together.batches(5, 32, 100, 0, starts):
            if not all(left.values()):
                break
            _, wanted_place, wanted = left[layer].pop(0)
            assert place == wanted_place and torch.equal(rows, wanted)


def test_too_little_text(model, tokenizer, texts):
    with pytest.raises(TextError, match=r"60 entries, and 100000 held-out tokens take them all"):
        stream(model, tokenizer, texts).held_out(100_000)


# Starts


def varied(arch: str, **kwargs: object) -> FrozenSAE:
    """An SAE whose decoder rows and thresholds differ a lot."""
    g = torch.Generator().manual_seed(7)
    W_dec = torch.randn(D_SAE, D_IN, generator=g) * (0.5 + torch.rand(D_SAE, 1, generator=g))
    if arch == "jumprelu":
        kwargs["threshold"] = 1 + 3 * torch.rand(D_SAE, generator=g)
    b_enc, b_dec = 0.1 * torch.randn(D_SAE, generator=g), 0.1 * torch.randn(D_IN, generator=g)
    return FrozenSAE(arch, W_dec.T / D_IN**0.5, b_enc, W_dec, b_dec, layer=LAYER, **kwargs)


def test_jumprelu_starts_as_it_is():
    """Its thresholds are the same in the units of the training, and converting back gives the same SAE."""
    start, scale = varied("jumprelu"), 0.3
    sae = started_sae(start, 8, scale=scale, threshold_lr=0.01, metadata={})
    norm = start.W_dec.norm(dim=1)
    sae.topk_threshold.fill_((start.threshold * norm).median().item() * scale)
    back = FrozenSAE.from_sae_lens(jumprelu(sae, scale=scale, normalize_activations="none"), layer=LAYER)
    h = 3 * torch.randn(200, D_IN, generator=torch.Generator().manual_seed(1))
    f, wanted = back.encode(h), start.encode(h)
    assert (wanted > 0).any() and (wanted[:, start.threshold > 2] == 0).any()
    close_but_at_thresholds(f, wanted * norm, start.threshold * norm)
    both = f * (wanted > 0), wanted * (f > 0)
    atol = decoded_rounding(wanted, start.W_dec)
    torch.testing.assert_close(back.decode(both[0]), start.decode(both[1]), atol=atol, rtol=0)


@pytest.mark.parametrize("arch", ["standard", "topk"])
def test_others_start_with_the_same_latents(arch):
    start = varied(arch, **({"k": 9} if arch == "topk" else {}))
    sae = started_sae(start, 9, scale=2.0, threshold_lr=0.01, metadata={})
    back = FrozenSAE.from_sae_lens(jumprelu(sae, scale=2.0, normalize_activations="none"), layer=LAYER)
    h = torch.randn(50, D_IN, generator=torch.Generator().manual_seed(1))
    f, wanted = back.encode(h), start.encode(h) * start.W_dec.norm(dim=1)
    atol = latent_rounding(wanted, D_IN)
    torch.testing.assert_close(f[wanted > 0], wanted[wanted > 0], atol=atol, rtol=0)


def test_a_threshold_without_bounds_is_no_unit():
    start = varied("jumprelu")
    start.weights.threshold[:4] = torch.tensor([torch.inf, 0.0, 1e-6, 1e6])
    sae = started_sae(start, 8, scale=1.0, threshold_lr=0.01, metadata={})
    torch.testing.assert_close(sae.W_dec[:4].norm(dim=1), torch.ones(4), atol=rounding(D_IN, 1.0), rtol=0)
    assert all(bool(parameter.isfinite().all()) for parameter in sae.parameters())


# Training


def test_train(tmp_path, model, tokenizer, texts):
    from sae_lens import SAE

    sae = train_sae(
        model, tokenizer, texts, LAYER, tmp_path / "sae", d_sae=D_SAE, k=6, config=TINY, progress=False, model_name="m"
    )
    before, after = read_qualities(tmp_path / "sae").values()
    assert after.explained_variance > before.explained_variance + 0.1 and 3 < after.l0 < 12
    loaded = FrozenSAE.load(tmp_path / "sae")
    assert (loaded.arch, loaded.layer, loaded.model_name, loaded.d_sae) == ("jumprelu", LAYER, "m", D_SAE)
    torch.testing.assert_close(loaded.W_dec.norm(dim=1), torch.ones(D_SAE), atol=rounding(D_IN, 1.0), rtol=0)
    held_out = stream(model, tokenizer, texts).held_out(TINY.held_out_tokens)[0][LAYER]
    assert evaluate_sae(loaded, held_out) == after and loaded.fingerprint == sae.fingerprint
    theirs = SAE.load_from_disk(tmp_path / "sae")
    close_but_at_thresholds(theirs.encode(held_out), loaded.encode(held_out), loaded.threshold)
    assert theirs.cfg.metadata.prepend_bos is True and theirs.cfg.metadata.training_architecture == "batchtopk"
    record = json.loads((tmp_path / "sae" / "training.json").read_text())
    assert record["settings"]["k"] == 6 and record["settings"]["data"] == TextFile(texts).digest
    assert len(record["history"]) == 25 and record["history"][-1]["tokens"] == 1600
    assert not list((tmp_path / "sae").glob("checkpoint*"))


@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("arch", ["standard", "topk"])
def test_finetune_any(tmp_path, model, tokenizer, texts, arch, normalize):
    start = varied(arch, normalize_activations=normalize, **({"k": 9} if arch == "topk" else {}))
    config = replace(TINY, lr=1e-3)
    sae = finetune_sae(model, tokenizer, texts, start, tmp_path / "sae", k=9, config=config, progress=False)
    before, after = read_qualities(tmp_path / "sae").values()
    assert sae.weights.normalize == normalize and sae.arch == "jumprelu" and sae.layer == LAYER
    assert after.explained_variance > before.explained_variance and after.l0 < 13


def test_k_is_the_starts_own_l0(tmp_path, model, tokenizer, texts, start):
    finetune_sae(model, tokenizer, texts, start, tmp_path / "sae", config=TINY, progress=False)
    details = json.loads((tmp_path / "sae" / "cfg.json").read_text())["metadata"]["training_architecture_details"]
    ids = [tokenizer(text)["input_ids"] for text in TextFile(texts).entries()]
    own = evaluate_sae(start, stream(model, tokenizer, texts).rows(ids)[LAYER]).l0
    assert own * 1.01 != pytest.approx(details["k"], rel=0.001) and details["k"] == pytest.approx(own, rel=0.1)


@pytest.mark.parametrize("kind", ["train", "finetune"])
def test_a_stopped_run_goes_on_to_the_same_sae(tmp_path, monkeypatch, model, tokenizer, texts, start, kind):
    def run(out: Path) -> FrozenSAE:
        if kind == "train":
            return train_sae(model, tokenizer, texts, LAYER, out, d_sae=D_SAE, k=6, config=TINY, progress=False)
        return finetune_sae(model, tokenizer, texts, start, out, config=TINY, progress=False)

    wanted = run(tmp_path / "whole")
    # Before the first checkpoint, just after one, between two; then what is left.
    for steps in (2, 4, 7, 9):
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            stop_after(patch, steps)
            run(tmp_path / "stopped")
        assert not (tmp_path / "stopped" / "cfg.json").exists()
    assert [path.name for path in (tmp_path / "stopped").glob("checkpoint*")] == ["checkpoint-000000016"]
    got = run(tmp_path / "stopped")
    for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"):
        assert torch.equal(getattr(got, name), getattr(wanted, name)), name
    records = [json.loads((tmp_path / name / "training.json").read_text()) for name in ("whole", "stopped")]
    assert records[0] == records[1]


def test_layers_in_one_pass(tmp_path, monkeypatch, model, tokenizer, texts):
    """Each is the SAE of its layer alone, after a stop too, and the model reads the text once for all."""
    alone = {
        layer: train_sae(
            *(model, tokenizer, texts, layer, tmp_path / f"{layer}"), d_sae=d_sae, k=k, config=TINY, progress=False
        )
        for layer, d_sae, k in ((LAYER, D_SAE, 6), (0, 64, 4))
    }

    def run() -> list[FrozenSAE]:
        options = {"d_sae": [D_SAE, 64], "k": [6, 4], "config": TINY, "progress": False}
        return train_saes(model, tokenizer, texts, [LAYER, 0], tmp_path / "both", **options)

    # The one layer is steps ahead of the other, at its end as well.
    for steps in (6, 4, 33):
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            stop_after(patch, steps)
            run()
    finished = run()
    assert [sae.fingerprint for sae in run()] == [sae.fingerprint for sae in finished]
    for layer, sae in zip((LAYER, 0), finished, strict=True):
        assert sae.layer == layer and sae.fingerprint == alone[layer].fingerprint
        records = [tmp_path / name / "training.json" for name in (f"{layer}", f"both/layer_{layer}")]
        assert json.loads(records[0].read_text()) == json.loads(records[1].read_text())


def test_one_pass_reads_once(tmp_path, monkeypatch, model, tokenizer, texts):
    config = replace(TINY, n_tokens=256, max_norm_ratio=0)
    read = documents_read(monkeypatch, model)
    train_sae(model, tokenizer, texts, LAYER, tmp_path / "one", d_sae=D_SAE, k=6, config=config, progress=False)
    one = sum(read)
    read.clear()
    train_saes(model, tokenizer, texts, [0, LAYER], tmp_path / "two", d_sae=D_SAE, k=6, config=config, progress=False)
    assert sum(read) == one


def test_directions_of_a_new_sae_lie_halfway_to_rows():
    """Each row is taken once before any is taken twice."""
    sae = new_sae(D_IN, D_SAE, 8, seed=0, threshold_lr=0.01, metadata={})
    random = sae.W_dec.detach().clone()
    rows = 5 + torch.randn(40, D_IN, generator=torch.Generator().manual_seed(1))
    begin_at_data(sae, rows, 0)
    unit = torch.nn.functional.normalize
    toward = unit(unit(random, dim=1)[:, None] + unit(rows - rows.mean(0), dim=1), dim=2)
    W_dec = sae.W_dec.detach()
    cosines = (toward * unit(W_dec, dim=1)[:, None]).sum(-1)
    torch.testing.assert_close(cosines.amax(dim=1), torch.ones(D_SAE), atol=rounding(D_IN, 1.0), rtol=0)
    taken = cosines.argmax(dim=1).bincount(minlength=40)
    assert taken.min() == 2 and taken.max() == 3
    torch.testing.assert_close(W_dec.norm(dim=1), random.norm(dim=1), atol=rounding(D_IN, 1.0), rtol=0)
    assert torch.equal(sae.W_enc, sae.W_dec.T)


def test_a_new_sae_begins_at_the_mean(tmp_path, monkeypatch, model, tokenizer, texts):
    from dspa.saes import fitting

    begun = []
    monkeypatch.setattr(fitting, "begin_threshold", lambda sae, rows: begun.append((sae.b_dec.detach().clone(), rows)))
    config = replace(TINY, n_tokens=64, held_out_tokens=64)
    train_sae(model, tokenizer, texts, LAYER, tmp_path / "sae", d_sae=D_SAE, k=6, config=config, progress=False)
    (b_dec, rows), scale = begun[0], json.loads((tmp_path / "sae" / "training.json").read_text())["scale"]
    torch.testing.assert_close(b_dec, rows.mean(dim=0), atol=rounding(64, float(rows.abs().max())), rtol=0)
    torch.testing.assert_close(rows.norm(dim=1).mean(), torch.tensor(D_IN**0.5), atol=1e-3, rtol=0)
    assert scale != 1


def test_windows_scale_with_the_training(tmp_path, model, tokenizer, texts):
    def settings(**changed: int | None) -> dict[str, object]:
        config = replace(TINY, lr=None, dead_feature_window=None, **changed)
        out = tmp_path / str(config.n_tokens)
        train_sae(model, tokenizer, texts, LAYER, out, d_sae=D_SAE, k=6, config=config, progress=False)
        return json.loads((out / "training.json").read_text())["settings"]

    for n_steps in (25, 50):
        recorded = settings(n_tokens=64 * n_steps)
        assert recorded["dead_feature_window"] == n_steps // 10
        assert recorded["lr"] == 5e-3


@pytest.mark.parametrize(
    ("n_steps", "d_sae", "new", "lr"),
    [
        (12_000, 16_384, True, 3e-4),
        (12_000, 4096, True, 6e-4),
        (750, 4096, True, 1.2e-3),
        (750, 4096, False, 6e-4),
        (30, 4096, True, 5e-3),
    ],
)
def test_learning_rate_by_default(n_steps, d_sae, new, lr):
    config = SAETrainingConfig(n_tokens=4096 * n_steps)
    assert config.resolved(d_sae, new=new).lr == pytest.approx(lr)
    assert replace(config, lr=7.0).resolved(d_sae, new=new).lr == 7.0


def test_dead_is_counted_from_the_first_report_on(tmp_path, model, tokenizer, texts):
    """A window longer than the training once showed none, whatever the latents did."""
    config = replace(TINY, dead_feature_window=1000, lr=1e-6, n_tokens=640)
    train_sae(model, tokenizer, texts, LAYER, tmp_path / "sae", d_sae=2048, k=1, config=config, progress=False)
    dead = [report["dead"] for report in json.loads((tmp_path / "sae" / "training.json").read_text())["history"]]
    # At most one latent per token is active.
    assert len(dead) == 10 and all(n >= 2048 - 64 * (i + 1) for i, n in enumerate(dead))
    assert dead == sorted(dead, reverse=True)


def test_a_run_on_conversations_goes_on_after_midnight(tmp_path, monkeypatch, model):
    tokenizer, file = word_tokenizer(), lines(tmp_path / "t.jsonl", MESSAGES)
    tokenizer.chat_template = "{{ 'sun ' if strftime_now('%d') == '20' else 'rain snow ' }}" + TEMPLATE

    def run(out: Path, now: str) -> torch.Tensor:
        set_clock(monkeypatch, now)
        options = {"d_sae": D_SAE, "k": 6, "config": TINY, "progress": False}
        return train_sae(model, tokenizer, file, LAYER, out, **options).W_enc

    wanted = run(tmp_path / "whole", "2026-11-20T09:00")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 7)
        run(tmp_path / "stopped", "2026-11-20T23:59")
    assert torch.equal(run(tmp_path / "stopped", "2026-11-21T00:01"), wanted)
    records = [json.loads((tmp_path / name / "training.json").read_text()) for name in ("whole", "stopped")]
    assert records[0] == records[1] and records[0]["settings"]["template_date"] == "2026-11-20"
    assert not torch.equal(run(tmp_path / "later", "2026-11-21T00:01"), wanted)


def documents_read(monkeypatch, model) -> list[int]:
    """List that gets the number of documents of every forward pass from now on, by their BOS tokens."""
    forward, read = type(model.model).forward, []

    def counted(self, input_ids, **kwargs):
        read.append(int((input_ids == 1).sum()))
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(type(model.model), "forward", counted)
    return read


@pytest.mark.parametrize("kind", ["train", "finetune"])
def test_nothing_is_read_twice(tmp_path, monkeypatch, model, tokenizer, texts, start, kind):
    """A training reads the held-out text and its one block, and when it is resumed the same once more."""
    config = replace(TINY, n_tokens=256, checkpoint_every=2, max_norm_ratio=0)
    read = documents_read(monkeypatch, model)

    def run() -> None:
        if kind == "train":
            train_sae(model, tokenizer, texts, LAYER, tmp_path / kind, d_sae=D_SAE, k=6, config=config, progress=False)
        else:
            finetune_sae(model, tokenizer, texts, start, tmp_path / kind, config=config, progress=False)

    # Documents until these numbers of tokens without BOS are reached.
    ends = torch.tensor([len(sentence(n).split()) for n in range(60)]).cumsum(0)
    n_held_out = int((ends < 200).sum()) + 1
    n_documents = int((ends - ends[n_held_out - 1] < 256).sum()) + 1
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 3)
        run()
    assert sum(read) == n_documents < 60
    read.clear()
    run()
    assert sum(read) == n_documents


def test_bars_move_with_the_tokens_read(tmp_path, monkeypatch, capsys, model, tokenizer, texts):
    from dspa.saes import activations, fitting

    bars = []

    class Bar(tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.moves = []
            bars.append(self)

        def update(self, n=1):
            self.moves.append(n)
            return super().update(n)

    for module in (activations, fitting):
        monkeypatch.setattr(module, "tqdm", Bar)

    def run(progress: bool) -> None:
        train_sae(
            *(model, tokenizer, texts, LAYER, tmp_path / f"sae-{progress}"),
            d_sae=D_SAE,
            k=6,
            config=TINY,
            progress=progress,
        )

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 6)
        run(True)
    names = [bar.desc.rstrip(": ") for bar in bars]
    assert names[:3] == ["reading held-out text", "train", "filling shuffle buffer"]
    for bar in (bars[0], bars[2]):
        assert len(bar.moves) > 1 and sum(bar.moves) == bar.total > 200
    shown = capsys.readouterr().err
    assert shown.index("reading held-out text:   0%") < shown.index("filling shuffle buffer:   0%")
    bars.clear()
    run(True)
    names = [bar.desc.rstrip(": ") for bar in bars]
    assert names[:3] == ["reading held-out text", "train", "filling shuffle buffer"] and bars[1].initial == 256
    capsys.readouterr()
    run(False)
    assert not capsys.readouterr().err


@pytest.fixture
def stopped(tmp_path, monkeypatch, model, tokenizer, texts):
    """A folder with a checkpoint, and the function that continues its training."""

    def run(**changed):
        given = {"layer": LAYER, "d_sae": D_SAE, "k": 6, "config": TINY, "texts": texts} | changed
        return train_sae(model, tokenizer, out=tmp_path / "sae", progress=False, **given)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 5)
        run()
    return tmp_path / "sae", run


def test_other_settings_are_refused(stopped, tmp_path):
    _, run = stopped
    other = lines(tmp_path / "other.txt", [sentence(n) for n in range(61)])
    for changed, message in (
        ({"layer": 1}, "layer: 2 there, 1 now"),
        ({"d_sae": 64}, "d_sae: 96 there, 64 now"),
        ({"k": 7}, "k: 6 there, 7 now"),
        ({"texts": other}, "data: "),
        ({"config": replace(TINY, seed=4, lr=1e-3)}, "lr: 0.003 there, 0.001 now; seed: 3 there, 4 now"),
    ):
        with pytest.raises(TrainingError, match=message):
            run(**changed)


def test_damaged_checkpoints(stopped, tmp_path):
    folder, run = stopped
    state = next(folder.glob("checkpoint-*")) / "trainer_state.pt"

    class Harm:
        def __reduce__(self):
            return Path.touch, (tmp_path / "harm",)

    for content in (pickle.dumps(Harm()), b"nothing"):
        state.write_bytes(content)
        with pytest.raises(TrainingError, match=r"checkpoint-000000004 is damaged.*Delete it"):
            run()
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position": {"block": -1}}, "`position.block` is -1; accepted: a whole number >= 0"),
        ({"position": {"block": 0, "entry": 2.5}}, "`position.entry` is 2.5"),
        ({"position": 3}, "`position` is 3"),
        ({"history": [{"loss": None}]}, "`history.0.loss.*` is None; accepted: a number"),
        ({"more": 1}, "`more` is not known"),
        ({"history": []}, "stream.json was changed after it was written"),
        ({"position": {"block": 1}}, "stream.json was changed after it was written"),
        ("[1", "is not JSON"),
    ],
)
def test_damaged_places_in_the_stream(stopped, change, message):
    folder, run = stopped
    stream = next(folder.glob("checkpoint-*")) / "stream.json"
    stream.write_text(change if isinstance(change, str) else json.dumps(json.loads(stream.read_text()) | change))
    with pytest.raises(TrainingError, match=rf"checkpoint-000000004 is damaged \(.*{message}.*Delete it"):
        run()


def test_a_checkpoint_of_another_step(stopped):
    """A trainer past its last step would not end."""
    folder, run = stopped
    (checkpoint,) = folder.glob("checkpoint-*")
    state = torch.load(checkpoint / "trainer_state.pt")
    for step, accepted in ((3, "4, as in its name"), (10**9, "1 to "), (True, "1 to "), (-1, "1 to ")):
        torch.save(state | {"n_training_steps": step}, checkpoint / "trainer_state.pt")
        with pytest.raises(TrainingError, match=rf"damaged \(the step is {step}; accepted: {accepted}.*Delete it"):
            run()


def test_a_checkpoint_with_nan(stopped):
    folder, run = stopped
    file = next(folder.glob("checkpoint-*")) / "sae.safetensors"
    tensors = load_file(file)
    tensors["W_enc"][1, 2] = math.nan
    save_file(tensors, file)
    with pytest.raises(TrainingError, match=r"damaged \(`W_enc` is partly NaN or infinite; .*Delete it"):
        run()


def be_killed(folder):
    """End at once in a folder that this process holds, and writes to."""
    contexts = [held(folder, "x", ValueError), workspace(folder)]
    for context in contexts:
        context.__enter__()
    os._exit(9)


def test_a_finished_training_is_not_repeated(stopped, tmp_path, monkeypatch):
    """Also after a kill between its last file and the removal of its checkpoints, a workspace and its lock."""
    folder, run = stopped
    shutil.copytree(next(folder.glob("checkpoint-*")), tmp_path / "left" / "checkpoint-000000004")
    sae = run()
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    shutil.copytree(tmp_path / "left", folder, dirs_exist_ok=True)
    with monkeypatch.context() as patch:
        process = multiprocessing.get_context("fork").Process(target=be_killed, args=(folder,))
        process.start(), process.join()
        assert len(list(folder.iterdir())) == len(files) + 3
        patch.setattr(Activations, "rows", lambda *_: pytest.fail("The model was read."))
        again = run()
    assert again.fingerprint == sae.fingerprint
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    with pytest.raises(TrainingError, match=r"training of other settings .*lr: 0\.003 there, 0\.001 now"):
        run(config=replace(TINY, lr=1e-3))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


def test_folders(stopped, tmp_path):
    folder, run = stopped
    run()
    (folder / "training.json").write_text("[]")
    with pytest.raises(TrainingError, match=r"training\.json is not what a training wrote"):
        run()
    (folder / "training.json").unlink()
    with pytest.raises(TrainingError, match=r"holds \['cfg\.json', 'sae_weights\.safetensors'\]"):
        run()


def test_refusals(tmp_path, monkeypatch, model, tokenizer, texts, start):
    def train(layer=LAYER, k=6.0, out=tmp_path / "sae", model=model):
        train_sae(model, tokenizer, texts, layer, out, d_sae=D_SAE, k=k, config=TINY, progress=False)

    def finetune(sae, **kwargs):
        finetune_sae(model, tokenizer, texts, sae, tmp_path / "sae", config=TINY, progress=False, **kwargs)

    training, overflowing = make_model("gemma2").train(), make_model("gemma2")
    overflowing.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.inf
    sae = make_sae(LAYER, D_SAE)
    silent = FrozenSAE(
        "jumprelu", sae.W_enc, sae.b_enc, sae.W_dec, threshold=torch.full((D_SAE,), torch.inf), layer=LAYER
    )
    for call, error, message in (
        (lambda: train(layer=4), ModelError, "`layer` is 4; accepted: 0 to 3"),
        (lambda: train(k=97), TrainingError, "`k` is 97; accepted: 1 to d_sae = 96"),
        (lambda: train(out=tmp_path / "no" / "sae"), TrainingError, "The output folder is"),
        (lambda: train(model=training), ModelError, "training mode"),
        (lambda: finetune(make_sae(LAYER, D_SAE, d_in=40)), ModelError, "`sae` reads 40 dimensions"),
        (lambda: finetune(make_sae(9, D_SAE)), ModelError, "`layer` is 9"),
        (lambda: finetune(make_sae(None, D_SAE)), ModelError, "does not say its layer"),
        (
            lambda: finetune(make_sae(LAYER, D_SAE, model_name="a"), model_name="b"),
            ModelError,
            "`sae` was made for 'a'",
        ),
        (lambda: SAETrainingConfig(n_tokens=4095), ValueError, r"`n_tokens` is 4095; accepted: one batch \(4096\)"),
        (lambda: SAETrainingConfig(lr=0), ValueError, "`lr` is 0"),
        (lambda: SAETrainingConfig(seed=-1), ValueError, "`seed` is -1"),
    ):
        with pytest.raises(error, match=message):
            call()
        assert not (tmp_path / "sae").exists()
    with pytest.raises(ModelError, match=r"layer 2 are NaN or infinite.*fp16 overflows"):
        train(model=overflowing, out=tmp_path / "overflow")
    with pytest.raises(TrainingError, match=r"`k` is 0\.0.*is it the SAE of this layer"):
        finetune(silent)
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(RuntimeError, match="Training an SAE needs the package sae-lens"):
        train()


# The demo's model


def test_finetuning_beats_its_start(tmp_path):
    """Fine-tuning improves an SAE on held-out tokens of the demo's preferences, with no more active latents.

    The SAEs are the shipped one, and one trained too briefly, which fine-tuning has to improve much more.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(ASSETS / "dspa-demo", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "dspa-demo")
    shipped = FrozenSAE.load(ASSETS / "sae_out")
    short = SAETrainingConfig(n_tokens=40_000, batch_size=1024, lr=1e-3, held_out_tokens=4000, buffer_tokens=20_000)
    longer = replace(short, n_tokens=60_000, batch_size=512, lr=2e-3, seed=1)
    texts = ASSETS / "preferences.jsonl"
    small = train_sae(model, tokenizer, texts, 4, tmp_path / "small", d_sae=128, k=8, config=short, progress=False)
    for start, left in ((shipped, 0.97), (small, 0.3)):
        out = tmp_path / f"tuned-{start.d_sae}"
        tuned = finetune_sae(model, tokenizer, texts, start, out, config=longer, progress=False)
        held_out, _ = Activations(
            model, tokenizer, TextFile(texts), [4], max_length=128, exclude_special_tokens=True, batch_tokens=4096
        ).held_out(short.held_out_tokens)
        before, after = evaluate_sae(start, held_out[4]), evaluate_sae(tuned, held_out[4])
        assert 1 - after.explained_variance < left * (1 - before.explained_variance)
        assert after.l0 <= before.l0 * 1.01


# The command line


def shows_what_was_recorded(dspa, folder: Path, quality) -> None:
    """`dspa sae show` on a trained SAE, on one without the training's folder, and on one of an earlier version."""
    figures = f"explained variance │ {quality.explained_variance:.4f} │", f"L0 │ {quality.l0:.2f} │", "dead latents │"
    left_out = "training tokens left out for their norm │ 0 │"

    def shown(path: Path) -> str:
        code, text = dspa("show", path)
        assert code == 0
        return " ".join(text.split())

    for path in (folder, folder / "sae_weights.safetensors"):
        assert all(figure in shown(path) for figure in (*figures, left_out))
    alone = folder.with_name("alone")
    shutil.copytree(folder, alone)
    (alone / "training.json").write_text('{"lr": 1}')
    text = shown(alone)
    assert all(figure in text for figure in figures) and left_out not in text
    # An earlier version recorded the explained variance in training.json alone, and left nothing out.
    record, cfg = json.loads((folder / "training.json").read_text()), json.loads((alone / "cfg.json").read_text())
    del record["n_left_out"], record["after"]["n_left_out"], cfg["metadata"]["explained_variance"]
    (alone / "cfg.json").write_text(json.dumps(cfg))
    (alone / "training.json").write_text(json.dumps(record))
    text = shown(alone)
    assert all(figure in text for figure in figures) and left_out not in text
    (alone / "training.json").unlink()
    text = shown(alone)
    assert figures[0] not in text and "explained" not in text and figures[1] in text
    FrozenSAE.load(folder).save(alone / "saved")
    assert "L0" not in shown(alone / "saved")


def test_commands(tmp_path, monkeypatch, capsys, model, tokenizer, texts):
    model.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")

    def dspa(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["dspa", "sae", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), " ".join((captured.out + captured.err).split())

    shared = ["--model", tmp_path / "tiny", "--device", "cpu", "--tokens", 640, "--batch-size", 64, "--held-out", 200]
    train = ["train", texts, *shared, "--layer", LAYER, "--d-sae", 64, "--k", 4]
    code, text = dspa(*train, "--out", tmp_path / "sae", "--special-tokens")
    assert code == 0 and "explained variance" in text and "dead latents" in text
    warned = "Warning: A latent was active on 40 tokens of the training on average (accepted: from 1000)."
    advice = "Train on more tokens, or lower --d-sae."
    assert f"{warned} {advice}" in text and warned in dspa("show", tmp_path / "sae")[1]
    settings = json.loads((tmp_path / "sae" / "training.json").read_text())["settings"]
    assert settings["n_tokens"] == 640 and not settings["exclude_special_tokens"]
    assert settings["model_name"] == "./tiny" and FrozenSAE.load(tmp_path / "sae").model_name is None
    shows_what_was_recorded(dspa, tmp_path / "sae", read_qualities(tmp_path / "sae")["after"])
    several = ["train", texts, *shared, "--layer", LAYER, "--layer", 0, "--k", 4, "--out", tmp_path / "both"]
    code, text = dspa(*several, "--d-sae", 64, "--d-sae", 32)
    assert code == 0 and "both/layer_2." in text.replace(" ", "") and "both/layer_0." in text.replace(" ", "")
    assert [FrozenSAE.load(tmp_path / "both" / f"layer_{n}").d_sae for n in (LAYER, 0)] == [64, 32]
    finetune = ["finetune", texts, *shared, "--sae", tmp_path / "sae"]
    code, text = dspa(*finetune, "--out", tmp_path / "tuned")
    assert code == 0 and "before" in text and FrozenSAE.load(tmp_path / "tuned").layer == LAYER
    again = dspa(*train, "--out", tmp_path / "sae", "--special-tokens")
    assert again[0] == 0 and "This training was finished before, in" in again[1]
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    for arguments, message in (
        ((*train, "--out", tmp_path / "tuned"), "holds a training of other settings"),
        ((*train, "--out", tmp_path / "no" / "sae"), "The output folder is"),
        ((*finetune, "--out", texts), "The output folder is"),
        (("train", tmp_path / "bad.jsonl", *train[2:], "--out", tmp_path / "new"), "bad.jsonl line 2 is not JSON"),
        ((*several, "--d-sae", 64), "holds a training of other settings (d_sae: 32 there, 64 now)"),
        ((*several[:-1], tmp_path / "new", *["--d-sae", 64] * 3), "--d-sae is 3 values; accepted: one, or one per"),
        (
            (*train, "--layer", LAYER, "--out", tmp_path / "new"),
            "--layer is [2, 2]; accepted: one or more layers, each",
        ),
        ((*train, "--out", tmp_path / "new", "--tokens", 63), "--tokens is 63; accepted: one batch (64) or more"),
    ):
        code, text = dspa(*arguments)
        assert code == 2 and "Error:" in text and message in text
