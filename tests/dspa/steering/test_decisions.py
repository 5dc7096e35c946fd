"""Gates in every way of generating: the tokens and edits of a loop written out here, which keeps no state."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import dspa
from dspa.evaluate.responses import Response, log_probabilities
from dspa.models.layers import decoder_layers
from dspa.steering.decisions import Decisions, mixed, prompt_key, top_entropy
from dspa.steering.gated import Gated
from dspa.testing import L_OUT, make_model

from ...rounding import assert_same_logits
from ..support.adapters import make_adapter
from ..support.plain import encode
from .test_generate import CONFIG, N_NEW, PROMPTS, compiled_decoding, new_tokens, padded, plain
from .test_vector import SCALE, make_vector

Rule = Callable[[int, float], bool]
CASES = (
    *(("steering", rule) for rule in ("entropy", "complement", "random", "first")),
    *(("vector", "entropy"), ("vector of all", "complement"), ("adapter", "entropy"), ("ablation", "random")),
)
ABLATED = list(range(40))


@dataclass
class Acts:
    """The maker of an object with a gate, its edit of one residual of a prompt, and if it changes whole prompts."""

    make: Callable[[Any], Any]
    edit: Callable[[list[int], Tensor], Tensor]
    prompts: bool = False


def entropy(logits: Tensor, k: int = 10) -> float:
    top = sorted(logits.tolist(), reverse=True)[:k]
    weights = [math.exp(z - top[0]) for z in top]
    return -sum(w / sum(weights) * math.log(w / sum(weights)) for w in weights)


class Loop:
    """The rule of a gate by full passes over single rows: what is open depends on a row's tokens alone."""

    def __init__(self, model: Any, acts: Acts, rule: Rule, prompt: list[int]) -> None:
        self.model, self.acts, self.rule, self.prompt = model, acts, rule, prompt
        self._logits: dict[tuple[int, ...], Tensor] = {}

    def opened(self, answer: tuple[int, ...]) -> list[bool]:
        """True for residuals that are changed: those that predict the tokens of an answer and the one after it."""
        return [self.rule(i, entropy(self.logits(answer[: i - 1])) if i else math.nan) for i in range(len(answer) + 1)]

    @torch.no_grad()
    def logits(self, answer: tuple[int, ...]) -> Tensor:
        """Those of the token after an answer."""
        if answer not in self._logits:
            opened = [self.acts.prompts] * (len(self.prompt) - 1) + self.opened(answer)

            def hook(_module: Any, _args: Any, output: Any) -> Any:
                h = (output[0] if isinstance(output, tuple) else output).clone()
                for t in range(h.shape[1]):
                    if opened[t]:
                        h[0, t] = self.acts.edit(self.prompt, h[0, t])
                return (h, *output[1:]) if isinstance(output, tuple) else h

            handle = decoder_layers(self.model)[L_OUT].register_forward_hook(hook)
            tokens = torch.tensor([self.prompt + list(answer)])
            self._logits[answer] = self.model(tokens, use_cache=False).logits[0, -1]
            handle.remove()
        return self._logits[answer]

    def generate(self, *, sample: bool = False) -> tuple[int, ...]:
        answer: tuple[int, ...] = ()
        for _ in range(N_NEW):
            logits = self.logits(answer)
            answer += (int(torch.multinomial(logits.softmax(-1), 1) if sample else logits.argmax()),)
        return answer

    def beams(self, n: int) -> list[tuple[int, ...]]:
        """The best answers by beam search, which no answer ends before the last token."""
        best = [(0.0, ())]
        for _ in range(N_NEW):
            longer = [
                (score + logp, (*answer, token))
                for score, answer in best
                for token, logp in enumerate(self.logits(answer).log_softmax(-1).tolist())
            ]
            best = sorted(longer, reverse=True)[:n]
        return [answer for _, answer in best]


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("qwen3")


@pytest.fixture(scope="module", params=CASES, ids=" ".join)
def case(request: Any) -> tuple[str, str]:
    return request.param


@pytest.fixture(scope="module")
def acts(case: tuple[str, str], model: Any, sae_in: Any, sae_out: Any, cdmap: Any) -> Acts:
    kind, _ = case
    if kind == "steering":
        loop = plain(model, sae_in, sae_out, cdmap)
        chosen = {tuple(prompt): loop.select(prompt) for prompt in PROMPTS}

        def edit(prompt: list[int], h: Tensor) -> Tensor:
            augment, ablate = chosen[tuple(prompt)]
            f = encode(sae_out, h)
            step, new = CONFIG.alpha * f.max(), f.clone()
            for j in augment:
                new[j] = f[j] + step if f[j] > 0 else 0
            for j in ablate:
                new[j] = max(f[j] - step, torch.zeros(()))
            return h + (new - f) @ sae_out.W_dec

        return Acts(lambda gate: dspa.Steering(sae_in, sae_out, cdmap, CONFIG, gate=gate), edit)
    if kind == "ablation":

        def ablated(_prompt: list[int], h: Tensor) -> Tensor:
            f = encode(sae_out, h)
            return h - f[ABLATED] @ sae_out.W_dec[ABLATED]

        return Acts(lambda gate: dspa.Steering.of_latents(sae_out, ABLATED, gate=gate), ablated)
    made = make_adapter(sae_out) if kind == "adapter" else make_vector("all" if kind == "vector of all" else "response")

    def gated(gate: Any) -> Gated:
        made.gate = gate
        return made

    if kind == "adapter":
        return Acts(gated, lambda _prompt, h: made(h[None])[0], prompts=True)
    return Acts(gated, lambda _prompt, h: h + SCALE * made.vector, prompts=kind == "vector of all")


@pytest.fixture(scope="module")
def gate(case: tuple[str, str], model: Any) -> tuple[Any, Rule]:
    """A gate and its rule; the threshold is the middle of what the base model's entropies are."""
    if case[1] == "random":
        return dspa.RandomGate(0.5, seed=3), None
    if case[1] == "first":
        return dspa.FirstTokens(2), lambda i, _: i < 2
    with torch.no_grad():
        logits = torch.cat([model(torch.tensor([prompt])).logits[0] for prompt in PROMPTS])
    threshold = sorted(entropy(row) for row in logits)[len(logits) // 2]
    complement = case[1] == "complement"
    return dspa.EntropyGate(threshold, complement=complement), lambda i, h: (i == 0 or h >= threshold) != complement


@pytest.fixture(scope="module")
def loops(model: Any, acts: Acts, gate: Any) -> list[Loop]:
    made, rule = gate

    def drawn(prompt: list[int]) -> Rule:
        key = prompt_key(torch.tensor([prompt]), torch.ones(1, len(prompt), dtype=torch.bool))
        opened = made.opened(torch.arange(N_NEW)[None], key)[0].tolist()
        return lambda i, _: opened[i]

    return [Loop(model, acts, rule or drawn(prompt), prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def expected(loops: list[Loop]) -> list[list[int]]:
    """Tokens of each prompt alone, on some of which each gate is open and on some closed."""
    answers = [loop.generate() for loop in loops]
    opened = [flag for loop, answer in zip(loops, answers, strict=True) for flag in loop.opened(answer[:-1])]
    assert 0 < sum(opened) < len(opened)
    return [list(answer) for answer in answers]


def shares(loops: list[Loop], answers: list[list[int]]) -> list[int]:
    return [sum(loop.opened(tuple(answer[:-1]))) for loop, answer in zip(loops, answers, strict=True)]


@pytest.mark.parametrize(
    "how",
    [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}],
    ids=lambda how: next(iter(how), "cache"),
)
def test_ways_of_decoding(model: Any, acts: Acts, gate: Any, loops: Any, expected: list[list[int]], how: Any) -> None:
    with acts.make(gate[0]).attach(model) as acting:
        output = model.generate(**padded(PROMPTS), max_new_tokens=N_NEW, do_sample=False, **how)
    assert new_tokens(output) == expected
    assert acting.decisions.read.tolist() == [N_NEW] * 3
    assert acting.decisions.touched.tolist() == shares(loops, expected)
    assert acting.decisions.share == sum(shares(loops, expected)) / (3 * N_NEW)


def test_compiled_decoding(model: Any, acts: Acts, gate: Any, loops: Any, expected: list[list[int]]) -> None:
    """A graph that was compiled for one gate serves no other, nor the method without one."""
    config = compiled_decoding()
    torch.compiler.reset()
    before = model.generate(**padded(PROMPTS), generation_config=config)
    for other in (None, dspa.FirstTokens(5)):
        with acts.make(other).attach(model):
            model.generate(**padded(PROMPTS), generation_config=config)
    with acts.make(gate[0]).attach(model) as acting:
        for _ in range(2):
            assert new_tokens(model.generate(**padded(PROMPTS), generation_config=config)) == expected
    assert acting.decisions.touched.tolist() == shares(loops, expected)
    assert torch.equal(model.generate(**padded(PROMPTS), generation_config=config), before)
    torch.compiler.reset()


def test_sampling(model: Any, acts: Acts, gate: Any, loops: list[Loop]) -> None:
    for loop in loops:
        torch.manual_seed(3)
        wanted = loop.generate(sample=True)
        torch.manual_seed(3)
        with acts.make(gate[0]).attach(model):
            output = model.generate(torch.tensor([loop.prompt]), max_new_tokens=N_NEW, do_sample=True, top_k=0)
        assert new_tokens(output) == [list(wanted)]


def test_return_sequences(model: Any, acts: Acts, gate: Any, loops: list[Loop]) -> None:
    """Each sequence has the gates of its own tokens, and the logits that follow from them."""
    settings = {"do_sample": True, "top_k": 0, "num_return_sequences": 3, "max_new_tokens": N_NEW}
    torch.manual_seed(0)
    with acts.make(gate[0]).attach(model) as acting:
        out = model.generate(**padded(PROMPTS), output_logits=True, return_dict_in_generate=True, **settings)
    answers = new_tokens(out.sequences)
    assert len({tuple(answer) for answer in answers}) > 6
    for n, answer in enumerate(answers):
        loop = loops[n // 3]
        for i in range(N_NEW):
            assert_same_logits(out.logits[i][n], loop.logits(tuple(answer[:i])))
        assert acting.decisions.opened[n].tolist() == loop.opened(tuple(answer[:-1]))


def test_beams(model: Any, acts: Acts, gate: Any, loops: list[Loop]) -> None:
    with acts.make(gate[0]).attach(model):
        settings = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": N_NEW, "do_sample": False}
        output = new_tokens(model.generate(**padded(PROMPTS), **settings))
    assert output == [list(answer) for loop in loops for answer in loop.beams(3)[:2]]


@pytest.mark.parametrize("how", ["prompt_lookup", "assistant", "itself"])
def test_speculation(model: Any, acts: Acts, gate: Any, expected: list[list[int]], how: str) -> None:
    family = "qwen3" if "Qwen3" in type(model).__name__ else "gemma2"
    settings: dict[str, Any] = {
        "prompt_lookup": {"prompt_lookup_num_tokens": 3},
        "assistant": {"assistant_model": make_model(family, seed=5)},
        "itself": {"assistant_model": model},
    }[how]
    refused = isinstance(gate[0], dspa.EntropyGate)
    with acts.make(gate[0]).attach(model):
        for prompt, wanted in zip(PROMPTS, expected, strict=True):
            checked = pytest.raises(dspa.ModelError, match=r"one (token )?at a time.*RandomGate") if refused else None
            with checked or contextlib.nullcontext():
                output = model.generate(torch.tensor([prompt]), max_new_tokens=N_NEW, do_sample=False, **settings)
                assert output[0, len(prompt) :].tolist() == wanted


def test_ended_rows(model: Any, acts: Acts, gate: Any, loops: list[Loop], expected: list[list[int]]) -> None:
    """Tokens after the end of a row are not counted."""
    end = expected[0][2]
    lengths = [answer.index(end) + 1 if end in answer else N_NEW for answer in expected]
    with acts.make(gate[0]).attach(model) as acting:
        model.generate(**padded(PROMPTS), max_new_tokens=N_NEW, do_sample=False, eos_token_id=end, pad_token_id=0)
    assert acting.decisions.read.tolist() == lengths and min(lengths) < max(lengths)
    cut = [answer[:n] for answer, n in zip(expected, lengths, strict=True)]
    assert acting.decisions.touched.tolist() == shares(loops, cut)


def test_log_probabilities(model: Any, acts: Acts, gate: Any, loops: list[Loop]) -> None:
    """Responses of different lengths are scored as if they were written token by token."""
    answers = [(5, 9, 9, 3, 40), (7, 2), (33, 8, 60)]
    rows = [Response(prompt, list(answer)) for prompt, answer in zip(PROMPTS, answers, strict=True)]
    wanted = [
        torch.stack([loop.logits(answer[:i]).log_softmax(-1)[token] for i, token in enumerate(answer)]).mean()
        for loop, answer in zip(loops, answers, strict=True)
    ]
    with acts.make(gate[0]).attach(model) as acting:
        actual = log_probabilities(model, rows)
    assert_same_logits(actual, torch.stack(wanted))
    if acting.stepwise:
        for n, (loop, answer) in enumerate(zip(loops, answers, strict=True)):
            assert acting.decisions.opened[n][: len(answer)].tolist() == loop.opened(answer[:-1])
    else:
        assert acting.decisions.touched.tolist() == shares(loops, answers)


def test_a_closed_gate_leaves_residuals_bit_for_bit(model: Any, acts: Acts) -> None:
    settings = {"max_new_tokens": N_NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    if acts.prompts:
        pytest.skip("prompts are changed")
    before = model.generate(**padded(PROMPTS), **settings)
    for closed in (dspa.RandomGate(0.0), dspa.EntropyGate(0.0, complement=True)):
        with acts.make(closed).attach(model) as acting:
            after = model.generate(**padded(PROMPTS), **settings)
        assert acting.decisions.share == 0
        assert all(torch.equal(a, b) for a, b in zip(before.logits, after.logits, strict=True))


def test_an_open_gate_changes_nothing(model: Any, acts: Acts) -> None:
    settings = {"max_new_tokens": N_NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with acts.make(None).attach(model) as acting:
        before = model.generate(**padded(PROMPTS), **settings)
        assert acting.decisions is None
    for gate in (dspa.EntropyGate(0.0), dspa.RandomGate(1.0), dspa.FirstTokens(99)):
        with acts.make(gate).attach(model) as acting:
            after = model.generate(**padded(PROMPTS), **settings)
        assert acting.decisions.share == 1
        assert all(torch.equal(a, b) for a, b in zip(before.logits, after.logits, strict=True))


# Parts


def test_entropy_of_the_published_rule() -> None:
    """The anchors of METHODS, computed by hand."""
    logits = torch.tensor([[2.0, 1.5, 1.0, -1.0]])
    assert top_entropy(logits, 3).item() == pytest.approx(1.020191, abs=1e-6)
    assert top_entropy(logits.log_softmax(-1), 3).item() == pytest.approx(1.020191, abs=1e-6)
    assert top_entropy(torch.zeros(1, 50), 10).item() == pytest.approx(2.302585, abs=1e-6)
    assert top_entropy(torch.tensor([[3.0, -math.inf, -math.inf]]), 10).item() == 0
    assert top_entropy(torch.zeros(1, 4), 10).item() == pytest.approx(math.log(4))


def test_random_gates_draw_their_share() -> None:
    index = torch.arange(2000).expand(20, -1)
    key = prompt_key(torch.arange(100).view(20, 5), torch.ones(20, 5, dtype=torch.bool))
    draws = {}
    for share in (0.1, 0.5, 0.9):
        opened = dspa.RandomGate(share).opened(index, key)
        # Five standard deviations of 40,000 draws.
        assert abs(opened.float().mean().item() - share) < 5 * math.sqrt(share * (1 - share) / opened.numel())
        assert torch.equal(dspa.RandomGate(share, complement=True).opened(index, key), ~opened)
        draws[share] = opened
    assert bool((draws[0.9] | ~draws[0.5]).all())
    other = dspa.RandomGate(0.5, seed=2**40).opened(index, key)
    for pair in ((draws[0.5], other), (draws[0.5][0], draws[0.5][1]), (draws[0.5][:, 1:], draws[0.5][:, :-1])):
        assert abs((pair[0] == pair[1]).float().mean().item() - 0.5) < 5 * math.sqrt(0.25 / pair[0].numel())


def test_prompt_keys_do_not_see_padding() -> None:
    left, alone = padded(PROMPTS), [prompt_key(torch.tensor([p]), torch.ones(1, len(p)).bool()) for p in PROMPTS]
    together = prompt_key(left["input_ids"], left["attention_mask"].bool())
    assert together.tolist() == [key.item() for key in alone] and len(set(together.tolist())) == 3
    assert prompt_key(torch.tensor([[1, 2]]), torch.ones(1, 2).bool()) != prompt_key(
        torch.tensor([[2, 1]]), torch.ones(1, 2).bool()
    )


def lowbias32(x: int) -> int:
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * factor % 2**32
    return x ^ (x >> 16)


def test_hashes_are_those_of_whole_numbers() -> None:
    for state, number in ((0, 0), (1, 5), (2**32 - 1, 7), (12345, 2**32 - 1)):
        wanted = lowbias32(((state ^ number) + 0x9E3779B9) % 2**32)
        assert mixed(torch.tensor([state]), torch.tensor([number])).item() == wanted


def test_plain_passes(gemma: Any, sae_in: Any, sae_out: Any, cdmap: Any) -> None:
    """Gates that need no logits act in plain passes; one that does is refused."""
    loop = plain(gemma, sae_in, sae_out, cdmap)
    text, n_prompt = torch.tensor([PROMPTS[2]]), 6
    with torch.no_grad():
        base = gemma(text).logits
        with dspa.Steering(sae_in, sae_out, cdmap, CONFIG, gate=dspa.FirstTokens(2)).attach(gemma) as steering:
            with steering.responses([n_prompt]):
                first = gemma(text).logits
            assert (steering.decisions.read.tolist(), steering.decisions.touched.tolist()) == ([4], [2])
        with loop.steered(PROMPTS[2][:n_prompt]):
            everywhere = gemma(text, use_cache=False).logits
    assert_same_logits(first[:, : n_prompt + 1], everywhere[:, : n_prompt + 1])
    assert torch.equal(first[:, : n_prompt - 1], base[:, : n_prompt - 1])
    assert (first[:, n_prompt + 1 :] - everywhere[:, n_prompt + 1 :]).abs().max() > 1e-3
    entropy_gate = dspa.Steering(sae_in, sae_out, cdmap, CONFIG, gate=dspa.EntropyGate()).attach(gemma)
    with entropy_gate, pytest.raises(dspa.ModelError, match=r"EntropyGate, reads the logits.*log_probabilities"):
        entropy_gate.responses([3])


def test_refused_settings(sae_out: Any) -> None:
    for make, message in (
        (lambda: dspa.EntropyGate(-1.0), "threshold.*finite number >= 0"),
        (lambda: dspa.EntropyGate(k=1), "whole number >= 2"),
        (lambda: dspa.EntropyGate(1.2, k=3), r"`threshold` is 1\.2; accepted: 0 to ln 3, 1\.099 nats"),
        (lambda: dspa.RandomGate(1.5), "number from 0 to 1"),
        (lambda: dspa.FirstTokens(0), "whole number >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(TypeError, match=r"`gate` is a str; accepted: a dspa.EntropyGate"):
        dspa.Steering.of_latents(sae_out, [1], gate="entropy")  # type: ignore[arg-type]


def test_the_gate_of_what_is_attached_stays(gemma: Any) -> None:
    vector = make_vector("response")
    with vector.attach(gemma), pytest.raises(dspa.ModelError, match="`gate` cannot be changed"):
        vector.gate = dspa.EntropyGate()


def test_several_tokens_at_once_are_refused() -> None:
    decisions = Decisions(dspa.EntropyGate(), torch.zeros(1, dtype=torch.int64), 3, "opened")
    decisions.begin([], 5)
    decisions.step(torch.ones(1, 3, dtype=torch.int64), 3, 3)
    with pytest.raises(dspa.ModelError, match="over tokens 1 to 2"):
        decisions.step(torch.ones(1, 5, dtype=torch.int64), 2, 5)
