"""Runs in a guest that mounts the bed's NFS: executes what the test sends, in one lasting namespace, and answers.

One connection a call: a line of JSON ``{"code": …}``, answered by ``{"value": …}`` (of the last expression) or
``{"error": …}``.  Whatever it runs in, the bed's network has no other users.
"""

import ast
import json
import os
import socket
import threading
import traceback
from typing import Any

from tests.guest import call, load

SERVER = "10.99.0.1"
PORT = 7000


def address(node: int) -> str:
    """Where the agent of a node listens."""
    return f"{SERVER}{node}"


def run(code: str, space: dict[str, Any]) -> Any:
    """Execute ``code``; returns the value of its last statement if that is an expression."""
    tree = ast.parse(code)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<test>", "exec"), space)
    return eval(compile(ast.Expression(last.value), "<test>", "eval"), space) if isinstance(last, ast.Expr) else None


def serve(sock: socket.socket, space: dict[str, Any]) -> None:
    with sock, sock.makefile("rw") as lines:
        try:
            reply = {"value": run(json.loads(lines.readline())["code"], space)}
            text = json.dumps(reply)
        except BaseException:  # noqa: BLE001 - told to the test
            text = json.dumps({"error": traceback.format_exc()})
        lines.write(text + "\n")


def main(order: dict[str, Any]) -> None:
    """``{"node", "options"}`` (of the mount): mount the export on ``/mnt/nfs``, and serve for ever."""
    node, options = order["node"], order["options"]
    load("nfsv4")
    for line in ("link set lo up", "link set vec0 up", f"addr add {address(node)}/24 dev vec0"):
        call("ip", *line.split())
    socket.sethostname(f"node{node}")
    os.mkdir("/mnt/nfs")
    call("mount", "-t", "nfs4", "-o", f"vers=4.2,proto=tcp,port=2049,{options}", f"{SERVER}:/export", "/mnt/nfs")
    space: dict[str, Any] = {"__name__": "guest"}
    with socket.create_server(("", PORT), backlog=64) as listener:
        while True:
            sock, _ = listener.accept()
            threading.Thread(target=serve, args=(sock, space), daemon=True).start()
