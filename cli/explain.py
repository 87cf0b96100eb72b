"""``kvfs explain``: why a prompt hits or misses, and where it leaves what is stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvfs.cli import render
from kvfs.cli.target import Target, at_option, resolve
from kvfs.errors import ConfigError, IdentityError, NamespaceNotFound, Unsupported

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvfs.client import Client
    from kvfs.identity import Manifest
    from kvfs.reach import Tail

TIMEOUT = 5.0
"""Seconds for each question to the daemon: a person waits longer than an engine."""


@click.command(short_help="Say why a prompt would hit or miss.")
@click.argument("namespace", metavar="NS")
@click.option(
    "--tokens", "token_file", type=click.File("rb"), metavar="FILE", help="Token ids as a JSON list; - reads stdin."
)
@click.option(
    "--text", "text_file", type=click.File("rb"), metavar="FILE", help="Text, with --tokenizer; - reads stdin."
)
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="DIR",
    help="Folder of the model's tokenizer.",
)
@click.option("--cache-salt", metavar="SALT", help="The cache_salt of the request.")
@at_option
@render.json_option
def explain(
    namespace: str,
    token_file: Any,
    text_file: Any,
    tokenizer: Path | None,
    cache_salt: str | None,
    at: Path | None,
    as_json: bool,
) -> None:
    """Say how far a prompt would hit in NS, and what stops it there.

    NS is a namespace (its name or the beginning of its digest), a model's folder (every namespace of its weights), or
    a manifest.json (also of another store: the fields in which the stored namespaces differ from it are named).
    """
    if token_file and not text_file and not tokenizer:
        tokens = read_tokens(token_file.read())
    elif text_file and tokenizer and not token_file:
        tokens = encode(text_file.read().decode(), tokenizer)
    else:
        raise click.UsageError("give --tokens FILE, or --text FILE with --tokenizer DIR")
    target = resolve(at)
    answers = [answer(target, manifest, tokens, cache_salt) for manifest in asked(target, namespace)]
    if as_json:
        render.emit(answers)
        return
    for each in answers:
        click.echo("\n".join(map(render.printable, sentences(each))))


def asked(target: Target, word: str) -> Iterator[Manifest]:
    """Yield the manifests that ``word`` stands for."""
    from kvfs.identity import Manifest
    from kvfs.weights import weights_fingerprint

    path = Path(word)
    if path.is_file():
        try:
            document = json.loads(path.read_bytes())
            yield Manifest.from_json(document.get("identity", document))
        except (ValueError, AttributeError) as error:
            if isinstance(error, IdentityError):
                raise
            raise IdentityError(f"{word} is not a manifest ({error})") from None
    elif path.is_dir():
        weights = weights_fingerprint(path)
        manifests = [target.store.manifest(ns) for ns in target.namespaces()]
        found = [manifest for manifest in manifests if manifest.weights == weights]
        if not found:
            raise NamespaceNotFound(f"of the weights in {word}")
        yield from found
    else:
        yield target.store.manifest(target.find_namespace(word))


def read_tokens(raw: bytes) -> list[int]:
    """Read a JSON list of token ids; ConfigError for anything else."""
    try:
        tokens = json.loads(raw)
    except ValueError as error:
        raise ConfigError(f"--tokens: not JSON ({error}); write a list such as [1, 2, 3]") from None
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise ConfigError("--tokens: write a list of token ids such as [1, 2, 3]")
    return tokens


def encode(text: str, folder: Path) -> list[int]:
    """Turn text into token ids, special tokens included, as an engine does with a plain prompt."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        return encode_fast(text, folder)
    return [int(token) for token in AutoTokenizer.from_pretrained(str(folder), local_files_only=True).encode(text)]


def encode_fast(text: str, folder: Path) -> list[int]:
    """Do the same with the tokenizers library alone."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise Unsupported("--text without a tokenizer library: pip install transformers, or give --tokens") from None
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ConfigError(f"{folder} has no tokenizer.json; install transformers, or give --tokens")
    return list(Tokenizer.from_file(str(file)).encode(text).ids)


def answer(target: Target, manifest: Manifest, tokens: list[int], cache_salt: str | None) -> dict[str, Any]:
    """Ask the store how far it carries ``tokens``: the answer of `kvfs.explain.explain`, with the tail counted in."""
    from kvfs.identity import chunk_keys, root_key, salt32
    from kvfs.reach import reach

    with target.client() as client:
        root = root_key(manifest.ns, salt32(client.salts().own, cache_salt))
        keys = chunk_keys(root, tokens, manifest.chunk_tokens)
        found: dict[str, Any] = client.explain(manifest.ns, keys, manifest)
        found |= {"tokens": len(tokens), "chunk_tokens": manifest.chunk_tokens, "tail": None}
        if found["verdict"] == "unknown-namespace":
            return found
        masks = client.lookup(manifest.ns, keys, timeout=TIMEOUT)
        first_gap = next((i for i, mask in enumerate(masks) if not mask), len(keys))
        tails = find_tails(client, manifest, root, keys, tokens, first_gap)
    reached = reach(manifest, masks, tails, len(tokens))
    verdict = "hit" if reached.n >= last_step(tokens) else "partial" if reached.n else "miss"
    return found | {"reach": reached.n, "verdict": verdict, "tail": max((tail.end for tail in tails), default=None)}


def last_step(tokens: list[int]) -> int:
    """Return the last place in a text where a stored tail may end."""
    from kvfs.identity import TAIL_STEP

    return len(tokens) // TAIL_STEP * TAIL_STEP


def find_tails(
    client: Client, manifest: Manifest, root: bytes, keys: list[bytes], tokens: list[int], index: int
) -> list[Tail]:
    """Return the tails stored within the chunk at ``index``, the first that is not stored in full."""
    from kvfs.identity import TAIL_STEP, as_tokens, next_key
    from kvfs.reach import Tail

    start = index * manifest.chunk_tokens
    parent = keys[index - 1] if index else root
    stop = min(start + manifest.chunk_tokens - 1, len(tokens))
    ends = range(start + TAIL_STEP, stop + 1, TAIL_STEP)
    tails = [next_key(parent, as_tokens(tokens[start:end])) for end in ends]
    masks = client.lookup(manifest.ns, tails, timeout=TIMEOUT)
    return [Tail(end, mask) for end, mask in zip(ends, masks, strict=True) if mask]


def sentences(found: dict[str, Any]) -> Iterator[str]:
    """Yield the answer in words."""
    yield f"namespace {found['ns'][: render.SHORT]} {found['name'] or ''}".rstrip()
    if found["verdict"] == "unknown-namespace":
        yield "  miss: this store has no such namespace"
    else:
        yield f"  {found['verdict']}: {found['reach']:,} of {found['tokens']:,} tokens can be loaded"
        if found["blocker"]:
            yield f"  {stop(found)}"
        elif found["verdict"] == "partial":
            yield f"  of what follows token {found['reach']:,}, no tail of this text is stored"
    for near in found["near"]:
        yield f"  {near['ns'][: render.SHORT]} {near['name'] or ''} differs in:"
        for field, ours, theirs in near["differs"]:
            yield f"    {field}: {json.dumps(ours)} here, {json.dumps(theirs)} there"


def stop(found: dict[str, Any]) -> str:
    """Say what ends the reach."""
    blocker, size = found["blocker"], found["chunk_tokens"]
    first = blocker["index"] * size
    where = f"chunk {blocker['index']} (tokens {first:,} to {first + size - 1:,}, key {blocker['key'][: render.SHORT]})"
    if blocker["absent"]:
        return f"{where} is not stored: the text differs from every stored one there, or was never stored that far"
    return f"{where} lacks {', '.join(blocker['missing'])}: a store is under way, or a part was lost"
