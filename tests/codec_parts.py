"""Raw parts with KV-like numbers, for the tests of coded parts; ``python -m tests.codec_parts`` adds golden files.

A golden file is never written again: it must decode for ever to the values whose digest is in digests.json.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvfs import _native, chunk, codec
from kvfs.codec.shape import Style
from kvfs.identity import GroupKind, Manifest, PartId

KIND = GroupKind("full", (0, 1, 3), 2, 64, 64)
GOLDEN = Path(__file__).parent / "golden" / "codec"


@dataclass(frozen=True)
class Raw:
    """A raw part, and the RoPE of its keys."""

    manifest: Manifest
    header: chunk.PartHeader
    data: bytes
    rope: codec.Rope | None

    def encode(self, name: str, **more: object) -> bytes:
        return codec.encode_part(self.header, self.data, codec.level(name), self.rope, **more)


def raw_part(
    kind: GroupKind = KIND, tokens: int = 256, position: int = 256, dtype: str = "BF16",
    fidelity: str = "lossy", rope: bool = True, seed: int = 0,
) -> Raw:  # fmt: skip
    """The first head slice of ``kind``, every tensor with channels of its own spread and mean."""
    manifest = Manifest("ab" * 32, {"model_type": "sample"}, "bfloat16", dtype, (kind,), fidelity=fidelity)
    part = PartId(kind.name, 0)
    lay, rng = chunk.layout(manifest, part, tokens), np.random.default_rng([seed, tokens, position])
    pieces = []
    for t in lay.tensors:
        x = rng.standard_normal(t.shape) * np.exp(0.7 * rng.standard_normal(t.shape[-1])) + rng.standard_normal(
            t.shape[-1]
        )
        if dtype == "BF16":
            pieces.append((x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes())
        elif dtype == "F16":
            pieces.append(x.astype(np.float16).tobytes())
        elif dtype == "F32":
            pieces.append(x.astype(np.float32).tobytes())
        else:
            pieces.append(rng.integers(0x30, 0x48, t.shape, np.uint8).tobytes())
    data = b"".join(pieces)
    meta = chunk.PartMeta(manifest.ns, bytes(range(32)), bytes(32), tokens, position, part)
    header = chunk.PartHeader(meta, lay, _native.sums(data, lay.bounds), chunk.ALIGNMENT, "raw", fidelity)
    turned = frozenset(kind.layers[:-1]) if len(kind.layers) > 1 else frozenset(kind.layers)
    latent = kind.name == "mla"
    pairs = 32 if latent else kind.head_dim // 2
    frequencies = tuple(np.float32(1e4 ** (-np.arange(pairs) / pairs)).tolist())
    first, style = (kind.head_dim - 64, Style.NEIGHBOURS) if latent else (0, Style.HALVES)
    return Raw(manifest, header, data, codec.Rope(frequencies, style, turned, first) if rope else None)


LATENT = GroupKind("mla", (0, 1), 1, 576, 0)
FLOAT8 = {"dtype": "F8_E4M3", "fidelity": "exact"}


def golden_parts() -> dict[str, bytes]:
    """What the golden files hold; today's encoder need not write it again."""
    kind = GroupKind("full", (0, 7), 1, 64, 64)
    found = {f"bf16-{name}": raw_part(kind, 32, 0).encode(name) for name in codec.LEVELS}
    found |= {f"bf16-{name}-later": raw_part(kind, 48, 1 << 20, seed=1).encode(name) for name in ("medium", "lowest")}
    found["f16-medium"] = raw_part(kind, 32, 0, "F16").encode("medium")
    found["f16-lossless"] = raw_part(kind, 32, 0, "F16").encode("lossless")
    found["e4m3-lossless"] = raw_part(kind, 32, 0, **FLOAT8).encode("lossless")
    found["f32-lossless"] = raw_part(kind, 16, 0, "F32").encode("lossless")
    found["latent-medium"] = raw_part(LATENT, 16, 512).encode("medium")
    found["heads-medium"] = raw_part(GroupKind("swa128", (2,), 24, 80, 80), 32, 256).encode("medium")
    return found


def digest(file: bytes) -> str:
    """SHA-256 of what a coded part decodes to."""
    return hashlib.sha256(codec.CodedPart.parse(file, len(file)).decode(file)).hexdigest()


def write_golden() -> None:
    """Write the files that are missing, and the digests of their values."""
    GOLDEN.mkdir(parents=True, exist_ok=True)
    digests = json.loads((GOLDEN / "digests.json").read_text()) if (GOLDEN / "digests.json").exists() else {}
    for name, file in golden_parts().items():
        if name not in digests:
            (GOLDEN / f"{name}.safetensors").write_bytes(file)
            digests[name] = digest(file)
    (GOLDEN / "digests.json").write_text(json.dumps(digests, indent=2) + "\n")


def resealed(file: bytes, index: bytes) -> bytes:
    """A coded part with another index of the same length, and checksums that are right again."""
    size = 8 + int.from_bytes(file[:8], "little")
    text = bytearray(file[8:size])
    for mark, content in ((b'"kvfs.index_sum":"', index), (b'"kvfs.header_sum":"', None)):
        at = text.index(mark) + len(mark)
        text[at : at + 16] = b"0" * 16
        text[at : at + 16] = b"%016x" % _native.xxh3_64(bytes(text) if content is None else content)
    return file[:8] + bytes(text) + index + file[size + len(index) :]


if __name__ == "__main__":
    write_golden()
