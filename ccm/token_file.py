"""The file that CCM_API_TOKEN_FILE names: a line `NAME:TOKEN` for each client. Empty lines and `#` comments may be."""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path

from ccm.errors import BadSetting

NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)
# What an HTTP header carries without quoting; long enough not to be guessed.
TOKEN = re.compile(r"[\x21-\x7e]{16,512}", re.ASCII)
TOKEN_BYTES = 32


def read_tokens(file: Path) -> dict[str, str]:
    """The tokens by their names.

    Raises:
        OSError: it cannot be read.
        BadSetting: a line is none; the sentence names it by its number, for it may hold a token.
    """
    tokens: dict[str, str] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
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
        BadSetting: the file is none, or has the name already.
        OSError: it cannot be written.
    """
    tokens = read_tokens(file) if file.exists() else {}
    if name in tokens:
        raise BadSetting(f"There is a token of the name {name} already; delete its line in {file} first.")
    before = file.read_bytes() if file.exists() else b""
    separator = b"" if not before or before.endswith(b"\n") else b"\n"
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    with open(descriptor, "ab") as stream:
        stream.write(separator + f"{name}:{token}\n".encode("ascii"))
