"""Deletes whole trees of sessions with Claude Code's own files of their runs. Nothing else deletes recorded history."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ccm.core.archive.local_files import LocalFiles, count, remove
from ccm.db import sessions, trees
from ccm.db.driver.database import Database
from ccm.db.trees import Tree
from ccm.errors import CommandRefused
from ccm.timestamps import timestamp


@dataclass(frozen=True)
class Candidate:
    """A tree to delete, and the files on this host to delete with it.

    Attributes:
        directories: the configuration directories of Claude Code that were searched for the files.
    """

    tree: Tree
    paths: list[Path]
    file_count: int
    directories: list[Path]


def tree_of(database: Database, session_id: str, files: LocalFiles) -> Candidate:
    """Return the tree of a session.

    Raises:
        SessionNotFound: there is no such session.
        CommandRefused: a run of it has not ended.
    """
    with database.transaction() as transaction:
        root = trees.get_root(transaction, sessions.get(transaction, session_id).id)
    candidate = _candidate(database, root, files)
    if candidate.tree.not_ended:
        raise CommandRefused(f"Nothing was deleted: {why_kept(candidate.tree)}")
    return candidate


def why_kept(tree: Tree) -> str:
    """Return the sentence that says why a tree is not deleted."""
    return (
        f"the tree of session {tree.root} has runs that have not ended ({tree.not_ended}). Start the service and let "
        "them end, or cancel them there; those that a crash has left it ends by itself."
    )


def trees_older_than(database: Database, age: int, files: LocalFiles) -> Iterator[Candidate]:
    """Yield the trees whose latest activity is older than `age` seconds, also those with a run that has not ended."""
    with database.transaction() as transaction:
        roots = trees.older_than(transaction, timestamp(-age))
    for root in roots:
        yield _candidate(database, root, files)


def _candidate(database: Database, root: str, files: LocalFiles) -> Candidate:
    with database.transaction() as transaction:
        tree = trees.measure(transaction, root)
    sdk_session_ids: list[str] = []
    # All directories, because a run may have written the transcript of another run of the tree to its own directory.
    directories: dict[Path, None] = {}
    for place in trees.run_places(database, root):
        sdk_session_ids.append(place.sdk_session_id)
        directories.update(dict.fromkeys(files.directories(place.cwd, _own_environ(place.options_json))))
    paths = files.of_sessions(sdk_session_ids, directories)
    return Candidate(tree, paths, sum(count(path) for path in paths), list(directories))


def _own_environ(options_json: str) -> dict[str, str]:
    """Return the variables of a run's `env` option. Skip values of other types, which an import may have stored."""
    environ = json.loads(options_json).get("env")
    if not isinstance(environ, dict):
        return {}
    return {name: value for name, value in environ.items() if isinstance(value, str)}


def delete(database: Database, candidate: Candidate) -> None:
    """Delete a tree and its files: the files first, because the rows say where they are.

    Raises:
        CommandRefused: a file cannot be deleted. The tree is still in the database.
        StorageError: the database failed. Another call deletes the rest.
    """
    for path in candidate.paths:
        try:
            remove(path)
        except OSError as error:
            raise CommandRefused(
                f"{path} cannot be deleted: {error.strerror}. Its tree of session {candidate.tree.root} is still there."
            ) from None
    trees.delete(database, candidate.tree.root)
