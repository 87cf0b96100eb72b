"""Runs in a guest: executes what the test sends, in one lasting namespace, and answers with the value.

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

PORT = 7000


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


def main() -> None:
    space: dict[str, Any] = {"__name__": "guest"}
    with socket.create_server(("", PORT), backlog=64) as listener:
        print("agent ready", os.uname().nodename, flush=True)  # noqa: T201
        while True:
            sock, _ = listener.accept()
            threading.Thread(target=serve, args=(sock, space), daemon=True).start()


if __name__ == "__main__":
    main()
