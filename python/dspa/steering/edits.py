"""An edit, which token, which latents and by how much, and a summary of many for people."""

from __future__ import annotations

import html
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from dspa.data.token_texts import quoted
from dspa.schemas import Count, Number

# Rows of a table, and names in a cell.
N_ROWS, N_NAMES = 10, 3


@dataclass(frozen=True)
class Edit:
    """One edited token.

    Attributes:
        call: number of the call of `generate()` or the model, from 0.
        row: sequence in the batch. A beam or return sequence counts as one.
        position: position_id of the token, whose residual predicts the token after it.
        maximum: `M_t`, the token's largest latent, None where strengths do not depend on it.
        latents: latents of the output SAE that changed.
        before, after: their values.
        token: id of the token, None where the model was given embeddings.
        text: its text, None without a tokenizer.
        promoted: the tokens that each of `latents` promotes most, None where the map does not record them.
    """

    call: Count
    row: Count
    position: Count
    maximum: Number | None
    latents: list[Count]
    before: list[Number]
    after: list[Number]
    token: Count | None = None
    text: str | None = None
    promoted: list[list[str]] | None = None


@dataclass(frozen=True)
class SteeredText:
    """One text of a call, whose edits are recorded to its end.

    Attributes:
        call, row: as of its edits.
        n_tokens: number of tokens that were predicted with steering, from edited and unedited residuals.
        map_digest: `ConditionalDifferenceMap.digest` of the map that steered it.
    """

    call: Count
    row: Count
    n_tokens: Count
    map_digest: str


@dataclass(frozen=True)
class TraceTable:
    """The first rows of a table whose first column is a name and whose last one is a list of names.

    Attributes:
        title: what its rows are, and how many there are.
        header: names of the columns.
        rows: cells of each row.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def text(self) -> str:
        """Return the table in columns of equal width."""
        lines = [self.header, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        middle = range(1, len(widths) - 1)
        cells = [[line[0].ljust(widths[0]), *(line[n].rjust(widths[n]) for n in middle), line[-1]] for line in lines]
        return "\n".join((self.title, *("  ".join(line).rstrip() for line in cells)))

    def html(self) -> str:
        """Return the table for a notebook."""
        lines = [("th", self.header), *(("td", row) for row in self.rows)]
        rows = ("".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line) for tag, line in lines)
        return f"<p>{self.title}</p><table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


@dataclass(frozen=True)
class Summary:
    """One line on a trace, and its tables.

    Attributes:
        line: number of edited tokens, and of what they are in.
        tables: the most edited latents and tokens; none for an empty trace.
    """

    line: str
    tables: Sequence[TraceTable]

    @classmethod
    def of(cls, edits: Iterable[Edit], promoted: Mapping[int, Sequence[str]] | None = None) -> Summary:
        """Summarise edits, with the tokens that latents promote where they are known."""
        edits = list(edits)
        if not edits:
            return cls("Trace: no token was edited, or nothing was recorded (record=True).", ())
        n_sequences = len({(edit.call, edit.row) for edit in edits})
        line = f"Trace: {len(edits)} edited tokens in {n_sequences} sequences"
        if all(edit.text is None for edit in edits):
            line += ". Tokens are named by their ids: set `trace.tokenizer` for their text"
        return cls(f"{line}.", (_latent_table(edits, promoted or {}), _token_table(edits, promoted or {})))

    def text(self) -> str:
        """Return the summary for a terminal."""
        return "\n\n".join((self.line, *(table.text() for table in self.tables)))

    def html(self) -> str:
        """Return the summary for a notebook."""
        return "".join((f"<p>{html.escape(self.line)}</p>", *(table.html() for table in self.tables)))


def _latent_table(edits: Sequence[Edit], promoted: Mapping[int, Sequence[str]]) -> TraceTable:
    values: dict[int, list[tuple[float, float]]] = defaultdict(list)
    tokens: dict[int, Counter[str]] = defaultdict(Counter)
    for edit in edits:
        for latent, before, after in zip(edit.latents, edit.before, edit.after, strict=True):
            values[latent].append((before, after))
            tokens[latent][_name(edit)] += 1
    most = sorted(values, key=lambda latent: (-len(values[latent]), latent))[:N_ROWS]
    rows = []
    for latent in most:
        means = (f"{fmean(value):.4g}" for value in zip(*values[latent], strict=True))
        name = f"{latent} {quoted(promoted.get(latent, ())[:N_NAMES])}".rstrip()
        rows.append((name, str(len(values[latent])), *means, _most_common(tokens[latent])))
    title = f"Most edited latents, {len(most)} of {len(values)}, with means"
    title += ", and the tokens that they promote" if promoted else ""
    return TraceTable(title, ("latent", "tokens", "before", "after", "most often at"), rows)


def _token_table(edits: Sequence[Edit], promoted: Mapping[int, Sequence[str]]) -> TraceTable:
    named: dict[str, list[Edit]] = defaultdict(list)
    for edit in edits:
        named[_name(edit)].append(edit)
    most = sorted(named, key=lambda name: (-len(named[name]), name))[:N_ROWS]
    rows = []
    for name in most:
        latents = Counter(
            f"{latent} {quoted(promoted.get(latent, ())[:1])}".rstrip()
            for edit in named[name]
            for latent in edit.latents
        )
        per_edit = fmean(len(edit.latents) for edit in named[name])
        rows.append((name, str(len(named[name])), f"{per_edit:.4g}", _most_common(latents)))
    title = f"Most edited tokens, {len(most)} of {len(named)}; an edit changes the prediction of the token after it"
    return TraceTable(title, ("token", "times", "latents", "most often"), rows)


def _name(edit: Edit) -> str:
    """Return the text of an edited token in quotes, so that spaces show, or else its id."""
    if edit.text is not None:
        return quoted([edit.text])
    return "embedding" if edit.token is None else str(edit.token)


def _most_common(counts: Counter[str]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in counts.most_common(N_NAMES))
