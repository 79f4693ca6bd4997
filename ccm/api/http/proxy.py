"""Behind a reverse proxy: what it tells of the request that it passes on is believed if CCM_TRUSTED_PROXY names it.

From everybody else `X-Forwarded-*` and `Forwarded` are taken away: whoever could send them would choose the name, the
scheme and the client's address that the service goes by.
"""

from __future__ import annotations

import ipaddress
import logging
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from werkzeug.middleware.proxy_fix import ProxyFix

from ccm.api.http.guard import HOST
from ccm.errors import ValidationError
from ccm.settings.parsers import UNIX_PEER, URL_PREFIX

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

log = logging.getLogger(__name__)

# How waitress and werkzeug name the peers of a Unix socket.
UNIX_ADDRESSES = frozenset({"localhost", "<local>"})
FORWARDED = "HTTP_X_FORWARDED_"
# What each header may say. The client is for the log only, so any node's name will do (RFC 7239, section 6).
RULES = {
    FORWARDED + "FOR": (re.compile(r"[\w.:%\[\]-]{1,100}", re.ASCII), "an address"),
    FORWARDED + "PROTO": (re.compile(r"https?"), "http or https"),
    FORWARDED + "HOST": (HOST, "a host's name and perhaps its port"),
    FORWARDED + "PREFIX": (URL_PREFIX, "a path such as /agents, without what would need quoting"),
}
FAULT = "ccm.forwarded_fault"


class Forwarded:
    """WSGI middleware around the whole app: afterwards the environ is as if the client had come without a proxy.

    Args:
        trusted: addresses of the proxies that are believed; UNIX_PEER is whoever comes through the Unix socket.
        prefix: the path under which clients find the service, where a proxy does not tell. It may have taken it off
            the request's path, or not.
    """

    def __init__(self, app: WSGIApplication, trusted: Iterable[str], prefix: str) -> None:
        self._app = app
        self._believed = ProxyFix(app, x_for=1, x_proto=1, x_host=1, x_prefix=1)
        self._trusted = frozenset(trusted)
        self._prefix = prefix
        self._told = False

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        names = [name for name in environ if name.startswith(FORWARDED) or name == "HTTP_FORWARDED"]
        said = {name: environ.pop(name) for name in names}
        peer = environ["REMOTE_ADDR"] = _peer(environ["REMOTE_ADDR"])
        environ["SCRIPT_NAME"] = self._prefix
        path = environ["PATH_INFO"]
        if self._prefix and (path == self._prefix or path.startswith(self._prefix + "/")):
            environ["PATH_INFO"] = path[len(self._prefix) :] or "/"
        if peer not in self._trusted:
            if said and not self._told:
                self._told = True
                log.warning("what %s forwards is not believed: CCM_TRUSTED_PROXY does not name it", peer)
            return self._app(environ, start_response)
        for name, (rule, meaning) in RULES.items():
            # The last one is the trusted proxy's own word; what stands before it, anybody may have sent.
            value = said.get(name, "").rpartition(",")[2].strip(" \t")
            if name.endswith(("HOST", "PROTO")):
                value = value.lower()
            elif name.endswith("PREFIX"):
                value = value.rstrip("/") if value.strip("/") else ""
            if rule.fullmatch(value):
                environ[name] = value
            elif value:
                header = name.removeprefix("HTTP_").replace("_", "-").title()
                environ[FAULT] = f"The proxy sent a {header} that cannot be used: it must be {meaning}."
        return self._believed(environ, start_response)


def check_forwarded(environ: WSGIEnvironment) -> None:
    """
    Raises:
        ValidationError: a trusted proxy sent what cannot be used.
    """
    if FAULT in environ:
        raise ValidationError(environ[FAULT])


def _peer(address: str) -> str:
    """An address in its one form: an IPv4 one is the same on a socket for both kinds."""
    if address in UNIX_ADDRESSES:
        return UNIX_PEER
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    return str(getattr(ip, "ipv4_mapped", None) or ip)
