"""Commands that read and clean a store, on a bare folder without a daemon."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from kvfs import config, errors
from kvfs.chunk import ALIGNMENT
from kvfs.cli import mounts, render
from kvfs.cli.main import kvfs_command
from kvfs.identity import Manifest, chunk_keys, next_key, root_key, salt32
from kvfs.index import Index
from kvfs.names import part_path
from kvfs.store import Store
from kvfs.weights import weights_fingerprint
from tests import samples

TOKENS = [int(t) for t in np.random.default_rng(7).integers(0, 50_000, 700)]
"""A text of two full chunks and a rest of 188 tokens."""


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for row in config.SETTINGS.values():
        monkeypatch.delenv(row.env, raising=False)
    (tmp_path / "empty.toml").touch()
    monkeypatch.setenv(config.ENV_FILE, str(tmp_path / "empty.toml"))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "kv"


@pytest.fixture
def store(place: Path) -> Store:
    """A store with one namespace, "sample@r1", and two chunks: a whole one, and one that lacks two parts."""
    made = samples.new_store(place)
    samples.put(made, bytes([1] * 32), tokens=256)
    samples.put(made, bytes([2] * 32), *samples.MANIFEST.parts[2:], tokens=32, position=256)
    return made


def invoke(*args: object, **kwargs: Any) -> Result:
    return CliRunner().invoke(kvfs_command, [str(arg) for arg in args], prog_name="kvfs", **kwargs)


def answer(*args: object) -> Any:
    done = invoke(*args, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def rows(done: Result) -> list[list[str]]:
    assert done.exit_code == 0, done.output
    return [line.split() for line in done.stdout.splitlines()]


def path_of(place: Path, key: bytes, part: int = 0, manifest: Manifest = samples.MANIFEST) -> Path:
    return place / manifest.ns_hex / part_path(key, manifest.parts[part])


def flip(path: Path, at: int) -> None:
    path.chmod(0o600)
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


# ------------------------------------------------------------------------------------------------------ where to look


def test_the_configured_store_is_the_default(store: Store, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if len(mounts.mounted_stores()) != 1:  # the only mount of a host is looked at unasked
        done = invoke("ls")
        assert done.exit_code == errors.ConfigError.exit_code
        assert "name a mount point or a store with --at" in done.stderr
    monkeypatch.setenv("KVFS_STORE", str(place))
    assert len(answer("ls")) == 1


def test_what_is_no_store_is_told(tmp_path: Path) -> None:
    done = invoke("status", "--at", tmp_path)
    assert done.exit_code == errors.NotAStore.exit_code


# ------------------------------------------------------------------------------------------------------ looking


def test_ls_namespaces(store: Store, place: Path) -> None:
    (row,) = answer("ls", "--at", place)
    size = sum(path.stat().st_size for path in place.rglob("*.safetensors"))
    identity = {"ns": samples.MANIFEST.ns_hex, "name": "sample@r1", "kv_dtype": "BF16", "kinds": ["swa512", "full"]}
    assert row == identity | {"chunks": 2, "bytes": size}
    head, line = rows(invoke("ls", "--at", place))
    assert head == ["NAMESPACE", "NAME", "CHUNKS", "SIZE", "DTYPE", "KINDS"]
    assert line[:3] == [samples.MANIFEST.ns_hex[:12], "sample@r1", "2"]
    assert invoke("ns", "list", "--at", place).stdout == invoke("ls", "--at", place).stdout


def test_ls_chunks_last_used_first_with_what_a_daemon_remembered(store: Store, place: Path) -> None:
    index = Index(store)
    index.reconcile()
    index.touch(samples.MANIFEST.ns, [bytes([2] * 32)], now=time.time() - 7200)
    index.save()
    second, first = answer("ls", "sample", "--at", place)
    assert (second["key"], second["tokens"], second["hits"], len(second["parts"])) == ("02" * 32, 32, 1, 2)
    assert (first["key"], first["tokens"], first["hits"], first["last_use"]) == ("01" * 32, 256, 0, 0.0)
    assert first["parts"] == {
        str(p): path_of(place, bytes([1] * 32), i).stat().st_size for i, p in enumerate(samples.MANIFEST.parts)
    }
    lines = invoke("ls", samples.MANIFEST.ns_hex[:6], "--at", place).stdout.splitlines()
    assert lines[1].split()[:2] == ["02" * 6, "32"]
    assert "2/4" in lines[1]
    assert lines[1].endswith("2.0 h ago")
    assert "4/4" in lines[2]
    assert lines[2].endswith("never")


def test_show(store: Store, place: Path) -> None:
    shown = answer("show", "0202", "--at", place)
    assert shown["key"] == "02" * 32
    assert shown["parts"]["swa512.h0"] == {"error": "missing"}
    assert shown["parts"]["full.h1"]["position"] == 256
    assert shown["parts"]["full.h1"]["tokens"] == 32
    flip(path_of(place, bytes([2] * 32), 2), 20)
    assert answer("show", "0202", "--at", place)["parts"]["full.h0"]["reason"] == "header"
    assert "is damaged (header)" in invoke("show", "0202", "--at", place).stdout


@pytest.mark.parametrize(
    ("word", "error", "says"),
    [
        ("ffff", errors.ChunkNotFound, "no chunk ffff"),
        ("01", errors.ConfigError, "write at least 4"),
        ("not-hex", errors.ConfigError, "write at least 4"),
    ],
)
def test_show_what_is_not_there(word: str, error: type[errors.KvfsError], says: str, store: Store, place: Path) -> None:
    done = invoke("show", word, "--at", place)
    assert done.exit_code == error.exit_code
    assert says in done.stderr


def test_an_ambiguous_prefix_names_the_choices(store: Store, place: Path) -> None:
    samples.put(store, bytes([1] * 31 + [9]), tokens=16)
    done = invoke("show", "0101", "--at", place)
    assert done.exit_code == errors.ConfigError.exit_code
    assert "0101 begins 2 names" in done.stderr


def test_ns_show_and_diff(store: Store, place: Path) -> None:
    other = dataclasses.replace(
        samples.MANIFEST, model_dtype="float16", config={"model_type": "sample", "rope_theta": 1e4}
    )
    store.register(other, {"name": "other"})
    assert Manifest.from_json(answer_of("ns", "show", "sample", "--at", place)["identity"]) == samples.MANIFEST
    rows_ = answer("ns", "diff", "sample", "other", "--at", place)
    assert rows_ == [
        {"field": "config.rope_theta", "a": None, "b": 1e4},
        {"field": "model_dtype", "a": "bfloat16", "b": "float16"},
    ]
    assert "model_dtype" in invoke("ns", "diff", "sample", "other", "--at", place).stdout
    assert invoke("ns", "diff", "other", "other", "--at", place).stdout == "the same namespace\n"
    done = invoke("ns", "show", "nobody", "--at", place)
    assert (done.exit_code, done.stderr) == (
        errors.NamespaceNotFound.exit_code,
        "kvfs: no namespace nobody: `kvfs ns list` shows those of this store\n",
    )


def answer_of(*args: object) -> Any:
    return json.loads(invoke(*args).stdout)


def test_names_cannot_command_the_terminal(place: Path) -> None:
    made = Store.init(place)
    made.register(samples.MANIFEST, {"name": "a\x1b[31mb"})
    assert "\x1b" not in invoke("ls", "--at", place, color=True).stdout


def test_status(store: Store, place: Path) -> None:
    stats = answer("status", "--at", place)
    assert (stats["store"], stats["chunks"], len(stats["namespaces"])) == (str(place), 2, 1)
    text = invoke("status", "--at", place).stdout
    assert "2 in 1 namespaces" in text
    assert "without a daemon" in text


# ------------------------------------------------------------------------------------------------------ cleaning


def test_verify_of_a_whole_store(store: Store, place: Path) -> None:
    report = answer("verify", "--at", place)
    assert (report["parts"], report["damaged"]) == (6, [])
    assert invoke("verify", "sample", "--at", place).stdout.endswith(": all whole\n")


def test_verify_finds_damage_and_puts_it_away(store: Store, place: Path) -> None:
    bad = path_of(place, bytes([1] * 32), 3)
    flip(bad, ALIGNMENT + 5)
    dry = invoke("verify", "--dry-run", "--json", "--at", place)
    assert dry.exit_code == errors.ChunkCorrupt.exit_code
    (found,) = json.loads(dry.stdout)["damaged"]
    assert (found["key"], found["part"], found["reason"], found["quarantined"]) == (
        "01" * 32,
        "full.h1",
        "checksum",
        False,
    )
    assert bad.exists()
    done = invoke("verify", "--at", place)
    assert done.exit_code == errors.ChunkCorrupt.exit_code
    assert "moved to lost+found" in done.stdout
    assert done.stdout.splitlines()[-1].endswith(": 1 damaged")
    assert not bad.exists()
    assert len([path for path in (place / "lost+found").iterdir() if path.suffix == ".json"]) == 1
    assert invoke("verify", "--at", place).exit_code == 0


def test_verify_shows_no_bar_without_a_terminal(store: Store, place: Path) -> None:
    assert invoke("verify", "--at", place).stderr == ""


def test_verify_shows_a_bar_on_a_terminal(store: Store, place: Path) -> None:
    ours, terminal = pty.openpty()
    command = [Path(sys.executable).with_name("kvfs"), "verify", "--at", place]
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=terminal, timeout=60, check=True)
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal ends
        while some := os.read(ours, 65536):
            shown += some
    os.close(ours)
    assert b"checking" in shown
    assert b"100%" in shown


def test_retire_asks_and_removes(store: Store, place: Path) -> None:
    assert invoke("retire", "sample", "--at", place, input="n\n").exit_code == 1
    assert len(answer("ls", "--at", place)) == 1
    done = invoke("retire", "sample", "--yes", "--at", place)
    assert done.exit_code == 0
    assert answer("ls", "--at", place) == []
    assert not (place / samples.MANIFEST.ns_hex).exists()


# ------------------------------------------------------------------------------------------------------ explaining


@pytest.fixture
def text(store: Store, tmp_path: Path) -> Path:
    """The file with `TOKENS`, of which the store holds both full chunks and a tail of 96 tokens."""
    put_text(store, TOKENS, 96)
    path = tmp_path / "tokens.json"
    path.write_text(json.dumps(TOKENS))
    return path


def put_text(store: Store, tokens: list[int], tail: int, salt: str | None = None) -> None:
    ns = samples.MANIFEST.ns
    keys = chunk_keys(root_key(ns, salt32(cache_salt=salt)), tokens)
    for i, key in enumerate(keys):
        samples.put(store, key, position=256 * i)
    start = 256 * len(keys)
    if tail:
        key = next_key(keys[-1], np.array(tokens[start : start + tail], dtype=np.uint32))
        samples.put(store, key, tokens=tail, position=start)


def test_explain_a_prompt_that_hits_up_to_its_tail(text: Path, place: Path) -> None:
    (found,) = answer("explain", "sample", "--tokens", text, "--at", place)
    assert (found["verdict"], found["reach"], found["tail"], found["asked"]) == ("partial", 608, 608, 2)
    text.write_text(json.dumps(TOKENS[:610]))
    (found,) = answer("explain", "sample", "--tokens", text, "--at", place)
    assert (found["verdict"], found["reach"]) == ("hit", 608)
    assert "hit: 608 of 610 tokens" in invoke("explain", "sample", "--tokens", text, "--at", place).stdout


def test_explain_where_a_prompt_diverges(text: Path, place: Path) -> None:
    changed = [*TOKENS[:300], 1, *TOKENS[301:]]
    done = invoke("explain", "sample", "--tokens", "-", "--at", place, input=json.dumps(changed))
    assert "partial: 256 of 700 tokens" in done.stdout
    assert "chunk 1 (tokens 256 to 511" in done.stdout
    assert "is not stored" in done.stdout


def test_explain_a_missing_part(text: Path, place: Path) -> None:
    key = chunk_keys(root_key(samples.MANIFEST.ns, salt32()), TOKENS)[1]
    path_of(place, key, 3).unlink()
    (found,) = answer("explain", "sample", "--tokens", text, "--at", place)
    assert (found["reach"], found["blocker"]["missing"]) == (256, ["full.h1"])
    assert "lacks full.h1" in invoke("explain", "sample", "--tokens", text, "--at", place).stdout


def test_explain_minds_the_cache_salt(text: Path, store: Store, place: Path) -> None:
    (found,) = answer("explain", "sample", "--tokens", text, "--cache-salt", "pepper", "--at", place)
    assert (found["verdict"], found["reach"]) == ("miss", 0)
    put_text(store, TOKENS, 0, salt="pepper")
    (found,) = answer("explain", "sample", "--tokens", text, "--cache-salt", "pepper", "--at", place)
    assert found["reach"] == 512


def test_explain_names_the_field_that_differs(text: Path, place: Path, tmp_path: Path) -> None:
    other = dataclasses.replace(samples.MANIFEST, kv_dtype="F16")
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps({"identity": other.to_json(), "info": {}}))
    (found,) = answer("explain", manifest, "--tokens", text, "--at", place)
    assert found["verdict"] == "unknown-namespace"
    assert found["near"][0]["differs"] == [["kv_dtype", "F16", "BF16"]]
    done = invoke("explain", manifest, "--tokens", text, "--at", place)
    assert "this store has no such namespace" in done.stdout
    assert 'kv_dtype: "F16" here, "BF16" there' in done.stdout


def test_explain_by_a_model_folder(
    text: Path, store: Store, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(os.urandom(100))
    done = invoke("explain", model, "--tokens", text, "--at", place)
    assert done.exit_code == errors.NamespaceNotFound.exit_code
    store.register(dataclasses.replace(samples.MANIFEST, weights=weights_fingerprint(model)), {"name": "mine"})
    (found,) = answer("explain", model, "--tokens", text, "--at", place)
    assert (found["name"], found["verdict"]) == ("mine", "miss")


def test_explain_a_text_with_a_tokenizer(text: Path, place: Path, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(["[UNK]", *"abcdefgh"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("a b c d " * 5)
    (found,) = answer("explain", "sample", "--text", prompt, "--tokenizer", folder, "--at", place)
    assert (found["tokens"], found["verdict"]) == (20, "miss")


@pytest.mark.parametrize(
    ("args", "code"), [([], 2), (["--text", "-"], 2), (["--tokens", "-", "--text", "-"], 2), (["--tokens", "-"], 11)]
)
def test_explain_wants_one_prompt(args: list[str], code: int, place: Path) -> None:
    done = invoke("explain", "sample", *args, "--at", place, input='{"not": "a list"}')
    assert done.exit_code == code


# ------------------------------------------------------------------------------------------------------ words and units


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (150 << 20, "150 MiB"),
        (3 << 40, "3.0 TiB"),
        (5 << 50, "5,120.0 TiB"),
    ],
)
def test_sizes(count: int, text: str) -> None:
    assert render.size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.045, "45 ms"), (2.2, "2 s"), (90, "1.5 min"), (3600, "1.0 h"), (86400 * 12.3, "12 d")]
)
def test_spans(seconds: float, text: str) -> None:
    assert render.span(seconds) == text
