"""Commands that look and change nothing: ``status``, ``ls``, ``show``, ``ns``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from kvfs.cli import render
from kvfs.cli.target import Chunk, Target, at_option, resolve
from kvfs.errors import ChunkCorrupt, ChunkNotFound

if TYPE_CHECKING:
    from pathlib import Path

    from kvfs.identity import PartId


@click.command(short_help="Show what is cached and how it is used.")
@at_option
@render.json_option
def status(at: Path | None, as_json: bool) -> None:
    """Show what is cached, how it is used, and whether a daemon serves it."""
    target = resolve(at)
    with target.client() as client:
        stats = client.stats()
    if as_json:
        render.emit(stats)
        return
    render.pairs(status_lines(target, stats))


def status_lines(target: Target, stats: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the figures for people; those that only a daemon has are left out for a bare store."""
    lines = [("store", f"{stats['store']}, {render.size(stats['free'])} free")]
    if target.mounted:
        lines.append(("mount", f"{target.path}, up {render.span(stats['uptime'])}, kvfs {stats['version']}"))
    else:
        lines.append(("mount", "none; read from the folder, without a daemon"))
    lines.append(("chunks", f"{stats['chunks']:,} in {len(stats['namespaces'])} namespaces"))
    lines.append(("size", render.size(stats["bytes"])))
    if target.mounted:
        asked = stats["hits"] + stats["misses"]
        rate = f", {stats['hits'] / asked:.0%} hit" if asked else ""
        lines += [
            ("lookups", f"{asked:,} keys{rate}"),
            ("leases", f"{stats['leases']:,} chunks"),
            ("stored", f"{stats['publishes']:,} parts, {stats['drops']:,} refused"),
            (
                "quarantined",
                ", ".join(f"{count:,} {reason}" for reason, count in stats["quarantined"].items()) or "none",
            ),
            *eviction_lines(stats["eviction"]),
            *compaction_lines(stats),
            *sharing_lines(stats["sharing"]),
            ("scrub", scrub_line(stats["scrub"])),
        ]
    lines += tenant_lines(stats)
    lost = stats["lost_found"]
    purged = f"; {lost['purged']:,} purged to make room" if lost["purged"] else ""
    lines.append(("lost+found", f"{lost['entries']:,} entries, {render.size(lost['bytes'])}{purged}"))
    return lines


def tenant_lines(stats: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what each tenant uses of what it may; of one that is looked at, its name."""
    lines = [("tenant", stats["tenant"])] if "tenant" in stats else []
    for row in stats.get("tenants", []):
        used = of_limit(row["bytes"], row["limit"]) if "limit" in row else f"{render.size(row['bytes'])}"
        of = "" if row.get("listens", True) else "; its socket is not served"
        lines.append((f"tenant {row['name']}", f"{row['chunks']:,} chunks, {used}{of}"))
    return lines


def eviction_lines(eviction: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what may be used and written, what is, and what was evicted or refused for it."""
    *others, store = eviction["budgets"]
    lines = [("budget", f"{of_limit(store['used'], store['limit'])}, {render.size(eviction['min_free'])} to stay free")]
    lines += [("", f"{of_limit(each['used'], each['limit'])} in {each['namespaces']} namespaces") for each in others]
    for what in ("evicted", "refused"):
        counts = ", ".join(f"{count:,} {reason}" for reason, count in eviction[what].items())
        lines.append((what, counts or "none"))
    limit, written = eviction["write_budget"], eviction["written_day"]
    today = render.size(written) if limit is None else of_limit(written, limit)
    lines.append(("written", f"{today} in 24 h, {eviction['drive_writes_per_day']:.2g} drive writes a day"))
    return lines


def compaction_lines(stats: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what the coded form saves, and which namespaces an operator lets lose more than was measured."""
    made = stats["compaction"]
    counts = ", ".join(f"{count:,} {form}" for form, count in made["chunks"].items()) or "none"
    saved = f"; {render.size(max(0, made['saved']))} saved" if made["coded"] else ""
    idle = "" if made["after"] is None else f", after {render.span(made['after'])} without use"
    memory = made["hydrated"]
    lines = [("compacted", f"{counts}{saved}{idle}")]
    names = {each["ns"]: each["name"] or each["ns"][: render.SHORT] for each in stats["namespaces"]}
    lines += [
        ("", f"{names[each['ns']]} to {each['level']}, forced by the operator")
        for each in made["namespaces"]
        if each["forced"]
    ]
    return [*lines, ("decoded", f"{of_limit(memory['bytes'], memory['limit'])} of memory")]


def sharing_lines(sharing: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Return who else uses the store and who evicts; nothing where this daemon is alone."""
    if sharing is None or (sharing["members"][1:] == [] and sharing["in_office"]):
        return []
    janitor = "this daemon" if sharing["in_office"] else sharing["janitor"] or "to be elected"
    return [
        ("janitor", f"{janitor}, of {len(sharing['members'])}: {', '.join(sharing['members'])}"),
        ("trash", f"{render.size(sharing['trash'])}; {sharing['held_elsewhere']:,} chunks held by others"),
    ]


def of_limit(used: int, limit: int) -> str:
    """Return how much of what may be used is."""
    return f"{render.size(used)} of {render.size(limit)} ({used / max(1, limit):.0%})"


def scrub_line(scrub: dict[str, Any]) -> str:
    """Return how far the daemon's own check of everything has come."""
    if not scrub["rate"]:
        return "off"
    since = scrub["complete_since"]
    passed = f"every part read since {render.ago(since)}" if since else "first pass"
    return f"{passed}; {render.size(scrub['bytes'])} read, {scrub['damaged']:,} damaged since the start"


@click.command(short_help="List namespaces, or the chunks of one.")
@click.argument("namespace", required=False, metavar="[NS]")
@at_option
@render.json_option
def ls(namespace: str | None, at: Path | None, as_json: bool) -> None:
    """List namespaces, or the chunks of namespace NS (its name or the beginning of its digest), last used first."""
    target = resolve(at)
    if namespace is None:
        list_namespaces(target, as_json)
        return
    ns = target.find_namespace(namespace)
    total = len(target.store.manifest(ns).parts)
    chunks = target.chunks(ns)
    if as_json:
        render.emit([chunk_json(chunk) for chunk in chunks])
        return
    render.table(
        ("KEY", "TOKENS>", "SIZE>", "PARTS>", "FORM", "HITS>", "LAST USE"),
        [
            (
                chunk.key.hex()[: render.SHORT],
                f"{chunk.tokens:,}",
                render.size(chunk.size),
                f"{len(chunk.parts)}/{total}",
                chunk.form,
                f"{chunk.hits:,}",
                render.ago(chunk.last),
            )
            for chunk in chunks
        ],
    )


def chunk_json(chunk: Chunk) -> dict[str, Any]:
    """Return a chunk as JSON has it."""
    return {
        "key": chunk.key.hex(),
        "tokens": chunk.tokens,
        "bytes": chunk.size,
        "form": chunk.form,
        "hits": chunk.hits,
        "last_use": chunk.last,
        "pinned": chunk.pinned,
        "parts": {str(part): size for part, size in sorted(chunk.parts.items())},
    }


def list_namespaces(target: Target, as_json: bool) -> None:
    """Print one line a namespace."""
    with target.client() as client:
        stats = client.stats()
    rows = []
    for each in stats["namespaces"]:
        ns = bytes.fromhex(each["ns"])
        manifest = target.store.manifest(ns)
        kinds = [kind.name for kind in manifest.kinds]
        counts = {"chunks": each["chunks"], "bytes": each["bytes"]}
        rows.append(
            {"ns": each["ns"], "name": target.name(ns), **counts, "kv_dtype": manifest.kv_dtype, "kinds": kinds}
        )
    if as_json:
        render.emit(rows)
        return
    render.table(
        ("NAMESPACE", "NAME", "CHUNKS>", "SIZE>", "DTYPE", "KINDS"),
        [
            (
                row["ns"][: render.SHORT],
                row["name"],
                f"{row['chunks']:,}",
                render.size(row["bytes"]),
                row["kv_dtype"],
                " ".join(row["kinds"]),
            )
            for row in rows
        ],
    )


@click.command(short_help="Show one chunk and its parts.")
@click.argument("key")
@at_option
@render.json_option
def show(key: str, at: Path | None, as_json: bool) -> None:
    """Show the chunk whose key begins with KEY: what each of its parts says of itself."""
    target = resolve(at)
    ns, found = target.find_chunk(key)
    chunk = target.chunk(ns, found)
    manifest = target.store.manifest(ns)
    headers = {str(part): part_json(target, ns, chunk, part) for part in manifest.parts}
    if as_json:
        render.emit({**chunk_json(chunk), "ns": ns.hex(), "name": target.name(ns), "parts": headers})
        return
    render.pairs(
        [
            ("key", found.hex()),
            ("namespace", f"{ns.hex()[: render.SHORT]} {target.name(ns)}"),
            ("tokens", f"{chunk.tokens:,}"),
            ("size", render.size(chunk.size)),
            ("form", chunk.form),
            ("hits", f"{chunk.hits:,}"),
            ("last use", render.ago(chunk.last)),
            *([("pinned", "with all before it in its text")] if chunk.pinned else []),
            ("", ""),
        ]
    )
    render.table(
        ("PART", "SIZE>", "POSITION>", "TENSORS>", "STATE"),
        [
            (part, render.size(row["bytes"]), f"{row['position']:,}", str(row["tensors"]), "ok")
            if "error" not in row
            else (part, "", "", "", row["error"])
            for part, row in headers.items()
        ],
    )


def part_json(target: Target, ns: bytes, chunk: Chunk, part: PartId) -> dict[str, Any]:
    """Return what the header of a part says, or why it cannot be read."""
    from kvfs.coded import open_stored

    try:
        file = open_stored(target.store, ns, chunk.key, part)
    except ChunkNotFound:
        return {"error": "missing"}
    except ChunkCorrupt as error:
        return {"error": str(error), "reason": error.reason}
    with file:
        header = file.header
    return {
        "bytes": chunk.parts.get(part, 0),
        "parent": header.meta.parent.hex(),
        "position": header.meta.position,
        "tokens": header.meta.tokens,
        "form": header.form,
        "fidelity": header.fidelity,
        "tensors": len(header.layout.tensors),
    }


@click.group(short_help="Look at namespaces.")
def ns() -> None:
    """Look at namespaces: what makes KV interchangeable."""


@ns.command(name="list")
@at_option
@render.json_option
def ns_list(at: Path | None, as_json: bool) -> None:
    """List namespaces, as `kvfs ls` does."""
    list_namespaces(resolve(at), as_json)


@ns.command(name="show")
@click.argument("namespace", metavar="NS")
@at_option
def ns_show(namespace: str, at: Path | None) -> None:
    """Print the manifest of namespace NS as JSON."""
    target = resolve(at)
    found = target.find_namespace(namespace)
    identity, info = target.store.manifest(found).to_json(), target.store.info(found)
    render.emit({"ns": found.hex(), "identity": identity, "info": info})


@ns.command(name="diff")
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@at_option
@render.json_option
def ns_diff(first: str, second: str, at: Path | None, as_json: bool) -> None:
    """Name the fields in which namespaces A and B differ: why neither can use the other's chunks."""
    from kvfs.identity import diff

    target = resolve(at)
    a, b = (target.store.manifest(target.find_namespace(word)) for word in (first, second))
    rows = diff(a, b)
    if as_json:
        render.emit([{"field": field, "a": x, "b": y} for field, x, y in rows])
    elif rows:
        render.table(("FIELD", "A", "B"), [(field, json.dumps(x), json.dumps(y)) for field, x, y in rows])
    else:
        click.echo("the same namespace")
