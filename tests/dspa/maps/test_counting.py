"""`dspa.maps.counting` against separate full forward passes and the formulas of SPEC.md, section 1."""

from __future__ import annotations

import copy
import random
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from dspa import FrozenSAE, ModelError
from dspa.maps import batches, counting, pieces
from dspa.maps.batches import Rows
from dspa.maps.reduce import _calibration
from dspa.maps.shards import PARTS, ROW_QUANTUM
from dspa.models.layers import decoder_layers
from dspa.testing import BOS, D_IN, D_SAE_OUT, L_IN, L_OUT, make_model, make_sae, make_tokenizer

from ...rounding import PASS, rounding
from ..support.counts import (
    LARGEST,
    MARGIN,
    PASSES,
    Calls,
    Case,
    check_plain,
    check_same,
    handled,
    hooked,
    make_case,
    make_ids,
    passes,
    ran,
    shards,
    tables,
    whole,
)

LONG_SEED = 0


@pytest.fixture(scope="module", params=["gemma2", "qwen3", "gpt2"])
def family_case(request: pytest.FixtureRequest) -> Case:
    return make_case(request.param)


class InTuples:
    """A decoder layer of earlier versions of transformers, which returns its residual in a tuple."""

    def forward(self, hidden_states: Tensor | tuple[Tensor], *args: Any, **kwargs: Any) -> tuple[Tensor]:
        h = hidden_states[0] if isinstance(hidden_states, tuple) else hidden_states
        return (super().forward(h, *args, **kwargs),)  # type: ignore[misc]


def with_tuples(model: PreTrainedModel) -> PreTrainedModel:
    for layer in decoder_layers(model):
        layer.__class__ = type("Layer", (InTuples, type(layer)), {})
    return model


# What is counted


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_counts_are_those_of_separate_full_passes(family_case: Case, padding_side: str) -> None:
    got = family_case.collect(tokenizer=make_tokenizer(padding_side))
    check_plain(family_case, got, family_case.ids)
    lengths = {name: lengths for name, (_, lengths) in tables(got).items()}
    for n_tokens in (lengths["prompt"], lengths["prompt"] + lengths["rejected"]):
        assert n_tokens.min() < 16 < n_tokens.max(), "on both sides of the window"
    assert (lengths["rejected"] == lengths["rejected_special"]).sum() == 1
    assert (got.settings.layer_in, got.settings.layer_out) == (L_IN, L_OUT)
    assert got.data is not None and got.data.n_triples == len(family_case.ids)
    assert not whole(got).cut.any()


def test_both_saes_at_one_layer(family_case: Case) -> None:
    case = replace(family_case, sae_in=make_sae(L_OUT, D_SAE_OUT, seed=4))
    check_plain(case, case.collect(), case.ids)


@pytest.mark.parametrize("family", ["gemma2", "qwen3"])
def test_layers_that_return_tuples(family: str, case: Case) -> None:
    ordinary = make_case(family)
    case.model = with_tuples(make_model(family))
    returned = []
    decoder_layers(case.model)[L_IN].register_forward_hook(lambda _m, _a, output: returned.append(type(output)))
    got = case.collect()
    assert set(returned) == {tuple}
    check_plain(ordinary, got, case.ids)
    check_same(got, ordinary.collect())


def test_padding_beyond_the_positions_of_the_model(family_case: Case) -> None:
    """A long prompt and a long response in one batch take more columns than the model has positions."""
    ids = make_ids(LONG_SEED, [(100, 5, 3), (3, 90, 70), (20, 1, 30)])
    calls = []
    with hooked(family_case.model, lambda h: calls.append(h.shape[1])):
        got = family_case.collect(ids)
    assert calls == [100, 90] and sum(calls) > 128
    check_plain(family_case, got, ids)


@pytest.mark.parametrize("batch_tokens", [1, 150, 8192])
def test_batch_size_changes_nothing(family_case: Case, batch_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = family_case.collect()
    calls = Calls(monkeypatch)
    check_same(family_case.collect(batch_tokens=batch_tokens), at_once, batched_alike=False)
    n = len(family_case.ids)
    assert {1: calls.n == PASSES * n, 150: 2 < calls.n < PASSES * n, 8192: calls.n == 2}[batch_tokens]


@pytest.mark.parametrize("batch_tokens", [100, 200])
def test_batches_keep_to_their_size(case: Case, batch_tokens: int) -> None:
    """Padding and the cache count; a text that is longer runs alone."""
    seen: list[tuple[int, int, int, int]] = []
    with ran(case.model, seen):
        case.collect(batch_tokens=batch_tokens)
    assert all(rows == 1 or rows * (before + columns) <= batch_tokens for rows, columns, before, _ in seen)
    assert sum(rows for rows, _, before, _ in seen if before == 0) == len(case.ids)
    assert sum(rows for rows, _, before, _ in seen if before > 0) == 2 * len(case.ids)
    assert max(rows for rows, *_ in seen) > 1


@pytest.mark.parametrize("most", [1.0, 1.1, 1.5])
def test_batches_are_of_texts_of_like_length(family_case: Case, most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = family_case.collect()
    monkeypatch.setattr(batches, "MOST_PADDED", most)
    monkeypatch.setattr(batches, "SMALL_BATCH", 1 << 40)
    seen: list[tuple[int, int, int, int]] = []
    with ran(family_case.model, seen):
        check_same(family_case.collect(), at_once, batched_alike=False)
    assert all(rows * columns <= most * tokens for rows, columns, _, tokens in seen)
    assert len(seen) > 2 and max(rows for rows, *_ in seen) > 1


def test_order_of_triples_permutes_the_counts(family_case: Case) -> None:
    order = random.Random(1).sample(range(len(family_case.ids)), len(family_case.ids))
    one, other = family_case.collect(), family_case.collect([family_case.ids[i] for i in order])
    for (counts, lengths), theirs in zip(tables(one).values(), tables(other).values(), strict=True):
        assert torch.equal(theirs[0], counts[order]) and torch.equal(theirs[1], lengths[order])
    assert all(torch.equal(a, b) for a, b in zip(_calibration(one), _calibration(other), strict=True))


def test_long_responses_are_cut_at_their_end(family_case: Case) -> None:
    room = 26
    cut = [(p, c[: room - len(p)], r[: room - len(p)]) for p, c, r in family_case.ids]
    n_cut = [
        sum(len(a) > len(b) for a, b in zip(one, short, strict=True))
        for one, short in zip(family_case.ids, cut, strict=True)
    ]
    assert {0, 1, 2} == set(n_cut)
    got = family_case.collect(max_length=room)
    check_plain(family_case, got, cut)
    shard = whole(got)
    assert shard.cut[shard.index.argsort()].tolist() == n_cut and got.settings.max_length == room


BF16_TRIPLES = 24


@torch.no_grad()
@pytest.mark.parametrize("family", ["gemma2", "qwen3", "gpt2"])
def test_bf16_differs_where_rounding_decides(family: str, record_property: Callable[[str, object], None]) -> None:
    """Counts differ by no more than there are tokens on which the latent is near its threshold."""
    case = make_case(family, [triple for seed in range(3) for triple in make_ids(seed)])
    case.model.to(torch.bfloat16)
    case.sae_in, case.sae_out = case.sae_in.to(dtype=torch.bfloat16), case.sae_out.to(dtype=torch.bfloat16)
    mine = tables(case.collect())
    # The error of a pass in bf16, per latent, is what it differs by from fp32 with the same weights. Two passes may
    # differ by twice that.
    exact = replace(case, model=copy.deepcopy(case.model).float())
    pairs = [list(zip(passes(case, ids), passes(exact, ids), strict=True)) for ids in case.ids]
    near = [
        2 * torch.cat([(above - wanted).abs() for above, wanted in part]).amax(dim=0)
        for part in zip(*pairs, strict=True)
    ]
    n_differ = n_wrong = 0
    for n, parts in enumerate(pairs):
        for part, (above, wanted), band in zip(PARTS, parts, near, strict=True):
            active = (above > 0).sum(dim=0)
            off = (mine[part][0][n] - active).abs()
            assert (off <= (above.abs() < band).sum(dim=0)).all()
            n_differ += int((off > 0).sum())
            n_wrong += int((active != (wanted > 0).sum(dim=0)).sum())
    record_property("differ", f"{n_differ}, and {n_wrong} from fp32")
    assert n_differ <= 2 * n_wrong


# What runs


def test_nothing_above_the_output_layer_runs(family_case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    # The logit lens tries the norm once, after all counts.
    monkeypatch.setattr("dspa.maps.collect.top_tokens", lambda *_, **__: {})
    inner = family_case.model.base_model
    layers = decoder_layers(family_case.model)
    norm = inner.ln_f if hasattr(inner, "ln_f") else inner.norm
    names: list[str] = []
    watched = {"out": layers[L_OUT], "next": layers[L_OUT + 1], "norm": norm, "head": family_case.model.lm_head}
    handles = [m.register_forward_pre_hook(lambda *_, name=name: names.append(name)) for name, m in watched.items()]
    family_case.collect()
    for handle in handles:
        handle.remove()
    assert set(names) == {"out"}


@pytest.mark.parametrize("batch_tokens", [1, 8192])
def test_each_token_runs_once(family_case: Case, batch_tokens: int) -> None:
    """p + c + r tokens per triple go through the first layer, and not p + (p + c) + (p + r)."""
    seen: list[tuple[int, int, int, int]] = []
    through: list[int] = []
    with ran(family_case.model, seen), hooked(family_case.model, lambda h: through.append(h.shape[0] * h.shape[1])):
        family_case.collect(batch_tokens=batch_tokens)
    n_tokens = sum(len(p) + len(c) + len(r) for p, c, r in family_case.ids)
    assert sum(tokens for *_, tokens in seen) == n_tokens
    assert through == [rows * columns for rows, columns, *_ in seen]
    assert (sum(through) == n_tokens) == (batch_tokens == 1)


def test_hooks_are_gone_afterwards(case: Case) -> None:
    case.collect()
    assert not any(module._forward_hooks for module in case.model.modules())


def test_a_model_without_a_cache(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DynamicCache, "update", lambda _self, keys, values, *_, **__: (keys, values))
    with pytest.raises(ModelError, match="Qwen3ForCausalLM is a model that keeps no key/value cache"):
        case.collect()


# Memory


ERRORS = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"),
}


def fail_above(error: Exception, n_tokens: int) -> Callable[[Tensor], None]:
    def look(h: Tensor) -> None:
        if h.shape[0] * h.shape[1] > n_tokens:
            raise error

    return look


@pytest.mark.parametrize("n_tokens", [25, 60])
@pytest.mark.parametrize("error", ERRORS)
def test_memory_that_does_not_suffice_for_a_batch(case: Case, error: str, n_tokens: int) -> None:
    at_once = case.collect()
    with (
        hooked(case.model, fail_above(ERRORS[error], n_tokens)),
        pytest.warns(UserWarning, match="not enough memory for batches of") as warned,
    ):
        got = case.collect()
    check_same(got, at_once, batched_alike=False)
    # Starting with the size that the last warning names gives no warning.
    (size,) = (int(digits) for digits in re.findall(r"Continuing with (\d+)\.", str(warned[-1].message)))
    with hooked(case.model, fail_above(ERRORS[error], n_tokens)), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        check_same(case.collect(batch_tokens=size), at_once, batched_alike=False)


@pytest.mark.parametrize("error", ERRORS)
def test_memory_that_does_not_suffice_for_one_triple(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    monkeypatch.setattr(pieces, "TRIPLES_PER_WINDOW", 2)
    case.ids.sort(key=lambda triple: max(map(len, triple)))
    with (
        hooked(case.model, fail_above(ERRORS[error], 20)),
        warnings.catch_warnings(),
        pytest.raises(
            ModelError, match=r"for one triple alone: triple \d, with a prompt of \d+ tokens and a response of \d+\."
        ) as raised,
    ):
        warnings.simplefilter("ignore")
        case.collect(work_dir=tmp_path)
    assert raised.value.__cause__ is ERRORS[error]
    finished = {path: path.stat().st_mtime_ns for path in shards(tmp_path)}
    assert 0 < len(finished) < 4
    check_same(case.collect(work_dir=tmp_path), case.collect(), batched_alike=False)
    assert all(path.stat().st_mtime_ns == then for path, then in finished.items())


def test_other_errors_are_not_taken_for_memory(case: Case) -> None:
    error = RuntimeError("CUDA error: device-side assert triggered")
    with hooked(case.model, fail_above(error, 45)), pytest.raises(RuntimeError) as raised:
        case.collect()
    assert raised.value is error


# Maxima, and the mean of what the encoder reads


# Added to all thresholds, these leave about half of the tokens without an active latent.
RAISED = {"gemma2": 6.0, "qwen3": 9.0, "gpt2": 3.2}


def make_kind(arch: str, family: str, **options: Any) -> FrozenSAE:
    """An output SAE like `make_sae`'s."""
    base = make_sae(L_OUT, D_SAE_OUT, seed=3)
    if arch == "jumprelu":
        options["threshold"] = base.threshold + RAISED[family]
    return FrozenSAE(arch, base.W_enc, base.b_enc, base.W_dec, layer=L_OUT, **options)


def reads(sae: FrozenSAE, h: Tensor) -> Tensor:
    """Return what the encoder reads of one token, in fp64."""
    h = h.double()
    if sae.weights.normalize == "layer_norm":
        h = h - h.mean()
        return h / (h.std() + 1e-5)
    return h


@torch.no_grad()
def plain_maxima(case: Case, sae: FrozenSAE, most: int) -> tuple[Tensor, int, Tensor]:
    """Return how often each latent is the largest [d_sae], the number of sampled tokens, and their sum [d_in]."""
    held = torch.zeros(sae.d_sae, dtype=torch.int64)
    n_tokens, total = 0, torch.zeros(D_IN, dtype=torch.float64)
    for prompt, *answers in case.ids:
        for answer in answers:
            out = case.model(input_ids=torch.tensor([prompt + answer]), output_hidden_states=True, use_cache=False)
            step = next(n for n in range(1, 100) if len(answer[::n]) <= most)
            for t in range(0, len(answer), step):
                x = reads(sae, out.hidden_states[L_OUT + 1][0, len(prompt) + t])
                pre = (x @ sae.W_enc.double() + sae.b_enc.double()).tolist()
                # A top-k SAE's largest latent is among the k.
                f = [p if p > max(0, u) else 0 for p, u in zip(pre, sae.threshold.tolist(), strict=True)]
                first, second = sorted(range(len(f)), key=lambda j: (-f[j], j))[:2]
                assert f[first] - f[second] > MARGIN or f[first] == 0
                held[first] += f[first] > 0
                n_tokens += 1
                total += x
    return held, n_tokens, total


KINDS: dict[str, Any] = {
    "jumprelu": {},
    "standard": {},
    "topk": {"k": 3},
    "standard, layer norm": {"normalize_activations": "layer_norm"},
}


@pytest.mark.parametrize("most", [2, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_maxima_are_those_of_separate_full_passes(
    family_case: Case, kind: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "TOKENS_PER_RESPONSE", most)
    sae = make_kind(kind.split(",")[0], family_case.model.config.model_type, **KINDS[kind])
    held, n_tokens, total = plain_maxima(family_case, sae, most)
    got = family_case.collect(sae_out=sae)
    shard = whole(got)
    assert torch.equal(shard.max_counts, held) and shard.n_sampled.tolist() == [n_tokens]
    assert 0 < held.sum() <= n_tokens and (held.sum() < n_tokens) == (kind == "jumprelu")
    # Each residual is rounded by its pass, and to a whole number of ROW_QUANTUM.
    apart = ROW_QUANTUM / 2 + rounding(PASS, LARGEST)
    torch.testing.assert_close(shard.residual_sum.double() * ROW_QUANTUM, total, rtol=0, atol=n_tokens * apart)
    latents, counts, mean = _calibration(got)
    times = held.tolist()
    wanted = sorted((j for j, n in enumerate(times) if n), key=lambda j: (-times[j], j))
    assert latents.tolist() == wanted and counts.tolist() == [times[j] for j in wanted]
    assert latents.dtype == torch.int32 and len(set(counts.tolist())) < len(counts), "ties are ordered"
    # The mean is rounded to bf16.
    torch.testing.assert_close(mean.double(), total / n_tokens, rtol=2**-8, atol=apart)


@pytest.mark.parametrize("elements", [1, 5 * D_SAE_OUT, 1 << 24])
def test_blocks_change_nothing(case: Case, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = case.collect()
    monkeypatch.setattr(counting, "LATENTS_PER_BLOCK", elements)
    check_same(case.collect(), at_once)


@pytest.mark.parametrize("most", [1, 3, 16])
@pytest.mark.parametrize("left", [True, False])
def test_sample_is_of_every_nth_token(most: int, left: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "TOKENS_PER_RESPONSE", most)
    rows = [list(range(1, n + 1)) for n in (1, 2, 3, 4, 7, 16, 17, 33)]
    padded = Rows.padded(rows, [[True] * len(row) for row in rows], left=left)
    for row, tokens, at in zip(rows, padded.tokens, counting._sampled(padded.mask), strict=True):
        step = next(n for n in range(1, 100) if len(row[::n]) <= most)
        assert tokens[at].tolist() == row[::step]


def test_of_equal_latents_the_smaller_holds_the_maximum() -> None:
    """Latents 1 and 3 are equal and largest on a row of ones; none is active on a row of minus ones."""
    W_enc = torch.tensor([[1.0, 2.0, 1.0, 2.0]]).expand(4, 4).clone()
    sae = FrozenSAE("standard", W_enc, torch.zeros(4), torch.eye(4), layer=0)
    h = torch.ones(2, 3, 4)
    h[0, 1], h[1, 2] = -1, 2.5
    sample = torch.tensor([[True, True, False], [False, True, True]])
    max_counts, n_sampled, residual_sum = counting._sample_statistics(h, sae, sample)
    assert max_counts.tolist() == [0, 3, 0, 0] and n_sampled.tolist() == [4]
    assert torch.equal(residual_sum.double() * ROW_QUANTUM, (h[0, 0] + h[0, 1] + h[1, 1] + h[1, 2]).double())


def test_residuals_without_measure() -> None:
    """Huge residuals do not overflow the sums, and a row of zeros, which has no direction, adds nothing."""
    sae = make_sae(0, 8, d_in=4, normalize_activations="constant_norm_rescale")
    one = torch.ones(1, 1, dtype=torch.bool)
    max_counts, n_sampled, residual_sum = counting._sample_statistics(torch.zeros(1, 1, 4), sae, one)
    assert not max_counts.any() and n_sampled.tolist() == [1] and not residual_sum.any()
    h = torch.tensor([[[3e38, -3e38, 1.0, 0.0]]])
    _, _, residual_sum = counting._sample_statistics(h, make_sae(0, 8, d_in=4), one)
    assert (residual_sum * ROW_QUANTUM).tolist() == [2.0**24, -(2.0**24), 1.0, 0.0]


# Bad input


@pytest.mark.parametrize("layer", [L_IN, L_OUT])
def test_hidden_states_that_are_not_finite(case: Case, layer: int) -> None:
    next(case.model.model.layers[layer].mlp.parameters()).data[0, 0] = float("nan")
    with pytest.raises(ModelError, match=f"Hidden states at layer {layer} are NaN or infinite"):
        case.collect()


def test_hidden_states_of_padding_are_ignored(case: Case) -> None:
    """Rows of padding may be NaN in a model whose attention to nothing is NaN."""
    at_once = case.collect()
    layer, masks = case.model.model.layers[L_OUT], []

    class Spoilt(type(layer)):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            h = super().forward(*args, **kwargs)
            return torch.where(masks[-1][:, -h.shape[1] :, None] > 0, h, torch.nan)

    layer.__class__ = Spoilt
    look = case.model.base_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    with handled(look):
        check_same(case.collect(), at_once)
    assert any((mask == 0).any() for mask in masks)


def test_a_prompt_that_just_fits(case: Case) -> None:
    got = case.collect([([BOS, *[5] * 126], [6, 7], [7])])
    lengths = {part: tables(got)[part][1].item() for part in PARTS}
    assert lengths == {"prompt": 127, "chosen": 1, "rejected": 1} and whole(got).cut.tolist() == [1]
