"""A host of its own for tests of the service files: systemd as the first process of new namespaces, with kvfs' units.

It sees the files of this host through an overlay in memory, and no units but those that it is given; all of it is gone
when its first process is killed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tests.mounted import until

if TYPE_CHECKING:
    from collections.abc import Iterator

REPOSITORY: Final = Path(__file__).parent.parent
SYSTEMD: Final = Path("/lib/systemd/systemd")
CGROUPS: Final = next(
    (path for path in map(Path, ("/sys/fs/cgroup", "/sys/fs/cgroup/unified")) if (path / "cgroup.procs").exists()), None
)
"""Where cgroups of version 2 are made, and what all of those in there lie below."""

PLACES: Final = {"kvfs": str(REPOSITORY), "packages": sysconfig.get_path("purelib"), "python": sys.base_prefix}
"""What lies in /opt in there: services see nothing of /home, /root and /tmp, where it may lie out here."""

PROGRAM: Final = f"/opt/python/bin/python{sys.version_info[0]}.{sys.version_info[1]}"

needs_systemd = pytest.mark.skipif(
    os.geteuid() != 0
    or not SYSTEMD.exists()
    or shutil.which("systemd-sysusers") is None
    or not Path("/dev/fuse").exists()
    or CGROUPS is None,
    reason="takes root, /dev/fuse, cgroups of version 2 and the Debian package systemd",
)

BOOT: Final = r"""
set -eu
cd "$WORK"
mount --make-rprivate /
mount -t tmpfs tmpfs host
mkdir host/upper host/work host/root
mount -t overlay overlay -o "lowerdir=/,upperdir=$WORK/host/upper,workdir=$WORK/host/work" host/root
cd host/root
mount -t proc proc proc
for folder in sys dev; do mount --rbind /$folder $folder; done
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs tmpfs run
mkdir -p units etc/systemd etc/kvfs var/lib/kvfs
for place in kvfs packages python; do
    mkdir -p opt/$place
    eval "mount --rbind \"\$$place\" opt/$place"
done
mount -t tmpfs tmpfs var/lib/kvfs
mkdir -p opt/given && mount --bind "$WORK" opt/given
mkdir tmp/before && pivot_root . tmp/before && umount -l /tmp/before
mount -t tmpfs tmpfs /tmp
mount --make-rshared /
cat >/usr/bin/kvfs <<END
#!/bin/sh
export LD_LIBRARY_PATH=/opt/python/lib PYTHONPATH=/opt/kvfs:/opt/packages
exec $PROGRAM -c 'from kvfs.cli.main import main; main()' "\$@"
END
chmod 755 /usr/bin/kvfs
cp /opt/kvfs/systemd/*.service /units
mkdir /units/service.d
printf '[Service]\nStandardOutput=append:/opt/given/log\n' >/units/service.d/log.conf
for target in sysinit basic shutdown multi-user local-fs remote-fs; do echo '[Unit]' >/units/$target.target; done
rm -f /etc/machine-id && echo 0123456789abcdef0123456789abcdef >/etc/machine-id
systemd-sysusers /opt/kvfs/systemd/sysusers.d/kvfs.conf
systemd-tmpfiles --create /opt/kvfs/systemd/tmpfiles.d/kvfs.conf
exec env -i container=lxc PATH=/usr/sbin:/usr/bin:/sbin:/bin SYSTEMD_UNIT_PATH=/units \
    /lib/systemd/systemd --system --unit=basic.target --log-target=console
"""


class Host:
    """What runs in there."""

    def __init__(self, first: int, log: Path) -> None:
        self._log = log
        self._enter = ["nsenter", f"--target={first}", "--mount", "--pid", "--uts", "--cgroup"]

    def command(self, *words: object) -> list[str]:
        """The command that runs another in there, with a limit."""
        return [*self._enter, "timeout", "-k", "5", "60", *map(str, words)]

    def run(self, *words: object) -> subprocess.CompletedProcess[str]:
        """Run something in there."""
        return subprocess.run(self.command(*words), capture_output=True, text=True, check=False, cwd="/")

    def output(self, *words: object) -> str:
        """What it prints; it must succeed."""
        done = self.run(*words)
        assert done.returncode == 0, (done, self.log())
        return done.stdout

    def show(self, unit: str, *names: str) -> list[str]:
        """Properties of a unit."""
        shown = self.output("systemctl", "show", unit, *(f"--property={name}" for name in names))
        values = dict(line.split("=", 1) for line in shown.splitlines())
        return [values[name] for name in names]

    def log(self) -> str:
        """What all services have said so far."""
        return self._log.read_text() if self._log.exists() else ""


@contextlib.contextmanager
def booted(work: Path) -> Iterator[Host]:
    """A host with kvfs installed and no service started."""
    (work / "host").mkdir()
    assert CGROUPS is not None
    group = CGROUPS / work.parent.parent.name
    group.mkdir()
    unshare = "exec unshare --fork --pid --mount --cgroup --uts --kill-child sh -c"
    with (work / "console").open("wb") as console:
        outside = subprocess.Popen(
            ["sh", "-c", f'echo $$ >{group}/cgroup.procs; {unshare} "$0"', BOOT],
            env={"PATH": os.environ["PATH"], "WORK": str(work), "PROGRAM": PROGRAM, **PLACES},
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=console,
        )
    try:
        children = Path(f"/proc/{outside.pid}/task/{outside.pid}/children")
        until(lambda: outside.poll() is not None or children.read_text())
        first = int(children.read_text() or 0)
        host = Host(first, work / "log")
        until(lambda: outside.poll() is not None or host.run("systemctl", "is-active", "basic.target").returncode == 0)
        if outside.poll() is not None:
            pytest.skip(f"systemd does not start here: {(work / 'console').read_text()[-500:]}")
        yield host
    finally:
        outside.kill()
        outside.wait()
        until(lambda: _removed(group))


def _removed(group: Path) -> bool:
    """Remove a cgroup with those in it, once their processes are gone."""
    try:
        for folder, _, _ in os.walk(group, topdown=False):
            os.rmdir(folder)
    except OSError:
        return False
    return True
