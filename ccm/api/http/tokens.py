"""The tokens that clients show, each with a name."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import threading
from pathlib import Path

from ccm.errors import BadSetting
from ccm.settings.settings import Settings
from ccm.settings.token_file import read_tokens

log = logging.getLogger(__name__)

# The name of the one client where there is a single token without names.
SINGLE = "api"


class Tokens:
    """Digests of tokens only: what is compared takes as long whatever was sent.

    Args:
        settings: names the token, or the file of tokens, which is read again when it changes.
    """

    def __init__(self, settings: Settings) -> None:
        self._file = settings.api_token_file
        self._lock = threading.Lock()
        self._read_at: tuple[int, ...] | None = None
        # The errno for which the file cannot be read at the moment.
        self._failure: int | None = None
        self._single = {} if settings.api_token is None else {SINGLE: settings.api_token}
        self._digests = {_digest(token): name for name, token in self._single.items()}
        self.required = bool(self._single) or self._file is not None

    def client(self, token: str) -> str | None:
        """Whose token it is, None if it is nobody's."""
        if self._file is not None:
            self._refresh(self._file)
        shown = _digest(token)
        name = None
        for digest, owner in self._digests.items():
            if hmac.compare_digest(digest, shown):
                name = owner
        return name

    def _refresh(self, file: Path) -> None:
        with self._lock:
            try:
                state = _state(file)
                if state == self._read_at:
                    return
                tokens = read_tokens(file)
            except OSError as error:
                self._lose(file, error)
                return
            except BadSetting as error:
                # A slip of the operator's pen must not lock everybody out.
                log.warning("the tokens stay as they were: %s", error)
                self._read_at, self._failure = state, None
                return
            self._read_at, self._failure = state, None
            self._take(tokens)

    def _lose(self, file: Path, error: OSError) -> None:
        """Let nobody in while the file cannot be read.

        Each request tries again: the reason may pass without a change of the file, as a want of descriptors does.
        """
        self._read_at = None
        if self._failure == error.errno:
            return  # said when it began: with every request it would flood the log
        self._failure = error.errno
        log.warning("nobody is let in, for CCM_API_TOKEN_FILE %s cannot be read: %s", file, error.strerror)
        self._take({})

    def _take(self, tokens: dict[str, str]) -> None:
        self._digests = {_digest(token): name for name, token in self._single.items() | tokens.items()}
        log.info("tokens of %s", ", ".join(tokens) or "nobody")


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _state(file: Path) -> tuple[int, ...]:
    status = os.stat(file)
    # The time of its change too: a `chmod` that lets the service read it again changes nothing else.
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
