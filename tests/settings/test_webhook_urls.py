"""The operator's list of hosts that may receive webhooks."""

from __future__ import annotations

import pytest

from ccm.settings.webhook_urls import allowed, host_of, web_address


@pytest.mark.parametrize(
    ("url", "pattern", "is_allowed"),
    [
        ("https://hooks.example.com/x", "hooks.example.com", True),
        ("https://HOOKS.example.COM/x", "hooks.example.com", True),
        ("http://hooks.example.com:81/x", "hooks.example.com", True),
        ("https://hooks.example.com/x", "hooks.example.com:443", True),
        ("http://hooks.example.com/x", "hooks.example.com:443", False),
        ("https://hooks.example.com.evil.example/", "hooks.example.com", False),
        ("https://evil.example/hooks.example.com", "hooks.example.com", False),
        ("https://evil.example/?@hooks.example.com", "hooks.example.com", False),
        ("https://a.example.com/", "*.example.com", True),
        ("https://a.b.example.com/", "*.example.com", True),
        ("https://example.com/", "*.example.com", False),
        ("https://evilexample.com/", "*.example.com", False),
        ("https://a.example.com:8443/", "*.example.com:8443", True),
        ("https://a.example.com/", "*.example.com:8443", False),
        ("http://[::1]:80/", "[::1]", True),
        ("http://[::1]/", "[::1]:80", True),
        ("http://[::2]/", "[::1]", False),
    ],
)
def test_hosts_match_patterns(url: str, pattern: str, is_allowed: bool) -> None:
    assert allowed(web_address(url), (pattern,)) is is_allowed
    assert allowed(url, ("other.example", pattern)) is is_allowed
    assert allowed(url, ())


def test_host_of_shows_host_and_port_only() -> None:
    assert host_of("https://Hooks.example.com/path?key=1") == "hooks.example.com:443"
    assert host_of("http://[::1]") == "[::1]:80"
