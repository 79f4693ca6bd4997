"""Who may talk to the service at all. Whoever may has a shell as its user, so this comes before anything else, on every
path: the Host, then the token, then where the request comes from, then its media type.

Without these a web page could have a browser on this host start runs: through a name of its own that leads to loopback
(DNS rebinding: the Host gives it away), or by a request across sites (Origin and Sec-Fetch-Site do).
"""

from __future__ import annotations

import ipaddress
import re

from flask import Request

from ccm.api.http.tokens import Tokens
from ccm.errors import HostForbidden, OriginForbidden, Unauthorized, UnsupportedMediaType, ValidationError
from ccm.settings.parsers import HOST_NAME

# A name or an address, and perhaps a port: nothing else that a header may hold.
HOST = re.compile(rf"(?P<name>{HOST_NAME.pattern})(?::\d{{1,5}})?", re.ASCII)
# It tells nobody anything, and whoever watches the service should need no secret.
OPEN_PATHS = frozenset({"/health"})
# A page of another site, or of another name under the same domain. `none` is the user's own typing.
FOREIGN_SITES = frozenset({"cross-site", "same-site"})
# Names under which tokens are wrongly sent in addresses, which land in logs and histories.
TOKEN_PARAMETERS = frozenset({"token", "access_token", "api_key", "apikey"})
DEFAULT_PORTS = {"http": ":80", "https": ":443"}
# Where werkzeug keeps what the proxy itself sent.
PROXY_FIX = "werkzeug.proxy_fix.orig"
BODY_METHODS = frozenset({"POST", "PUT", "PATCH"})


class Guard:
    """
    Args:
        allowed_hosts: names that the service may be called by, without ports: `ssh -L` takes another port.
        tokens: who may use it; everybody that reaches it, if there are none.
    """

    def __init__(self, allowed_hosts: tuple[str, ...], tokens: Tokens) -> None:
        self._allowed_hosts = frozenset(map(host_name, allowed_hosts))
        self._tokens = tokens

    def admit(self, request: Request) -> str | None:
        """Let a request through, and say whose it is: the name of its token, None if there are no tokens.

        Raises:
            CCMError: it is refused.
        """
        self._check_host(request.environ.get("HTTP_HOST"))
        if PROXY_FIX in request.environ:
            # The proxy's own Host too: a page that is rebound onto the proxy's address may forge the forwarded one.
            self._check_host(request.environ[PROXY_FIX]["HTTP_HOST"])
        client = self._check_token(request)
        self._check_origin(request)
        self._check_media_type(request)
        return client

    def _check_host(self, header: str | None) -> None:
        # Two Host headers come joined by a comma, which is no name either.
        name = None if header is None else host_name(header)
        if name is None or name not in self._allowed_hosts:
            shown = "The request has no Host header" if header is None else f"The Host {header[:200]!r} is not allowed"
            raise HostForbidden(f"{shown}. CCM_ALLOWED_HOSTS names the hosts that this service may be called by.")

    def _check_token(self, request: Request) -> str | None:
        for name in request.args:
            if name.lower() in TOKEN_PARAMETERS:
                raise ValidationError(
                    f"{name}: a token does not belong into an address, which is logged and remembered. Send it as "
                    "'Authorization: Bearer TOKEN', and make a new one instead of this.",
                    field=name,
                )
        if request.path in OPEN_PATHS or not self._tokens.required:
            return None
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        client = self._tokens.client(token.strip()) if scheme.lower() == "bearer" else None
        if client is None:
            raise Unauthorized(
                "This service wants a token: send 'Authorization: Bearer TOKEN' with one that CCM_API_TOKEN or "
                "CCM_API_TOKEN_FILE holds."
            )
        return client

    def _check_origin(self, request: Request) -> None:
        site = request.headers.get("Sec-Fetch-Site", "none").lower()
        origin = request.headers.get("Origin")
        own = f"{request.scheme}://{request.environ['HTTP_HOST']}".lower()
        own = own.removesuffix(DEFAULT_PORTS[request.scheme])  # a browser leaves it out, and some proxies do not
        if site in FOREIGN_SITES or (origin is not None and origin.lower() != own):
            raise OriginForbidden(
                "A web page of another origin may not use this service. Serve the page from the same host and port, "
                "or call the service from that page's own server. Behind a proxy, CCM_TRUSTED_PROXY has to name it."
            )

    def _check_media_type(self, request: Request) -> None:
        has_body = bool(request.content_length or request.headers.get("Transfer-Encoding") or request.mimetype)
        if request.method in BODY_METHODS and has_body and request.mimetype != "application/json":
            raise UnsupportedMediaType("The body must be JSON in UTF-8; send it with 'Content-Type: application/json'.")


def host_name(header: str) -> str | None:
    """The name in a Host header, in lower case and without the port; None if the header is none.

    Addresses are brought into one form, so that `[0:0:0:0:0:0:0:1]` is `[::1]`.
    """
    match = HOST.fullmatch(header.lower())
    if match is None:
        return None
    name = match["name"]
    if name.startswith("["):
        try:
            return f"[{ipaddress.IPv6Address(name[1:-1])}]"
        except ValueError:
            return None
    return name
