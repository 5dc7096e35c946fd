"""`dspa.serving.prefix_cache`: the blocks that requests share, and the room beside them."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dspa.errors import ModelError
from dspa.serving.prefix_cache import CacheSlots, with_room, with_steering
from dspa.serving.requests import parse
from tests.serving.test_requests import ADAPTERS, VECTORS, map_place, settings

BLOCK, PROMPT = 4, (("dspa", "dspa prompt"),)


def block_keys(asked: dict[str, Any], n_prompt: int, n_tokens: int, others: tuple[str, ...] | None = None) -> list[Any]:
    """Extra keys of the blocks of a request, as vLLM's hasher asks for them."""
    request = parse(asked, settings(adapters=ADAPTERS, vectors=VECTORS))
    keys = request.of_prompt(n_prompt).keys if request else asked
    params = SimpleNamespace(extra_args=keys | {"other": 1})
    extra_keys = with_steering(lambda *_: (others, 5))
    made = [extra_keys(SimpleNamespace(sampling_params=params), o, o + BLOCK, 0) for o in range(0, n_tokens, BLOCK)]
    assert {rest for _, rest in made} == {5}
    return [key for key, _ in made]


def test_blocks_before_the_first_edited_token_are_shared() -> None:
    mild, strong = ({"dspa_alpha": alpha} for alpha in (0.1, 0.9))
    # The last token of the prompt, which is edited, is that at 8.
    first, second = block_keys(mild, 9, 16), block_keys(strong, 9, 16)
    assert first[:2] == second[:2] == [PROMPT] * 2
    assert len({*first[2:], *second[2:]}) == 2
    # As generated, it is not edited, and is in the third block.
    assert block_keys(mild | {"dspa_positions": "generated"}, 12, 16)[2] == PROMPT
    assert block_keys(mild, 12, 16)[2] != PROMPT


@pytest.mark.parametrize(
    "other",
    [
        {"dspa_alpha": 0.3},
        {"dspa_mode": "both"},
        {"dspa_map": "terse"},
        {"dspa_positions": "generated"},
        {"dspa_gate": "entropy"},
        {"dspa_gate": "random", "dspa_gate_share": 0.5},
    ],
)
def test_edited_blocks_are_of_one_steering(other: dict[str, Any]) -> None:
    asked = {"dspa": "on"}
    assert block_keys(asked, 9, 16)[-1] == block_keys(asked, 9, 16)[-1] != block_keys(asked | other, 9, 16)[-1]
    # The same tokens as a prompt and its answer, or as a longer prompt.
    assert block_keys(asked, 9, 16)[-1] != block_keys(asked, 10, 16)[-1]


def test_blocks_without_a_map() -> None:
    """They have no latents, which a map would look for, and before their first edit they are plain vLLM's."""
    response = {"dspa_vector": "bold", "dspa_positions": "response"}
    keys = block_keys(response, 9, 16)
    assert keys[:2] == [None, None] and keys[2] == keys[3] != block_keys(response | {"dspa_alpha": 3}, 9, 16)[2]
    assert block_keys(response, 10, 16)[2] != keys[2]
    # Edited from the first token on, whatever the length of a prompt.
    for asked, other in (
        ({"dspa_adapter": "warm"}, {"dspa_adapter": "cold"}),
        ({"dspa_vector": "calm"}, {"dspa_vector": "calm", "dspa_alpha": 3}),
        ({"dspa_vector": "bold", "dspa_positions": "all"}, {"dspa_vector": "calm", "dspa_alpha": 0.5}),
    ):
        (key, *others), (apart, *_) = block_keys(asked, 9, 16), block_keys(other, 9, 16)
        assert key is not None and others == [key] * 3 and block_keys(asked, 10, 16) == [key] * 4 and apart != key


@pytest.mark.parametrize("asked", [{}, {"dspa": "off"}])
def test_unsteered_blocks_are_those_of_vllm(asked: dict[str, Any]) -> None:
    assert block_keys(asked, 9, 8) == [None, None]
    assert block_keys(asked, 9, 4, ("salt",)) == [("salt",)]
    no_sampling = with_steering(lambda *_: (("salt",), 5))(SimpleNamespace(sampling_params=None), 0, BLOCK, 0)
    assert no_sampling == (("salt",), 5)


def test_a_salt_stays() -> None:
    assert block_keys({"dspa": "on"}, 9, 4, ("salt",)) == [("salt", *PROMPT)]


def plan_blocks(_: Any, specs: list[Any], available: list[int]) -> list[Any]:
    """Plan as vLLM does: blocks of 16 slots, of 100 bytes each, as many as fit in the smallest worker."""
    groups = [SimpleNamespace(kv_cache_spec=spec) for spec in specs]
    return [SimpleNamespace(num_blocks=min(available) // 1600, kv_cache_groups=groups) for _ in available]


def test_room_for_latents() -> None:
    interface = pytest.importorskip("vllm.v1.kv_cache_interface", reason="needs vLLM: make test-vllm")
    spec = interface.FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=8, dtype=torch.float32)
    one = {"a": map_place("/a", d_sae_in=700), "b": map_place("/b", d_sae_in=700)}
    two = one | {"c": map_place("/c", layer_in=0, d_sae_in=60)}
    steered, twice = (SimpleNamespace(dspa=asdict(settings(maps=maps))) for maps in (one, two))
    for hf_config, taken in ((steered, 16 * 22 * 4), (twice, 16 * 24 * 4), (SimpleNamespace(), 0)):
        config = SimpleNamespace(model_config=SimpleNamespace(hf_config=hf_config))
        first, second = with_room(plan_blocks)(config, [spec], [10**9, 2 * 10**9])
        assert first.num_blocks == second.num_blocks
        assert 0 <= 10**9 - first.num_blocks * (1600 + taken) < 2 * (1600 + taken)


def test_a_group_that_keeps_all_tokens() -> None:
    interface = pytest.importorskip("vllm.v1.kv_cache_interface", reason="needs vLLM: make test-vllm")
    sizes = {"block_size": 16, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
    window = interface.SlidingWindowSpec(**sizes, sliding_window=8)
    whole = interface.FullAttentionSpec(**sizes)
    tables = SimpleNamespace(
        slot_mappings=torch.arange(20).view(2, 10),
        block_tables=[SimpleNamespace(gpu=torch.zeros(3, 4, dtype=torch.int32)) for _ in range(2)],
    )

    def config(*specs: Any) -> Any:
        return SimpleNamespace(num_blocks=5, kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec) for spec in specs])

    slots = CacheSlots.of(config(window, whole), tables)
    assert (slots.n_slots, slots.block_size) == (80, 16)
    assert slots.slots[0] == 10 and slots.blocks is tables.block_tables[1].gpu
    with pytest.raises(ModelError, match="--disable-sliding-window"):
        CacheSlots.of(config(window), tables)
