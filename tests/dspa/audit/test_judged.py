"""What a judge says, as the report shows it."""

from __future__ import annotations

import pytest
import torch

from dspa.audit.explained import ExplainedLatent, compare_groups
from dspa.audit.judged import folded, group_sections, hand_section, judgment_of
from dspa.audit.record import Judgment
from dspa.audit.scoring import Score
from dspa.confusion import Confusion
from dspa.errors import LabelError
from dspa.saes.labels import Labels

DETECTION = Score(10, Confusion(tp=3, fn=1, fp=2, tn=2), "the answer is 'yes'; accepted: a list")
FUZZING = Score(8, Confusion(tp=4, fn=0, fp=0, tn=4))


def test_a_latent_of_a_judge():
    latent = ExplainedLatent("cats", "m", "contexts", False, "[[cat]]", "Content", DETECTION, FUZZING, "No luck.")
    assert judgment_of(latent) == Judgment(
        "cats",
        "Content",
        {"detection": (3 / 4 + 2 / 4) / 2, "fuzzing": 1.0, "answered": 16, "unanswered": 2},
        {
            "explained by": "m, by contexts",
            "the judge stands by it": "no",
            "evidence": "[[cat]]",
            "F1": "detection 0.667, fuzzing 1.000",
            "problems": "No luck. Unanswered: the answer is 'yes'; accepted: a list.",
        },
    )


def test_auc_where_the_judge_gives_probabilities():
    sure = Score(4, Confusion(2, 0, 0, 2), "", ((True, 0.9), (True, 0.4), (False, 0.6), (False, 0.1)))
    assert judgment_of(ExplainedLatent("cats", fuzzing=sure)).notes["AUC"] == "fuzzing 0.750"


def test_a_latent_without_anything():
    scores = {"detection": None, "fuzzing": None, "answered": 0, "unanswered": 0}
    assert judgment_of(ExplainedLatent()) == Judgment(scores=scores)


def test_tables_of_groups():
    def some(category: str | None) -> ExplainedLatent:
        return ExplainedLatent("x", category=category, detection=DETECTION, fuzzing=FUZZING)

    latents = {0: some("Discourse"), 1: some("Discourse"), 2: some(None), 3: some("Content"), 4: some("Content")}
    groups = {"ablate": [0, 1, 2], "control": [3, 4]}
    quality, shares = group_sections(compare_groups(latents, groups, "control"))
    assert quality.rows == [
        ("ablate", 3, 3, 2, 0.625, None, None, "24 of 30", 1.0, None, None, "24 of 24"),
        ("control", 2, 2, 2, 0.625, None, None, "16 of 20", 1.0, None, None, "16 of 16"),
    ]
    assert len(quality.columns) == len(quality.rows[0])
    weighed, _ = group_sections(compare_groups(latents, groups, "control", torch.tensor([0.1, 0.2, 0, 0, 0])))
    assert weighed.rows[0][5::4] == (pytest.approx(2 / 3), pytest.approx(1.0)) and weighed.rows[1][5::4] == (None, None)
    content, discourse = shares.rows
    assert (content[:4], discourse[:4]) == (("ablate", "Content", 0, 0.0), ("ablate", "Discourse", 2, 1.0))
    # One of the 6 ways to draw 2 of 4 is as extreme on either side.
    assert discourse[-2:] == (0.0, pytest.approx(1 / 3))
    assert len(shares.columns) == len(discourse)
    (only,) = group_sections(compare_groups(latents, {"ablate": [0], "control": [2]}, "control"))
    assert only.title == quality.title


def test_a_table_of_labels_by_hand():
    latents = {n: ExplainedLatent("x", category="Content" if n < 6 else "Structure") for n in range(10)}
    latents[10] = ExplainedLatent("x")
    hand = folded(
        Labels({**dict.fromkeys(range(4), "Safety"), **dict.fromkeys(range(4, 10), "Structure"), 10: "Intent"}, 99)
    )
    assert hand.categories[0] == "Content"
    assert hand.categories[10] == "Discourse"
    section = hand_section(latents, hand)
    assert "accuracy is 0.800" in section.text
    assert "1 more have a label by hand alone" in section.text
    assert len(section.columns) == len(section.rows[0])
    low, high = section.rows[0][-2:]
    assert 0 <= low <= section.rows[0][-3] <= high <= 1
    content = dict(zip(section.columns, section.rows[0], strict=True))
    assert (content["category"], content["by hand"], content["by the judge"], content["by both"]) == (
        "Content",
        4,
        6,
        4,
    )
    assert (content["recall"], content["balanced accuracy"]) == (1.0, pytest.approx((1 + 4 / 6) / 2))
    # 6 of 10 are labelled, and a third of the others are labelled falsely: (0.6 - 1/3) / (1 - 1/3).
    assert (content["share"], content["corrected share"]) == (0.6, pytest.approx(0.4))
    with pytest.raises(LabelError, match="'Style' is not known"):
        folded(Labels({1: "Style"}, 99))
