"""Counts of small models and counts by hand, and plain versions of the maps made of them."""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dspa import ConditionalDifferenceMap, FrozenSAE, Triple
from dspa.maps.cdmap import TENSORS
from dspa.maps.collect import collect
from dspa.maps.collection import COSTS, MEASURED, Collection, CollectSettings
from dspa.maps.pieces import DataRecord
from dspa.maps.shards import COUNTED, PARTS, ROW_QUANTUM, Counts, Shard
from dspa.models.layers import decoder_layers
from dspa.models.reading import read_layers
from dspa.testing import BOS, D_SAE_IN, D_SAE_OUT, EOS, L_IN, L_OUT, VOCAB, make_model, make_sae, make_tokenizer

from ...rounding import PASS, rounding

SPECIAL = (0, BOS, EOS)
# Passes of one triple alone (batch_tokens=1): its prompt and its two responses.
PASSES = 3
# Seed of data in which no pre-activation is so near its threshold that rounding could decide a count.
SEED = 1
# No number in a residual of these models is larger.
LARGEST = 20.0
# No pre-activation may be nearer to its threshold, so that rounding, measured to be 1.2e-5 at most, decides no count.
MARGIN = 3e-5
Ids = tuple[list[int], list[int], list[int]]
Table = list[np.ndarray]


# Counts of small models


def words(draw: random.Random, n: int) -> list[int]:
    return [draw.randrange(3, VOCAB) for _ in range(n)]


def make_ids(seed: int, lengths: Iterable[tuple[int, int, int]] = ()) -> list[Ids]:
    """Draw prompts that begin with `<s>` and responses that may end with `</s>`.

    By default the prompts have 2 to 23 tokens and the responses 1 to 21, one of which is `</s>` alone: lengths on both
    sides of a window of 16 tokens.
    """
    draw = random.Random(seed)
    lengths = lengths or [(2 + 3 * i, 1 + (7 * i) % 20, 1 + (5 * i) % 21) for i in range(8)]
    ids = [([BOS, *words(draw, p - 1)], words(draw, c), [*words(draw, r - 1), EOS]) for p, c, r in lengths]
    draw.shuffle(ids)
    return ids


def as_triples(ids: list[Ids]) -> list[Triple]:
    names = {EOS: "</s>"}
    texts = ([" ".join(names.get(i, f"w{i}") for i in part) for part in (p[1:], *answers)] for p, *answers in ids)
    return [Triple(prompt, f" {chosen}", f" {rejected}") for prompt, chosen, rejected in texts]


def as_rows(ids: list[Ids]) -> list[dict[str, str]]:
    return [{"prompt": t.prompt, "chosen": t.chosen, "rejected": t.rejected} for t in as_triples(ids)]


TEMPLATE = (
    "{% if polite %}w5 w6 {% endif %}{% for tool in tools or [] %}w7 {{ tool.name }} {% endfor %}"
    "{% for m in messages %}w8 {{ m.content }} {% endfor %}{% if add_generation_prompt %}w8 {% endif %}"
)


def as_conversations(ids: list[Ids]) -> list[dict[str, Any]]:
    return [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in as_rows(ids)
    ]


def write_lines(path: Path, rows: Iterable[dict[str, str]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@dataclass
class Case:
    model: PreTrainedModel
    sae_in: FrozenSAE
    sae_out: FrozenSAE
    tokenizer: PreTrainedTokenizerFast
    ids: list[Ids]
    # Dotted path of the layers, and place of the first layer's output among the hidden states that the model returns.
    layers: str | None = None
    first_state: int = 1

    def collect(self, ids: list[Ids] | None = None, **options: Any) -> Collection:
        triples = options.pop("triples", None)
        options = {"sae_in": self.sae_in, "sae_out": self.sae_out, "layers": self.layers, "progress": False} | options
        return collect(
            self.model,
            options.pop("tokenizer", self.tokenizer),
            as_triples(ids or self.ids) if triples is None else triples,
            **options,
        )


def make_case(family: str, ids: list[Ids] | None = None) -> Case:
    return Case(
        make_model(family),
        make_sae(L_IN, D_SAE_IN, seed=1),
        make_sae(L_OUT, D_SAE_OUT, seed=2),
        make_tokenizer(),
        ids or make_ids(SEED),
    )


def with_template(template: str = "{{ messages }}") -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def with_special() -> Any:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["w7"]})
    return tokenizer


CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "max_length": ("max_length", {"max_length": 100}),
    "sae_in": ("sae_in", {"sae_in": make_sae(L_IN, D_SAE_IN, seed=9)}),
    "sae_out": ("sae_out", {"sae_out": make_sae(L_OUT, D_SAE_OUT, seed=9)}),
    "layer_in": ("layer_in", {"sae_in": make_sae(L_IN - 1, D_SAE_IN, seed=1)}),
    "layer_out": ("layer_out", {"sae_out": make_sae(L_OUT + 1, D_SAE_OUT, seed=2)}),
    "dtype of an SAE": ("dtypes", {"sae_in": make_sae(L_IN, D_SAE_IN, seed=1).to(dtype=torch.bfloat16)}),
    "model_name": ("model_name", {"model_name": "another"}),
    "chat template": ("tokenizer", {"tokenizer": with_template()}),
    "special tokens": ("tokenizer", {"tokenizer": with_special()}),
}


@torch.no_grad()
def distances(case: Case, sae: FrozenSAE, ids: list[int], start: int = 0) -> Tensor:
    """Return how far each latent is above its threshold [T - start, d_sae], from one full pass over `ids`."""
    out = case.model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False)
    h = out.hidden_states[sae.layer + case.first_state][0, start:]
    pre = h.double() @ sae.W_enc.double() + sae.b_enc.double()
    return pre - sae.threshold.clamp(min=0)


def passes(case: Case, triple: Ids) -> list[Tensor]:
    """Return the distances of the three parts, each from a separate pass."""
    prompt, *answers = triple
    return [
        distances(case, case.sae_in, prompt),
        *(distances(case, case.sae_out, prompt + answer, len(prompt)) for answer in answers),
    ]


@torch.no_grad()
def plain(case: Case, ids: list[Ids]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return counts [N, width] and lengths [N] of each part, on all and on special tokens, triple by triple."""
    counts_of: dict[str, list[tuple[Tensor, int]]] = {}
    for triple in ids:
        for part, tokens, above in zip(PARTS, triple, passes(case, triple), strict=True):
            assert above.abs().min() > MARGIN
            for name, counted in ((part, range(len(tokens))), (f"{part}_special", None)):
                rows = [t for t, token in enumerate(tokens) if token in SPECIAL] if counted is None else list(counted)
                counts_of.setdefault(name, []).append(((above[rows] > 0).sum(dim=0), len(rows)))
    return {
        name: (torch.stack([c for c, _ in rows]), torch.tensor([n for _, n in rows]))
        for name, rows in counts_of.items()
    }


def check_plain(case: Case, got: Collection, ids: list[Ids]) -> None:
    mine = tables(got)
    for name, (counts, lengths) in plain(case, ids).items():
        assert torch.equal(mine[name][1], lengths), name
        assert torch.equal(mine[name][0], counts), name
        # The data can show errors: latents active on some tokens, and on none.
        assert ((counts == 0).any() and ((counts > 0) & (counts < lengths.max())).any()) or "special" in name


class Calls:
    """Counter of the passes of the model, which fails at the pass `fail_at`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_at: int | None = None) -> None:
        self.n, self.fail_at, self.real = 0, fail_at, read_layers
        monkeypatch.setattr("dspa.maps.passes.read_layers", self)

    def __call__(self, *args: Any, **kwargs: Any) -> dict[int, Tensor]:
        if self.n == self.fail_at:
            raise KeyboardInterrupt
        self.n += 1
        return self.real(*args, **kwargs)


def ran(model: PreTrainedModel, seen: list[tuple[int, int, int, int]]) -> Any:
    """Append rows, columns, columns before them in the cache, and tokens of every pass to `seen`."""

    def look(_module: nn.Module, _args: Any, kwargs: dict[str, Tensor]) -> None:
        rows, columns = kwargs["input_ids"].shape
        mask = kwargs["attention_mask"]
        seen.append((rows, columns, mask.shape[1] - columns, int(mask[:, -columns:].sum())))

    return handled(model.base_model.register_forward_pre_hook(look, with_kwargs=True))


@contextlib.contextmanager
def handled(handle: RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def hooked(model: PreTrainedModel, look: Callable[[Tensor], object]) -> Any:
    """Call `look` with the input of the first layer."""
    return handled(decoder_layers(model)[0].register_forward_pre_hook(lambda _module, args: look(args[0])))


def whole(collection: Collection) -> Shard:
    return Shard.join([collection.read(path) for path in collection.paths()])


def dense(counts: Counts, width: int) -> Tensor:
    """Return dense counts [N, width] int64, made entry by entry."""
    out = torch.zeros(len(counts.lengths), width, dtype=torch.int64)
    for n, (start, end) in enumerate(zip(counts.starts.tolist(), counts.starts.tolist()[1:], strict=False)):
        latents = counts.latents[start:end].tolist()
        assert latents == sorted(set(latents))
        for latent, count in zip(latents, counts.counts[start:end].tolist(), strict=True):
            out[n, latent] = count
    return out


def tables(collection: Collection) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the counts [N, width] and lengths [N] of each of COUNTED, in the order of the data."""
    shard = whole(collection)
    n = len(shard.index)
    assert sorted(shard.index.tolist()) == list(range(n)), "each triple once"
    order = shard.index.argsort()
    widths = dict.fromkeys(COUNTED, collection.settings.d_sae_out)
    widths |= dict.fromkeys(("prompt", "prompt_special"), collection.settings.d_sae_in)
    return {name: (dense(part, widths[name])[order], part.lengths[order]) for name, part in shard.counts.items()}


def check_same(one: Collection, other: Collection, *, batched_alike: bool = True) -> None:
    """Check for the same counts, and for sums of residuals up to the rounding of hidden states in other batches."""
    assert one.settings == other.settings and one.data == other.data
    for (name, (counts, lengths)), theirs in zip(tables(one).items(), tables(other).values(), strict=True):
        assert torch.equal(counts, theirs[0]) and torch.equal(lengths, theirs[1]), name
    a, b = whole(one), whole(other)
    assert torch.equal(a.cut[a.index.argsort()], b.cut[b.index.argsort()])
    assert torch.equal(a.max_counts, b.max_counts) and torch.equal(a.n_sampled, b.n_sampled)
    assert a.residual_sum.dtype == b.residual_sum.dtype == torch.int64 and a.residual_sum.any()
    apart = ROW_QUANTUM + rounding(PASS, LARGEST)
    assert (a.residual_sum - b.residual_sum).abs().max() <= (
        0 if batched_alike else int(a.n_sampled) * apart / ROW_QUANTUM
    )


def files(folder: Path) -> dict[str, bytes]:
    """Return all files by their names but those of times, and folders as if they were empty."""
    paths = (path for path in folder.iterdir() if path.name not in (MEASURED, COSTS))
    return {path.name: path.read_bytes() if path.is_file() else b"" for path in paths}


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*.safetensors"))


def in_a_child(work: Callable[[], Any]) -> multiprocessing.Process:
    """Start a copy of this process that does some work."""
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    return child


# Counts by hand


def as_counts(table: np.ndarray, lengths: np.ndarray) -> Counts:
    rows = [np.flatnonzero(row) for row in table]
    return Counts(
        starts=torch.tensor([0, *np.cumsum([len(row) for row in rows])]),
        latents=torch.tensor(np.concatenate(rows), dtype=torch.int32),
        counts=torch.tensor(np.concatenate([row[at] for row, at in zip(table, rows, strict=True)]), dtype=torch.int32),
        lengths=torch.tensor(lengths, dtype=torch.int64),
    )


def settings_of(data: Table, **other: Any) -> CollectSettings:
    settings = {
        "model_name": "made by hand",
        "sae_in": "a" * 16,
        "sae_out": "b" * 16,
        "layer_in": L_IN,
        "layer_out": L_OUT,
        "d_sae_in": data[0].shape[1],
        "d_sae_out": data[1].shape[1],
        "dtypes": "",
        "max_length": 64,
        "tokenizer": "",
        "boundary": "joint",
    }
    return CollectSettings(**settings | other)


def as_shard(data: Table, special: Table, index: np.ndarray) -> Shard:
    """Make a shard of some triples.

    Each latent was the largest as often as it has rejected counts, the residuals are the first four of these in halves,
    and a triple was cut as often as its last prompt latent is active, modulo 3.
    """
    counts = {}
    for name, (*parts, lengths) in (("", data), ("_special", special)):
        for part, table, length in zip(PARTS, parts, lengths, strict=True):
            counts[f"{part}{name}"] = as_counts(table[index], length[index])
    rejected = torch.from_numpy(data[2][index]).long()
    return Shard(
        index=torch.from_numpy(index),
        keys=torch.tensor([zlib.crc32(b"".join(table[n].tobytes() for table in data[:3])) for n in index]),
        cut=torch.tensor(data[0][index, -1] % 3, dtype=torch.uint8),
        counts=counts,
        max_counts=rejected.sum(dim=0),
        n_sampled=rejected.sum()[None],
        residual_sum=rejected[:, :4].sum(dim=0) * int(0.5 / ROW_QUANTUM),
    )


def as_collection(
    data: Table,
    special: Table | None = None,
    pieces: Sequence[Sequence[int]] | None = None,
    folder: Path | None = None,
    **settings: Any,
) -> Collection:
    """Make a collection.

    Args:
        data: counts [N, d] of the three parts, and lengths [3, N].
        special: the same of special tokens. Default: there are none.
        pieces: triples of each shard. Default: all in one.
        folder: as for `Collection.start`.
        settings: entries that differ from those of `settings_of`.
    """
    n = len(data[0])
    collection = Collection.start(folder, settings_of(data, **settings))
    pieces = [range(n)] if pieces is None else pieces
    for piece, index in enumerate(pieces):
        shard = as_shard(data, special or [0 * table for table in data], np.array(index, dtype=np.int64))
        collection.write(piece, str(piece), shard)
    collection.record(DataRecord.of(n, [str(piece) for piece in range(len(pieces))]))
    return collection


# Lengths whose densities are exact in binary, and others.
DYADIC, ODD = (1, 2, 4, 8), (1, 3, 5, 6, 7)
D_IN, D_OUT = 14, 18


def draw(n: int, seed: int, lengths_from: tuple[int, ...] = DYADIC, active: float = 0.4) -> Table:
    """Draw counts of prompts, chosen and rejected responses, and lengths. Latent 0 is never active, latent 1 always."""
    g = np.random.default_rng(seed)
    lengths = g.choice(lengths_from, size=(3, n))
    tables = []
    for width, length in zip((D_IN, D_OUT, D_OUT), lengths, strict=True):
        table = g.integers(1, length[:, None] + 1, size=(n, width)) * (g.random((n, width)) < active)
        table[:, 0], table[:, 1] = 0, length
        tables.append(table)
    return [*tables, lengths]


def rows_of(data: Table, index: Any) -> Table:
    return [*(table[index] for table in data[:3]), data[3][:, index]]


def fractions(table: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return np.array([[Fraction(int(c), int(t)) for c in row] for row, t in zip(table, lengths, strict=True)])


def naive(
    data: Table, percentile: float = 90.0, rule: str = "published", k: int = 16, sparsify: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Return gates [N, d_in] and A [d_in, d_out] in exact fractions."""
    prompt, chosen, rejected, lengths = data
    n = len(prompt)
    rho, plus, minus = (
        fractions(*table_and_lengths) for table_and_lengths in zip((prompt, chosen, rejected), lengths, strict=True)
    )
    gates = rho.astype(float) >= np.percentile(rho.astype(float), percentile, axis=0)
    if rule == "active":
        gates &= prompt > 0
    A = np.full((prompt.shape[1], chosen.shape[1]), Fraction(0))
    for t in range(n):
        A = A + np.outer(gates[t].astype(int), plus[t] - minus[t]) / Fraction(n)
    if sparsify:
        sizes = []
        for row, opened in zip(A, gates.sum(axis=0), strict=True):
            if opened > 0:
                ordered = sorted(row)
                sizes += [abs(a) for a in row if (a >= ordered[-k] or a <= ordered[k - 1]) and a != 0]
        A = np.where(np.abs(A) < min(sizes), Fraction(0), A)
    return gates, A


BAD_SETTINGS = [
    ({"percentile": -1}, "`percentile` is -1; accepted: 0 to 100"),
    ({"percentile": 100.5}, "`percentile` is 100.5"),
    ({"percentile": math.nan}, "`percentile` is nan"),
    ({"gate_rule": "activ"}, "`gate_rule` is 'activ'; accepted: published, active"),
    ({"count_tokens": "txt"}, "`count_tokens` is 'txt'; accepted: all, text"),
    ({"count_tokens": ""}, "`count_tokens` is ''; accepted: all, text"),
    ({"k_diff": 0}, "`k_diff` is 0; accepted: 1 to"),
]


def same_bits(one: ConditionalDifferenceMap, other: ConditionalDifferenceMap) -> bool:
    assert one.meta == other.meta
    return all(
        (a := getattr(one, name)).dtype == (b := getattr(other, name)).dtype and torch.equal(a, b) for name in TENSORS
    )
