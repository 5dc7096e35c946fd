"""The report as a page: complete, escaped, without a network, and with the numbers of its record."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dspa.audit.edits import Effect, LatentEdits, TextEdits
from dspa.audit.evidence import Context
from dspa.audit.record import Audit, Judgment, LatentRecord, Sample, SampleToken, Section
from dspa.audit.report import render, write_report
from dspa.audit.words import summary

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)> \"'&"
UNJUDGED = Judgment()
VOID = {"meta", "input", "path", "br"}


class Page(HTMLParser):
    """Tags with attributes, and text outside of scripts and styles. Raises for tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self._open):
            self.text += data

    def with_class(self, name: str) -> list[dict[str, str | None]]:
        return [attrs for _, attrs in self.tags if name in (attrs.get("class") or "").split()]


def edits_of(change: float, n: int = 2) -> LatentEdits:
    return LatentEdits(n, 1, 2.0, 2.0 + change / n, change, ((EVIL, n),))


def make_audit(n: int = 4) -> Audit:
    """An audit of n latents whose texts are hostile wherever there is one."""
    edits = {j: edits_of(-1.0 - j) for j in range(0, n, 2)}
    records = [
        LatentRecord(
            latent=j,
            group=("augment", "ablate", "control", "edited")[j % 4],
            column_sum=None if j % 4 == 2 else 1.5 - j,
            promotes=(EVIL, f" token{j}"),
            suppresses=("\n",),
            label=EVIL if j == 1 else "",
            density=0.0 if j == 3 else 0.125 / (1 + j),
            contexts=()
            if j == 3
            else [Context(1, 1, (EVIL, f" strong{j}", "\n", " none"), (0.5, 4.0, 2.0, 0.0)) for _ in range(10)],
            edits=edits.get(j),
            judgment=Judgment(EVIL, "Discourse", {"detection": 0.75 - 0.1 * j, "fuzzing": None})
            if j < 3
            else Judgment(),
        )
        for j in range(n)
    ]
    return Audit(
        title=EVIL,
        latents=records,
        settings={"prompts": EVIL},
        versions={"torch": "2"},
        edits=TextEdits(8, 32, 3, edits),
        effects=[Effect("augment", 0, 9, (), 0, 0.0, 0.0), Effect("ablate", 2, 7, (2,), 1, 4.0, 1.0)],
        n_read=1000,
        density=[0.125, 0.06, 0.0, 0.01],
        samples=[Sample(EVIL, EVIL, [SampleToken(f"{EVIL} "), SampleToken("word", [(0, 2.0, 1.0), (77, 1.0, 1.5)])])],
        sections=[Section("Shares", "Of the categories.", ["category", "share"], [[EVIL, 0.51234], ["other", None]])],
    )


def test_text_stays_text() -> None:
    html = render(make_audit())
    page = Page(html)
    assert EVIL not in html and page.text.count("<script>alert(1)</script>") > 20
    assert sum(tag == "script" for tag, _ in page.tags) == 1 and not any(tag == "img" for tag, _ in page.tags)
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)


def test_nothing_is_loaded() -> None:
    page = Page(render(make_audit()))
    for tag, attrs in page.tags:
        assert tag not in ("link", "iframe", "object") and "src" not in attrs
        for name in ("href", "xlink:href"):
            assert (attrs.get(name) or "#").startswith("#")
    assert any("default-src 'none'" in (attrs.get("content") or "") for _, attrs in page.tags)


def test_every_link_leads_to_a_part_of_the_page() -> None:
    page = Page(render(make_audit()))
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(set(ids)) == len(ids)
    links = {attrs["href"] for tag, attrs in page.tags if tag == "a"}
    assert {f"#latent-{j}" for j in range(4)} <= links and links <= {f"#{name}" for name in ids}


def test_marks_differ_without_colour() -> None:
    """With ten contexts per latent, 0.5 is an eighth of the strongest, 2 a half; what is 0 has no mark."""
    page = Page(render(make_audit()))
    counts = {name: len(page.with_class(name)) for name in ("v1", "v2", "v3")}
    # One more in the legend of each page with contexts.
    assert counts == dict.fromkeys(counts, 33)
    edited = page.with_class("edit")
    assert [attrs["tabindex"] for attrs in edited] == ["0"]
    assert "▼ 0 2 → 1" in page.text and "▲ 77 1 → 1.5" in page.text
    for _, attrs in page.tags:
        assert attrs.get("role") != "img" or attrs.get("aria-label")


def test_numbers_are_those_of_the_record(tmp_path: Path) -> None:
    audit = make_audit()
    write_report(audit, tmp_path)
    record = json.loads((tmp_path / "audit.json").read_text())
    assert record["format"] == "dspa.audit.1" and record["edits"]["latents"]["2"]["change"] == -3.0
    assert [latent["density"] for latent in record["latents"]] == [one.density for one in audit.latents]
    assert record["latents"][0]["contexts"][0]["values"] == [0.5, 4.0, 2.0, 0.0]
    with (tmp_path / "latents.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["latent"] for row in rows] == ["0", "1", "2", "3"] and rows[0]["detection"] == "0.75"
    assert rows[2]["change"] == "-3.0" and rows[1]["change"] == "0.0" and rows[1]["mean_before"] == ""
    assert (tmp_path / "report.html").read_bytes() == render(audit).encode()


def test_half_a_character_can_be_written(tmp_path: Path) -> None:
    write_report(replace(make_audit(), title="half \ud83d"), tmp_path)
    assert "half \\ud83d" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_what_is_absent_is_left_out() -> None:
    audit = Audit("map", [LatentRecord(5, "control")], {}, {})
    page = Page(render(audit))
    assert not page.with_class("edit") and not page.with_class("contexts") and "category" not in page.text
    assert not any(tag == "svg" for tag, _ in page.tags)
    assert "No texts were steered" in page.text and "No texts were read" in page.text


def test_the_summary_says_what_was_measured() -> None:
    sentences = " ".join(summary(make_audit()))
    for words in (
        "4 latents: 1 with the largest column sums",
        "In 3 steered texts, 8 tokens were edited, 25% of the 32 that could be, and 2 different latents",
        "Edits raise no latent",
        "Edits lower 2 latents. 1 of them are among the 7 that the map presumes, not 2; 1 are among the columns with "
        "the smallest sums, and have 25% of the movement.",
        "of 1,000 tokens. 1 of the audited latents are active on none of them",
    ):
        assert words in sentences


@pytest.mark.parametrize("n", [150])
def test_a_large_report_is_below_5_mb(n: int) -> None:
    assert len(render(make_audit(n)).encode()) < 5e6


def test_the_same_audit_is_the_same_page() -> None:
    assert render(make_audit()) == render(make_audit())


def test_scores_of_any_name_have_a_column() -> None:
    page: Any = Page(render(make_audit()))
    assert "detection" in page.text and "0.75" in page.text and "0.512" in page.text
