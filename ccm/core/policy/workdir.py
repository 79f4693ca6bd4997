"""The rules for a run's working directory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ccm.errors import CwdForbidden, ValidationError

# PostgreSQL indexes values of up to 2,700 bytes.
PATH_BYTES = 2_000


def resolve(cwd: str, roots: Sequence[Path]) -> str:
    """Return the directory with its symbolic links resolved, as it is stored.

    Args:
        roots: the directories in one of which it must lie; empty for anywhere. This prevents mistakes, but an agent can
            still leave its directory.

    Raises:
        ValidationError: it is not the absolute path of a directory that this user can enter.
        CwdForbidden: it lies outside the allowed roots.
    """
    _check_absolute(cwd)
    try:
        path = Path(cwd).resolve(strict=True)
    except FileNotFoundError:
        raise ValidationError(f"cwd: {cwd!r} does not exist on the service's host.", field="cwd") from None
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it cannot be resolved"
        raise ValidationError(f"cwd: {cwd!r} cannot be used: {reason}.", field="cwd") from None
    if not path.is_dir():
        raise ValidationError(f"cwd: {cwd!r} is not a directory.", field="cwd")
    if not os.access(path, os.R_OK | os.X_OK):
        raise ValidationError(f"cwd: the service's user has no permission to enter {cwd!r}.", field="cwd")
    try:
        size = len(str(path).encode("utf-8"))
    except UnicodeEncodeError:
        raise ValidationError(f"cwd: {cwd!r} resolves to a path that is not UTF-8.", field="cwd") from None
    if size > PATH_BYTES:
        raise ValidationError(f"cwd: must be at most {PATH_BYTES} bytes long.", field="cwd")
    if not _within(path, roots):
        raise CwdForbidden(f"cwd: {cwd!r} is outside the directories that CCM_ALLOWED_ROOTS allows.", field="cwd")
    return str(path)


def check_roots(cwd: str, roots: Sequence[Path]) -> None:
    """Check a stored directory again: the roots and the directory's symbolic links may have changed since.

    Raises:
        CwdForbidden: it lies outside the allowed roots.
    """
    if not _within(Path(os.path.realpath(cwd)), roots):
        raise CwdForbidden(
            f"The directory {cwd!r} is outside those that CCM_ALLOWED_ROOTS allows. Start a fresh run or fork the "
            "session with a cwd within them."
        )


def _within(path: Path, roots: Sequence[Path]) -> bool:
    return not roots or any(path.is_relative_to(root) for root in roots)


def _check_absolute(cwd: str) -> None:
    if not os.path.isabs(cwd):
        raise ValidationError(f"cwd: {cwd!r} is not an absolute path; begin it with /.", field="cwd")


def canonical(cwd: str) -> str:
    """Return a directory as `resolve` would store it, even if it does not exist. For filtering runs by directory.

    Raises:
        ValidationError: it is not an absolute path.
    """
    _check_absolute(cwd)
    path = os.path.realpath(cwd)
    return path if path.isprintable() or path.isascii() else path.encode("utf-8", "replace").decode("utf-8")
