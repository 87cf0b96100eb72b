"""Headers that have hurt some reader of safetensors, or were made to hurt this one."""

from __future__ import annotations

import re
import struct
from typing import Final

from kvfs import _native, chunk
from kvfs.identity import PartId
from tests.samples import MANIFEST

PART: Final = PartId("swa512", 1)
KEY: Final = bytes(range(32))
SIZE: Final = 4096 + 131072
"""Bytes of the file that a header is read from."""


def pad(body: bytes, n: int | None = None) -> bytes:
    """A header of this text, in as many pages as it takes, that says it is ``n`` bytes long (by default it is)."""
    size = -(-(8 + len(body)) // 4096) * 4096
    return struct.pack("<Q", size - 8 if n is None else n) + body.ljust(size - 8)


def _attacks() -> dict[str, bytes]:
    meta_of = chunk.PartMeta(MANIFEST.ns, KEY, bytes(32), 256, 512, PART)
    raw = chunk.encode_header(MANIFEST, meta_of, bytes(8 * 4))
    body = raw[8:4096].rstrip()
    table = body.index(b'"layers.0.k"')
    meta, tensors = body[:table], body[table:]

    def t(old: bytes, new: bytes) -> bytes:
        assert old in tensors
        return pad(meta + tensors.replace(old, new, 1))

    return {
        "length 2**63": struct.pack("<Q", 1 << 63) + raw[8:4096],
        "length beyond the file": struct.pack("<Q", 1 << 20) + raw[8:4096],
        "length 0": struct.pack("<Q", 0) + raw[8:4096],
        "not aligned": struct.pack("<Q", 4000) + raw[8:4096],
        "empty object": pad(b"{}"),
        "no metadata": pad(b"{" + tensors),
        "depth": pad(b"[" * 60000),
        "nested metadata": pad(b'{"__metadata__":{"a":{"b":{}}},' + tensors),
        "many tensors": pad(meta + b",".join(b'"layers.%d.k":{"dtype":"U8"}' % i for i in range(2000)) + b"}"),
        "negative offset": t(b"[0,", b"[-4,"),
        "overlap": t(b"[32768,65536]", b"[0,32768]"),
        "hole": t(b"[32768,65536]", b"[32769,65537]"),
        "reversed": t(b"[0,32768]", b"[32768,0]"),
        "huge shape": t(b"[1,256,64]", b"[9999999,9999999,9999999]"),
        "shape of zero": t(b"[1,256,64]", b"[0,256,64]"),
        "float shape": t(b"[1,256,64]", b"[1,256,6.4e1]"),
        "four dimensions": t(b"[1,256,64]", b"[1,1,256,64]"),
        "no shape": t(b"[1,256,64]", b"[]"),
        "unknown dtype": t(b'"BF16"', b'"BF17"'),
        "wrong width": t(b'"BF16"', b'"F32"'),
        "string offsets": t(b"[0,32768]", b'["0","32768"]'),
        "duplicate tensor": t(b"layers.0.v", b"layers.0.k"),
        "foreign tensor": t(b"layers.0.k", b"../../etc/x"),
        "non-ascii name": t(b"layers.0.k", "layers.０.k".encode()),
        "surrogate": t(b"layers.0.k", b"\\ud800yers.0.k"),
        "byte order mark": pad(b"\xef\xbb\xbf" + body),
        "trailing text": pad(body + b"x"),
        "trailing object": pad(body + b"{}"),
        "NUL padding": struct.pack("<Q", 4088) + body.ljust(4088, b"\0"),
        "duplicate metadata": pad(body.replace(b'"kvfs.tokens":"256"', b'"kvfs.tokens":"256","kvfs.tokens":"16"', 1)),
        "duplicate __metadata__": pad(meta + tensors[:-1] + b',"__metadata__":{}}'),
        "number metadata": pad(body.replace(b'"kvfs.tokens":"256"', b'"kvfs.tokens":256', 1)),
        "other tokens": pad(body.replace(b'"kvfs.tokens":"256"', b'"kvfs.tokens":"128"', 1)),
        "utf-16": pad(body[:1500].decode().encode("utf-16")),
    }


ATTACKS: Final = _attacks()


def seal(raw: bytes) -> bytes:
    """The same from an attacker who computes the header's checksum as we do."""
    zeroed = re.sub(rb'"kvfs.header_sum":"[0-9a-f]{16}"', b'"kvfs.header_sum":"' + b"0" * 16 + b'"', raw)
    return zeroed.replace(b'header_sum":"' + b"0" * 16, b'header_sum":"%016x' % _native.xxh3_64(zeroed), 1)
