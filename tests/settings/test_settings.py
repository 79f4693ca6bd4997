"""Settings: defaults, invalid values, and their table in ccm/docs/configuration.md."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from ccm.errors import BadSetting
from ccm.settings.parsers import UNIX_PEER
from ccm.settings.settings import (
    PERMISSION_MODES,
    PRIVILEGED_OPTIONS,
    PRIVILEGED_PERMISSION_MODES,
    Settings,
    unknown_variables,
    variable_of,
)
from tests.docs import README, page, text_of

CONFIGURATION = text_of(page("configuration"))
ROW = re.compile(r"^\| `([A-Z_]+)` \| (.+?) \| (.+) \|$", re.MULTILINE)


def test_the_defaults() -> None:
    settings = Settings.from_env({})

    assert settings == Settings()
    assert (settings.host, settings.port, settings.log_level) == ("127.0.0.1", 3000, "info")
    assert settings.url == f"sqlite:///{Path.cwd()}/db.sqlite"


def test_values_are_read_from_the_environment(tmp_path: Path) -> None:
    settings = Settings.from_env(
        {
            "PORT": "8080",
            "DATABASE_URL": "postgres://u@h/db",
            "CCM_PRIVILEGED_OPTIONS": "env, sandbox",
            "CCM_ALLOWED_ROOTS": f"/:{tmp_path}",
            "CCM_SETTING_SOURCES": "",
            "LOG_LEVEL": "",
            "CCM_MAX_TURNS": "20",
            "CCM_MAX_BUDGET_USD": "2.50",
            "CCM_TRUSTED_PROXY": "0:0::1, unix",
            "CCM_URL_PREFIX": "/a/b-c/",
            "CCM_UNIX_SOCKET_MODE": "660",
            "CCM_WEBHOOK_URL": "https://hooks.example.com/x?key=1",
            "CCM_WEBHOOK_ALLOW": "Hooks.example.com:8443, *.example.org,[::1]",
            "CCM_WEBHOOK_SECRET": "whsec_MTExMTExMTExMTExMTExMTExMTExMTEx  whsec_MjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIy",
        }
    )

    assert settings.port == 8080
    assert settings.url == "postgresql://u@h/db"
    assert settings.privileged_options == ("env", "sandbox")
    assert settings.allowed_roots == (Path("/"), tmp_path.resolve())
    assert settings.setting_sources == ()
    assert settings.log_level == "info"
    assert (settings.max_turns, settings.max_budget_usd, settings.run_timeout) == (20, 2.5, None)
    assert settings.trusted_proxy == ("::1", "unix")
    assert settings.url_prefix == "/a/b-c"
    assert settings.unix_socket_mode == 0o660
    assert settings.webhook_url == "https://hooks.example.com/x?key=1"
    assert settings.webhook_allow == ("hooks.example.com:8443", "*.example.org", "[::1]")
    assert settings.webhook_secret == (b"1" * 24, b"2" * 24)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("30m", 1800), (" 2h ", 7200), ("1", 1), ("720h", 2_592_000), ("30d", 2_592_000)],
)
def test_a_duration_is_in_seconds_or_has_a_unit(text: str, seconds: int) -> None:
    assert Settings.from_env({"CCM_RUN_TIMEOUT": text}).run_timeout == seconds


def test_two_names_of_one_file_give_one_database(tmp_path: Path) -> None:
    (tmp_path / "link.sqlite").symlink_to(tmp_path / "real.sqlite")
    names = [Settings.from_env({"DATABASE_PATH": f"{tmp_path}/{name}.sqlite"}).url for name in ("link", "real")]
    assert names[0] == names[1]


def test_an_error_shows_no_password() -> None:
    with pytest.raises(BadSetting) as refusal:
        Settings.from_env({"DATABASE_URL": "mysql://user:secret@h/db"})
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("CCM_WEBHOOK_SECRET", "whsec_c2VjcmV0"),
        ("CCM_WEBHOOK_SECRET", "my secret"),
        ("CCM_WEBHOOK_URL", "hooks.example.com/secret"),
        ("CCM_WEBHOOK_URL", "https://hooks.example.com/ secret"),
    ],
)
def test_an_error_in_a_webhook_setting_shows_no_secret(variable: str, value: str) -> None:
    with pytest.raises(BadSetting) as refusal:
        Settings.from_env({variable: value})
    for part in ("my secret", "c2VjcmV0", "/secret", "/ secret"):
        assert part not in str(refusal.value)


def test_a_star_allows_every_privileged_option() -> None:
    assert "mcpServers" in Settings.from_env({"CCM_PRIVILEGED_OPTIONS": "*"}).privileged_options


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("PORT", "http", "whole number"),
        ("PORT", "70000", "from 0 to 65535"),
        ("HOST", "everywhere", "IP address"),
        ("HOST", "example.org", "IP address"),
        ("DATABASE_URL", "mysql://h/db", "postgresql://"),
        ("DATABASE_URL", "sqlite:///db.sqlite", "DATABASE_PATH"),
        ("DATABASE_PATH", "what?.sqlite", "question mark"),
        ("LOG_LEVEL", "loud", "debug, info, warn, error"),
        ("CCM_MAX_CONCURRENT_RUNS", "0", "from 1"),
        ("CCM_MAX_QUEUED_RUNS", "-1", "from 0"),
        ("CCM_MAX_HELD", "0", "from 1"),
        ("CCM_MAX_BODY_BYTES", "1", "from 1024"),
        ("CCM_MAX_MESSAGE_BYTES", "x", "whole number"),
        ("CCM_MESSAGE_BUDGET_BYTES", "1", "from 65536"),
        ("CCM_ALLOWED_ROOTS", "relative", "absolute path of a directory"),
        ("CCM_ALLOWED_ROOTS", "/nowhere/at/all", "absolute path of a directory"),
        ("CCM_PRIVILEGED_OPTIONS", "evn", "takes any of"),
        ("CCM_PERMISSION_MODE", "yolo", "must be one of"),
        ("CCM_SETTING_SOURCES", "user,team", "takes any of"),
        ("CCM_CLI_PATH", "claude", "absolute path"),
        ("CCM_MAX_TURNS", "0", "from 1"),
        ("CCM_MAX_TURNS", "2.5", "whole number"),
        ("CCM_MAX_BUDGET_USD", "0", "above 0"),
        ("CCM_MAX_BUDGET_USD", "-1", "above 0"),
        ("CCM_MAX_BUDGET_USD", "nan", "above 0"),
        ("CCM_MAX_BUDGET_USD", "inf", "above 0"),
        ("CCM_MAX_BUDGET_USD", "2,50", "above 0"),
        ("CCM_MAX_BUDGET_USD", "$2", "above 0"),
        ("CCM_RUN_TIMEOUT", "0", "from 1s"),
        ("CCM_RUN_TIMEOUT", "721h", "to 30d"),
        ("CCM_APPROVAL_TIMEOUT", "31d", "to 30d"),
        ("CCM_RUN_TIMEOUT", "1.5h", "such as 90s, 30m, 2h or 3d"),
        ("CCM_RUN_TIMEOUT", "2 days", "such as 90s, 30m, 2h or 3d"),
        ("CCM_RUN_TIMEOUT", "-5s", "such as 90s, 30m, 2h or 3d"),
        ("CCM_RUN_TIMEOUT", "500ms", "such as 90s, 30m, 2h or 3d"),
        ("CCM_TRUSTED_PROXY", "proxy.example", "neither an IP address nor unix"),
        ("CCM_TRUSTED_PROXY", "10.0.0.0/8", "neither an IP address nor unix"),
        ("CCM_TRUSTED_PROXY", "*", "neither an IP address nor unix"),
        ("CCM_URL_PREFIX", "agents", "a path such as /agents"),
        ("CCM_URL_PREFIX", "//evil.example", "a path such as /agents"),
        ("CCM_URL_PREFIX", "/a/../b", "a path such as /agents"),
        ("CCM_URL_PREFIX", "/a b", "a path such as /agents"),
        ("CCM_URL_PREFIX", "/api", "the service's own paths"),
        ("CCM_UNIX_SOCKET", "socket", "absolute path"),
        ("CCM_UNIX_SOCKET", "/" + "x" * 107, "107 bytes"),
        ("CCM_UNIX_SOCKET_MODE", "0400", "octal mode"),
        ("CCM_UNIX_SOCKET_MODE", "1777", "octal mode"),
        ("CCM_WEBHOOK_URL", "hooks.example.com", "begins with http"),
        ("CCM_WEBHOOK_URL", "https://me:secret@hooks.example.com/", "no user or password"),
        ("CCM_WEBHOOK_URL", "https://hooks.example.com/#x", "fragment"),
        ("CCM_WEBHOOK_SECRET", "a-word-of-mine", "whsec_"),
        ("CCM_WEBHOOK_SECRET", "MTExMTExMTExMTExMTExMTExMTExMTEx", "whsec_"),
        ("CCM_WEBHOOK_SECRET", "whsec_MTEx", "24 to 64 random bytes"),
        ("CCM_WEBHOOK_SECRET", "whsec_" + "MTEx" * 22, "24 to 64 random bytes"),
        ("CCM_WEBHOOK_SECRET", "whsec_MTExMTExMTExMTExMTExMTExMTExMTEx whsec_?", "base64"),
        ("CCM_WEBHOOK_ALLOW", "https://hooks.example.com", "no host"),
        ("CCM_WEBHOOK_ALLOW", "a.example,,b.example", "no host"),
        ("CCM_WEBHOOK_ALLOW", "*", "no host"),
        ("CCM_WEBHOOK_ALLOW", "*.*.example", "no host"),
        ("CCM_WEBHOOK_ALLOW", "::1", "no host"),
        ("CCM_WEBHOOK_ALLOW", "a.example:0", "no host"),
    ],
)
def test_an_invalid_value_is_refused_with_a_message_that_names_the_variable(
    variable: str, value: str, expected: str
) -> None:
    with pytest.raises(BadSetting) as refusal:
        Settings.from_env({variable: value})

    assert str(refusal.value).startswith(variable)
    assert expected in str(refusal.value)
    assert refusal.value.exit_code == 2


def test_an_unknown_variable_gets_a_suggestion() -> None:
    environ = {"CCM_ALOWED_ROOTS": "/", "CCM_RUN_ID": "an agent started this service", "CCM_MAX_HELD": "5"}

    assert unknown_variables(environ) == ["CCM_ALOWED_ROOTS is not a setting; did you mean CCM_ALLOWED_ROOTS?"]


def test_the_page_lists_every_setting_with_its_default() -> None:
    rows = ROW.findall(CONFIGURATION)
    settings = {variable_of(field.name): field for field in dataclasses.fields(Settings)}

    assert [variable for variable, _, _ in rows] == list(settings)
    for variable, shown, _ in rows:
        default = settings[variable].default
        if shown.startswith("(empty"):
            assert default in (None, "", ())
        else:
            assert settings[variable].metadata["parse"](shown.strip("`")) == default


def test_the_readme_repeats_rows_of_the_page() -> None:
    rows = ROW.findall(text_of(README))

    assert rows
    assert [row for row in rows if row not in ROW.findall(CONFIGURATION)] == []


@pytest.mark.parametrize(
    ("variable", "words"),
    [
        ("CCM_TRUSTED_PROXY", (UNIX_PEER,)),
        ("CCM_PRIVILEGED_OPTIONS", PRIVILEGED_OPTIONS),
        ("CCM_PERMISSION_MODE", PERMISSION_MODES + PRIVILEGED_PERMISSION_MODES),
    ],
)
def test_the_page_names_the_words_that_a_setting_takes(variable: str, words: tuple[str, ...]) -> None:
    (row,) = re.findall(rf"^\| `{variable}` \|.*$", CONFIGURATION, re.M)

    assert [word for word in words if f"`{word}`" not in row] == []
