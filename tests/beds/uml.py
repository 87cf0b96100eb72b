"""Two user-mode-Linux guests that mount one user-space NFSv4.2 server: nodes 0 and 1, on a network of their own.

The bed unshares the calling thread's network, so that bridge and taps go with the process.  Needs root, /dev/net/tun
and the Debian packages that ``make nfs`` installs.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.beds.agent import PORT
from tests.conftest import RUN_MARK

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
REPO = HERE.parent.parent
MODULES = Path("/usr/lib/uml/modules")
CLONE_NEWNET = 0x40000000
BOOT = 120.0
CONFIG = """
NFS_CORE_PARAM {{ Protocols = 4; Bind_addr = 10.99.0.1; NFS_Port = 2049; MNT_Port = 20048; NLM_Port = 32803;
    Enable_NLM = false; Enable_RQUOTA = false; Enable_UDP = false; Plugins_Dir = "{plugins}"; }}
NFSv4 {{ Graceless = true; RecoveryBackend = fs; RecoveryRoot = "{bed}/recovery"; Minor_Versions = 0,1,2;
    Only_Numeric_Owners = true; }}
EXPORT {{ Export_Id = 1; Path = {bed}/export; Pseudo = /export; Access_Type = RW; Squash = No_Root_Squash;
    SecType = sys; Protocols = 4; Transports = TCP; FSAL {{ Name = VFS; }} }}
LOG {{ Default_Log_Level = EVENT; }}
"""


def missing() -> str | None:
    """What this host lacks for a bed; None if nothing."""
    if os.geteuid() != 0:
        return "root"
    for program in ("linux.uml", "ganesha.nfsd", "mount.nfs4", "ip", "modprobe"):
        if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None:
            return program
    return None if os.path.exists("/dev/net/tun") else "/dev/net/tun"


class Guest:
    """A client. `call` runs Python in it."""

    def __init__(self, bed: Path, node: int, options: str) -> None:
        self.node = node
        words = {
            "BED": bed,
            "MODULES": bed,
            "NODE": node,
            "OPTIONS": options,
            "REPO": REPO,
            "PYTHON": REPO / ".venv" / "bin" / "python",
        }
        self.console = bed / f"node{node}.log"
        command = ["linux.uml", "mem=512M", "root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro", "quiet"]
        command += [f"init={HERE / 'guest.sh'}", f"vec0:transport=tap,ifname=tap{node},depth=128,gro=1"]
        command += ["con=null", "con0=null,fd:1", *(f"{key}={value}" for key, value in words.items())]
        with self.console.open("wb") as console:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self) -> None:
        """Until it answers."""
        deadline = time.monotonic() + BOOT
        while True:
            assert self.process.poll() is None, self.console.read_text(errors="replace")
            assert time.monotonic() < deadline, self.console.read_text(errors="replace")
            with contextlib.suppress(OSError):
                assert self.call("1 + 1", 5.0) == 2
                assert "no NFS mount" not in self.console.read_text(errors="replace")
                return
            time.sleep(0.1)

    def call(self, code: str, limit: float = 60.0) -> Any:
        """The value of the last expression of ``code``, run in the guest; AssertionError with its traceback."""
        with socket.create_connection((f"10.99.0.1{self.node}", PORT), limit) as sock, sock.makefile("rw") as lines:
            sock.settimeout(limit)
            lines.write(json.dumps({"code": code}) + "\n")
            lines.flush()
            reply = json.loads(lines.readline())
        assert "error" not in reply, f"node{self.node}: {reply['error']}"
        return reply["value"]

    def end(self) -> None:
        """Cut the power."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Bed:
    """The server and its two clients."""

    def __init__(self, folder: Path, options: str) -> None:
        self.folder, self.export = folder, folder / "export"
        self.server: subprocess.Popen[bytes] | None = None
        for name in ("export", "recovery", "lib"):
            (folder / name).mkdir()
        (folder / "lib" / "modules").symlink_to(MODULES)
        (folder / "ganesha.conf").write_text(CONFIG.format(bed=folder, plugins=_plugins()))
        self.start_server()
        self.guests = [Guest(folder, node, options) for node in (0, 1)]

    def start_server(self) -> None:
        """Serve, and wait for the port."""
        command = ["ganesha.nfsd", "-F", "-f", self.folder / "ganesha.conf", "-L", self.folder / "ganesha.log"]
        command += ["-p", self.folder / "ganesha.pid"]
        environ = {name: value for name, value in os.environ.items() if name != RUN_MARK}  # it may outlive a test
        self.server = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, env=environ)
        deadline = time.monotonic() + 30
        while True:
            assert time.monotonic() < deadline, self.log()
            assert self.server.poll() is None, self.log()
            with contextlib.suppress(OSError), socket.create_connection(("10.99.0.1", 2049), 1):
                return
            time.sleep(0.1)

    def kill_server(self) -> None:
        """SIGKILL."""
        assert self.server is not None
        self.server.kill()
        self.server.wait()

    def log(self) -> str:
        return (self.folder / "ganesha.log").read_text(errors="replace")

    def close(self) -> None:
        for guest in self.guests:
            guest.end()
        self.kill_server()


def _plugins() -> Path:
    return next(path.parent for path in Path("/usr/lib").rglob("libfsalvfs.so"))


def _network() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")
    lines = ["link set lo up", "link add br0 type bridge", "addr add 10.99.0.1/24 dev br0", "link set br0 up"]
    for node in (0, 1):
        lines += [f"tuntap add tap{node} mode tap", f"link set tap{node} master br0 up"]
    for line in lines:
        subprocess.run(["ip", *line.split()], check=True, timeout=10)


@contextlib.contextmanager
def bed(folder: Path, options: str) -> Iterator[Bed]:
    """A bed in an empty folder; ``options`` are those of the mounts.  Takes this thread off the network."""
    _network()
    made = Bed(folder, options)
    try:
        for guest in made.guests:
            guest.wait()
        yield made
    except BaseException:
        for guest in made.guests:
            sys.stderr.write(guest.console.read_text(errors="replace"))
        raise
    finally:
        made.close()
