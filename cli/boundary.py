"""The outer boundary of the command line: every error becomes one line on stderr and an exit code."""

from __future__ import annotations

import errno
import logging
import sys
import traceback
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

import click

from kvfs.errors import KvfsError

if TYPE_CHECKING:
    from collections.abc import Iterator

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130

log = logging.getLogger(__name__)


class Failure(click.ClickException):
    """The end of a command: a message for people, and an exit code for scripts."""

    def __init__(self, message: str, exit_code: int = EXIT_ERROR) -> None:
        super().__init__(message)
        vars(self)["exit_code"] = exit_code  # click keeps it by class, kvfs by error

    def show(self, file: IO[Any] | None = None) -> None:
        """Write ``kvfs: message`` to ``file``, by default stderr."""
        click.echo(f"kvfs: {' '.join(self.message.split())}", file=file or sys.stderr)


@contextmanager
def errors_end_here() -> Iterator[None]:
    """Turn whatever a command raises into a `Failure`; with log level debug its traceback is logged too."""
    try:
        yield
    except (click.ClickException, click.exceptions.Exit, click.Abort):
        raise
    except KeyboardInterrupt:
        raise click.exceptions.Exit(EXIT_INTERRUPTED) from None
    except KvfsError as error:
        log.debug("the command failed", exc_info=True)
        raise Failure(str(error), error.exit_code) from error
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise  # whoever read our output has left: click ends without a word
        log.debug("the command failed", exc_info=True)
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        raise Failure(what) from error
    except Exception as error:
        # Not foreseen, so there is no remedy to name: say where it happened.
        log.debug("the command failed", exc_info=True)
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise Failure(
            f"unexpected {type(error).__name__} in {place.name} ({place.filename}:{place.lineno}): {error}; "
            "set KVFS_LOG_LEVEL=debug for the traceback, and report it"
        ) from error


class Command(click.Command):
    """A command that stands alone, behind the boundary."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        with errors_end_here():
            return super().invoke(ctx)


class Group(click.Group):
    """The group of all commands, behind the boundary."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the chosen command."""
        with errors_end_here():
            return super().invoke(ctx)
