"""The demo reaches what it claims, with the same code that steers any model."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout

import pytest

from dspa.demo import language, steer


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Outcomes, record and what was printed."""
    path, printed = tmp_path_factory.mktemp("demo") / "demo.json", io.StringIO()
    with redirect_stdout(printed):
        return steer.run(path, progress=False), json.loads(path.read_text()), printed.getvalue()


def outcome(outcomes, name, alpha):
    return next(reached for reached in outcomes[0] if (reached.method, reached.alpha) == (name, alpha))


def test_dspa_at_the_published_settings(outcomes):
    base = outcome(outcomes, "base model", None)
    dspa = outcome(outcomes, "DSPA ablate", 0.2)
    static = outcome(outcomes, "Static-SAE", 0.2)
    gain = dspa.mean_share - base.mean_share
    assert gain >= 0.10
    assert static.mean_share - base.mean_share <= gain / 3
    assert dspa.perplexity == pytest.approx(base.perplexity, rel=0.03)


def test_every_seed_gains(outcomes):
    base, dspa = outcome(outcomes, "base model", None), outcome(outcomes, "DSPA ablate", 0.2)
    assert all(after > before for before, after in zip(base.share, dspa.share, strict=True))


def test_record(outcomes):
    record = outcomes[1]
    assert record["settings"]["k_prompt"] == 32 and record["settings"]["n_triples"] == 250
    assert len(record["outcomes"]) == len(steer.METHODS) and all(len(o["share"]) == 3 for o in record["outcomes"])
    assert any(any(example["edited"]) for example in record["examples"])


def outcomes_with(static: float, dspa: float) -> list[steer.MethodOutcome]:
    """Outcomes at the published alpha with these shares, over a base of 0.5."""
    alpha = steer.PUBLISHED.alpha
    named = (("base model", None, 0.5), ("Static-SAE", alpha, static), ("DSPA ablate", alpha, dspa))
    return [steer.MethodOutcome(name, at, [share], 2.0) for name, at, share in named]


def test_the_conclusion_follows_the_numbers():
    sentence = steer.conclusion(outcomes_with(static=0.55, dspa=0.7))
    assert sentence.startswith(
        "Latents chosen per prompt follow the preference better than one fixed set: at alpha 0.2"
    )
    assert "from 0.500 to 0.700 with DSPA ablate and to 0.550 with Static-SAE" in sentence and "+0.0%" in sentence
    for static, dspa in ((0.7, 0.6), (0.3, 0.4)):
        assert "do not follow the preference better" in steer.conclusion(outcomes_with(static, dspa))


def example(preferred: language.Style, base: str, steered: str) -> steer.Example:
    return steer.Example("", preferred, base.split(), steered.split(), [False] * len(steered.split()))


def test_samples_are_those_with_the_largest_gain_per_register():
    formal = [example("formal", "get", word) for word in ("get", "obtain", "obtain", "obtain")]
    casual = [example("casual", *words) for words in (("get", "obtain"), ("get buy", "get"), ("get obtain", "get"))]
    answered = [*formal, *casual]
    assert steer.choose(answered) == [formal[1], formal[2], casual[2]]
    assert [answer.gain for answer in casual] == [-1, 0, 0.5]
    sentence = steer.legend(answered, 3)
    assert sentence.startswith("3 samples of DSPA at alpha 0.2 in mode ablate, chosen to show the difference")
    assert "Of all 7 prompts it rises on 4, falls on 1 and stays on 2." in sentence and "A ^ follows" in sentence


def test_the_table_comes_first_then_the_conclusion_then_samples(outcomes):
    heads = ("neutral", "Latents chosen per prompt", "4 samples of DSPA at alpha 0.2 in mode ablate", "base, ")
    places = [outcomes[2].index(head) for head in heads]
    assert places == sorted(places) and outcomes[2].count("  base, ") == 4


def test_assets_are_small():
    size = sum(path.stat().st_size for path in steer.ASSETS.rglob("*") if path.is_file())
    assert size <= 6_000_000


def test_the_preference_flips_with_the_register():
    """In every triple, the chosen and the rejected answer are of different styles."""
    rows = [json.loads(line) for line in (steer.ASSETS / "preferences.jsonl").read_text().splitlines()]
    for row in rows:
        styles = {
            part: [language.count_style_words(row[part], style)[0] for style in language.STYLES]
            for part in ("chosen", "rejected")
        }
        assert styles["chosen"].index(max(styles["chosen"])) != styles["rejected"].index(max(styles["rejected"]))


def test_prompt_and_response_tokens_join():
    demo = steer.World()
    for row in demo.held_out[:20]:
        apart = (
            demo.tokenizer(row["prompt"])["input_ids"]
            + demo.tokenizer(row["response"], add_special_tokens=False)["input_ids"]
        )
        assert apart == demo.tokenizer(row["prompt"] + row["response"])["input_ids"]
