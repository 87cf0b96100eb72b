"""docs/operations.md says what the code says: settings, exit codes, metrics, commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvfs import config, errors
from kvfs.cli.boundary import EXIT_INTERRUPTED
from kvfs.cli.main import kvfs_command
from kvfs.metrics import Metrics

TEXT = (Path(__file__).parent.parent / "docs" / "operations.md").read_text()


def rows(heading: str) -> list[list[str]]:
    section = TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_settings() -> None:
    shown = ((row, row.show(row.default)) for row in config.SETTINGS.values())
    assert rows("Configuration") == [
        [f"`{row.name}`", row.doc, row.kind.form, f"`{default}`" if default else "none"] for row, default in shown
    ]


def test_exit_codes() -> None:
    named = {int(code): meaning.split(":")[0] for code, meaning in rows("Exit codes")}
    leaves = {getattr(errors, name).exit_code: name for name in errors.__all__ if name != "KvfsError"}
    assert {code: name for code, name in named.items() if code in leaves} == leaves
    assert named.keys() - leaves.keys() == {0, errors.KvfsError.exit_code, 2, EXIT_INTERRUPTED}


def test_metrics() -> None:
    documented = {name.strip("`"): (labels, what) for name, labels, what in rows("Metrics")}
    metrics = [each for each in vars(Metrics()).values() if hasattr(each, "_documentation")]
    suffix = {"counter": "_total"}
    assert documented == {
        each._name + suffix.get(each._type, ""): (", ".join(each._labelnames), each._documentation) for each in metrics
    }


@pytest.mark.parametrize("command", sorted(kvfs_command.commands))
def test_commands(command: str) -> None:
    assert re.search(rf"`kvfs {command}\b", "".join(cells[0] for cells in rows("Commands")))
