"""The file of CCM_API_TOKEN_FILE: a line `NAME:TOKEN` for each client; empty lines and `#` comments are skipped."""

from __future__ import annotations

import os
import re
import secrets
import shlex
import stat
from pathlib import Path

from ccm.errors import BadSetting

NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)
# The characters that an HTTP header carries unquoted; long enough not to be guessed.
TOKEN = re.compile(r"[\x21-\x7e]{16,512}", re.ASCII)
TOKEN_BYTES = 32
# Permissions that make the file unsafe: any for others, and write for its group. The group may read it (0640), because
# the file may belong to root while the service reads it through its group.
UNSAFE_MODE = 0o027


def read_tokens(file: Path) -> dict[str, str]:
    """Return the tokens by client name.

    Raises:
        OSError: the file cannot be read.
        BadSetting: other users may read or change the file, or a line is invalid. The message names that line by its
            number only, because it may contain a token.
    """
    with file.open("rb") as stream:
        _check_mode(file, stream.fileno())
        return _parse(file, stream.read())


def _check_mode(file: Path, descriptor: int) -> None:
    """Refuse a file that other users may read or change.

    Args:
        descriptor: the open file. Its path may name another file by now.
    """
    mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
    if mode & UNSAFE_MODE:
        raise BadSetting(
            f"CCM_API_TOKEN_FILE {file} has mode {mode:04o}, so other users of this host can read or add tokens, and "
            f"each token gives a shell as the service's user: run `chmod 600 {shlex.quote(str(file))}`."
        )


def _parse(file: Path, content: bytes) -> dict[str, str]:
    tokens: dict[str, str] = {}
    for number, line in enumerate(content.decode("utf-8", errors="replace").splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        name, colon, token = line.strip().partition(":")
        if not colon or not NAME.fullmatch(name) or not TOKEN.fullmatch(token):
            raise BadSetting(
                f"CCM_API_TOKEN_FILE {file}, line {number}: must be NAME:TOKEN, a name of letters, digits, '.', '_' "
                "and '-', and a token of 16 to 512 visible characters. `flask token NAME` makes one."
            )
        if name in tokens or token in tokens.values():
            raise BadSetting(f"CCM_API_TOKEN_FILE {file}, line {number}: an earlier line has this name or token.")
        tokens[name] = token
    return tokens


def new_token() -> str:
    """Return a random token."""
    return secrets.token_urlsafe(TOKEN_BYTES)


def add_token(file: Path, name: str, token: str) -> None:
    """Append a line to the file, which is created with mode 0600 if it does not exist.

    Raises:
        BadSetting: the file is invalid or has the name already, or other users may read or change it.
        OSError: the file cannot be read or written.
    """
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    with open(descriptor, "a+b") as stream:
        _check_mode(file, descriptor)
        stream.seek(0)
        content = stream.read()
        if name in _parse(file, content):
            raise BadSetting(f"A token named {name} already exists; delete its line in {file} first.")
        separator = b"" if not content or content.endswith(b"\n") else b"\n"
        stream.write(separator + f"{name}:{token}\n".encode("ascii"))
