"""`dspa.densities.collect` against separate full forward passes and the formulas of SPEC.md, section 1."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dspa import FrozenSAE, ModelError, PreferenceError, Triple, densities
from dspa.densities import COUNTED, FORMAT, PARTS, ROW_QUANTUM, Counts, Densities, collect
from dspa.errors import MapError

from .conftest import D_IN, D_SAE_IN, D_SAE_OUT, L_IN, L_OUT, VOCAB, make_model, make_sae

BOS, EOS = 1, 2
# No pre-activation may be nearer to its threshold, so that rounding cannot decide a count.
MARGIN = 1e-4
# Data that keep it.
SEED = 6
Ids = tuple[list[int], list[int], list[int]]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Words w3, w4, ... of these ids; `<s>` before a text."""
    words = {"<unk>": 0, "<s>": BOS, "</s>": EOS} | {f"w{i}": i for i in range(3, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def make_ids(seed: int) -> list[Ids]:
    """Prompts that begin with `<s>` and responses, of 2 to 9 and 1 to 8 tokens; one response is `</s>` alone."""
    draw = random.Random(seed)

    def words(n: int) -> list[int]:
        return [draw.randrange(3, VOCAB) for _ in range(n)]

    ids = [([BOS, *words(1 + i)], words(1 + (3 * i) % 8), [*words((5 * i) % 8), EOS]) for i in range(8)]
    draw.shuffle(ids)
    return ids


def as_triples(ids: list[Ids]) -> list[Triple]:
    names = {EOS: "</s>"}
    texts = ([" ".join(names.get(i, f"w{i}") for i in part) for part in (p[1:], *answers)] for p, *answers in ids)
    return [Triple(*each) for each in texts]


@dataclass
class Case:
    model: PreTrainedModel
    sae_in: FrozenSAE
    sae_out: FrozenSAE
    tokenizer: PreTrainedTokenizerFast
    ids: list[Ids]

    def collect(self, ids: list[Ids] | None = None, **options: Any) -> Densities:
        triples = options.pop("triples", None) or as_triples(ids or self.ids)
        options = {"sae_in": self.sae_in, "sae_out": self.sae_out, "progress": False} | options
        return collect(self.model, self.tokenizer, triples, **options)


def make_case(family: str) -> Case:
    return Case(
        make_model(family),
        make_sae(L_IN, D_SAE_IN, seed=1),
        make_sae(L_OUT, D_SAE_OUT, seed=2),
        make_tokenizer(),
        make_ids(SEED),
    )


@pytest.fixture(scope="module", params=["gemma2", "qwen3", "gpt2"])
def each(request: pytest.FixtureRequest) -> Case:
    return make_case(request.param)


@pytest.fixture
def case() -> Case:
    """One that a test may break."""
    return make_case("qwen3")


def active(model: PreTrainedModel, sae: FrozenSAE, ids: list[int], start: int = 0) -> Tensor:
    """Active latents [T - start, d_sae] on `ids` from `start` on, from one full forward pass."""
    out = model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False)
    h = out.hidden_states[sae.layer + 1][0, start:]
    pre = h.double() @ sae.W_enc.double() + sae.b_enc.double()
    assert (pre - sae.threshold).abs().min() > MARGIN
    return (pre > sae.threshold) & (pre > 0)


@torch.no_grad()
def plain(case: Case, ids: list[Ids], count_tokens: str = "all") -> dict[str, tuple[Tensor, Tensor]]:
    """Counts [N, width] and lengths [N] of each part, triple by triple."""
    found: dict[str, list[tuple[Tensor, int]]] = {part: [] for part in PARTS}
    for prompt, *answers in ids:
        passes = [(prompt, active(case.model, case.sae_in, prompt))]
        passes += [(a, active(case.model, case.sae_out, prompt + a, len(prompt))) for a in answers]
        for part, (tokens, on) in zip(PARTS, passes, strict=True):
            counted = [n for n, i in enumerate(tokens) if count_tokens == "all" or i not in (0, BOS, EOS)]
            found[part].append((on[counted].sum(dim=0), len(counted)))
    return {
        part: (torch.stack([c for c, _ in rows]), torch.tensor([n for _, n in rows])) for part, rows in found.items()
    }


def dense(counts: Counts, width: int) -> Tensor:
    out = torch.zeros(len(counts.lengths), width, dtype=torch.int64)
    for n in range(len(out)):
        latents, values, _ = counts.row(n)
        out[n, latents.long()] = values.long()
    return out


def check_plain(case: Case, got: Densities, ids: list[Ids], count_tokens: str = "all") -> None:
    for part, (counts, lengths) in plain(case, ids, count_tokens).items():
        mine: Counts = getattr(got, part)
        assert torch.equal(mine.lengths, lengths)
        assert torch.equal(dense(mine, counts.shape[1]), counts)
        # Something to get wrong: latents active on some tokens, all, and none.
        assert (counts == 0).any() and ((counts > 0) & (counts < lengths[:, None])).any()


def parts(of: Densities) -> dict[str, Tensor]:
    return {f"{part}.{name}": t for part in COUNTED for name, t in vars(getattr(of, part)).items()}


def check_totals(one: Tensor, other: Tensor, lengths: Tensor) -> None:
    """Alike up to the rounding of hidden states, which depends on the batch."""
    assert one.dtype == other.dtype == torch.int64 and one.any()
    assert ((one - other).abs() <= lengths[:, None] * 1e-4 / ROW_QUANTUM).all()


def check_same(one: Densities, other: Densities, *, batched_alike: bool = True) -> None:
    assert one.settings == other.settings
    for (name, a), b in zip(parts(one).items(), parts(other).values(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name
    check_totals(one.totals, other.totals, one.maxima.lengths)
    assert not batched_alike or torch.equal(one.totals, other.totals)
    assert torch.equal(one.mean(), other.mean())


class Calls:
    """Counts the passes through `read_layers` and fails at the pass `fail_at`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_at: int | None = None) -> None:
        self.n, self.fail_at, self.real = 0, fail_at, densities.read_layers
        monkeypatch.setattr(densities, "read_layers", self)

    def __call__(self, *args: Any, **kwargs: Any) -> dict[int, Tensor]:
        if self.n == self.fail_at:
            raise KeyboardInterrupt
        self.n += 1
        return self.real(*args, **kwargs)


# What is counted


@pytest.mark.parametrize("count_tokens", ["all", "text"])
def test_counts_are_those_of_separate_full_passes(each: Case, count_tokens: str) -> None:
    got = each.collect(count_tokens=count_tokens)
    check_plain(each, got, each.ids, count_tokens)
    assert (got.rejected.lengths == 0).sum() == (count_tokens == "text")
    assert (got.settings.n_triples, got.settings.n_cut) == (len(each.ids), 0)
    assert (got.settings.layer_in, got.settings.layer_out) == (L_IN, L_OUT)


def test_densities_are_counts_over_lengths(each: Case) -> None:
    got = each.collect(count_tokens="text").rejected
    counts = dense(got, D_SAE_OUT).double()
    rho = got.densities(D_SAE_OUT)
    assert rho.dtype == torch.float64
    for n, length in enumerate(got.lengths.tolist()):
        assert torch.equal(rho[n], counts[n] / length if length else torch.zeros(D_SAE_OUT, dtype=torch.float64))


@pytest.mark.parametrize("batch_tokens", [1, 64, 8192])
def test_batch_size_changes_nothing(each: Case, batch_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = each.collect()
    calls = Calls(monkeypatch)
    check_same(each.collect(batch_tokens=batch_tokens), whole, batched_alike=False)
    n, longest = len(each.ids), max(len(p) + max(len(c), len(r)) for p, c, r in each.ids)
    assert {1: calls.n == n, 64: 64 // (2 * longest) < n and 1 < calls.n < n, 8192: calls.n == 1}[batch_tokens]


def test_order_of_triples_permutes_the_counts(each: Case) -> None:
    order = random.Random(1).sample(range(len(each.ids)), len(each.ids))
    one, other = each.collect(), each.collect([each.ids[i] for i in order])
    for part in COUNTED:
        for n, i in enumerate(order):
            a, b = getattr(other, part).row(n), getattr(one, part).row(i)
            assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[2] == b[2]
    check_totals(other.totals, one.totals[order], other.maxima.lengths)
    assert all(torch.equal(a, b) for a, b in zip(one.hot(), other.hot(), strict=True))
    assert torch.equal(one.mean(), other.mean())


def test_long_responses_are_cut_at_their_end(each: Case) -> None:
    room = 11
    cut = [(p, c[: room - len(p)], r[: room - len(p)]) for p, c, r in each.ids]
    n_cut = sum(
        len(a) > len(b) for whole, short in zip(each.ids, cut, strict=True) for a, b in zip(whole, short, strict=True)
    )
    assert 0 < n_cut < len(cut)
    got = each.collect(max_length=room)
    check_plain(each, got, cut)
    assert (got.settings.n_cut, got.settings.max_length) == (n_cut, room)


def test_nothing_above_the_output_layer_runs(each: Case) -> None:
    inner = each.model.base_model
    layers = inner.h if hasattr(inner, "h") else inner.layers
    norm = inner.ln_f if hasattr(inner, "ln_f") else inner.norm
    ran: list[str] = []
    watched = {"out": layers[L_OUT], "next": layers[L_OUT + 1], "norm": norm, "head": each.model.lm_head}
    handles = [m.register_forward_pre_hook(lambda *_, name=name: ran.append(name)) for name, m in watched.items()]
    each.collect()
    for handle in handles:
        handle.remove()
    assert ran == ["out"]


def test_hooks_are_gone_afterwards(case: Case) -> None:
    case.collect()
    assert not any(module._forward_hooks for module in case.model.modules())


# Maxima, and the mean of what the encoder reads


# Added to all thresholds, it leaves about half of the tokens without an active latent.
RAISED = {"gemma2": 6.0, "qwen3": 9.0, "gpt2": 3.2}


def make_kind(arch: str, family: str, **options: Any) -> FrozenSAE:
    """An output SAE like `make_sae`'s."""
    base = make_sae(L_OUT, D_SAE_OUT, seed=3)
    if arch == "jumprelu":
        options["threshold"] = base.threshold + RAISED[family]
    return FrozenSAE(arch, base.W_enc, base.b_enc, base.W_dec, layer=L_OUT, **options)


def reads(sae: FrozenSAE, h: Tensor) -> Tensor:
    """What the encoder reads of one token, in fp64."""
    h = h.double()
    if sae.weights.normalize == "layer_norm":
        h = h - h.mean()
        return h / (h.std() + 1e-5)
    return h


@torch.no_grad()
def plain_maxima(case: Case, sae: FrozenSAE, count_tokens: str, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """How often each latent holds a maximum [N, d_sae], tokens looked at [N], sums of what is read [N, d_in]."""
    held = torch.zeros(len(case.ids), sae.d_sae, dtype=torch.int64)
    n_tokens = torch.zeros(len(case.ids), dtype=torch.int64)
    sums = torch.zeros(len(case.ids), D_IN, dtype=torch.float64)
    for i, (prompt, *answers) in enumerate(case.ids):
        for answer in answers:
            out = case.model(input_ids=torch.tensor([prompt + answer]), output_hidden_states=True, use_cache=False)
            counted = [t for t, token in enumerate(answer) if count_tokens == "all" or token not in (0, BOS, EOS)]
            step = next(n for n in range(1, 100) if len(counted[::n]) <= most)
            for t in counted[::step]:
                x = reads(sae, out.hidden_states[L_OUT + 1][0, len(prompt) + t])
                pre = (x @ sae.W_enc.double() + sae.b_enc.double()).tolist()
                # A top-k SAE's largest latent is among the k.
                f = [p if p > max(0, u) else 0 for p, u in zip(pre, sae.threshold.tolist(), strict=True)]
                first, second = sorted(range(len(f)), key=lambda j: (-f[j], j))[:2]
                assert f[first] - f[second] > MARGIN or f[first] == 0
                held[i, first] += f[first] > 0
                n_tokens[i] += 1
                sums[i] += x
    return held, n_tokens, sums


KINDS: dict[str, Any] = {
    "jumprelu": {},
    "standard": {},
    "topk": {"k": 3},
    "standard, layer norm": {"normalize_activations": "layer_norm"},
}


@pytest.mark.parametrize("most", [2, 16])
@pytest.mark.parametrize("count_tokens", ["all", "text"])
@pytest.mark.parametrize("kind", KINDS)
def test_maxima_are_those_of_separate_full_passes(
    each: Case, kind: str, count_tokens: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(densities, "TOKENS_A_RESPONSE", most)
    sae = make_kind(kind.split(",")[0], each.model.config.model_type, **KINDS[kind])
    held, n_tokens, sums = plain_maxima(each, sae, count_tokens, most)
    got = each.collect(sae_out=sae, count_tokens=count_tokens)
    assert torch.equal(dense(got.maxima, D_SAE_OUT), held) and torch.equal(got.maxima.lengths, n_tokens)
    assert held.sum() > 0 and (held.sum() < n_tokens.sum()) == (kind == "jumprelu")
    torch.testing.assert_close(got.totals.double() * ROW_QUANTUM, sums, rtol=0, atol=1e-3)
    latents, counts = got.hot()
    times = held.sum(dim=0).tolist()
    wanted = sorted((j for j, n in enumerate(times) if n), key=lambda j: (-times[j], j))
    assert latents.tolist() == wanted and counts.tolist() == [times[j] for j in wanted]
    assert latents.dtype == torch.int32 and len(set(counts.tolist())) < len(counts), "ties are ordered"
    torch.testing.assert_close(got.mean().double(), sums.sum(dim=0) / n_tokens.sum(), rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("elements", [1, 5 * D_SAE_OUT, 1 << 24])
def test_blocks_change_nothing(case: Case, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = case.collect()
    monkeypatch.setattr(densities, "LATENTS_A_BLOCK", elements)
    check_same(case.collect(), whole)


def test_of_equal_latents_the_smaller_holds_the_maximum() -> None:
    """Latents 1 and 3 are equal and largest on a row of ones; none is active on a row of minus ones."""
    W_enc = torch.tensor([[1.0, 2.0, 1.0, 2.0]]).expand(4, 4).clone()
    sae = FrozenSAE("standard", W_enc, torch.zeros(4), torch.eye(4), layer=0)
    h = torch.ones(2, 3, 4)
    h[0, 1], h[1, 2] = -1, 2.5
    triples = torch.tensor([[0, 0, -1], [-1, 1, 1]])
    triple, held, units = densities._looked_at(h, sae, triples)
    assert triple.tolist() == [0, 0, 1, 1] and held.tolist() == [1, -1, 1, 1]
    assert torch.equal(units.double() * ROW_QUANTUM, torch.stack([h[0, 0], h[0, 1], h[1, 1], h[1, 2]]).double())


def test_residuals_without_measure() -> None:
    """Huge ones do not overflow the sums, and a row of zeros, which has no direction, adds nothing."""
    sae = make_sae(0, 8, d_in=4, normalize_activations="constant_norm_rescale")
    _, held, units = densities._looked_at(torch.zeros(1, 1, 4), sae, torch.zeros(1, 1))
    assert held.tolist() == [-1] and not units.any()
    h = torch.tensor([[[3e38, -3e38, 1.0, 0.0]]])
    _, _, units = densities._looked_at(h, make_sae(0, 8, d_in=4), torch.zeros(1, 1))
    assert (units * ROW_QUANTUM).tolist() == [[2.0**24, -(2.0**24), 1.0, 0.0]]


def test_no_token_looked_at() -> None:
    """As where all tokens of all responses are special."""
    empty = Counts.join([(torch.zeros(0, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), 0)])
    got = Densities(make_case("qwen3").collect().settings, *[empty] * 4, totals=torch.zeros(1, 5, dtype=torch.int64))
    assert not len(got.hot()[0]) and torch.equal(got.mean(), torch.zeros(5))


# Progress


def test_progress_shows_the_rate(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    case.collect(progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "8/8" in err and "triple/s" in err


def test_no_progress_prints_nothing(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    case.collect(progress=False)
    assert capfd.readouterr() == ("", "")


# Shards


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(densities, "TRIPLES_A_SHARD", 2)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*.safetensors"))


@pytest.mark.parametrize("fail_at", [0, 1, 2, 5, 7])
def test_a_stopped_run_goes_on(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_shards: None, fail_at: int
) -> None:
    whole = case.collect(batch_tokens=1)
    folder = tmp_path / "new" / "work"
    options = {"batch_tokens": 1, "work_dir": folder}
    with monkeypatch.context() as patch:
        Calls(patch, fail_at)
        with pytest.raises(KeyboardInterrupt):
            case.collect(**options)
    finished = fail_at - fail_at % 2
    assert len(shards(folder)) == finished // 2
    with monkeypatch.context() as patch:
        calls = Calls(patch)
        check_same(case.collect(**options), whole)
        assert calls.n == len(case.ids) - finished
        check_same(case.collect(**options), whole)
        assert calls.n == len(case.ids) - finished
    assert len(shards(folder)) == len(case.ids) // 2
    assert not list(folder.glob("*.partial"))


def test_a_shard_holds_what_is_lost_at_most(case: Case) -> None:
    """The usual map is of 250 triples: a shard is much less."""
    assert densities.TRIPLES_A_SHARD <= 50


def test_partial_files_are_not_read(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_shards: None
) -> None:
    whole, replace = case.collect(), densities.os.replace

    def fail(source: Path, target: Path) -> None:
        if "shard" in Path(target).name:
            raise OSError("no space")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(densities.os, "replace", fail)
        with pytest.raises(OSError, match="no space"):
            case.collect(work_dir=tmp_path, batch_tokens=1)
    (partial,) = tmp_path.glob("*.partial")
    partial.write_bytes(b"half a sha")
    check_same(case.collect(work_dir=tmp_path, batch_tokens=1), whole, batched_alike=False)


def test_settings_are_on_disk(case: Case, tmp_path: Path) -> None:
    got = case.collect(work_dir=tmp_path)
    assert json.loads((tmp_path / "settings.json").read_text()) == asdict(got.settings)
    assert got.settings.sae_in == case.sae_in.fingerprint


CHANGES = {
    "count_tokens": {"count_tokens": "text"},
    "max_length": {"max_length": 100},
    "sae_in": {"sae_in": make_sae(L_IN, D_SAE_IN, seed=9)},
    "sae_out": {"sae_out": make_sae(L_OUT, D_SAE_OUT, seed=9)},
    "layer_out": {"sae_out": make_sae(L_OUT + 1, D_SAE_OUT, seed=2)},
    "dtypes": {"sae_in": make_sae(L_IN, D_SAE_IN, seed=1).to(dtype=torch.bfloat16)},
    "model_name": {"model_name": "another"},
    "data": {"ids": make_ids(7)},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_folder_of_other_settings_is_refused(case: Case, tmp_path: Path, name: str) -> None:
    case.collect(work_dir=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(MapError, match=rf"{tmp_path} holds shards of other settings \({name}: ") as raised:
        case.collect(work_dir=tmp_path, **CHANGES[name])
    assert str(raised.value).count(" there, ") == 1
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_shards_of_an_earlier_format_are_refused(case: Case, tmp_path: Path) -> None:
    case.collect(work_dir=tmp_path)
    settings = json.loads((tmp_path / "settings.json").read_text())
    del settings["format"]
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(MapError, match=rf"other settings \(format: None there, '{FORMAT}' now\)"):
        case.collect(work_dir=tmp_path)


def cut_off(content: bytes) -> bytes:
    return content[:-5]


def flip_a_bit(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize("damage", [cut_off, flip_a_bit, lambda _: b""])
def test_a_damaged_shard_is_named_and_counted_again(
    case: Case, tmp_path: Path, small_shards: None, damage: Any
) -> None:
    options = {"work_dir": tmp_path, "batch_tokens": 1}
    whole = case.collect(**options)
    path = shards(tmp_path)[1]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(MapError, match=f"{path} is damaged.*Delete it"):
        case.collect(**options)
    path.unlink()
    check_same(case.collect(**options), whole)


@pytest.mark.parametrize("content", ["{", "[1]", ""])
def test_damaged_settings_are_named(case: Case, tmp_path: Path, content: str) -> None:
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(MapError, match=f"{tmp_path / 'settings.json'} is not what collect wrote"):
        case.collect(work_dir=tmp_path)


# Bad input


@pytest.mark.parametrize("layer", [L_IN, L_OUT])
def test_hidden_states_that_are_not_finite(case: Case, layer: int) -> None:
    next(case.model.model.layers[layer].mlp.parameters()).data[0, 0] = float("nan")
    with pytest.raises(ModelError, match=f"Hidden states at layer {layer} are NaN or infinite"):
        case.collect()


def test_training_mode(case: Case) -> None:
    case.model.train()
    with pytest.raises(ModelError, match=r"training mode.*model.eval\(\)"):
        case.collect()


BAD_SAES = {
    "sae_in": (make_sae(L_IN, 20, d_in=D_IN + 1), f"`sae_in` reads {D_IN + 1} dimensions .* is {D_IN}"),
    "sae_out": (make_sae(L_OUT, 20, d_in=D_IN + 1), f"`sae_out` reads {D_IN + 1} dimensions .* is {D_IN}"),
    "sae_in at l_out": (make_sae(L_OUT, 20), f"input SAE sits at layer {L_OUT} and the output SAE at layer {L_OUT}"),
    "sae_in above": (make_sae(L_OUT + 1, 20), f"input SAE sits at layer {L_OUT + 1}"),
    "sae_out beyond": (make_sae(4, 20), "`sae_out` sits at layer 4; accepted: 0 to 3"),
    "sae_out without a layer": (make_sae(None, 20), "does not say its layer"),
    "sae_in of another": (make_sae(L_IN, 20, model_name="gemma-2-2b"), "`sae_in` was made for 'gemma-2-2b'.*'mine'"),
}


@pytest.mark.parametrize("name", BAD_SAES)
def test_saes_that_do_not_fit(case: Case, name: str) -> None:
    sae, message = BAD_SAES[name]
    with pytest.raises(ModelError, match=message):
        case.collect(model_name="mine", **{name.split()[0]: sae})


def test_the_same_model_by_another_name(case: Case) -> None:
    sae = make_sae(L_IN, D_SAE_IN, seed=1, model_name="gemma-2-2b")
    assert case.collect(sae_in=sae, model_name="google/gemma-2-2b-it").settings.model_name == "google/gemma-2-2b-it"


@pytest.mark.parametrize("value", ["txt", "", "ALL"])
def test_count_tokens_misspelt(case: Case, value: str) -> None:
    with pytest.raises(ValueError, match=f"`count_tokens` is '{value}'; accepted: all, text"):
        case.collect(count_tokens=value)


@pytest.mark.parametrize("value", [129, 1, 0, -5])
def test_max_length_beyond_the_model(case: Case, value: int) -> None:
    with pytest.raises(ValueError, match=f"`max_length` is {value}; accepted: 2 to 128"):
        case.collect(max_length=value)


@pytest.mark.parametrize(("length", "options"), [(128, {}), (130, {}), (9, {"max_length": 9})])
def test_a_prompt_without_room_is_refused_by_its_number(case: Case, length: int, options: dict[str, int]) -> None:
    ids = [*case.ids[:2], ([BOS, *[5] * (length - 1)], [6], [7])]
    calls = []
    case.model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(PreferenceError, match=f"triple 3: its prompt of {length} tokens leaves no room"):
        case.collect(ids, **options)
    assert not calls


def test_a_prompt_that_just_fits(case: Case) -> None:
    ids = [([BOS, *[5] * 126], [6, 7], [7])]
    got = case.collect(ids)
    assert (got.prompt.lengths.item(), got.chosen.lengths.item(), got.settings.n_cut) == (127, 1, 1)
