"""Labels of latents: their files, rules, and what is refused."""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
from pathlib import Path

import pytest

from dspa.fsrl import LabelError, Labels, read_labels
from dspa.saes.labels import Explanation, LatentSpace, read_descriptions, read_explanations
from dspa.testing import make_sae

D_SAE = 40
DESCRIPTIONS = {3: "FORMATTING of lists", 7: "mentions of kindness", 12: "  ", 20: "bullet trains", 39: None}
RULES = {"style": ["format", r"\bbullets?\b"], "alignment": ["kind", "harm", "bullet"]}


@pytest.fixture(scope="module")
def sae():
    return make_sae(12, D_SAE, model_name="gemma-2-2b")


def exported(latent: object, description: object, **changed: object) -> dict[str, object]:
    """An entry of an export of Neuronpedia."""
    return {
        "modelId": "gemma-2-2b",
        "layer": "12-gemmascope-res-65k",
        "index": latent,
        "description": description,
        "explanationModelName": "gpt-4o-mini",
        "typeName": "oai_token-act-pair",
    } | changed


def written(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def as_lines(rows: list[dict[str, object]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture
def rules(tmp_path) -> Path:
    return written(tmp_path / "rules.json", RULES)


# Files


def test_every_form_of_an_export_reads_alike(tmp_path, sae, rules):
    rows = [exported(str(latent), text) for latent, text in DESCRIPTIONS.items()]
    (tmp_path / "lines.jsonl").write_bytes(as_lines(rows))
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress(as_lines(rows)))
    written(tmp_path / "list.json", [row | {"index": int(str(row["index"]))} for row in rows])
    (tmp_path / "batches").mkdir()
    for n in range(2):
        (tmp_path / "batches" / f"batch-{n}.jsonl.gz").write_bytes(gzip.compress(as_lines(rows[n::2])))
    for name in ("lines.jsonl", "lines.jsonl.gz", "list.json", "batches"):
        labels = read_labels(tmp_path / name, sae, rules=rules)
        # Latent 20 matches both categories and has the first. An empty description labels nothing.
        assert labels.categories == {3: "style", 7: "alignment", 20: "style"}, name
        assert labels.of("style") == [3, 20]


def test_what_no_rule_finds_is_other(tmp_path, sae, rules):
    path = written(tmp_path / "one.json", [exported(1, "the word 'the'")])
    assert read_labels(path, sae, rules=rules).categories == {1: "other"}
    # One line alone is an object, too.
    (tmp_path / "one.jsonl").write_bytes(as_lines([exported(1, "harmless")]))
    assert read_labels(tmp_path / "one.jsonl", sae, rules=rules).categories == {1: "alignment"}


def test_categories_themselves(tmp_path, sae):
    for content in (
        {"12": "style", "3": "topic"},
        [{"index": 12, "label": "style"}, {"index": "3", "category": "topic", "layer": 12}],
    ):
        assert read_labels(written(tmp_path / "a.json", content), sae).categories == {12: "style", 3: "topic"}


def test_one_explainer_of_several(tmp_path, sae, rules):
    rows = [exported(1, "format"), exported(1, "harm", explanationModelName="gpt-3.5-turbo"), exported(2, "kind")]
    path = written(tmp_path / "a.json", rows)
    with pytest.raises(LabelError, match=r"two categories to latents 1 \('style' and 'alignment'\).*explanationModelN"):
        read_labels(path, sae, rules=rules)
    assert read_labels(path, sae, rules=rules, explainer="gpt-4o-mini").categories == {1: "style", 2: "alignment"}
    with pytest.raises(LabelError, match="labels no latent by 'claude'"):
        read_labels(path, sae, rules=rules, explainer="claude")


def test_duplicates_that_agree_are_one(tmp_path, sae, rules):
    path = written(tmp_path / "a.json", [exported(1, "format"), exported("1", "formatting"), exported(1, "")])
    assert read_labels(path, sae, rules=rules).categories == {1: "style"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"3": "a", "40": "b", "-1": "c"}, "labels latents 40, -1; accepted: 0 to 39"),
        ({str(n): "a" for n in range(35, 55)}, r"40, 41, .*, 49 and 5 more; accepted: 0 to 39"),
        ({"3.0": "a"}, "`index` is '3.0'; accepted: a whole number"),
        ([{"index": 3.5, "label": "a"}], "`index` is 3.5"),
        ([{"index": True, "label": "a"}], "`index` is True"),
        ([{"index": 1, "label": "a"}, {"index": 1, "label": "b"}], r"two categories to latents 1 \('a' and 'b'\)"),
        ({"3": ""}, "`category` is ''; accepted: a name"),
        ({"3": "unlabelled"}, "accepted: a name, not 'unlabelled'"),
        ([{"index": 3}], "`description` is None"),
        ([{"index": 3, "description": 4}], "`description` is 4"),
        ([exported(3, "x")], "is a description; accepted: descriptions with rules"),
        (
            [exported(3, "x", layer="20-gemmascope-res-65k")],
            r"entry 1 is of layer '20-gemmascope-res-65k'; accepted: 12",
        ),
        ([exported(3, "x", modelId="gpt2-small")], "is of the model 'gpt2-small'; accepted: 'gemma-2-2b'"),
        ([{"latent": 3}], "entry 1 is"),
        ([4], "entry 1 is '4'"),
        ({}, "labels no latent"),
        ([], "labels no latent"),
    ],
)
def test_labels_that_cannot_be_used(tmp_path, sae, content, message):
    with pytest.raises(LabelError, match=message):
        read_labels(written(tmp_path / "a.json", content), sae)


def test_files_that_cannot_be_used(tmp_path, sae, rules):
    plain = written(tmp_path / "plain.json", {"3": "a"})
    (tmp_path / "twice.json").write_text('{"3": "a", "3": "b"}')
    (tmp_path / "broken.jsonl").write_text('{"index": 3, "label": "a"}\n{"index"\n')
    (tmp_path / "cut.json.gz").write_bytes(gzip.compress(b"{}" * 100)[:-9])
    (tmp_path / "empty").mkdir()
    for path, given, message in (
        (plain, rules, "holds categories and no descriptions"),
        (tmp_path / "twice.json", None, "'3' is given twice, as 'a' and as 'b'"),
        (tmp_path / "broken.jsonl", None, "broken.jsonl line 2 is not JSON"),
        (tmp_path / "cut.json.gz", None, "is a damaged gzip file"),
        (tmp_path / "empty", None, "holds no file of labels"),
        (tmp_path / "none", None, "is not a file"),
        (plain, written(tmp_path / "r1.json", []), "holds no rules"),
        (plain, written(tmp_path / "r2.json", {"a": "x"}), "'a': 'x'; accepted"),
        (plain, written(tmp_path / "r3.json", {"a": ["("]}), "'a' has an invalid expression"),
        (plain, written(tmp_path / "r4.json", {"a": [3]}), "'a' has an invalid expression"),
        (plain, written(tmp_path / "r5.json", {"unlabelled": ["x"]}), "not 'unlabelled'"),
        (plain, tmp_path / "broken.jsonl", "broken.jsonl is not JSON"),
    ):
        with pytest.raises(LabelError, match=message):
            read_labels(path, sae, rules=given)


def test_a_category_that_no_latent_has():
    with pytest.raises(LabelError, match="'c'; accepted: a, b"):
        Labels({1: "b", 2: "a"}, 4).of("c")


# Descriptions

SPACE = LatentSpace(12, "12", D_SAE, "google/gemma-2-2b-it")


def test_descriptions(tmp_path, sae):
    rows = [exported(str(latent), text) for latent, text in DESCRIPTIONS.items()]
    rows += [exported("3", "FORMATTING of lists"), exported("3", "bullets", explanationModelName="claude")]
    (tmp_path / "lines.jsonl").write_bytes(as_lines(rows))
    said = {3: "FORMATTING of lists; bullets", 7: "mentions of kindness", 20: "bullet trains"}
    assert read_descriptions(tmp_path, SPACE) == read_descriptions(tmp_path, sae) == said
    assert read_descriptions(tmp_path, SPACE, explainer="claude") == {3: "bullets"}
    file = written(tmp_path / "categories.json", {"5": "style"})
    assert read_descriptions(file, SPACE) == {5: "style"}


def test_the_folder_of_an_sae_in_an_export(tmp_path):
    """Latents are ordered as text, several explainers have folders of their own, and other folders are not labels."""
    texts = {latent: f"text {latent}" for latent in range(D_SAE)}
    ordered = sorted(map(str, texts))
    for name, by, latents in (("explanations", "gpt-4o-mini", ordered), ("explanations-o3", "o3", ["3", "10"])):
        (tmp_path / name).mkdir()
        for n in range(0, len(latents), 16):
            rows = [exported(k, f"{texts[int(k)]} by {by}", explanationModelName=by) for k in latents[n : n + 16]]
            (tmp_path / name / f"batch-{n // 16}.jsonl.gz").write_bytes(gzip.compress(as_lines(rows)))
    for name in ("features", "activations", "explanations_of_others"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "batch-0.jsonl").write_text('{"index": "0", "tokens": [], "description": "none"}')
    (tmp_path / "source.jsonl").write_text('{"id": "12-gemmascope-res-65k"}')
    explanations = read_explanations(tmp_path, SPACE)
    assert sorted(explanations) == list(range(D_SAE))
    one, other = Explanation("text 10 by gpt-4o-mini", "gpt-4o-mini", "oai_token-act-pair"), "text 10 by o3"
    assert explanations[10] == [one, Explanation(other, "o3", "oai_token-act-pair")]
    assert explanations[2] == [Explanation("text 2 by gpt-4o-mini", "gpt-4o-mini", "oai_token-act-pair")]
    assert read_descriptions(tmp_path, SPACE, explainer="o3") == {3: "text 3 by o3", 10: other}


def test_descriptions_of_the_residual_before_a_layer(tmp_path):
    file = written(tmp_path / "l.json", [exported(1, "a", layer="13-res-jb")])
    for place in ("13", "13-res-jb"):
        assert read_descriptions(file, dataclasses.replace(SPACE, neuronpedia_place=place)) == {1: "a"}
    for place in ("12", "13-res_fs-jb"):
        with pytest.raises(LabelError, match=f"of layer '13-res-jb'; accepted: {place}"):
            read_descriptions(file, dataclasses.replace(SPACE, neuronpedia_place=place))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([exported(40, "a")], "labels latents 40; accepted: 0 to 39, those of an SAE of 40 latents at layer 12"),
        ([exported(1, "a", layer="13-x")], "of layer '13-x'; accepted: 12-x, that of an SAE of 40 latents"),
        ([exported(1, "a", modelId="gpt2")], "of the model 'gpt2'"),
        ([exported(1, " ")], "labels no latent"),
        ([exported(1, ["a"])], "is ['a']; accepted: text"),
        ([exported("one", "a")], "`index` is 'one'"),
    ],
    ids=str,
)
def test_descriptions_that_are_refused(tmp_path, rows, message):
    with pytest.raises(LabelError, match=re.escape(message)):
        read_descriptions(written(tmp_path / "l.json", rows), SPACE)
