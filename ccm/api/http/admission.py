"""Admission checks of each request: Host, token, origin, media type, in this order.

They run before anything else and on every path, because admitted clients can execute commands as the service's user.
Without them a web page could make a browser on this host start runs: through a domain name that resolves to loopback
(DNS rebinding, which the Host reveals), or with a cross-site request (which Origin and Sec-Fetch-Site reveal).
"""

from __future__ import annotations

import ipaddress
import re

from flask import Request

from ccm.api.http.tokens import Tokens
from ccm.errors import HostForbidden, OriginForbidden, Unauthorized, UnsupportedMediaType, ValidationError
from ccm.settings.parsers import HOST_NAME

# A name or an address, with an optional port.
HOST = re.compile(rf"(?P<name>{HOST_NAME.pattern})(?::\d{{1,5}})?", re.ASCII)
# Open without a token, because the path reveals no data and monitoring should need no secret.
OPEN_PATHS = frozenset({"/health"})
# The pages of the documentation, and what they load. They are open because a browser cannot send a token with these
# requests. They hold no data: their scripts ask for a token and fetch the rest with it.
DOCUMENTATION = re.compile(r"/docs(?:/[\w-]+)?", re.ASCII)
DOCUMENTATION_ASSETS = "/docs/assets/"
# Requests by pages of another site, or of another host of the same site. `none` means that the user typed the address.
FOREIGN_SITES = frozenset({"cross-site", "same-site"})
# Query parameters in which clients send tokens by mistake. URLs end up in logs and histories.
TOKEN_PARAMETERS = frozenset({"token", "access_token", "api_key", "apikey"})
DEFAULT_PORTS = {"http": ":80", "https": ":443"}
# The key of the headers as the proxy sent them, before werkzeug replaced them with the forwarded ones.
PROXY_FIX = "werkzeug.proxy_fix.orig"
BODY_METHODS = frozenset({"POST", "PUT", "PATCH"})


class Admission:
    """The admission checks.

    Args:
        allowed_hosts: the names that a Host header may have. Ports are ignored, because `ssh -L` uses another one.
        tokens: the accepted tokens. Without any, all clients are admitted.
    """

    def __init__(self, allowed_hosts: tuple[str, ...], tokens: Tokens) -> None:
        self._allowed_hosts = frozenset(map(host_name, allowed_hosts))
        self._tokens = tokens

    def check(self, request: Request) -> str | None:
        """Check a request. Return the name of its token, None if no tokens are configured.

        Raises:
            CCMError: the request is refused.
        """
        self._check_host(request.environ.get("HTTP_HOST"))
        if PROXY_FIX in request.environ:
            # The proxy's own Host too, because a page that rebinds to the proxy's address can forge the forwarded one.
            self._check_host(request.environ[PROXY_FIX]["HTTP_HOST"])
        client = self._check_token(request)
        self._check_origin(request)
        self._check_media_type(request)
        return client

    def _check_host(self, header: str | None) -> None:
        # Two Host headers arrive joined by a comma, which is not a valid name.
        name = None if header is None else host_name(header)
        if name is None or name not in self._allowed_hosts:
            shown = "The request has no Host header" if header is None else f"The Host {header[:200]!r} is not allowed"
            raise HostForbidden(f"{shown}. CCM_ALLOWED_HOSTS names the hosts that this service may be called by.")

    def _check_token(self, request: Request) -> str | None:
        for name in request.args:
            if name.lower() in TOKEN_PARAMETERS:
                raise ValidationError(
                    f"{name}: do not send a token in a URL, which is logged and remembered. Send it as "
                    "'Authorization: Bearer TOKEN', and replace this one.",
                    field=name,
                )
        if _is_open(request.path) or not self._tokens.required:
            return None
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        client = self._tokens.client(token.strip()) if scheme.lower() == "bearer" else None
        if client is None:
            raise Unauthorized(_refusal("Authorization" in request.headers, scheme, token))
        return client

    def _check_origin(self, request: Request) -> None:
        site = request.headers.get("Sec-Fetch-Site", "none").lower()
        origin = request.headers.get("Origin")
        own = f"{request.scheme}://{request.environ['HTTP_HOST']}".lower()
        own = own.removesuffix(DEFAULT_PORTS[request.scheme])  # browsers omit it, some proxies do not
        if (site in FOREIGN_SITES and not _is_followed_link(request)) or (origin is not None and origin.lower() != own):
            raise OriginForbidden(
                "A web page of another origin may not use this service. Serve the page from the same host and port, "
                "or call the service from that page's own server. Behind a proxy, CCM_TRUSTED_PROXY has to name it."
            )

    def _check_media_type(self, request: Request) -> None:
        if request.method not in BODY_METHODS:
            return
        has_body = bool(request.content_length or request.headers.get("Transfer-Encoding") or request.mimetype)
        if has_body and request.mimetype != "application/json":
            raise UnsupportedMediaType("The body must be JSON in UTF-8; send it with 'Content-Type: application/json'.")


def _refusal(given: bool, scheme: str, token: str) -> str:
    """Return why a request has no accepted token. Neither part of the header is repeated: either may be a secret."""
    send = "send 'Authorization: Bearer TOKEN' with one that CCM_API_TOKEN or CCM_API_TOKEN_FILE holds."
    if not given:
        return f"This service requires a token: {send}"
    if scheme.lower() != "bearer":
        return f"The Authorization header does not begin with 'Bearer ': {send}"
    if ":" in token:
        return "The token is not known. If it is a line NAME:TOKEN, leave off the name and the colon."
    return f"The token is not known: {send}"


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(DOCUMENTATION_ASSETS) or DOCUMENTATION.fullmatch(path) is not None


def _is_followed_link(request: Request) -> bool:
    """Return whether the user followed a link to the documentation, such as one in an issue tracker."""
    navigation = [request.headers.get(f"Sec-Fetch-{name}") for name in ("Mode", "Dest")]
    return navigation == ["navigate", "document"] and DOCUMENTATION.fullmatch(request.path) is not None


def host_name(header: str) -> str | None:
    """Return the name in a Host header, in lower case and without the port. None if the header is invalid.

    IPv6 addresses are normalized: `[0:0:0:0:0:0:0:1]` becomes `[::1]`.
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
