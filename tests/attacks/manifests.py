"""Manifests as long as they may be, that would become far more than they are."""

from __future__ import annotations

import json
from typing import Final

from tests.samples import MANIFEST


def _attacks() -> dict[str, str]:
    good = MANIFEST.to_json()
    kind = good["kinds"][0]

    def with_kind(**change: object) -> str:
        return json.dumps(good | {"kinds": [kind | change]})

    return {
        "nested lists": "[" * 500_000,
        "nested objects": '{"a":' * 80_000 + "1" + "}" * 80_000,
        "a number of 400,000 digits": '{"kinds":' + "9" * 400_000 + "}",
        "a thousand kinds": json.dumps(good | {"kinds": [kind | {"name": f"swa{n + 1}"} for n in range(1000)]}),
        "heads without end": with_kind(kv_heads=1 << 62),
        "negative heads": with_kind(kv_heads=-8),
        "no heads": with_kind(kv_heads=0),
        "a dimension without end": with_kind(head_dim=1 << 62),
        "a thousand slices": with_kind(head_slices=1000),
        "a layer far away": with_kind(layers=[1 << 62]),
        "layers that are text": with_kind(layers="0123"),
        "a name that leads away": with_kind(name="../../etc"),
        "chunks without end": json.dumps(good | {"chunk_tokens": 1 << 62}),
        "chunks of nothing": json.dumps(good | {"chunk_tokens": 0}),
        "slices of layers without end": json.dumps(good | {"layer_slices": 1 << 62}),
        "NaN": json.dumps(good | {"chunk_tokens": float("nan")}),
        "a config that is a list": json.dumps(good | {"config": []}),
    }


ATTACKS: Final = _attacks()
