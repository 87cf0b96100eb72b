"""Which rotary position embedding a model's keys carry, so that the codec can take it off and put it back.

The codec turns keys back by these angles before it quantises them and forth again after, so a wrong angle costs bits,
never correctness.  So positions are those of text (M-RoPE turns the keys of images by other ones), rescaled
frequencies (YaRN, Llama 3) matter and scaled amplitudes do not, and what is not known is coded without RoPE.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvfs.codec.shape import Style
from kvfs.identity import GroupKind

__all__ = ["MAX_FREQUENCY", "Rope", "rope_of"]

MAX_FREQUENCY = 64.0
"""Radians a token.  Real ones are at most 1."""

_NEIGHBOURS = ("chatglm", "codegen", "cohere", "cohere2", "deepseek_v2", "deepseek_v3", "glm", "glm4", "gptj", "helium")
"""Model types whose RoPE pairs adjacent channels."""


@dataclass(frozen=True)
class Rope:
    """Channels ``first`` to ``first + 2 * len(inv_freq)`` of a head are turned, in the layers ``layers``.

    ``inv_freq``: float32, radians a token for each pair.
    """

    inv_freq: tuple[float, ...]
    style: Style
    layers: frozenset[int]
    first: int = 0


def rope_of(config: Mapping[str, Any], kind: GroupKind) -> Rope | None:
    """The RoPE of a group kind from the model's Hugging Face text config; None if there is none or it is not known."""
    sliding = kind.window is not None
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    by_type = parameters.get("sliding_attention" if sliding else "full_attention")
    if isinstance(by_type, Mapping):
        parameters = dict(by_type)
    theta = parameters.get("rope_theta", config.get("rope_theta"))
    if sliding and "rope_local_base_freq" in config and by_type is None:
        parameters, theta = {}, config["rope_local_base_freq"]
    latent = kind.name == "mla"
    width = config.get("qk_rope_head_dim", 0) if latent else _rotary_width(config, parameters, kind.head_dim)
    layers = _turned_layers(config, kind)
    if not theta or width <= 0 or width % 2 or width > kind.head_dim or not layers:
        return None
    frequencies: npt.NDArray[Any] = float(theta) ** (-np.arange(0, width, 2) / width)
    frequencies = _rescaled(frequencies, float(theta), parameters, config).astype(np.float32)
    if not (frequencies > 0).all() or frequencies.max() > MAX_FREQUENCY:
        return None
    style = Style.NEIGHBOURS if latent or config.get("model_type") in _NEIGHBOURS else Style.HALVES
    first = kind.head_dim - width if latent else 0
    return Rope(tuple(frequencies.tolist()), style, layers, first)


def _rotary_width(config: Mapping[str, Any], parameters: Mapping[str, Any], head_dim: int) -> int:
    if "rotary_dim" in config:
        return int(config["rotary_dim"])
    part = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor", config.get("rotary_pct", 1)))
    return int(head_dim * float(part))


def _turned_layers(config: Mapping[str, Any], kind: GroupKind) -> frozenset[int]:
    """Some models leave RoPE out of some layers (``no_rope_layers`` holds 0 for those), some of all full ones."""
    flags = config.get("no_rope_layers")
    if flags:
        return frozenset(i for i in kind.layers if i >= len(flags) or flags[i])
    if config.get("model_type") == "cohere2" and kind.window is None:
        return frozenset()
    return frozenset(kind.layers)


def _rescaled(
    frequencies: npt.NDArray[np.float64], theta: float, parameters: Mapping[str, Any], config: Mapping[str, Any]
) -> npt.NDArray[np.float64]:
    """Frequencies after the rescaling that extends the context; the formulas are those of Hugging Face transformers."""
    method = parameters.get("rope_type", parameters.get("type", "default"))
    factor = float(parameters.get("factor") or 1)
    trained = parameters.get("original_max_position_embeddings") or config.get("max_position_embeddings") or 8192
    if method == "linear":
        return frequencies / factor
    if method == "llama3":
        low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
        turns = trained * frequencies / (2 * math.pi)
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        return (1 - smooth) * frequencies / factor + smooth * frequencies
    if method == "yarn":
        width = 2 * len(frequencies)

        def pair_of(turns: float) -> float:
            return width * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

        first = max(math.floor(pair_of(float(parameters.get("beta_fast") or 32))), 0)
        last = min(math.ceil(pair_of(float(parameters.get("beta_slow") or 1))), width - 1)
        ramp = np.clip((np.arange(len(frequencies)) - first) / max(last - first, 0.001), 0, 1)
        return ramp * frequencies / factor + (1 - ramp) * frequencies
    return frequencies
