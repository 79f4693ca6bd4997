"""The tokens that are accepted, each with the name of its client."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from pathlib import Path

from ccm.errors import BadSetting
from ccm.settings.settings import Settings
from ccm.settings.token_file import read_tokens

log = logging.getLogger(__name__)

# The client name of CCM_API_TOKEN.
SINGLE = "api"


class Tokens:
    """The accepted tokens, kept as digests, so that the time of a look-up reveals nothing about a token.

    Args:
        settings: has the single token, or the file of tokens, which is read again when it changes.
    """

    def __init__(self, settings: Settings) -> None:
        self._file = settings.api_token_file
        self._lock = threading.Lock()
        # The file's state when it was last read, or the errno while it cannot be read.
        self._seen: tuple[int, ...] | int | None = None
        self._single = {} if settings.api_token is None else {SINGLE: settings.api_token}
        self._digests = {_digest(token): name for name, token in self._single.items()}
        self.required = settings.has_tokens

    def client(self, token: str) -> str | None:
        """Return the name of a token's client, None if the token is not accepted."""
        if self._file is not None:
            self._refresh(self._file)
        return self._digests.get(_digest(token))

    def _refresh(self, file: Path) -> None:
        with self._lock:
            seen: tuple[int, ...] | int | None = None
            try:
                seen = _state(file)
                if seen != self._seen:
                    self._use(read_tokens(file))
            except OSError as error:
                # No token is accepted. Each request tries again, because the reason may pass without a change of the
                # file, such as too many open files.
                seen = error.errno
                if seen != self._seen:  # logged once: a line per request would flood the log
                    sentence = "no token is accepted, because CCM_API_TOKEN_FILE %s cannot be read: %s"
                    log.warning(sentence, file, error.strerror, extra={"event": "token_file_unreadable"})
                    self._use({})
            except BadSetting as error:
                # A typo of the operator must not lock out all clients.
                log.warning("the tokens stay as they were: %s", error, extra={"event": "token_file_invalid"})
            self._seen = seen

    def _use(self, tokens: dict[str, str]) -> None:
        self._digests = {_digest(token): name for name, token in self._single.items() | tokens.items()}
        log.info("tokens of %s", ", ".join(tokens) or "nobody", extra={"event": "tokens_read"})


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _state(file: Path) -> tuple[int, ...]:
    status = os.stat(file)
    # ctime too, because a `chmod` that makes the file readable again changes nothing else.
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
