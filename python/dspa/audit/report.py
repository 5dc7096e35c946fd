"""The report of an audit: one HTML file that needs nothing else, with the same figures as JSON and CSV beside it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dspa.audit.edits import ABLATE, AUGMENT, CONTROL, EDITED
from dspa.audit.plots import plots
from dspa.audit.record import Audit, LatentRecord
from dspa.audit.words import summary
from dspa.outputs import write_atomically

FILES = ("audit.json", "latents.csv", "report.html")
GROUPS = {
    "map": {
        AUGMENT: "one of the columns with the largest sums, which preferred responses activate more often",
        ABLATE: "one of the columns with the smallest sums, which preferred responses activate less often",
        CONTROL: "a random latent, as a control",
        EDITED: "among the latents that were moved farthest in texts, and in no other group",
    },
    "adapter": {
        AUGMENT: "one of the latents that the adapter raises most in its texts",
        ABLATE: "one of the latents that the adapter lowers most in its texts",
        CONTROL: "a random latent that is active in these texts, as a control",
    },
}
# Latents that the mark of an edited token names.
N_NAMED = 5


def write_report(audit: Audit, folder: Path) -> None:
    """Write `report.html`, `audit.json` and `latents.csv` to a folder.

    Raises:
        OSError: they cannot be written.
    """
    audit.write(folder)
    write_atomically(folder / "report.html", render(audit).encode("utf-8", "backslashreplace"))


def render(audit: Audit) -> str:
    """Return the report as HTML. Text of users and models is escaped, and stays text."""
    environment = Environment(
        loader=PackageLoader("dspa.audit"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "visible": visible, "level": level}
    return environment.get_template("report.html").render(
        audit=audit,
        summary=summary(audit),
        groups=GROUPS[audit.kind],
        # Made here, out of numbers and names of groups.
        plots=[(plot.caption, Markup(plot.svg)) for plot in plots(audit)],  # noqa: S704
        records={record.latent: record for record in audit.latents},
        has_sums=audit.kind == "map",
        has_categories=any(record.judgment.category for record in audit.latents),
        n_named=N_NAMED,
        meaning=meaning,
        largest=largest,
    )


def meaning(record: LatentRecord | None) -> str:
    """Return what is known of a latent in a few words: its explanation, its label, or the tokens that it promotes."""
    if record is None:
        return ""
    promotes = " ".join(f"“{visible(token.strip() or token)}”" for token in record.promotes)
    return record.judgment.explanation or record.label or promotes


def largest(edits: Iterable[tuple[int, float, float]]) -> list[tuple[int, float, float]]:
    """Return the edits of a token that move farthest, those that its mark names."""
    return sorted(edits, key=lambda edit: -abs(edit[2] - edit[1]))[:N_NAMED]


def number(value: float | int | str | None) -> str:
    """Return a value for a table, nothing for None."""
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def visible(text: str) -> str:
    """Return a text in which line breaks and tabs show."""
    return text.replace("\n", "↵").replace("\r", "␍").replace("\t", "⇥")


def level(value: float, most: float) -> int:
    """Return how strong a value is, from 0 for none to 3, of which the strongest has more than two thirds of `most`."""
    return 0 if value <= 0 or most <= 0 else min(3, 1 + int(3 * value / most))
