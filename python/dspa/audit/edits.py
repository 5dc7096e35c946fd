"""Edits: which latents are edited in texts, how often and how far, and which presumed effects of a map occur."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dspa.errors import TraceError, listed, refusal
from dspa.maps.cdmap import ConditionalDifferenceMap
from dspa.maps.reports import top_columns
from dspa.schemas import Count, check
from dspa.steering.edits import Edit, SteeredText
from dspa.steering.trace import read_trace

# Groups of latents: those with the largest and the smallest column sums, random others, and others that were edited.
AUGMENT, ABLATE, CONTROL, EDITED = "augment", "ablate", "control", "edited"
# Tokens that are named per latent.
N_TOKENS = 5


@dataclass(frozen=True)
class LatentEdits:
    """Edits of one latent.

    Attributes:
        n_tokens: number of tokens on which it was edited.
        n_texts: number of texts with such a token.
        before, after: mean of its value there before and after the edit.
        change: sum of after - before.
        tokens: text, or id, of the tokens on which it was edited most often, with the number of times.
    """

    n_tokens: int
    n_texts: int
    before: float
    after: float
    change: float
    tokens: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class TextEdits:
    """Edits of texts.

    Attributes:
        n_edited: number of tokens with an edit.
        n_tokens: number of tokens that could be edited, None where the trace does not record it for all texts.
        n_texts: number of texts, of which those without an edit count where the trace records them.
        latents: edits by latent, by falling size of `change`.
    """

    n_edited: int
    n_tokens: int | None
    n_texts: int
    latents: dict[int, LatentEdits]

    @property
    def share(self) -> float | None:
        """Share of the tokens that could be edited with an edit, None without tokens or their number."""
        return self.n_edited / self.n_tokens if self.n_tokens else None

    def with_sign(self, sign: int) -> dict[int, LatentEdits]:
        """Return the latents that edits raise (1) or lower (-1) in all."""
        return {latent: edits for latent, edits in self.latents.items() if sign * edits.change > 0}


@dataclass(frozen=True)
class Effect:
    """One presumed effect of a map, and whether the edits of texts have it.

    The map presumes that the latents it augments are those with a large entry in some row, the union of the `k_diff`
    largest of all rows, and that the latents it ablates are in the union of the `k_diff` smallest. With the published
    settings both held for all edited latents.

    Attributes:
        direction: "augment" for latents that edits raise, "ablate" for those that they lower.
        n_latents: number of latents edited in this direction.
        n_union: number of latents in the union.
        outside: those of the edited latents that are not in the union.
        n_extreme: number of the edited latents among the columns with the largest, or smallest, sums.
        change: sum of |after - before| over all edits in this direction.
        extreme_change: part of it on the columns with the largest, or smallest, sums.
    """

    direction: str
    n_latents: int
    n_union: int
    outside: tuple[int, ...]
    n_extreme: int
    change: float
    extreme_change: float


def audited_latents(cdmap: ConditionalDifferenceMap, n: int = 50, *, seed: int = 0) -> dict[str, list[int]]:
    """Return the latents to audit: the columns with the largest and the smallest sums, and a control.

    Args:
        cdmap: the map.
        n: number of latents per group; fewer where fewer columns have a sum of that sign.
        seed: seed of the control, random latents of the output SAE that are in neither group.

    Raises:
        ValueError: a negative `n`.
    """
    check(Count, n, ValueError, "`n`")
    augment, ablate = ([column.latent for column in columns] for columns in top_columns(cdmap, n))
    others = sorted(set(range(cdmap.meta.d_sae_out)) - {*augment, *ablate})
    control = random.Random(seed).sample(others, min(n, len(others)))
    return {AUGMENT: augment, ABLATE: ablate, CONTROL: control}


def read_edits(path: str | Path, cdmap: ConditionalDifferenceMap) -> TextEdits:
    """Read the edits of a file that `dspa generate --trace` wrote with a map.

    Raises:
        TraceError: a file without edits, one that is damaged, or the trace of another map.
    """
    edits, texts = read_trace(path)
    others = sorted({text.map_digest for text in texts} - {cdmap.digest, ""})
    if others:
        got = f"of the map with digest {listed(others)}"
        raise refusal(TraceError, str(path), got, f"a trace of this map, digest {cdmap.digest}")
    outside = sorted({latent for edit in edits for latent in edit.latents} - set(cdmap.columns.tolist()))
    if outside:
        got = f"edits of latents {listed(outside)}, which the map cannot edit"
        raise refusal(
            TraceError, str(path), got, f"a trace of this map, with edits of its {len(cdmap.columns)} columns"
        )
    if not edits:
        raise refusal(TraceError, str(path), "a trace without edits", "one that dspa generate --trace wrote")
    return summarise(edits, texts)


def summarise(edits: Iterable[Edit], texts: Sequence[SteeredText] = ()) -> TextEdits:
    """Summarise edits, and the texts that they are of, as far as these were recorded."""
    # Number of edits, and sums of the values before and after them.
    sums: dict[int, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    tokens: dict[int, Counter[str]] = defaultdict(Counter)
    where: dict[int, set[tuple[int, int]]] = defaultdict(set)
    n_edited, edited_texts = 0, set[tuple[int, int]]()
    for edit in edits:
        n_edited += 1
        edited_texts.add((edit.call, edit.row))
        for latent, before, after in zip(edit.latents, edit.before, edit.after, strict=True):
            sums[latent] = [total + value for total, value in zip(sums[latent], (1, before, after), strict=True)]
            where[latent].add((edit.call, edit.row))
            tokens[latent][str(edit.token) if edit.text is None else edit.text] += 1
    latents = {
        latent: LatentEdits(
            n_tokens=int(n),
            n_texts=len(where[latent]),
            before=before / n,
            after=after / n,
            change=after - before,
            tokens=tuple(tokens[latent].most_common(N_TOKENS)),
        )
        for latent, (n, before, after) in sums.items()
    }
    recorded = {(text.call, text.row) for text in texts}
    return TextEdits(
        n_edited=n_edited,
        n_tokens=sum(text.n_tokens for text in texts) if edited_texts <= recorded else None,
        n_texts=len(edited_texts | recorded),
        latents=dict(sorted(latents.items(), key=lambda item: (-abs(item[1].change), item[0]))),
    )


def unions(cdmap: ConditionalDifferenceMap, k_diff: int) -> dict[str, set[int]]:
    """Return the latents that have one of the `k_diff` largest positive entries of a row, or smallest negative ones."""
    k = min(k_diff, len(cdmap.columns))
    union = {}
    for direction, values in ((AUGMENT, cdmap.values), (ABLATE, -cdmap.values)):
        largest = values.topk(k, dim=1)
        union[direction] = {int(cdmap.columns[j]) for j in largest.indices[largest.values > 0].unique().tolist()}
    return union


def presumed_effects(
    cdmap: ConditionalDifferenceMap, edits: TextEdits, groups: Mapping[str, Sequence[int]], k_diff: int
) -> list[Effect]:
    """Return the presumed effects of a map, as far as the edits of texts have them.

    Args:
        cdmap: the map.
        edits: edits of texts.
        groups: the `audited_latents`.
        k_diff: as in the `SteeringConfig`.
    """
    union, effects = unions(cdmap, k_diff), []
    for direction, sign in ((AUGMENT, 1), (ABLATE, -1)):
        moved, extreme = edits.with_sign(sign), set(groups[direction])
        effects.append(
            Effect(
                direction=direction,
                n_latents=len(moved),
                n_union=len(union[direction]),
                outside=tuple(sorted(moved.keys() - union[direction])),
                n_extreme=len(moved.keys() & extreme),
                change=sum(abs(one.change) for one in moved.values()),
                extreme_change=sum(abs(one.change) for latent, one in moved.items() if latent in extreme),
            )
        )
    return effects
