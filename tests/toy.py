"""A toy engine around the real hook: paged KV whose bytes can be foretold, block tables as vLLM keeps them, no model.

It does with blocks what vLLM 0.32 does (docs/design.md): a sliding group gets no
blocks before the window of a hit, loses those behind the window at the next step, and freed blocks are overwritten at
once by someone else.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from vllm import SamplingParams
from vllm.v1.request import Request, RequestStatus

from kvfs.client import StoreClient
from kvfs.identity import GroupKind, Manifest, Salts
from kvfs.store import Store
from kvfs.vllm_hook.copying import HostCopy
from kvfs.vllm_hook.fingerprint import Namespaces
from kvfs.vllm_hook.gate import Gate
from kvfs.vllm_hook.geometry import Geometry, Group, Shard
from kvfs.vllm_hook.layout import PagedKV
from kvfs.vllm_hook.loader import Loader
from kvfs.vllm_hook.lookup import Lookups
from kvfs.vllm_hook.saver import Saver
from kvfs.vllm_hook.scheduler import SchedulerHalf
from kvfs.vllm_hook.stats import Counts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

BLOCK, CHUNK, WINDOW, HEADS, DIM = 16, 64, 96, 4, 32
BLOCKS = 400
CANARY = 0x1234

HYBRID = Geometry(
    "CPU_ATTN",
    (GroupKind("full", (2,), HEADS, DIM, DIM), GroupKind(f"swa{WINDOW}", (0, 1, 3), HEADS, DIM, DIM)),
    "BF16",
    (Group(f"swa{WINDOW}", BLOCK), Group(f"swa{WINDOW}", BLOCK), Group("full", BLOCK)),
    {"layers.0.attn": (0, 0), "layers.1.attn": (1, 1), "layers.2.attn": (2, 2), "layers.3.attn": (3, 0)},
)
PLAIN = Geometry(
    "FLASH_ATTN",
    (GroupKind("full", (0, 1), HEADS, DIM, DIM),),
    "BF16",
    (Group("full", BLOCK),),
    {"layers.0.attn": (0, 0), "layers.1.attn": (1, 0)},
)


def kv_of(layer: int, side: int, heads: range, tokens: Sequence[int], start: int) -> np.ndarray:
    """The KV bits ``[heads, tokens, DIM]`` (int16) of a text's tokens from position ``start`` on.

    As bfloat16 they are numbers from 1/8 to 2 of either sign, so that the codec makes them smaller.
    """
    position = np.arange(start, start + len(tokens), dtype=np.int64)
    per_token = np.asarray(tokens, np.int64) * 2654435761 + position * 40503 + layer * 977 + side * 131
    mixed = per_token[None, :, None] + np.arange(heads.start, heads.stop)[:, None, None] * 71 + np.arange(DIM)
    return (mixed % 0x200 + 0x3E00 | (mixed & 0x200) << 6).astype(np.uint16).view(np.int16)


@dataclass
class Rank:
    """The cache and the transfer threads of one tensor-parallel rank."""

    shard: Shard
    caches: dict[str, torch.Tensor]
    kv: PagedKV
    loader: Loader
    saver: Saver

    @property
    def heads(self) -> range:
        each = HEADS // self.shard.size
        return range(self.shard.rank * each, (self.shard.rank + 1) * each)


@dataclass
class Running:
    """One request in the toy: its tables, what it computed, and what the hook loaded for it."""

    request: Any
    tables: list[list[int]]
    computed: int = 0
    hit: int = 0
    failed: bool = False
    waited: float = 0.0
    seen: list[int] = field(default_factory=list)


class Toy:
    """An engine of ``ranks`` ranks with the hook over ``client``. Close it.

    A lossy one computes KV that differs from an exact one's in the last bit, so that it is found wherever it gets to.
    """

    def __init__(
        self,
        tmp: Path,
        client: Any,
        geometry: Geometry = HYBRID,
        ranks: int = 1,
        weights: int = 0,
        interval: int = 256,
        staging: int = 64 << 20,
        stall: float = 0.5,
        longest: float = 2.0,
        copy: Callable[[PagedKV], Any] = HostCopy,
        fidelity: str = "exact",
    ) -> None:
        self.client, self.geometry, self.counts = client, geometry, Counts()
        self.taint = int(fidelity == "lossy")
        folder = tmp / f"model{weights}"
        folder.mkdir(exist_ok=True)
        save_file({"w": np.full(8, weights, np.int32)}, folder / "model.safetensors")
        self.namespaces = Namespaces(config_of(folder), CHUNK, fidelity, self._register)
        lookups = Lookups(client, 0.5, self.namespaces.register)
        self.half = SchedulerHalf(self.namespaces, lookups, Gate("always", ranks), self.counts, interval)
        self.manifests: dict[bytes, Any] = {}
        self.free = list(range(BLOCKS - 1, 0, -1))
        self.ranks = [self._rank(Shard(r, ranks), staging, stall, longest, copy) for r in range(ranks)]
        self.half.start(geometry)
        wait_until(lambda: self.namespaces.get(None) is not None)
        self._number = 0

    def _register(self, manifest: Manifest, info: dict[str, Any]) -> Salts:
        self.client.register(manifest, info)
        return self.client.salts()

    def _rank(self, shard: Shard, staging: int, stall: float, longest: float, copy: Callable[[PagedKV], Any]) -> Rank:
        shape = (BLOCKS, HEADS // shard.size, BLOCK, 2 * DIM)
        caches = {n: torch.full(shape, CANARY, dtype=torch.int16).view(torch.bfloat16) for n in self.geometry.layers}
        kv = PagedKV(self.geometry, shard, caches, BLOCKS)
        way = copy(kv)
        loader = Loader(self.client, kv, way, self.counts, stall, longest)
        return Rank(shard, caches, kv, loader, Saver(self.client, kv, way, self.counts, staging))

    def close(self) -> None:
        self.half.close()
        for rank in self.ranks:
            rank.loader.close()
            rank.saver.close(5)

    # --- blocks ---

    def _windows(self) -> Iterator[tuple[int, int | None]]:
        kinds = {k.name: k for k in self.geometry.kinds}
        yield from ((g, kinds[group.kind].window) for g, group in enumerate(self.geometry.groups))

    def _allocate(self, run: Running, tokens: int, visible: int) -> None:
        """Extend the tables to ``tokens``; a sliding group gets no new blocks before the window at ``visible``."""
        for g, window in self._windows():
            skipped = max(0, visible - window + 1) // BLOCK if window else 0
            while len(run.tables[g]) < -(-tokens // BLOCK):
                run.tables[g].append(0 if len(run.tables[g]) < skipped else self.free.pop())

    def _forget(self, run: Running) -> None:
        """Free what lies behind the windows of a request that has computed so much."""
        for g, window in self._windows():
            if window:
                for i in range(max(0, run.computed - window + 1) // BLOCK):
                    self._release(run.tables[g], i)

    def _release(self, table: list[int], i: int) -> None:
        if table[i]:
            for rank in self.ranks:
                for name in self.geometry.layers:
                    rank.caches[name][table[i]].view(torch.int16).fill_(CANARY)
            self.free.insert(0, table[i])
            table[i] = 0

    def bits(self, rank: Rank, layer: int, side: int, table: list[int], start: int, end: int) -> np.ndarray:
        """What lies in the blocks for tokens [start, end): int16 ``[heads, tokens, DIM]``."""
        view = (rank.kv.layers[layer].k, rank.kv.layers[layer].v)[side]
        position = torch.arange(start, end)
        rows = view[torch.tensor(table)[position // BLOCK], :, position % BLOCK]
        return rows.transpose(0, 1).contiguous().view(torch.int16).numpy()

    def _compute(self, run: Running, start: int, end: int) -> None:
        position = torch.arange(start, end)
        for rank in self.ranks:
            for layer, group in self.geometry.layers.values():
                blocks = torch.tensor(run.tables[group])[position // BLOCK]
                for side, view in enumerate((rank.kv.layers[layer].k, rank.kv.layers[layer].v)):
                    fresh = kv_of(layer, side, rank.heads, run.request.all_token_ids[start:end], start) ^ self.taint
                    view[blocks, :, position % BLOCK] = torch.from_numpy(fresh).view(torch.bfloat16).transpose(0, 1)

    def check(self, run: Running, n: int, first: int = 0) -> None:
        """Every token that is live for a query at n holds just the bits it was computed with."""
        for rank in self.ranks:
            for layer, group in self.geometry.layers.values():
                window = dict(self._windows())[group]
                lo = max(first, max(0, n - window + 1) // BLOCK * BLOCK if window else 0)
                assert all(run.tables[group][lo // BLOCK : -(-n // BLOCK)])
                for side in (0, 1):
                    expected = kv_of(layer, side, rank.heads, run.request.all_token_ids[lo:n], lo)
                    found = self.bits(rank, layer, side, run.tables[group], lo, n)
                    where = f"layer {layer} side {side} [{lo}, {n})"
                    np.testing.assert_array_equal(found | self.taint, expected | self.taint, err_msg=where)

    def untouched(self, run: Running, start: int, end: int) -> bool:
        """Whether tokens [start, end) of a request's blocks still hold what was there before."""
        return all(
            (self.bits(rank, layer, side, run.tables[group], start, end) == CANARY).all()
            for rank in self.ranks
            for layer, group in self.geometry.layers.values()
            for side in (0, 1)
        )

    # --- requests ---

    def request(self, tokens: Sequence[int], **kwargs: Any) -> Request:
        self._number += 1
        params = kwargs.pop("params", None)
        sampling = SamplingParams(max_tokens=1000, extra_args={"kv_transfer_params": params} if params else None)
        return Request(f"r{self._number}", list(tokens), sampling, None, **kwargs)

    def admit(self, tokens: Sequence[int], local: int = 0, **kwargs: Any) -> Running:
        """Look a prompt up, give it blocks, and load what is promised beyond ``local`` tokens it has already."""
        run = Running(self.request(tokens, **kwargs), [[] for _ in self.geometry.groups])
        self.half.track(run.request)
        if local:
            self._allocate(run, local, 0)
            self._compute(run, 0, local)
            run.computed = local
        found: int | None = None
        until = time.monotonic() + 5
        while found is None and time.monotonic() < until:
            found, _ = self.half.matched(run.request, local)
            time.sleep(0.001)
        assert found is not None
        run.computed = run.hit = local + found
        self._allocate(run, run.computed, run.computed)
        self.half.allocated(run.request, tuple(run.tables), found)
        if found:
            self.load(run)
        return run

    def load(self, run: Running) -> None:
        """Carry out the load that the scheduler half has ordered, and wait for its report."""
        began = time.monotonic()
        step = self.half.take_step()
        self.manifests |= {m.ns: m for m in step.manifests}
        [job] = step.loads
        reports: list[tuple[set[str], set[str]]] = []
        for rank in self.ranks:
            rank.loader.submit(job, self.manifests)
        for rank in self.ranks:
            report: tuple[set[str], set[str]] = (set(), set())
            until = time.monotonic() + 20
            while not report[0] and time.monotonic() < until:
                report = rank.loader.take()
                time.sleep(0.001)
            assert report[0] == {run.request.request_id}
            reports.append(report)
        run.waited = time.monotonic() - began
        failed = set().union(*(r[1] for r in reports))
        self.half.received({run.request.request_id}, failed)
        if failed:
            run.failed = True
            run.computed = 0
            assert self.half.matched(run.request, 0) == (0, False)
        self.half.allocated(run.request, tuple(run.tables), 0)

    def step(self, run: Running, count: int) -> None:
        """Compute ``count`` tokens, and store what the hook wants of them."""
        self._forget(run)
        before = run.computed
        self._allocate(run, before + count, 0)
        step = self.half.take_step()
        self.half.scheduled(step, run.request.request_id, before, count, lambda _: run.tables)
        self._compute(run, before, before + count)
        self.store(step)
        run.computed += count
        run.request.num_computed_tokens = run.computed

    def store(self, step: Any) -> None:
        self.manifests |= {m.ns: m for m in step.manifests}
        for save in step.saves:
            for rank in self.ranks:
                rank.saver.gather(save, self.manifests[save.ns])

    def prefill(self, run: Running, batch: int = 10_000) -> None:
        """Compute the rest of the prompt, at most ``batch`` tokens a step."""
        if run.computed == run.request.num_tokens:  # all of it was loaded: the engine computes the last token again
            run.computed -= 1
        while run.computed < run.request.num_prompt_tokens:
            self.step(run, min(batch, run.request.num_prompt_tokens - run.computed))

    def decode(self, run: Running, output: Sequence[int]) -> None:
        """Generate the given tokens; the last one's KV is never computed."""
        for i, token in enumerate(output):
            run.request.append_output_token_ids(token)
            if i + 1 < len(output):
                self.step(run, 1)

    def finish(self, run: Running, status: RequestStatus = RequestStatus.FINISHED_STOPPED) -> None:
        """End a request as vLLM does: out-of-window blocks are gone before the hook is asked."""
        run.request.status = status
        self._forget(run)
        held = self.half.finished(run.request, tuple(run.tables))
        step = self.half.take_step()
        assert (run.request.request_id in step.held) == held
        self.store(step)
        for table in run.tables:
            for i in range(len(table)):
                self._release(table, i)

    def answer(self, tokens: Sequence[int], output: Sequence[int] = (7,), batch: int = 10_000, **kwargs: Any) -> int:
        """A whole request; returns the tokens it had without computing them."""
        run = self.admit(tokens, **kwargs)
        if run.hit and not run.failed:
            self.check(run, run.hit)
        self.prefill(run, batch)
        self.decode(run, output)
        self.finish(run)
        self.flush()
        return run.hit

    def flush(self) -> None:
        """Wait until what was gathered is in the store."""
        wait_until(lambda: all(r.saver._staging.used == 0 for r in self.ranks))


def config_of(folder: Path, **text: Any) -> Any:
    """The little of a VllmConfig that a fingerprint reads."""
    values = {"rope_theta": 1e4, "_name_or_path": str(folder)} | text
    return SimpleNamespace(
        model_config=SimpleNamespace(
            model=str(folder),
            revision=None,
            served_model_name="toy",
            dtype=torch.bfloat16,
            quantization=None,
            hf_text_config=SimpleNamespace(to_dict=lambda: values),
        ),
        load_config=SimpleNamespace(load_format="auto", download_dir=None),
        weight_transfer_config=None,
    )


def wait_until(ready: Callable[[], bool], seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < until, "it never came true"
        time.sleep(0.002)


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Toy]]:
    """Make engines that share one store; each is as fresh as a new process. ``client`` may be a class of client."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Store.init(tmp_path / "store").close()
    made: list[Toy] = []

    def make(client: Callable[[Path], Any] = StoreClient, **kwargs: Any) -> Toy:
        made.append(Toy(tmp_path, client(tmp_path / "store"), **kwargs))
        return made[-1]

    yield make
    for toy in made:
        toy.close()
        toy.client.close()
