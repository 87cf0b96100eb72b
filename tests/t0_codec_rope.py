"""RoPE from model configurations: the frequencies are those that transformers computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvfs.codec import Rope, rope_of
from kvfs.codec.shape import Style
from kvfs.identity import GroupKind

FULL = GroupKind("full", (0, 1, 2, 3), 8, 128, 128)
SLIDING = GroupKind("swa512", (0, 1, 2, 3), 8, 128, 128)
BASE: dict[str, Any] = {"model_type": "llama", "head_dim": 128, "max_position_embeddings": 131072}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192, "rope_theta": 5e5}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1e6}


def rope(config: dict[str, Any], kind: GroupKind = FULL) -> Rope:
    found = rope_of(BASE | config, kind)
    assert found is not None
    return found


def plain(theta: float, width: int) -> tuple[float, ...]:
    return tuple(np.float32(theta ** (-np.arange(0, width, 2) / width)).tolist())


def test_plain() -> None:
    assert rope({"rope_theta": 1e4}) == Rope(plain(1e4, 128), Style.HALVES, frozenset(range(4)))
    assert rope({"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}) == rope({"rope_theta": 1e4})


@pytest.mark.parametrize("parameters", [LLAMA3, YARN, {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}])
def test_rescaled_as_transformers_does(parameters: dict[str, Any]) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(head_dim=128, max_position_embeddings=131072, rope_parameters=dict(parameters))
    expected, _ = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu")
    assert np.allclose(rope({"rope_parameters": parameters}).inv_freq, expected.numpy(), rtol=1e-5)
    old = {k: v for k, v in parameters.items() if k != "rope_theta"}
    assert rope({"rope_scaling": old, "rope_theta": parameters["rope_theta"]}) == rope({"rope_parameters": parameters})


def test_each_kind_of_layer_has_its_own() -> None:
    new = {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}}
    old = {"rope_theta": 1e6, "rope_local_base_freq": 1e4}
    for config in (new, old):
        assert rope(config).inv_freq == plain(1e6, 128)
        assert rope(config, SLIDING).inv_freq == plain(1e4, 128)


def test_partial() -> None:
    assert len(rope({"rope_theta": 1e4, "partial_rotary_factor": 0.25}).inv_freq) == 16
    assert len(rope({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}).inv_freq) == 32
    gptj = rope({"model_type": "gptj", "rotary_dim": 64, "rope_theta": 1e4})
    assert (len(gptj.inv_freq), gptj.style) == (32, Style.NEIGHBOURS)


def test_latent() -> None:
    kind = GroupKind("mla", (0, 1), 1, 576, 0)
    found = rope({"model_type": "deepseek_v3", "rope_theta": 1e4, "qk_rope_head_dim": 64, "head_dim": 64}, kind)
    assert (found.first, len(found.inv_freq), found.style) == (512, 32, Style.NEIGHBOURS)


def test_layers_without() -> None:
    assert rope({"rope_theta": 1e4, "no_rope_layers": [1, 1, 1, 0]}).layers == {0, 1, 2}
    assert rope_of(BASE | {"model_type": "cohere2", "rope_theta": 1e4}, FULL) is None
    assert rope_of(BASE | {"model_type": "cohere2", "rope_theta": 1e4}, SLIDING) is not None


@pytest.mark.parametrize(
    "config",
    [{}, {"rope_theta": None}, {"rope_theta": 1e4, "partial_rotary_factor": 0}, {"rope_theta": 1e4, "rotary_dim": 256}],
)
def test_none(config: dict[str, Any]) -> None:
    assert rope_of(BASE | config, FULL) is None
