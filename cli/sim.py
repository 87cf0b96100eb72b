"""``kvfs sim``: what each policy would have kept, for a recorded trace or generated workloads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvfs.cli import render
from kvfs.errors import ConfigError
from kvfs.kinds import parse_amount

if TYPE_CHECKING:
    from collections.abc import Iterator

WORKLOADS = ("chat", "rag", "system")
POLICY_NAMES = ("gdsf", "s3-fifo", "lru")
BUDGETS = ("2%", "5%", "10%", "20%", "40%")
UNLIMITED = "100%"


def check_budgets(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse what is no amount."""
    for value in values:
        try:
            parse_amount(value)
        except (TypeError, ValueError):
            raise ConfigError(f"--budget {value}: write a size such as 500GiB, or a share such as 10%") from None
    return values


@click.command(short_help="Compare eviction policies on a workload.")
@click.option("--trace", type=click.Path(path_type=Path), metavar="FILE", help="What a daemon recorded, setting trace.")
@click.option("--workload", multiple=True, type=click.Choice(WORKLOADS), help="Generated workloads [all].")
@click.option("--policy", multiple=True, type=click.Choice(POLICY_NAMES), help="Policies [all].")
@click.option(
    "--budget",
    multiple=True,
    metavar="SIZE",
    callback=check_budgets,
    help=f"Bytes, or a share of all that the workload ever stores [{', '.join(BUDGETS)}].",
)
@click.option("--requests", type=click.IntRange(1), default=3000, show_default=True, help="Of a generated workload.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of a generated workload.")
@render.json_option
def sim(
    trace: Path | None,
    workload: tuple[str, ...],
    policy: tuple[str, ...],
    budget: tuple[str, ...],
    requests: int,
    seed: int,
    as_json: bool,
) -> None:
    """Replay a workload through a cache of several sizes under each policy.

    Two figures each: of the tokens asked for, how many were there; and of the prefill they cost, how much was saved.
    """
    if trace is not None and workload:
        raise click.UsageError("give --trace or --workload")
    from kvfs.cli import replay, workloads

    names, budgets = policy or POLICY_NAMES, (*(budget or BUDGETS), UNLIMITED)
    sources = {str(trace): trace} if trace else dict.fromkeys(workload or WORKLOADS)
    report = {}
    for name, file in sources.items():
        events = workloads.read_trace(file) if file else workloads.generate(name, requests, seed)
        report[name] = replay.compare(events, budgets, names)
    if as_json:
        render.emit(report)
        return
    render.table(("WORKLOAD", "BUDGET>", "SIZE>", *(f"{name} HIT / SAVED>" for name in names)), table_rows(report))
    limited = [row["policies"] for rows in report.values() for row in rows if row["budget"] != UNLIMITED]
    means = {name: sum(row[name]["saved"] for row in limited) / len(limited) for name in names}
    click.echo("prefill saved in the mean: " + ", ".join(f"{name} {mean:.1%}" for name, mean in means.items()))


def table_rows(report: dict[str, list[dict[str, Any]]]) -> Iterator[tuple[str, ...]]:
    """Format what `compare` found."""
    for name, rows in report.items():
        for row in rows:
            cells = [f"{score['hits']:.1%} / {score['saved']:.1%}" for score in row["policies"].values()]
            yield (name, row["budget"], render.size(row["bytes"]), *cells)
