"""Applies the `X-Forwarded-*` headers of the proxies in CCM_TRUSTED_PROXY.

They are removed from the requests of all other peers, as is `Forwarded`: a client that could set them would choose the
host name, the scheme and the client address that the service relies on.
"""

from __future__ import annotations

import ipaddress
import logging
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING

from werkzeug.middleware.proxy_fix import ProxyFix

from ccm.api.http.admission import HOST
from ccm.errors import ValidationError
from ccm.settings.parsers import UNIX_PEER, URL_PREFIX

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

log = logging.getLogger(__name__)

# The REMOTE_ADDR of peers on a Unix socket, in waitress and werkzeug.
UNIX_ADDRESSES = frozenset({"localhost", "<local>"})
FORWARDED = "HTTP_X_FORWARDED_"
# The valid values of each header. The client's address is only logged, so any node name is valid (RFC 7239, section 6).
RULES = {
    FORWARDED + "FOR": (re.compile(r"[\w.:%\[\]-]{1,100}", re.ASCII), "an address"),
    FORWARDED + "PROTO": (re.compile(r"https?"), "http or https"),
    FORWARDED + "HOST": (HOST, "a host's name and perhaps its port"),
    FORWARDED + "PREFIX": (URL_PREFIX, "a path such as /agents, without what would need quoting"),
}
# The key of a proxy's invalid header in the environ.
INVALID_HEADER = "ccm.forwarded_fault"


class Forwarded:
    """WSGI middleware that makes the environ look as if the client had connected without a proxy.

    Args:
        trusted: the addresses of trusted proxies. UNIX_PEER stands for all peers on the Unix socket.
        prefix: the path under which clients find the service, if the proxy does not send it. The proxy may or may not
            have removed it from the request's path.
    """

    def __init__(self, app: WSGIApplication, trusted: Iterable[str], prefix: str) -> None:
        self._app = app
        self._with_forwarded_headers = ProxyFix(app, x_for=1, x_proto=1, x_host=1, x_prefix=1)
        self._trusted = frozenset(trusted)
        self._prefix = prefix
        self._warned = False

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        # The first condition alone rules out nearly all names, quickly.
        names = [
            name for name in environ if "FORWARDED" in name and (name.startswith(FORWARDED) or name == "HTTP_FORWARDED")
        ]
        forwarded = {name: environ.pop(name) for name in names}
        peer = environ["REMOTE_ADDR"] = _peer(environ["REMOTE_ADDR"])
        environ["SCRIPT_NAME"] = self._prefix
        path = environ["PATH_INFO"]
        if self._prefix and (path == self._prefix or path.startswith(self._prefix + "/")):
            environ["PATH_INFO"] = path[len(self._prefix) :] or "/"
        if peer not in self._trusted:
            if forwarded and not self._warned:
                self._warned = True
                sentence = "ignoring the X-Forwarded headers of %s: CCM_TRUSTED_PROXY does not name it"
                log.warning(sentence, peer, extra={"event": "proxy_untrusted"})
            return self._app(environ, start_response)
        for name, (rule, meaning) in RULES.items():
            # The trusted proxy appended the last value. Clients may have sent the ones before it.
            value = forwarded.get(name, "").rpartition(",")[2].strip(" \t")
            if name.endswith(("HOST", "PROTO")):
                value = value.lower()
            elif name.endswith("PREFIX"):
                value = value.rstrip("/")
            if rule.fullmatch(value):
                environ[name] = value
            elif value:
                header = name.removeprefix("HTTP_").replace("_", "-").title()
                environ[INVALID_HEADER] = f"The proxy sent a {header} that cannot be used: it must be {meaning}."
        return self._with_forwarded_headers(environ, start_response)


def check_forwarded(environ: WSGIEnvironment) -> None:
    """Refuse a request with an invalid header of a trusted proxy.

    Raises:
        ValidationError: names the header.
    """
    if INVALID_HEADER in environ:
        raise ValidationError(environ[INVALID_HEADER])


@lru_cache(maxsize=256)  # parsing an address takes a tenth of the time of a short request
def _peer(address: str) -> str:
    """Return an address in its canonical form: a dual-stack socket shows IPv4 addresses as IPv6."""
    if address in UNIX_ADDRESSES:
        return UNIX_PEER
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    return str(getattr(ip, "ipv4_mapped", None) or ip)
