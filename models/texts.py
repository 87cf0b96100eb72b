"""Long real English texts that every Python installation carries: its language manual and its library's docstrings."""

from __future__ import annotations

import ast
import functools
import inspect
import sysconfig
from pathlib import Path
from pydoc_data import topics

LENGTH = 44_000
"""Characters of a text: 10,000 tokens or more of a common tokenizer."""

MODULES = (
    "_pydecimal", "argparse", "bdb", "calendar", "cmd", "configparser", "datetime", "difflib", "doctest", "enum",
    "fractions", "ftplib", "functools", "gettext", "heapq", "imaplib", "inspect", "ipaddress", "mailbox", "optparse",
    "os", "pathlib", "pdb", "pickletools", "poplib", "pydoc", "random", "shutil", "smtplib", "socket", "statistics",
    "string", "subprocess", "tarfile", "tempfile", "textwrap", "threading", "turtle", "typing", "uuid", "zipfile",
)  # fmt: skip
"""Modules of the standard library with much prose in their docstrings."""


def docstrings(source: str) -> str:
    """Join the docstrings of a module, of its classes and of their functions, in order."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    return "\n\n".join(inspect.cleandoc(text) for node in nodes if (text := ast.get_docstring(node, clean=False)))


@functools.cache
def long_texts() -> list[str]:
    """Return twenty or more distinct texts of exactly ``LENGTH`` characters, the same for one version of Python."""
    library = Path(sysconfig.get_path("stdlib"))
    sources = [library / f"{name}.py" for name in MODULES]
    manual = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    prose = "\n\n".join(docstrings(path.read_text("utf-8")) for path in sources if path.exists())
    return [
        text[start : start + LENGTH] for text in (manual, prose) for start in range(0, len(text) - LENGTH + 1, LENGTH)
    ]
