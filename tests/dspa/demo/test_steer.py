"""The demo reaches what it claims, with the same code that steers any model."""

from __future__ import annotations

import json

import pytest

from dspa.demo import language, steer


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / "demo.json"
    return steer.run(path, progress=False), json.loads(path.read_text())


def outcome(outcomes, name, alpha):
    return next(each for each in outcomes[0] if (each.method, each.alpha) == (name, alpha))


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


def test_assets_are_small():
    size = sum(path.stat().st_size for path in steer.ASSETS.rglob("*") if path.is_file())
    assert size <= 6_000_000


def test_the_preference_flips_with_the_register():
    """In the triples, each register's chosen answers are of the style that the other's rejected ones are."""
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
