"""Summary of an audit in sentences."""

from __future__ import annotations

from collections.abc import Iterator

from dspa.audit.edits import ABLATE, AUGMENT, CONTROL, EDITED, Effect
from dspa.audit.record import Audit, LatentRecord
from dspa.errors import listed

# Latents that are named in a sentence.
N_NAMED = 3
VERBS = {AUGMENT: "raise", ABLATE: "lower"}
ENDS = {AUGMENT: "largest", ABLATE: "smallest"}
GROUPS = {
    "map": {
        AUGMENT: "with the largest column sums, which preferred responses activate more often",
        ABLATE: "with the smallest, which they activate less often",
        CONTROL: "random ones as a control",
        EDITED: "others that were moved far in texts",
    },
    "adapter": {
        AUGMENT: "that the adapter raises most in the texts that it steered",
        ABLATE: "that it lowers most",
        CONTROL: "random ones that are active there as a control",
    },
}
FIRST = {
    "map": {AUGMENT: "The largest sums are those of", ABLATE: "The smallest sums are those of"},
    "adapter": {AUGMENT: "Raised most are", ABLATE: "Lowered most are"},
}


def summary(audit: Audit) -> list[str]:
    """Return sentences that say what was audited, what is edited, and which presumed effects occur."""
    return [*_on_latents(audit), *_on_edits(audit), *map(_on_effect, audit.effects), *_on_texts(audit)]


def _on_latents(audit: Audit) -> Iterator[str]:
    groups = ", ".join(
        f"{len(audit.group(name))} {words}" for name, words in GROUPS[audit.kind].items() if audit.group(name)
    )
    yield f"The audit looks at {len(audit.latents)} latents: {groups}."
    for direction in (AUGMENT, ABLATE):
        if first := audit.group(direction)[:N_NAMED]:
            yield f"{FIRST[audit.kind][direction]} {'; '.join(map(_name, first))}."


def _on_edits(audit: Audit) -> Iterator[str]:
    if (edits := audit.edits) is None:
        yield "No texts were steered for this audit, so it cannot say what is edited in practice."
        return
    share = "" if edits.share is None else f", {edits.share:.0%} of the {edits.n_tokens:,} that could be"
    yield (
        f"In {edits.n_texts} steered texts, {edits.n_edited:,} tokens were edited{share}, and {len(edits.latents)} "
        "different latents."
    )
    records = {record.latent: record for record in audit.latents}
    total = sum(abs(one.change) for one in edits.latents.values())
    movers = list(edits.latents)[:N_NAMED]
    if movers:
        part = sum(abs(edits.latents[latent].change) for latent in movers) / total
        names = "; ".join(_name(records[latent]) if latent in records else str(latent) for latent in movers)
        yield f"Those moved farthest are {names}: {part:.0%} of all movement."


def _on_effect(effect: Effect) -> str:
    verb, end = VERBS[effect.direction], ENDS[effect.direction]
    if not effect.n_latents:
        return f"Edits {verb} no latent, which is as it should be unless the mode is {effect.direction} or both."
    inside = effect.n_latents - len(effect.outside)
    but = f", not {listed(effect.outside, 5)}" if effect.outside else ""
    return (
        f"Edits {verb} {effect.n_latents} latents. {inside} of them are among the {effect.n_union} that the map "
        f"presumes{but}; {effect.n_extreme} are among the columns with the {end} sums, and have "
        f"{effect.extreme_change / effect.change:.0%} of the movement."
    )


def _on_texts(audit: Audit) -> Iterator[str]:
    if audit.n_read is None:
        yield "No texts were read, so latents have no contexts and no density (--texts)."
        return
    silent = [record.latent for record in audit.latents if not record.density]
    never = f" {len(silent)} of the audited latents are active on none of them." if silent else ""
    yield f"Contexts and densities are of {audit.n_read:,} tokens.{never}"


def _name(record: LatentRecord) -> str:
    """Return the number of a latent, with its explanation, its label or the tokens that it promotes."""
    meaning = record.judgment.explanation or record.label
    if not meaning and record.promotes:
        meaning = "promotes " + ", ".join(f"“{token.strip()}”" for token in record.promotes[:N_NAMED])
    return f"{record.latent} ({meaning})" if meaning else str(record.latent)
