"""The file that CCM_API_TOKEN_FILE names: a line `NAME:TOKEN` for each client. Empty lines and `#` comments may be."""

from __future__ import annotations

import os
import re
import secrets
import shlex
import stat
from pathlib import Path

from ccm.errors import BadSetting

NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)
# What an HTTP header carries without quoting; long enough not to be guessed.
TOKEN = re.compile(r"[\x21-\x7e]{16,512}", re.ASCII)
TOKEN_BYTES = 32
# Permissions that make it unsafe: any for others, and writing for its group. Its group may read it, because an operator
# may have a file of root's that the service's group reads (0640).
UNSAFE_MODE = 0o027


def read_tokens(file: Path) -> dict[str, str]:
    """The tokens by their names.

    Raises:
        OSError: it cannot be read.
        BadSetting: other users may read or change it, or a line is none; the sentence names the line by its number,
            for it may hold a token.
    """
    with file.open("rb") as stream:
        _check_mode(file, stream.fileno())
        return _parse(file, stream.read())


def _check_mode(file: Path, descriptor: int) -> None:
    """Refuse a file that other users may read or change.

    Args:
        descriptor: the opened file: under its path there may be another one by now.
    """
    mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
    if mode & UNSAFE_MODE:
        raise BadSetting(
            f"CCM_API_TOKEN_FILE {file} has mode {mode:04o}, so other users of this host can take or add tokens, and "
            f"each token is a shell as the service's user: `chmod 600 {shlex.quote(str(file))}`."
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
            raise BadSetting(f"CCM_API_TOKEN_FILE {file}, line {number}: this name or token is there already.")
        tokens[name] = token
    return tokens


def new_token() -> str:
    return secrets.token_urlsafe(TOKEN_BYTES)


def add_token(file: Path, name: str, token: str) -> None:
    """Add a line. The file is made if it is not there, its owner's alone.

    Raises:
        BadSetting: the file is none, has the name already, or other users may read or change it.
        OSError: it cannot be read or written.
    """
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    with open(descriptor, "a+b") as stream:
        _check_mode(file, descriptor)
        stream.seek(0)
        before = stream.read()
        if name in _parse(file, before):
            raise BadSetting(f"There is a token of the name {name} already; delete its line in {file} first.")
        separator = b"" if not before or before.endswith(b"\n") else b"\n"
        stream.write(separator + f"{name}:{token}\n".encode("ascii"))
