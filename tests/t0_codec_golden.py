"""Coded parts written once decode for ever to the same values, by every decoder."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from kvfs import _native, codec
from kvfs.codec import reference
from tests.codec_parts import GOLDEN

DIGESTS = json.loads((GOLDEN / "digests.json").read_text())


def test_every_level_and_type_has_a_golden_file() -> None:
    assert {p.stem for p in GOLDEN.glob("*.safetensors")} == set(DIGESTS)
    assert {f"bf16-{name}" for name in codec.LEVELS} <= set(DIGESTS)


@pytest.mark.parametrize("name", DIGESTS)
def test_native(name: str) -> None:
    file = (GOLDEN / f"{name}.safetensors").read_bytes()
    part, before = codec.CodedPart.parse(file, len(file)), _native.isa()
    try:
        for isa in _native.ISAS:
            _native.use_isa(isa)
            data = part.decode(file)
            assert hashlib.sha256(data).hexdigest() == DIGESTS[name]
            assert _native.sums(data, part.layout.bounds) == part.sums
    finally:
        _native.use_isa(before)


@pytest.mark.parametrize("name", DIGESTS)
def test_reference(name: str) -> None:
    file = (GOLDEN / f"{name}.safetensors").read_bytes()
    part = codec.CodedPart.parse(file, len(file))
    index, out = part.index, np.zeros(part.layout.nbytes, np.uint8)
    turns = reference.rotation(index.inv_freq, part.meta.position, part.meta.tokens) if len(index.inv_freq) else None
    for start, size, turned, *places in index.streams:
        stream = file[part.data_start + start : part.data_start + start + size]
        arrays = reference.decode(index.shape, stream, turns if turned else None)
        for a, place, section in zip(arrays, places, index.shape.sections, strict=True):
            rows = np.lib.stride_tricks.as_strided(
                out[place:].view(), (len(a), a[0].nbytes), (section.pitch * a.itemsize, 1), writeable=True
            )
            rows[:] = a.view(np.uint8).reshape(len(a), -1)
    assert hashlib.sha256(out.tobytes()).hexdigest() == DIGESTS[name]
