"""The output of the commands: lines, refusals with their exit codes, and counts with their nouns."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click

from ccm.errors import CommandRefused, DatabaseRefused, NotFound, StartRefused, StorageError


@contextmanager
def exit_on_refusal() -> Iterator[None]:
    """Print an expected error as one sentence on stderr, and exit with its exit code."""
    try:
        yield
    except (StartRefused, CommandRefused) as refusal:
        print_error(str(refusal))
        sys.exit(refusal.exit_code)
    except NotFound as error:
        print_error(error.message.partition(". ")[0] + " in this database.")
        sys.exit(CommandRefused.exit_code)
    except StorageError as error:
        print_error(f"The database cannot be used: {error}. Run the command again once it can; no step is done twice.")
        sys.exit(DatabaseRefused.exit_code)


def print_error(sentence: str) -> None:
    click.echo(sentence, err=True)


def print_line(line: str) -> None:
    """Write a line to stdout and flush it. Raises what `write` does."""
    write(f"{line}\n", flush=True)


def write(text: str, flush: bool = False) -> None:
    """Write to stdout.

    Raises:
        CommandRefused: writing failed, for example because the disk is full.
        BrokenPipeError: the reader of a pipe is gone. Click then ends the command.
    """
    try:
        sys.stdout.write(text)
        if flush:
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        # Python flushes stdout again at exit, and would print a stack trace.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise CommandRefused(f"The output cannot be written: {error.strerror}.") from None


def counted(count: int, noun: str) -> str:
    """Return a count with its noun, such as `1 run` or `2 runs`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
