"""Access: settings that would let in strangers are refused, and open access is reported to the operator."""

from __future__ import annotations

import ipaddress

from ccm.errors import BadSetting
from ccm.settings.settings import Settings
from ccm.settings.token_file import read_tokens


def check_access(settings: Settings) -> None:
    """Check, before the service listens, that strangers on the network cannot use it.

    Raises:
        BadSetting: the file of tokens cannot be used, or HOST is not loopback and no token is set.
    """
    if settings.api_token_file is not None:
        try:
            read_tokens(settings.api_token_file)
        except OSError as error:
            advice = "; `flask token NAME` makes it" if isinstance(error, FileNotFoundError) else ""
            raise BadSetting(
                f"CCM_API_TOKEN_FILE {settings.api_token_file} cannot be read: {error.strerror}{advice}."
            ) from None
    if settings.unix_socket is None and not settings.has_tokens and not _is_loopback(settings.host):
        raise BadSetting(
            f"HOST {settings.host} needs a token, because everyone who can reach the service has a shell as its user: "
            "set CCM_API_TOKEN or CCM_API_TOKEN_FILE (`flask token NAME` makes one), or leave HOST on loopback."
        )


def access_warnings(settings: Settings) -> list[str]:
    """Return warnings about who can use the service without a token, one sentence each."""
    if settings.has_tokens:
        return []
    who = "every user of this host"
    if settings.unix_socket is not None:
        who = f"anyone with access to {settings.unix_socket} (mode {settings.unix_socket_mode:04o})"
        if not settings.unix_socket_mode & 0o066:
            who = f"only root and this user, through {settings.unix_socket} (mode {settings.unix_socket_mode:04o}),"
    if settings.trusted_proxy:
        who = f"everyone whom the proxy lets in, and {who}"
    return [
        f"no token is set: {who} can use the service and so has a shell as its user; CCM_API_TOKEN sets a token, or "
        "CCM_API_TOKEN_FILE names a file of them, to which `flask token NAME` adds one"
    ]


def _is_loopback(address: str) -> bool:
    return address == "localhost" or ipaddress.ip_address(address).is_loopback
