"""Two guests that mount one user-space NFSv4.2 server: nodes 0 and 1, on a network of their own.

The bed unshares the calling thread's network, so that bridge and taps go with the process.  Needs root, /dev/net/tun
and the Debian packages that ``make nfs`` installs.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests import guest
from tests.beds.agent import PORT, SERVER, address
from tests.conftest import RUN_MARK

if TYPE_CHECKING:
    from collections.abc import Iterator

NODES = (0, 1)
CLONE_NEWNET = 0x40000000
BOOT = 120.0
"""Seconds that a guest may take until it answers."""
CONFIG = """
NFS_CORE_PARAM {{ Protocols = 4; Bind_addr = {server}; NFS_Port = 2049; MNT_Port = 20048; NLM_Port = 32803;
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
    if not os.path.exists("/dev/net/tun"):
        return "/dev/net/tun"
    return guest.missing("ganesha.nfsd", "mount.nfs4", "ip", "insmod")


class Client(guest.Guest):
    """A node. `call` runs Python in it."""

    def __init__(self, bed: Path, node: int, options: str) -> None:
        self.node = node
        card = f"vec0:transport=tap,ifname=tap{node},depth=128,gro=1"
        order = {"node": node, "options": options}
        super().__init__(bed / f"node{node}", "tests.beds.agent", order, card)

    def wait(self) -> None:
        """Until it answers."""
        deadline = time.monotonic() + BOOT
        while True:
            assert self.process.poll() is None, self.console()
            assert time.monotonic() < deadline, self.console()
            with contextlib.suppress(OSError):
                assert self.call("1 + 1", 5.0) == 2
                return
            time.sleep(0.1)

    def call(self, code: str, limit: float = 60.0) -> Any:
        """The value of the last expression of ``code``, run in the guest; AssertionError with its traceback."""
        try:
            with socket.create_connection((address(self.node), PORT), limit) as sock, sock.makefile("rw") as lines:
                sock.settimeout(limit)
                lines.write(json.dumps({"code": code}) + "\n")
                lines.flush()
                reply = json.loads(lines.readline())
        except OSError as e:
            e.add_note(f"node{self.node}: {self.console()}")
            raise
        assert "error" not in reply, f"node{self.node}: {reply['error']}"
        return reply["value"]


class Bed:
    """The server and its two clients."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server: subprocess.Popen[bytes] | None = None
        self.guests: list[Client] = []
        for name in ("export", "recovery"):
            (folder / name).mkdir()
        (folder / "ganesha.conf").write_text(CONFIG.format(bed=folder, plugins=_plugins(), server=SERVER))

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
            with contextlib.suppress(OSError), socket.create_connection((SERVER, 2049), 1):
                return
            time.sleep(0.1)

    def kill_server(self) -> None:
        """SIGKILL."""
        assert self.server is not None
        self.server.kill()
        self.server.wait()

    def log(self) -> str:
        return (self.folder / "ganesha.log").read_text(errors="replace")


def _plugins() -> Path:
    return next(path.parent for path in Path("/usr/lib").rglob("libfsalvfs.so"))


def _network() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")
    lines = ["link set lo up", "link add br0 type bridge", f"addr add {SERVER}/24 dev br0", "link set br0 up"]
    for node in NODES:
        lines += [f"tuntap add tap{node} mode tap", f"link set tap{node} master br0 up"]
    for line in lines:
        subprocess.run(["ip", *line.split()], check=True, timeout=10)


@contextlib.contextmanager
def bed(folder: Path, options: str) -> Iterator[Bed]:
    """A bed in an empty folder; ``options`` are those of the mounts.  Takes this thread off the network."""
    _network()
    made = Bed(folder)
    with contextlib.ExitStack() as stack:
        stack.callback(made.kill_server)
        made.start_server()
        made.guests = [stack.enter_context(Client(folder, node, options)) for node in NODES]
        for each in made.guests:
            each.wait()
        yield made
