"""The record of an audit: all that its report shows, also as JSON and CSV."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dspa.audit.edits import AUGMENT, EDITED, Effect, LatentEdits, TextEdits, presumed_effects
from dspa.audit.evidence import Context, Evidence
from dspa.data.token_texts import quoted
from dspa.files import write_csv
from dspa.maps.cdmap import ConditionalDifferenceMap
from dspa.maps.reports import origin
from dspa.outputs import write_atomically

FORMAT = "dspa.audit.1"
PACKAGES = ("dspa-kernels", "torch", "transformers")


@dataclass(frozen=True)
class Judgment:
    """Explanation of a latent by a judge or a person, as far as there is one.

    Attributes:
        explanation: what the latent responds to.
        category: category of the explanation.
        scores: further figures by name, as the balanced accuracy of detection.
        notes: further texts by name, as the evidence for the explanation.
    """

    explanation: str = ""
    category: str = ""
    scores: Mapping[str, float | int | str | None] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LatentRecord:
    """One latent, with all that is known of it.

    Attributes:
        latent: number of the latent.
        group: why it is here: a group of `audited_latents`, or "edited" for another one that was edited.
        column_sum: sum of its column of the map, None without a column.
        promotes, suppresses: tokens whose logits it raises and lowers most, by the logit lens.
        label: what a file of labels says of it.
        density: share of the tokens of the texts on which it is active, None without texts.
        contexts: where it is strongest in the texts, the strongest first.
        edits: its edits, None where it was not edited.
        judgment: explanation, category and scores.
    """

    latent: int
    group: str
    column_sum: float | None = None
    promotes: Sequence[str] = ()
    suppresses: Sequence[str] = ()
    label: str = ""
    density: float | None = None
    contexts: Sequence[Context] = ()
    edits: LatentEdits | None = None
    judgment: Judgment = Judgment()

    def row(self, scores: Sequence[str]) -> dict[str, Any]:
        """Return one line of CSV, with a column for each of these scores."""
        edits = self.edits
        return {
            "latent": self.latent,
            "group": self.group,
            "column_sum": self.column_sum,
            "density": self.density,
            "edited_tokens": edits.n_tokens if edits else 0,
            "edited_texts": edits.n_texts if edits else 0,
            "mean_before": edits.before if edits else None,
            "mean_after": edits.after if edits else None,
            "change": edits.change if edits else 0.0,
            "promotes": quoted(self.promotes),
            "suppresses": quoted(self.suppresses),
            "label": self.label,
            "explanation": self.judgment.explanation,
            "category": self.judgment.category,
            **{name: self.judgment.scores.get(name) for name in scores},
        }


@dataclass(frozen=True)
class SampleToken:
    """A token of a steered text.

    Attributes:
        text: what it adds to the text.
        edits: latent and its values before and after, of the edits of the residual that predicted the token.
    """

    text: str
    edits: Sequence[tuple[int, float, float]] = ()


@dataclass(frozen=True)
class Sample:
    """Answers of the model to a prompt, without steering and with it."""

    prompt: str
    base: str
    steered: Sequence[SampleToken]


@dataclass(frozen=True)
class Section:
    """A table that somebody adds to the report, as of a judge's scores, under a sentence that says what it shows."""

    title: str
    text: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | int | None]]


@dataclass(frozen=True)
class Audit:
    """All that a report shows.

    Attributes:
        title: name of what was audited.
        latents: the audited latents, group by group.
        settings: settings and origin, by name.
        versions: versions of packages.
        edits: edits of texts, None without any.
        effects: presumed effects, with edits.
        n_read: number of tokens of the texts, None without texts.
        density: density of every latent of the SAE.
        samples: sample texts.
        sections: further tables.
        kind: "map" or "adapter".
    """

    title: str
    latents: Sequence[LatentRecord]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    edits: TextEdits | None = None
    effects: Sequence[Effect] = ()
    n_read: int | None = None
    density: Sequence[float] = ()
    samples: Sequence[Sample] = ()
    sections: Sequence[Section] = ()
    kind: str = "map"

    @property
    def scores(self) -> list[str]:
        """Names of the scores that any latent has, in their order."""
        return list(dict.fromkeys(name for record in self.latents for name in record.judgment.scores))

    def group(self, name: str) -> list[LatentRecord]:
        """Return the latents of a group."""
        return [record for record in self.latents if record.group == name]

    def write(self, folder: Path) -> None:
        """Write `audit.json` and `latents.csv` to a folder.

        Raises:
            OSError: they cannot be written.
        """
        record = {"format": FORMAT, **asdict(self)}
        write_atomically(folder / "audit.json", json.dumps(record, allow_nan=False).encode())
        scores = self.scores
        names = list(LatentRecord(0, AUGMENT).row(scores))
        write_csv(folder / "latents.csv", [latent.row(scores) for latent in self.latents], names)


def audit_of(
    cdmap: ConditionalDifferenceMap | None,
    groups: Mapping[str, Sequence[int]],
    *,
    title: str,
    settings: Mapping[str, Any],
    k_diff: int = 0,
    edits: TextEdits | None = None,
    evidence: Evidence | None = None,
    promotes: Mapping[int, Sequence[str]] | None = None,
    suppresses: Mapping[int, Sequence[str]] | None = None,
    labels: Mapping[int, str] | None = None,
    judgments: Mapping[int, Judgment] | None = None,
    samples: Sequence[Sample] = (),
    sections: Sequence[Section] = (),
) -> Audit:
    """Put together what is known of a map or an adapter, and of some latents.

    Args:
        cdmap: the map, None for an adapter.
        groups: latents by group: `audited_latents` or `moved_latents`, and others.
        title: name of the map or the adapter.
        settings: settings by name, to which the origin of the map is added.
        k_diff: as in the `SteeringConfig` of the map.
        edits: edits of texts.
        evidence: contexts and counts.
        promotes: tokens by latent, as `dspa.top_tokens` returns them; by default as the map records them.
        suppresses: the same for suppressed tokens.
        labels: texts of a file of labels by latent.
        judgments: explanations, categories and scores by latent.
        samples: sample texts.
        sections: further tables.
    """
    sums: dict[int, float] = {}
    promoted: Mapping[int, Sequence[str]] = {}
    effects: Sequence[Effect] = ()
    if cdmap is not None:
        sums = dict(zip(cdmap.columns.tolist(), cdmap.values.double().sum(dim=0).tolist(), strict=True))
        promoted = cdmap.promoted.get("sae_out", {})
        origins = {figure.name: figure.value for figure in origin(cdmap.meta)}
        settings = {**settings, "digest of the map": cdmap.digest, **origins}
        effects = presumed_effects(cdmap, edits, groups, k_diff) if edits else ()
    density = [] if evidence is None else evidence.density.tolist()
    promotes = promoted if promotes is None else promotes
    records = [
        LatentRecord(
            latent=latent,
            group=group,
            column_sum=sums.get(latent),
            promotes=promotes.get(latent, ()),
            suppresses=(suppresses or {}).get(latent, ()),
            label=(labels or {}).get(latent, ""),
            density=density[latent] if density else None,
            contexts=evidence.latents[latent].top if evidence else (),
            edits=edits.latents.get(latent) if edits else None,
            judgment=(judgments or {}).get(latent, Judgment()),
        )
        for group, latents in groups.items()
        for latent in latents
    ]
    return Audit(
        title=title,
        latents=records,
        settings=settings,
        versions={name: version(name) for name in PACKAGES},
        edits=edits,
        effects=effects,
        n_read=None if evidence is None else evidence.n_tokens,
        density=density,
        samples=samples,
        sections=sections,
        kind="adapter" if cdmap is None else "map",
    )


def with_edited(groups: Mapping[str, Sequence[int]], edits: TextEdits | None, n: int) -> dict[str, list[int]]:
    """Return groups with one more: the n latents that edits move farthest, of those that are in no group."""
    known = {latent for latents in groups.values() for latent in latents}
    others = [latent for latent in (edits.latents if edits else ()) if latent not in known]
    return {name: list(latents) for name, latents in groups.items()} | ({EDITED: others[:n]} if others[:n] else {})
