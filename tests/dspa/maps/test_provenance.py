"""Counts of other functions than the model's are noticed by what maps and folders record."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import dspa
from dspa.maps.cdmap import TENSORS
from dspa.maps.collection import MANIFEST, Collection
from dspa.maps.merge import merge
from dspa.testing import make_model

from ..support.counts import Case


def recorded(cdmap: dspa.ConditionalDifferenceMap, attention: str) -> dspa.ConditionalDifferenceMap:
    tensors = {name: getattr(cdmap, name) for name in TENSORS}
    return dspa.ConditionalDifferenceMap(**tensors, meta=replace(cdmap.meta, attention=attention))


@pytest.fixture
def attach(sae_in: dspa.FrozenSAE, sae_out: dspa.FrozenSAE, cdmap: dspa.ConditionalDifferenceMap) -> Callable:
    def attach(family: str, attention: str) -> None:
        with dspa.Steering(sae_in, sae_out, recorded(cdmap, attention)).attach(make_model(family)):
            pass

    return attach


@pytest.mark.parametrize("name", ["sdpa", "eager, sdpa"])
def test_a_map_without_the_cap_of_its_model(attach: Callable, name: str) -> None:
    with pytest.raises(dspa.MapError, match=r"numbers are wrong.*'sdpa', which leaves out the cap.*dspa map build"):
        attach("gemma2", name)


@pytest.mark.parametrize("family", ["gemma2", "falcon_h1"])
def test_a_map_of_an_earlier_version_that_may_be_wrong(attach: Callable, family: str) -> None:
    with pytest.warns(UserWarning, match=r"numbers may be wrong: an earlier version .*dspa map build") as warned:
        attach(family, "")
    assert [warning.filename for warning in warned] == [__file__]


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *(("qwen3", name) for name in ("eager", "sdpa", "flash_attention_2", "kernels-community/flash-attn3", "")),
        *(("gemma2", name) for name in ("eager", "flex_attention", "flash_attention_2")),
        ("falcon_h1", "sdpa"),
    ],
)
def test_maps_of_the_same_function(attach: Callable, family: str, name: str) -> None:
    """One may collect with one implementation and serve with another, on another machine."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(family, name)


def test_the_record_goes_from_the_model_into_the_map(case: Case, tmp_path: Path) -> None:
    case.model.set_attn_implementation("eager")
    counts = case.collect(work_dir=tmp_path / "counts")
    assert dspa.reduce(counts).meta.attention == "eager"
    case.model.set_attn_implementation("sdpa")
    case.collect(work_dir=tmp_path / "counts")
    assert Collection.open(tmp_path / "counts").settings.attention == "eager", "that of the shards"


def as_before(folder: Path) -> None:
    """Leave out of a folder what earlier versions did not record."""
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest.pop("attention")
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(("unknown", "joined"), [(True, ""), (False, "eager, sdpa")])
def test_merged_folders(case: Case, tmp_path: Path, unknown: bool, joined: str) -> None:
    for name, ids in (("eager", case.ids[:4]), ("sdpa", case.ids[4:])):
        case.model.set_attn_implementation(name)
        case.collect(ids, work_dir=tmp_path / name)
    if unknown:
        as_before(tmp_path / "sdpa")
    merged = merge(tmp_path / "all", [tmp_path / "eager", tmp_path / "sdpa"], progress=False)
    assert merged.settings.attention == joined
