"""Tokens of outlying norm: which are left out of training and figures, against plain passes over whole documents."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import processors

from dspa.data.texts import TextFile
from dspa.errors import TrainingError
from dspa.saes.activations import Activations, Position
from dspa.saes.config import SAETrainingConfig
from dspa.saes.outliers import typical_rows
from dspa.saes.quality import evaluate_sae, weaknesses
from dspa.saes.records import read_figures
from dspa.saes.training import finetune_sae, read_qualities, train_sae
from dspa.testing import D_IN, ENGLISH, make_model, make_sae, word_tokenizer

from ...rounding import PASS, rounding
from ..support.saes import Stopped, stop_after

pytest.importorskip("sae_lens")

LAYER, D_SAE, N_TEXTS, N_HELD_OUT = 2, 96, 60, 6
SINK, *WORDS = ENGLISH
TINY = SAETrainingConfig(
    n_tokens=1600, batch_size=64, lr=3e-3, held_out_tokens=60, buffer_tokens=300, batch_tokens=256, checkpoint_every=4
)


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer that puts no BOS token in front of a text."""
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    assert tokenizer(SINK)["input_ids"] == [3]
    return tokenizer


@pytest.fixture(scope="module")
def model():
    """A model in which one word, the first of every text and never another, has a norm a hundred times the others'."""
    model = make_model("qwen3")
    model.get_input_embeddings().weight.data[3] *= 1000
    return model


@pytest.fixture(scope="module")
def documents() -> list[str]:
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(6, 20, (N_TEXTS,), generator=g).tolist()
    return [" ".join([SINK, *(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=g))]) for n in lengths]


@pytest.fixture(scope="module")
def texts(tmp_path_factory, documents) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n".join(documents))
    return path


@pytest.fixture(scope="module")
def residuals(model, tokenizer, documents) -> list[np.ndarray]:
    """Residuals of each document, each from a pass of its own."""
    with torch.no_grad():
        passes = [model(torch.tensor([tokenizer(d)["input_ids"]]), output_hidden_states=True) for d in documents]
    return [output.hidden_states[LAYER + 1][0].double().numpy() for output in passes]


def stream(model, tokenizer, path, **settings) -> Activations:
    given = {"max_length": 128, "exclude_special_tokens": True, "batch_tokens": 256, "max_norm_ratio": 10.0} | settings
    return Activations(model, tokenizer, TextFile(path), [LAYER], **given)


def kept(rows: np.ndarray, ratio: float = 10.0) -> np.ndarray:
    norms = np.sqrt((rows**2).sum(axis=1))
    return rows[norms <= ratio * np.median(norms)]


def sorted_rows(rows: np.ndarray) -> np.ndarray:
    return rows[np.argsort(rows[:, 0])]


def norms(*values: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows of these norms."""
    return torch.tensor(values, dtype=dtype)[:, None] * torch.tensor([0.6, -0.8], dtype=dtype)


@pytest.mark.parametrize(
    ("values", "ratio", "wanted"),
    [
        ((1.0, 2.0, 3.0, 19.9, 20.1), 10.0, (1, 1, 1, 1, 1)),
        ((1.0, 2.0, 2.0, 19.9, 20.1), 10.0, (1, 1, 1, 1, 0)),
        ((1.0, 2.0, 2.0, 19.9, 20.1), 0.0, (1, 1, 1, 1, 1)),
        ((1.0, 2.0, 2.0, 3.0, 4.0), 1.0, (1, 1, 1, 0, 0)),
        # Never more than half, however far apart.
        ((1.0, 1e4, 1e4), 10.0, (1, 1, 1)),
        ((7.0,), 1.0, (1,)),
        ((), 10.0, ()),
        # A median of 0 says nothing about the others.
        ((0.0, 0.0, 0.0, 5.0), 10.0, (1, 1, 1, 1)),
    ],
)
def test_typical_rows(values, ratio, wanted):
    assert typical_rows(norms(*values), ratio).tolist() == [bool(w) for w in wanted]


def test_norms_do_not_overflow():
    """A sum of squares beyond fp16, and one beyond fp32."""
    rows = norms(300.0, 300.0, 300.0, 60000.0, dtype=torch.float16)
    assert typical_rows(rows, 10.0).tolist() == [True, True, True, False]
    assert typical_rows(norms(1e3, 1e3, 1e25), 10.0).tolist() == [True, True, False]
    assert typical_rows(norms(1e25, 1e25, 1e26), 10.0).all()


def test_the_first_tokens_are_outliers(residuals):
    """So that the other tests test something."""
    for document in residuals:
        size = np.linalg.norm(document, axis=1)
        assert size[0] > 30 * size[1:].max()


def test_batches_hold_the_other_tokens(model, tokenizer, texts, residuals):
    activations = stream(model, tokenizer, texts)
    block = np.concatenate(residuals[N_HELD_OUT:])
    wanted = kept(block)
    assert len(block) - len(wanted) == N_TEXTS - N_HELD_OUT
    batches = activations.batches(N_HELD_OUT, 1, len(block), seed=0)
    _, places, rows = zip(*(next(batches) for _ in range(len(wanted))), strict=True)
    assert places[-1] == Position(0, N_HELD_OUT, len(wanted), N_TEXTS - N_HELD_OUT)
    got = torch.cat(rows).double().numpy()
    np.testing.assert_allclose(sorted_rows(got), sorted_rows(wanted), atol=rounding(PASS, abs(wanted).max()), rtol=0)
    everything = stream(model, tokenizer, texts, max_norm_ratio=0).batches(N_HELD_OUT, 1, len(block), seed=0)
    assert len(kept(torch.cat([next(everything)[2] for _ in range(len(block))]).double().numpy())) == len(wanted)


def test_a_place_counts_what_was_left_out_before_it(model, tokenizer, texts):
    activations = stream(model, tokenizer, texts)

    def batches(start: Position | None):
        return ((place, rows) for _, place, rows in activations.batches(N_HELD_OUT, 16, 100, 0, {LAYER: start}))

    whole = batches(None)
    seen = [next(whole) for _ in range(60)]
    assert seen[-1][0].block > 5 and seen[-1][0].n_left_out > 40
    for stop in (0, 1, 4, 5, 6, 30):
        rest = batches(seen[stop][0])
        for place, rows in seen[stop + 1 : stop + 8]:
            next_place, next_rows = next(rest)
            assert next_place == place and torch.equal(next_rows, rows)


def test_a_block_of_one_batch_gives_a_batch(model, tokenizer, texts):
    """Without what is left out of it, a block must still be a batch, or the stream would read for ever."""
    batches = stream(model, tokenizer, texts).batches(N_HELD_OUT, 64, 64, seed=0)
    blocks = [next(batches)[1].block for _ in range(20)]
    assert set(blocks) == set(range(blocks[-1] + 1)) and blocks[-1] > 8


def explained_variance(folder: Path, rows: np.ndarray) -> float:
    """SAELens' reconstruction of `rows`, in the formula of the paper."""
    from sae_lens import SAE

    sae = SAE.load_from_disk(folder)
    with torch.no_grad():
        rebuilt = sae.decode(sae.encode(torch.tensor(rows, dtype=torch.float32))).double().numpy()
    return 1 - ((rows - rebuilt) ** 2).sum() / ((rows - rows.mean(axis=0)) ** 2).sum()


@pytest.mark.parametrize("kind", ["train", "finetune"])
def test_figures_are_those_of_the_other_tokens(tmp_path, model, tokenizer, texts, residuals, kind):
    def run(out: Path, **settings: float) -> None:
        config = replace(TINY, **settings)
        if kind == "train":
            train_sae(model, tokenizer, texts, LAYER, out, d_sae=D_SAE, k=6, config=config, progress=False)
        else:
            finetune_sae(model, tokenizer, texts, make_sae(LAYER, D_SAE), out, k=6, config=config, progress=False)

    run(tmp_path / "typical")
    run(tmp_path / "all", max_norm_ratio=0)
    n_held_out = int(np.argmax(np.cumsum([len(document) for document in residuals]) >= TINY.held_out_tokens)) + 1
    held_out = np.concatenate(residuals[:n_held_out])
    typical = kept(held_out)
    for out in ("typical", "all"):
        quality = read_qualities(tmp_path / out)["after"]
        assert quality.n_tokens == len(typical) and quality.n_left_out == len(held_out) - len(typical)
        assert quality.explained_variance == pytest.approx(explained_variance(tmp_path / out, typical), abs=1e-4)
        assert quality.explained_variance_all == pytest.approx(explained_variance(tmp_path / out, held_out), abs=1e-4)
        metadata = json.loads((tmp_path / out / "cfg.json").read_text())["metadata"]
        assert metadata["explained_variance"] == quality.explained_variance
    # A file is read over and over: one token is left out of every text.
    records = {name: json.loads((tmp_path / name / "training.json").read_text()) for name in ("typical", "all")}
    per_text = np.mean([len(document) - 1 for document in residuals])
    assert records["typical"]["n_left_out"] == pytest.approx(TINY.n_tokens / per_text, rel=0.3)
    assert records["all"]["n_left_out"] == 0
    # An SAE that was trained on outliers explains these, and nothing else.
    ruled = read_figures(tmp_path / "all")
    assert ruled["explained_variance_all"] > 0.9 and ruled["explained_variance"] < 0.5
    assert any("Outlying tokens rule" in text for text in weaknesses(ruled))
    assert not any("Outlying tokens rule" in text for text in weaknesses(read_figures(tmp_path / "typical")))


def test_figures_of_given_rows():
    g = torch.Generator().manual_seed(0)
    rows = torch.cat((torch.randn(101, D_IN, generator=g), 1000 + torch.randn(3, D_IN, generator=g)))
    sae = make_sae(LAYER, D_SAE)
    quality = evaluate_sae(sae, rows)
    assert (quality.n_tokens, quality.n_left_out) == (101, 3)
    typical, everything = evaluate_sae(sae, rows[:101], max_norm_ratio=0), evaluate_sae(sae, rows, max_norm_ratio=0)
    for name in ("explained_variance", "l0", "dead", "mse", "top_variance"):
        assert getattr(quality, name) == pytest.approx(getattr(typical, name), rel=1e-6)
    assert everything.n_tokens == 104 and everything.explained_variance == quality.explained_variance_all
    assert typical.explained_variance_all == typical.explained_variance


def test_a_stopped_run_leaves_the_same_tokens_out(tmp_path, monkeypatch, model, tokenizer, texts):
    def run(out: str) -> dict[str, object]:
        sae = train_sae(model, tokenizer, texts, LAYER, tmp_path / out, d_sae=D_SAE, k=6, config=TINY, progress=False)
        return json.loads((tmp_path / out / "training.json").read_text()) | {"sae": sae.fingerprint}

    wanted = run("whole")
    assert wanted["n_left_out"] > 100
    for steps in (6, 7):
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            stop_after(patch, steps)
            run("stopped")
    assert run("stopped") == wanted


def test_a_folder_that_records_no_ratio_kept_all(tmp_path, monkeypatch, model, tokenizer, texts):
    def run(out: str, ratio: float) -> str:
        config = replace(TINY, max_norm_ratio=ratio)
        return train_sae(
            model, tokenizer, texts, LAYER, tmp_path / out, d_sae=D_SAE, k=6, config=config, progress=False
        ).fingerprint

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 6)
        run("old", 0)
    record, checkpoint = tmp_path / "old" / "training.json", next((tmp_path / "old").glob("checkpoint-*"))
    content, place = json.loads(record.read_text()), json.loads((checkpoint / "stream.json").read_text())
    content["settings"].pop("max_norm_ratio")
    del place["position"]["n_left_out"], place["seal"]
    record.write_text(json.dumps(content))
    (checkpoint / "stream.json").write_text(json.dumps(place))
    with pytest.raises(TrainingError, match=r"max_norm_ratio: 0\.0 there, 10\.0 now"):
        run("old", 10.0)
    assert run("old", 0) == run("new", 0)


@pytest.mark.parametrize("ratio", [0.5, -1.0, float("inf"), float("nan")])
def test_a_ratio_out_of_range(ratio):
    with pytest.raises(ValueError, match=r"`max_norm_ratio` is .*accepted: a finite number >= 1, or 0"):
        SAETrainingConfig(max_norm_ratio=ratio)
