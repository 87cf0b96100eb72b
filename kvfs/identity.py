"""Who may share KV bytes with whom: the namespace manifest, its digest, and the chain of chunk keys.

Reuse of KV computed by another model, revision, adapter, dtype or layout is silent garbage, so
everything that changes KV bytes is in the manifest and nothing else is (docs/design.md, "Identity").
A key names the tokens a chunk covers and all tokens before it; every hashed field is framed, so no
choice of token ids can imitate another field.
"""

import dataclasses
import hashlib
import json
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from kvfs.errors import IdentityError

__all__ = [
    "CHUNK_TOKENS",
    "TAIL_STEP",
    "Extra",
    "GroupKind",
    "Manifest",
    "PartId",
    "Salts",
    "canonical_json",
    "chunk_keys",
    "config_identity",
    "diff",
    "next_key",
    "root_key",
    "salt32",
]

CHUNK_TOKENS = 256
TAIL_STEP = 16
"""The tail of a text is stored at a multiple of this many tokens, under a key of its own length."""
MAX_HEAD_SLICES = 8
MAX_PARTS = 64
"""Parts of a chunk: presence is one bit each of a 64-bit mask."""
MAX_SIZE = 1 << 16
"""Bound of every dimension and layer index: a manifest from anybody must not stand for sizes that overflow."""

_NS_DOMAIN = b"kvfs-ns/1\0"
_CHAIN_DOMAIN = b"kvfs-chain/1\0"
_SALT_DOMAIN = b"kvfs-salt/1\0"
LAYOUT = "kvfs-kv/1"
KEY_DOMAIN = "kvfs-chain/1"
KV_DTYPES = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1, "F8_E5M2": 1}
"""safetensors dtype names of KV tensors and their bytes per element."""
_KIND = re.compile(r"full|mla|(?:swa|chunked)([1-9][0-9]{0,6})")
_PART = re.compile(r"(full|mla|(?:swa|chunked)[1-9][0-9]{0,6})\.h([0-9]|[1-5][0-9]|6[0-3])")


def canonical_json(value: Any) -> bytes:
    """The one serialisation that is hashed: sorted keys, no spaces, ASCII, no NaN or infinity."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()
    except (TypeError, ValueError) as e:
        raise IdentityError(f"a manifest field cannot be written as JSON ({e})") from None


class PartId(NamedTuple):
    """One file of a chunk: a group kind and the index of a head slice; ``str`` gives ``full.h0``."""

    kind: str
    slice: int

    def __str__(self) -> str:
        return f"{self.kind}.h{self.slice}"

    @classmethod
    def parse(cls, text: str) -> "PartId":
        """Raises IdentityError for anything but ``<kind>.h<slice>``."""
        m = _PART.fullmatch(text)
        if m is None:
            raise IdentityError(f"{text!r} is not a part name (such as full.h0 or swa512.h3)")
        return cls(m[1], int(m[2]))


@dataclass(frozen=True)
class GroupKind:
    """Layers whose KV is kept by the same rule.

    ``name`` is ``full``, ``swa<window>``, ``chunked<window>`` or ``mla``; ``layers`` are the model's layer
    indices, ascending.  K is ``[kv_heads, tokens, head_dim]``, V ``[kv_heads, tokens, head_dim_v]``; for
    ``mla`` there is one latent of ``head_dim`` a token and ``kv_heads`` is 1.
    """

    name: str
    layers: tuple[int, ...]
    kv_heads: int
    head_dim: int
    head_dim_v: int

    def __post_init__(self) -> None:
        if not _KIND.fullmatch(self.name):
            raise IdentityError(f"{self.name!r} is not a group kind (full, swa<w>, chunked<w>, mla)")
        numbers = (self.kv_heads, self.head_dim, self.head_dim_v, *self.layers)
        if any(type(n) is not int or n >= MAX_SIZE for n in numbers):
            raise IdentityError(f"{self.name}: dimensions and layers must be whole numbers below {MAX_SIZE}")
        if not self.layers or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
            raise IdentityError(f"layers of {self.name} must be ascending and not empty")
        if min(self.kv_heads, self.head_dim) < 1 or self.head_dim_v < 0:
            raise IdentityError(f"{self.name}: kv_heads and head_dim must be positive")

    @property
    def window(self) -> int | None:
        """Tokens a query of this kind sees, its own included; None: all of them."""
        m = _KIND.fullmatch(self.name)
        return int(m[1]) if m and m[1] else None

    @property
    def head_slices(self) -> int:
        """Equal slices the KV heads are stored in: the largest divisor of ``kv_heads`` up to 8."""
        return next(n for n in range(min(self.kv_heads, MAX_HEAD_SLICES), 0, -1) if self.kv_heads % n == 0)


@dataclass(frozen=True)
class Manifest:
    """Everything that makes KV bytes interchangeable.  ``ns`` is the SHA-256 of its canonical JSON.

    ``weights`` is a content hash (`kvfs.weights`), ``config`` the model's text config after overrides,
    ``kv_scales`` how a quantised KV dtype is scaled, ``adapter`` a content hash or None.
    """

    weights: str
    config: Mapping[str, Any]
    model_dtype: str
    kv_dtype: str
    kinds: tuple[GroupKind, ...]
    quantization: Any = None
    kv_scales: str = "none"
    chunk_tokens: int = CHUNK_TOKENS
    layer_slices: int = 1
    adapter: str | None = None
    fidelity: str = "exact"
    layout: str = LAYOUT
    key_domain: str = KEY_DOMAIN

    def __post_init__(self) -> None:
        if self.kv_dtype not in KV_DTYPES:
            raise IdentityError(f"kv_dtype {self.kv_dtype!r} is not one of {', '.join(KV_DTYPES)}")
        if self.fidelity not in ("exact", "lossy"):
            raise IdentityError(f"fidelity {self.fidelity!r} is neither exact nor lossy")
        if not isinstance(self.config, Mapping):
            raise IdentityError("config must be an object")
        if any(type(n) is not int or not 1 <= n < MAX_SIZE for n in (self.chunk_tokens, self.layer_slices)):
            raise IdentityError(f"chunk_tokens and layer_slices must be whole numbers below {MAX_SIZE}")
        if self.chunk_tokens < TAIL_STEP or self.chunk_tokens % TAIL_STEP or self.chunk_tokens > 4096:
            raise IdentityError(f"chunk_tokens must be a multiple of {TAIL_STEP} up to 4096, not {self.chunk_tokens}")
        if (self.layout, self.key_domain) != (LAYOUT, KEY_DOMAIN):
            raise IdentityError(f"layout {self.layout} / keys {self.key_domain} come from another version of kvfs")
        names = [k.name for k in self.kinds]
        if not names or len(set(names)) != len(names):
            raise IdentityError("a manifest needs at least one group kind, each once")
        if len(self.parts) > MAX_PARTS:
            raise IdentityError(f"{len(self.parts)} parts a chunk; at most {MAX_PARTS} are supported")

    @cached_property
    def parts(self) -> tuple[PartId, ...]:
        """Every part of a complete chunk; bit i of a presence mask stands for ``parts[i]``."""
        return tuple(PartId(k.name, s) for k in self.kinds for s in range(k.head_slices))

    @cached_property
    def _bits(self) -> dict[PartId, int]:
        return {p: 1 << i for i, p in enumerate(self.parts)}

    @cached_property
    def _kinds(self) -> dict[str, GroupKind]:
        return {k.name: k for k in self.kinds}

    def bit(self, part: PartId) -> int:
        """The presence bit of a part; IdentityError if chunks of this namespace have no such part."""
        try:
            return self._bits[part]
        except KeyError:
            raise IdentityError(f"part {part} does not belong to namespace {self.ns_hex[:12]}") from None

    def kind(self, name: str) -> GroupKind:
        try:
            return self._kinds[name]
        except KeyError:
            raise IdentityError(f"namespace {self.ns_hex[:12]} has no group kind {name}") from None

    def mask_of(self, kind: str) -> int:
        """Presence mask of all head slices of one kind."""
        return sum(bit for part, bit in self._bits.items() if part.kind == kind)

    @cached_property
    def all_parts(self) -> int:
        return (1 << len(self.parts)) - 1

    @cached_property
    def num_layers(self) -> int:
        return 1 + max(k.layers[-1] for k in self.kinds)

    def to_json(self) -> dict[str, Any]:
        """A JSON object from which `from_json` makes an equal manifest."""
        d = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        d["config"] = dict(self.config)
        d["kinds"] = [
            dataclasses.asdict(k) | {"layers": list(k.layers), "head_slices": k.head_slices} for k in self.kinds
        ]
        return d

    @classmethod
    def from_json(cls, d: Mapping[str, Any]) -> "Manifest":
        """Raises IdentityError for missing, unknown or malformed fields."""
        try:
            kinds = []
            for k in d["kinds"]:
                slices = k["head_slices"]
                kind = GroupKind(**{n: v for n, v in k.items() if n != "head_slices"} | {"layers": tuple(k["layers"])})
                if slices != kind.head_slices:
                    raise IdentityError(f"{kind.name}: {slices} head slices, expected {kind.head_slices}")
                kinds.append(kind)
            return cls(**dict(d) | {"kinds": tuple(kinds)})
        except (KeyError, TypeError, AttributeError) as e:
            raise IdentityError(f"not a namespace manifest ({e})") from None

    @cached_property
    def ns(self) -> bytes:
        return hashlib.sha256(_NS_DOMAIN + canonical_json(self.to_json())).digest()

    @cached_property
    def ns_hex(self) -> str:
        return self.ns.hex()

    def with_adapter(self, adapter: str | None) -> "Manifest":
        return dataclasses.replace(self, adapter=adapter)

    def __hash__(self) -> int:
        return hash(self.ns)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Manifest) and self.ns == other.ns


_NOT_IDENTITY = ("_name_or_path", "_commit_hash", "transformers_version", "dtype", "torch_dtype")


def config_identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """A model's text config (``to_dict()`` of transformers' class) as it stands in a manifest: equal for equal models
    in every process.  The dtype is a field of its own, and where the config was loaded from does not count."""
    return {k: _plain(v) for k, v in config.items() if k not in _NOT_IDENTITY}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(v) for v in value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def diff(a: Manifest, b: Manifest) -> list[tuple[str, Any, Any]]:
    """The fields that differ as ``(path, value in a, value in b)``, deepest path first named, e.g.
    ``config.rope_theta``; a value missing on one side is None."""
    return list(_diff("", a.to_json(), b.to_json()))


def _diff(path: str, a: Any, b: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for k in sorted(a.keys() | b.keys()):
            yield from _diff(f"{path}.{k}" if path else k, a.get(k), b.get(k))
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _diff(f"{path}[{i}]", x, y)
    elif a != b:
        yield path, a, b


# --- keys --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Extra:
    """What else the KV of a chunk depends on: one multimodal item, or a digest of prompt embeddings."""

    type: int
    data: bytes

    MULTIMODAL: ClassVar[int] = 1
    EMBEDS: ClassVar[int] = 2


def salt32(tenant_secret: bytes = b"", cache_salt: str | None = None) -> bytes:
    """32 bytes from a tenant's secret and a request's cache salt, each length-prefixed.  No salt differs
    from an empty one."""
    salt = b"" if cache_salt is None else b"\1" + cache_salt.encode()
    return hashlib.sha256(
        _SALT_DOMAIN + b"".join(struct.pack("<I", len(x)) + x for x in (tenant_secret, salt))
    ).digest()


class Salts(NamedTuple):
    """Whose texts a reader finds: the secret of its tenant (empty for a store's own), and that of the public tenant,
    whose texts it may read too (empty where there is none)."""

    own: bytes = b""
    public: bytes = b""


def root_key(ns: bytes, salt: bytes) -> bytes:
    """k0, the parent of the first chunk of every text."""
    if len(ns) != 32 or len(salt) != 32:
        raise IdentityError("a namespace digest and a salt have 32 bytes each")
    return hashlib.sha256(_CHAIN_DOMAIN + ns + salt).digest()


def next_key(parent: bytes, tokens: npt.NDArray[np.uint32], extras: Sequence[Extra] = ()) -> bytes:
    """The key of the chunk holding ``tokens`` (u32, 1-d, at least one) after ``parent``."""
    h = hashlib.sha256(parent)
    h.update(struct.pack("<I", len(tokens)))
    h.update(np.ascontiguousarray(tokens, dtype="<u4").tobytes())
    h.update(struct.pack("<I", len(extras)))
    for x in extras:
        h.update(struct.pack("<BI", x.type, len(x.data)) + x.data)
    return h.digest()


def as_tokens(tokens: Sequence[int] | npt.NDArray[Any]) -> npt.NDArray[np.uint32]:
    """Token ids as u32; IdentityError for ids outside [0, 2**32)."""
    a = np.asarray(tokens)
    if a.ndim != 1 or (a.size and a.dtype.kind not in "iu"):
        raise IdentityError("token ids must be a flat list of integers")
    if a.size and (int(a.min()) < 0 or int(a.max()) >= 1 << 32):
        raise IdentityError("token ids must lie in [0, 2**32)")
    return a.astype(np.uint32)


def chunk_keys(
    root: bytes,
    tokens: Sequence[int] | npt.NDArray[Any],
    chunk_tokens: int = CHUNK_TOKENS,
    extras: Mapping[int, Sequence[Extra]] | None = None,
    known: Sequence[bytes] = (),
) -> list[bytes]:
    """Keys of the full chunks of a text.  ``extras`` maps a chunk's index to what overlaps it; ``known`` are
    keys already computed for the same text, which are kept."""
    t = as_tokens(tokens)
    keys = list(known)
    for i in range(len(keys), len(t) // chunk_tokens):
        span = t[i * chunk_tokens : (i + 1) * chunk_tokens]
        keys.append(next_key(keys[-1] if keys else root, span, (extras or {}).get(i, ())))
    return keys
