"""Bad input: each is refused with its status, code and field, nothing of it is stored, and nothing fails.

The requests are made in process. Bodies whose size or end waitress has to find go over a socket, and so does one
refusal of each kind.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ccm.api.http.bodies import ForkBody, ImageBody, ResumeBody, SessionBody, StartBody
from ccm.api.http.options_body import SERVICE_OWNED, Agent, Options
from ccm.core.policy.permitted_options import check_options
from ccm.errors import Forbidden
from ccm.models.fields import RUN_ID
from ccm.settings.settings import PRIVILEGED_OPTIONS, Settings
from tests.api.conftest import NOWHERE, connect, folder_of, post_head, read_all, refused
from tests.api.in_process import InProcessService
from tests.client import Client
from tests.conftest import ServeFunction
from tests.e2e.test_runs import PNG

KINDS = ("start", "resume", "fork")
SMALL = 2**16
# In place of a value: the field is left out.
MISSING = object()


@dataclass(frozen=True)
class Bad:
    """Fields that are refused, the field that is at fault, and words of the message."""

    fields: Mapping[str, Any]
    field: str
    words: str


# ---- the services


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one allowed root, in a directory where something else lies beside it."""
    root = folder_of(tmp_path_factory.mktemp("roots"), "allowed")
    folder_of(root)
    folder_of(root.parent, "allowed-not")
    (root / "file.txt").write_text("hello\n")
    (root / "way-out").symlink_to(root.parent)
    (root / "way-in").symlink_to(root / "project")
    (root / "loop").symlink_to(root / "loop")
    return root


@pytest.fixture(scope="module")
def strict_service(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcessService]:
    own = {"CCM_ALLOWED_ROOTS": root, "CCM_SETTING_SOURCES": "user"}
    with InProcessService(tmp_path_factory.mktemp("strict"), **own) as service:
        yield service
        # None of the requests that it refused was stored, and none failed.
        assert service.client.get("/api/runs").json == []
        assert service.client.get("/api/sessions").json == []
        assert service.client.get("/health").json == {"status": "ok"}
        assert [line for line in service.log if "Traceback" in line] == []


@pytest.fixture(scope="module")
def strict(strict_service: InProcessService) -> Client:
    """A client of a service whose operator allows nothing beyond the defaults, and which is to refuse everything."""
    return strict_service.client


@pytest.fixture(scope="module")
def lenient_service(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcessService]:
    own = {"CCM_ALLOWED_ROOTS": root, "CCM_SETTING_SOURCES": "user"}
    folder = tmp_path_factory.mktemp("lenient")
    with InProcessService(folder, **own, CCM_PRIVILEGED_OPTIONS="*", CCM_MAX_BODY_BYTES=SMALL) as service:
        yield service


@pytest.fixture(scope="module")
def lenient(lenient_service: InProcessService) -> Client:
    """A client of a service whose operator allows every option, and only small bodies."""
    return lenient_service.client


@pytest.fixture(scope="module")
def served(serve_all: ServeFunction) -> Client:
    """A client of a service over a socket, which takes only small bodies."""
    return Client(serve_all(CCM_MAX_BODY_BYTES=SMALL).url)


@pytest.fixture(scope="module")
def ended(lenient: Client, root: Path) -> dict[str, Any]:
    """A run of the lenient service."""
    return lenient.start(root / "project", "Hello.")


@pytest.fixture
def untouched(lenient: Client, ended: dict[str, Any]) -> Iterator[Client]:
    """The lenient service, which must have no more runs after the test than before it."""
    before = [run["id"] for run in lenient.get("/api/runs", limit=1000).json]
    yield lenient
    assert [run["id"] for run in lenient.get("/api/runs", limit=1000).json] == before


def body_for(kind: str, root: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    """A body with the fields put into one that is right."""
    right: dict[str, Any] = {"cwd": str(root / "project")} if kind == "start" else {"sessionId": NOWHERE}
    body = right | {"prompt": "Hello."} | dict(fields)
    return {name: value for name, value in body.items() if value is not MISSING}


def bad(field: str, words: str, **fields: Any) -> Any:
    """A case with a readable id."""
    shown = ",".join(f"{name}={'missing' if value is MISSING else json.dumps(value)}" for name, value in fields.items())
    return pytest.param(Bad(fields, field, words), id=shown if len(shown) < 70 else f"{shown[:67]}...")


# ---- over a socket


def test_refusals_over_a_socket_have_their_status_and_field(served: Client, tmp_path: Path) -> None:
    right = {"cwd": str(tmp_path), "prompt": "Hello."}

    assert "blank" in refused(served.post("/api/runs/start", right | {"prompt": ""}), "prompt")
    turns = right | {"options": {"maxTurns": 10**300}}
    assert "1000000" in refused(served.post("/api/runs/start", turns), "options.maxTurns")
    privileged = right | {"options": {"env": {"GREETING": "hello"}}}
    refused(served.post("/api/runs/start", privileged), "options.env", 403, "OPTION_FORBIDDEN")
    assert "JSON" in refused(served.request("POST", "/api/runs/start", b"[" * 60_000))
    text = served.request("POST", "/api/runs/start", b"{}", {"Content-Type": "text/plain"})
    refused(text, None, 415, "UNSUPPORTED_MEDIA_TYPE")
    refused(served.get("/api/runs?limit=0"), "limit")
    refused(served.get(f"/api/runs/{NOWHERE}"), None, 404, "RUN_NOT_FOUND")
    assert served.get("/api/runs").json == []


# ---- the fields of the bodies

TIME_LIMITS = [
    bad("timeoutMs", "integer", timeoutMs="1000"),
    bad("timeoutMs", "integer", timeoutMs="30m"),
    bad("timeoutMs", "integer", timeoutMs=1.5),
    bad("timeoutMs", "integer", timeoutMs=True),
    bad("timeoutMs", "greater than or equal to 1", timeoutMs=0),
    bad("timeoutMs", "greater than or equal to 1", timeoutMs=-1),
    bad("timeoutMs", "less than or equal to 86400000", timeoutMs=86_400_001),
    bad("timeoutMS", "did you mean timeoutMs?", timeoutMS=1),
]
APPROVALS = [
    bad("approvals", "boolean", approvals="yes"),
    bad("approvals", "boolean", approvals=1),
    bad("approvals", "boolean", approvals=None),
    bad("approvalTimeoutMs", "integer", approvals=True, approvalTimeoutMs="1h"),
    bad("approvalTimeoutMs", "integer", approvals=True, approvalTimeoutMs=1.5),
    bad("approvalTimeoutMs", "greater than or equal to 1", approvals=True, approvalTimeoutMs=0),
    bad("approvalTimeoutMs", "less than or equal to 2592000000", approvals=True, approvalTimeoutMs=2_592_000_001),
    bad("approvalTimeoutMs", "set approvals to true", approvalTimeoutMs=1_000),
    bad("approvalTimeoutMs", "set approvals to true", approvals=False, approvalTimeoutMs=1_000),
    bad("approval", "did you mean approvals?", approval=True),
]
WEBHOOKS = [
    bad("webhookUrl", "begins with http", webhookUrl=""),
    bad("webhookUrl", "begins with http", webhookUrl="hook"),
    bad("webhookUrl", "begins with http", webhookUrl="//h/"),
    bad("webhookUrl", "begins with http", webhookUrl="ftp://h/"),
    bad("webhookUrl", "begins with http", webhookUrl="file:///etc/passwd"),
    bad("webhookUrl", "begins with http", webhookUrl="javascript:alert(1)"),
    bad("webhookUrl", "must have a host", webhookUrl="http://"),
    bad("webhookUrl", "must have a host", webhookUrl="http:///path"),
    bad("webhookUrl", "port only as a number", webhookUrl="http://h:port/"),
    bad("webhookUrl", "port from 1 to 65535", webhookUrl="http://h:65536/"),
    bad("webhookUrl", "port from 1 to 65535", webhookUrl="http://h:0/"),
    bad("webhookUrl", "valid host", webhookUrl="http://h..example/"),
    bad("webhookUrl", "must have a host", webhookUrl="http://[::g]/"),
    bad("webhookUrl", "valid host", webhookUrl="http://[1.2.3]/"),
    bad("webhookUrl", "fragment", webhookUrl="http://h/#part"),
    bad("webhookUrl", "no user or password", webhookUrl="http://me@h/"),
    bad("webhookUrl", "no user or password", webhookUrl="http://me:word@h/"),
    bad("webhookUrl", "no user or password", webhookUrl="http://h\\@other/"),
    bad("webhookUrl", "no blanks", webhookUrl="http://h/a b"),
    bad("webhookUrl", "begins with http", webhookUrl=" http://h/"),
    bad("webhookUrl", "no blanks", webhookUrl="http://h/\n"),
    bad("webhookUrl", "no blanks", webhookUrl="http://h/\0"),
    bad("webhookUrl", "no blanks", webhookUrl="http://h/\r\nX-Header: 1"),
    bad("webhookUrl", "xn--", webhookUrl="http://hö/"),
    bad("webhookUrl", "%20", webhookUrl="http://h/ö"),
    bad("webhookUrl", "2048 characters", webhookUrl="http://h/" + "x" * 2_040),
    bad("webhookUrl", "string", webhookUrl=5),
    bad("webhookUrl", "string", webhookUrl=["http://h/"]),
    bad("webhookurl", "did you mean webhookUrl?", webhookurl="http://h/"),
]
PROMPTS = [
    bad("prompt", "is required", prompt=MISSING),
    bad("prompt", "string", prompt=None),
    bad("prompt", "string", prompt=5),
    bad("prompt", "string", prompt=["Hello."]),
    bad("prompt", "string", prompt={"text": "Hello."}),
    bad("prompt", "blank", prompt=""),
    bad("prompt", "blank", prompt=" \n\t\u00a0"),
    bad("prompt", "NUL", prompt="Hello.\0"),
    bad("prompt", "1000000", prompt="x" * 1_000_001),
]
IMAGES = [
    bad("images", "array", images={}),
    bad("images", "array", images="x"),
    bad("images.0", "object", images=[5]),
    bad("images.0.mediaType", "is required", images=[{"data": PNG}]),
    bad("images.0.data", "is required", images=[{"mediaType": "image/png"}]),
    bad("images.0.mediaType", "image/webp", images=[{"mediaType": "image/bmp", "data": PNG}]),
    bad("images.0.mediaType", "image/webp", images=[{"mediaType": "image/svg+xml", "data": PNG}]),
    bad("images.0.data", "string", images=[{"mediaType": "image/png", "data": 5}]),
    bad("images.0.data", "at least 1", images=[{"mediaType": "image/png", "data": ""}]),
    bad("images.0", "base64", images=[{"mediaType": "image/png", "data": "no base64"}]),
    bad("images.0", "base64", images=[{"mediaType": "image/png", "data": "aGVsbG8"}]),
    bad("images.0", "base64", images=[{"mediaType": "image/png", "data": PNG[:20] + "\n" + PNG[20:]}]),
    bad("images.0", "base64", images=[{"mediaType": "image/png", "data": f"data:image/png;base64,{PNG}"}]),
    bad("images.0", "base64", images=[{"mediaType": "image/png", "data": "\u00e9" * 4}]),
    bad("images.0", "not of the type image/jpeg", images=[{"mediaType": "image/jpeg", "data": PNG}]),
    bad("images.0", "not of the type image/png", images=[{"mediaType": "image/png", "data": "aGVsbG8="}]),
    bad("images.1", "not of the type", images=[{"mediaType": f"image/{name}", "data": PNG} for name in ("png", "gif")]),
    bad("images.0.name", "not a known field", images=[{"mediaType": "image/png", "data": PNG, "name": "x"}]),
    bad("images", "20", images=[{"mediaType": "image/png", "data": PNG}] * 21),
]
UNKNOWN = [
    bad("promt", "did you mean prompt?", promt="Hello."),
    bad("Prompt", "did you mean prompt?", Prompt="Hello."),
    bad("option", "did you mean options?", option={}),
    bad("a b", "is not a known field", **{"a b": 1}),
    bad("runId", "is not a known field", runId=NOWHERE),
]
TITLES = [
    bad("title", "string", title=5),
    bad("title", "string", title=["x"]),
    bad("title", "500", title="x" * 501),
    bad("title", "NUL", title="x\0"),
]
METADATA = [
    bad("metadata", "object", metadata=[]),
    bad("metadata", "object", metadata="x"),
    bad("metadata", "100000", metadata={"x": "y" * 100_000}),
    bad("metadata", "NaN", metadata={"x": float("nan")}),
    bad("metadata", "Infinity", metadata={"x": [{"y": float("-inf")}]}),
]
IDS: tuple[Any, ...] = (
    None,
    5,
    "",
    "a title",
    NOWHERE.replace("-", ""),
    f"{NOWHERE}\n",
    f"{{{NOWHERE}}}",
    "--resume",
    NOWHERE[:-1] + "g",
)
SESSION_IDS = [
    bad("sessionId", "is required", sessionId=MISSING),
    *(bad("sessionId", "", sessionId=value) for value in IDS),
]
OF_ONE_BODY = {
    "start": [
        bad("cwd", "is required", cwd=MISSING),
        bad("cwd", "string", cwd=None),
        bad("cwd", "string", cwd=5),
        bad("cwd", "at least 1", cwd=""),
        bad("cwd", "absolute", cwd="project"),
        bad("cwd", "absolute", cwd="~/project"),
        bad("cwd", "NUL", cwd="/\0"),
        bad("cwd", "4096", cwd="/" * 4097),
        bad("sessionId", "is not a known field", sessionId=NOWHERE),
        bad("ifBusy", "is not a known field", ifBusy="reject"),
        bad("atRunId", "is not a known field", atRunId=NOWHERE),
        *TITLES,
        *METADATA,
    ],
    "resume": [
        *SESSION_IDS,
        bad("sessionID", "did you mean sessionId?", sessionID=NOWHERE),
        bad("ifBusy", "reject", ifBusy="maybe"),
        bad("ifBusy", "reject", ifBusy=None),
        bad("ifBusy", "reject", ifBusy=True),
        bad("cwd", "is not a known field", cwd="/"),
        bad("title", "is not a known field", title="x"),
        bad("metadata", "is not a known field", metadata={}),
    ],
    "fork": [
        *SESSION_IDS,
        *(bad("atRunId", "", atRunId=value) for value in IDS[1:] if not RUN_ID.fullmatch(str(value))),
        *(bad("atMessage", "", atMessage=value) for value in IDS[1:]),
        bad("atMesage", "did you mean atMessage?", atMesage=NOWHERE),
        bad("cwd", "string", cwd=5),
        bad("cwd", "at least 1", cwd=""),
        bad("cwd", "NUL", cwd="/\0"),
        bad("cwd", "4096", cwd="/" * 4097),
        bad("ifBusy", "is not a known field", ifBusy="reject"),
        *TITLES,
        *METADATA,
    ],
}


@pytest.mark.parametrize("case", [*PROMPTS, *IMAGES, *TIME_LIMITS, *APPROVALS, *WEBHOOKS, *UNKNOWN])
def test_a_bad_field_of_every_body_is_named(strict: Client, root: Path, case: Bad) -> None:
    for kind in KINDS:
        assert case.words in refused(strict.post(f"/api/runs/{kind}", body_for(kind, root, case.fields)), case.field)


@pytest.mark.parametrize("case", OF_ONE_BODY["start"])
def test_a_bad_field_of_a_start_is_named(strict: Client, root: Path, case: Bad) -> None:
    assert case.words in refused(strict.post("/api/runs/start", body_for("start", root, case.fields)), case.field)


@pytest.mark.parametrize("case", OF_ONE_BODY["resume"])
def test_a_bad_field_of_a_resume_is_named(strict: Client, root: Path, case: Bad) -> None:
    assert case.words in refused(strict.post("/api/runs/resume", body_for("resume", root, case.fields)), case.field)


@pytest.mark.parametrize("case", OF_ONE_BODY["fork"])
def test_a_bad_field_of_a_fork_is_named(strict: Client, root: Path, case: Bad) -> None:
    assert case.words in refused(strict.post("/api/runs/fork", body_for("fork", root, case.fields)), case.field)


@pytest.mark.parametrize(
    "case",
    [*TITLES, *METADATA, bad("titel", "did you mean title?", titel="x"), bad("cwd", "not a known field", cwd="/")],
)
def test_a_bad_field_of_a_session_is_named(strict: Client, case: Bad) -> None:
    assert case.words in refused(strict.patch(f"/api/sessions/{NOWHERE}", dict(case.fields)), case.field)


@pytest.mark.parametrize("kind", KINDS)
def test_a_field_without_a_name_is_an_unknown_field(strict: Client, root: Path, kind: str) -> None:
    answer = strict.post(f"/api/runs/{kind}", body_for(kind, root, {"": 1}))
    assert answer.status == 400
    assert "is not a known field" in answer.error["message"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_that_is_too_large_is_refused(strict: Client, root: Path, kind: str) -> None:
    image = {"mediaType": "image/png", "data": "A" * 27_000_004}
    answer = strict.post(f"/api/runs/{kind}", body_for(kind, root, {"images": [image]}))
    assert "27000000" in refused(answer, "images.0.data")


def test_a_file_that_only_begins_like_a_webp_is_refused(lenient: Client, root: Path) -> None:
    sound = base64.b64encode(b"RIFF\x24\0\0\0WAVEfmt ").decode()
    body = body_for("start", root, {"images": [{"mediaType": "image/webp", "data": sound}]})
    assert "not of the type image/webp" in refused(lenient.post("/api/runs/start", body), "images.0")


def test_every_field_of_the_bodies_has_a_bad_value_here() -> None:
    cases = (*PROMPTS, *IMAGES, *TIME_LIMITS, *APPROVALS, *WEBHOOKS)
    common = {"options"} | {name for case in cases for name in case.values[0].fields}
    for kind, model in (("start", StartBody), ("resume", ResumeBody), ("fork", ForkBody)):
        tried = common | {name for case in OF_ONE_BODY[kind] for name in case.values[0].fields}
        assert set(model.model_fields) <= tried
    assert set(SessionBody.model_fields) == {"title", "metadata"}
    assert set(ImageBody.model_fields) == {"mediaType", "data"}


# ---- cwd


NO_DIRECTORIES = [
    ("nowhere", "does not exist"),
    ("project/nowhere", "does not exist"),
    ("file.txt", "not a directory"),
    ("file.txt/x", ""),
    ("loop", "cannot be used"),
    ("x" * 300, "cannot be used"),
]


@pytest.mark.parametrize(("path", "words"), NO_DIRECTORIES)
def test_a_cwd_must_be_a_directory(strict: Client, root: Path, path: str, words: str) -> None:
    answer = strict.post("/api/runs/start", {"cwd": str(root / path), "prompt": "x"})
    assert words in refused(answer, "cwd")


@pytest.mark.parametrize(("path", "words"), NO_DIRECTORIES)
def test_a_forks_cwd_must_be_a_directory(
    untouched: Client, ended: dict[str, Any], root: Path, path: str, words: str
) -> None:
    body = {"sessionId": ended["sessionId"], "cwd": str(root / path), "prompt": "x"}
    assert words in refused(untouched.post("/api/runs/fork", body), "cwd")


@pytest.mark.parametrize("cwd", ["project", ".", "~", "./project", "-p", " /"])
def test_a_forks_cwd_must_be_absolute(untouched: Client, ended: dict[str, Any], cwd: str) -> None:
    answer = untouched.post("/api/runs/fork", {"sessionId": ended["sessionId"], "cwd": cwd, "prompt": "x"})
    assert "absolute" in refused(answer, "cwd")


@pytest.mark.parametrize("path", ["..", "../allowed-not", "way-out", "way-out/allowed-not", "project/../..", "/"])
def test_a_cwd_outside_the_allowed_roots_is_forbidden(
    strict: Client, untouched: Client, ended: dict[str, Any], root: Path, path: str
) -> None:
    cwd = f"{root}/{path}" if path != "/" else path
    for answer in (
        strict.post("/api/runs/start", {"cwd": cwd, "prompt": "x"}),
        untouched.post("/api/runs/fork", {"sessionId": ended["sessionId"], "cwd": cwd, "prompt": "x"}),
    ):
        assert "CCM_ALLOWED_ROOTS" in refused(answer, "cwd", 403, "CWD_FORBIDDEN")


def test_a_link_to_a_directory_within_the_roots_is_stored_resolved(lenient: Client, root: Path) -> None:
    assert lenient.start(root / "way-in", "Hello.")["cwd"] == str(root / "project")


# ---- options

AGENT: dict[str, Any] = {"description": "Writes poems.", "prompt": "You are a poet."}


def option(name: str, value: Any, within: str = "", words: str = "") -> Any:
    """A case: this value of an option is refused; `within` is the place in it that is at fault."""
    return bad(f"options.{name}{within}", words, options={name: value})


def rules(name: str) -> list[Any]:
    return [
        option(name, "Bash", words="array"),
        option(name, 5, words="array"),
        option(name, [""], ".0"),
        option(name, [5], ".0", "string"),
        option(name, ["Read", "a\0"], ".1", "NUL"),
        option(name, ["Read", "--dangerously-skip-permissions"], ".1", "dash"),
        option(name, ["x" * 2_001], ".0", "2000"),
        option(name, ["x"] * 1_001, words="1000"),
        option(name, ["x" * 2_000] * 51, words="100000 bytes"),
        option(name, ["\u00e9" * 1_999] * 26, words="100000 bytes"),
    ]


def word(name: str) -> list[Any]:
    return [
        option(name, ""),
        option(name, 5, words="string"),
        option(name, ["x"], words="string"),
        option(name, "-p", words="dash"),
        option(name, "--help", words="dash"),
        option(name, "a\0", words="NUL"),
        option(name, "x" * 201, words="200"),
    ]


def switch(name: str) -> list[Any]:
    return [option(name, "yes", words="boolean"), option(name, 1, words="boolean"), option(name, [], words="boolean")]


def agent(within: str, words: str = "", **fields: Any) -> Any:
    return option("agents", {"poet": AGENT | fields}, f".poet{within}", words)


OPTIONS = [
    *word("model"),
    *word("fallbackModel"),
    option("systemPrompt", ""),
    option("systemPrompt", 5, words="string"),
    option("systemPrompt", []),
    option("systemPrompt", "a\0", words="NUL"),
    option("systemPrompt", "x" * 1_000_001, words="1000000"),
    option("systemPrompt", {}),
    option("systemPrompt", {"type": "file", "path": "/etc/passwd"}, words="custom"),
    option("systemPrompt", {"type": "custom"}, ".prompt", "is required"),
    option("systemPrompt", {"type": "custom", "prompt": ""}, ".prompt"),
    option("systemPrompt", {"type": "custom", "prompt": "x", "append": "y"}, ".append", "not a known field"),
    option("systemPrompt", {"type": "preset"}, ".preset", "is required"),
    option("systemPrompt", {"type": "preset", "preset": "x"}, ".preset", "claude_code"),
    option("systemPrompt", {"type": "preset", "preset": "claude_code", "append": ""}, ".append"),
    option("systemPrompt", {"type": "preset", "preset": "claude_code", "snapshot": 1}, ".snapshot", "boolean"),
    option("maxTurns", 0),
    option("maxTurns", -1),
    option("maxTurns", 1.5, words="integer"),
    option("maxTurns", "1", words="integer"),
    option("maxTurns", value=True, words="integer"),
    option("maxTurns", 1_000_001, words="1000000"),
    option("maxTurns", 10**300, words="1000000"),
    option("maxBudgetUsd", 0),
    option("maxBudgetUsd", -0.5),
    option("maxBudgetUsd", "1", words="number"),
    option("maxBudgetUsd", value=True, words="number"),
    option("maxBudgetUsd", 1_000_001, words="1000000"),
    option("maxBudgetUsd", 10**300, words="1000000"),
    option("maxBudgetUsd", float("nan"), words="finite"),
    option("maxBudgetUsd", float("inf"), words="finite"),
    option("permissionMode", "yolo", words="acceptEdits"),
    option("permissionMode", "-p", words="acceptEdits"),
    option("permissionMode", 5),
    *switch("strictMcpConfig"),
    option("settingSources", "user", words="array"),
    option("settingSources", ["global"], ".0", "project"),
    option("settingSources", [5], ".0"),
    option("settingSources", ["user"] * 4, words="3"),
    *rules("tools"),
    option("tools", {"type": "preset"}, ".preset", "is required"),
    option("tools", {"type": "preset", "preset": "x"}, ".preset", "claude_code"),
    option("tools", {"type": "x", "preset": "claude_code"}, ".type", "preset"),
    *rules("allowedTools"),
    *rules("disallowedTools"),
    option("agents", [], words="object"),
    option("agents", {"": AGENT}, "."),
    option("agents", {"-poet": AGENT}, ".-poet", "dash"),
    option("agents", {"poet": 5}, ".poet", "object"),
    option("agents", {"poet": {"prompt": "x"}}, ".poet.description", "is required"),
    option("agents", {"poet": {"description": "x"}}, ".poet.prompt", "is required"),
    option("agents", {str(number): AGENT for number in range(101)}, words="100"),
    agent(".description", description=""),
    agent(".description", "NUL", description="\0"),
    agent(".prompt", prompt=""),
    agent(".prompt", "1000000", prompt="x" * 1_000_001),
    agent(".tools.0", "dash", tools=["-p"]),
    agent(".tools", "array", tools="Bash"),
    agent(".disallowedTools.0", "dash", disallowedTools=["-p"]),
    agent(".model", "dash", model="-p"),
    agent(".model", model=""),
    agent(".skills", "array", skills="all"),
    agent(".skills.0", skills=["-p"]),
    agent(".memory", "project", memory="global"),
    agent(".mcpServers.0", mcpServers=[5]),
    agent(".mcpServers.0", "dash", mcpServers=["-p"]),
    agent(".mcpServers", "array", mcpServers={}),
    agent(".initialPrompt", initialPrompt=""),
    agent(".maxTurns", maxTurns=0),
    agent(".background", "boolean", background="yes"),
    agent(".effort", "high", effort="huge"),
    agent(".effort", "high", effort=5),
    agent(".permissionMode", "plan", permissionMode="yolo"),
    agent(".hooks", "not a known field", hooks={}),
    option("skills", "some"),
    option("skills", ["-p"], ".0"),
    option("skills", [""], ".0"),
    option("skills", ["a b"], ".0"),
    option("skills", ["a,Bash"], ".0"),
    option("skills", ["a)"], ".0"),
    option("skills", ["a\n"], ".0"),
    option("skills", ["*"], ".0"),
    option("skills", ["a:b:c"], ".0"),
    option("skills", ["/a"], ".0"),
    option("skills", [5], ".0", "string"),
    option("skills", ["x"] * 501, words="500"),
    *switch("includePartialMessages"),
    *switch("includeHookEvents"),
    *switch("forwardSubagentText"),
    *switch("verbatimPrompts"),
    option("outputFormat", "json", words="object"),
    option("outputFormat", {}, ".type", "is required"),
    option("outputFormat", {"type": "text", "schema": {}}, ".type", "json_schema"),
    option("outputFormat", {"type": "json_schema"}, ".schema", "is required"),
    option("outputFormat", {"type": "json_schema", "schema": []}, ".schema", "object"),
    option("outputFormat", {"type": "json_schema", "schema": {"x": "y" * 100_000}}, ".schema", "100000"),
    option("outputFormat", {"type": "json_schema", "schema": {"x": float("inf")}}, ".schema", "Infinity"),
    option("outputFormat", {"type": "json_schema", "schema": {}, "x": 1}, ".x", "not a known field"),
    option("thinking", value=True, words="object"),
    option("thinking", {}),
    option("thinking", {"type": "x"}, words="adaptive"),
    option("thinking", {"type": "adaptive", "display": "x"}, ".display", "omitted"),
    option("thinking", {"type": "enabled"}, ".budgetTokens", "is required"),
    option("thinking", {"type": "enabled", "budgetTokens": 0}, ".budgetTokens"),
    option("thinking", {"type": "enabled", "budgetTokens": "1"}, ".budgetTokens", "integer"),
    option("thinking", {"type": "enabled", "budgetTokens": 10**8}, ".budgetTokens"),
    option("thinking", {"type": "disabled", "display": "omitted"}, ".display", "not a known field"),
    option("effort", "huge", words="high"),
    option("effort", 5, words="high"),
    option("betas", "x", words="array"),
    option("betas", ["--help"], ".0", "dash"),
    option("betas", [""], ".0"),
    option("betas", ["x"] * 51, words="50"),
    option("taskBudget", 5, words="object"),
    option("taskBudget", {}, ".total", "is required"),
    option("taskBudget", {"total": 0}, ".total"),
    option("taskBudget", {"total": 1.5}, ".total", "integer"),
    option("taskBudget", {"total": 1, "x": 1}, ".x", "not a known field"),
    option("additionalDirectories", "/", words="array"),
    option("additionalDirectories", ["project"], ".0"),
    option("additionalDirectories", ["-p"], ".0"),
    option("additionalDirectories", ["/\0"], ".0", "NUL"),
    option("additionalDirectories", ["/"] * 101, words="100"),
    option("env", [], words="object"),
    option("env", {"A": 5}, ".A", "string"),
    option("env", {"A": "\0"}, ".A", "NUL"),
    option("env", {"A=B": "x"}, ".A=B"),
    option("env", {"1A": "x"}, ".1A"),
    option("env", {"": "x"}, "."),
    option("env", {"A": "x" * 100_001}, ".A", "100000"),
    option("env", {"CCM_CLAUDE": "/bin/sh"}, words="CCM_CLAUDE is set by the service"),
    option("env", {"CLAUDECODE": "1"}, words="CLAUDECODE is set by the service"),
    option("extraArgs", [], words="object"),
    option("extraArgs", {"--help": None}, ".--help"),
    option("extraArgs", {"a b": None}, ".a b"),
    option("extraArgs", {"": None}, "."),
    option("extraArgs", {"a": 5}, ".a", "string"),
    option("extraArgs", {"a": "\0"}, ".a", "NUL"),
    option("extraArgs", {"resume": NOWHERE}, words="--resume is set by the service"),
    option("extraArgs", {"session-id": NOWHERE}, words="--session-id is set by the service"),
    option("extraArgs", {"print": None}, words="--print is set by the service"),
    option("extraArgs", {"max-turns": "9"}, words="use the option maxTurns"),
    option("extraArgs", {"max-budget-usd": "9"}, words="use the option maxBudgetUsd"),
    option("extraArgs", {"setting-sources": "user"}, words="use the option settingSources"),
    option("mcpServers", [], words="object"),
    option("mcpServers", {"s": 5}, ".s", "object"),
    option("mcpServers", {"-p": {}}, ".-p", "dash"),
    option("mcpServers", {"s": {"x": float("nan")}}, ".s", "NaN"),
    option("plugins", {}, words="array"),
    option("plugins", [{"type": "npm", "path": "/"}], ".0.type", "local"),
    option("plugins", [{"type": "local"}], ".0.path", "is required"),
    option("plugins", [{"type": "local", "path": "project"}], ".0.path"),
    option("plugins", [{"type": "local", "path": "-p"}], ".0.path"),
    option("sandbox", [], words="object"),
    option("sandbox", value=True, words="object"),
    option("settings", ""),
    option("settings", 5),
    option("settings", []),
    option("settings", "a\0", words="NUL"),
    option("settings", {"x": "y" * 100_000}, words="100000"),
    bad("options", "object", options=[]),
    bad("options", "object", options="model"),
    bad("options.modle", "did you mean model?", options={"modle": "x"}),
    bad("options.max_turns", "did you mean maxTurns?", options={"max_turns": 1}),
    bad("options.thing", "is not a known field", options={"thing": 1}),
]


@pytest.mark.parametrize("case", OPTIONS)
def test_a_bad_option_is_named(strict: Client, root: Path, case: Bad) -> None:
    for kind in KINDS:
        assert case.words in refused(strict.post(f"/api/runs/{kind}", body_for(kind, root, case.fields)), case.field)


def test_every_option_has_a_bad_value_here() -> None:
    tried = {name for case in OPTIONS for name in case.values[0].fields["options"]}
    assert set(Options.model_fields) <= tried
    within = [case.values[0].field.split(".") for case in OPTIONS]
    assert set(Agent.model_fields) <= {
        path[3] for path in within if path[:3] == ["options", "agents", "poet"] and path[3:]
    }


@pytest.mark.parametrize("name", SERVICE_OWNED)
def test_an_option_that_the_service_sets_is_refused_with_the_reason(strict: Client, root: Path, name: str) -> None:
    for kind in KINDS:
        for value in ("x", True, None):
            answer = strict.post(f"/api/runs/{kind}", body_for(kind, root, {"options": {name: value}}))
            assert SERVICE_OWNED[name] in refused(answer, f"options.{name}")


PRIVILEGED: dict[str, Any] = {
    "additionalDirectories": ["/"],
    "env": {"GREETING": "hello"},
    "extraArgs": {"debug-to-stderr": None, "name": "--help"},
    "mcpServers": {"s": {"command": "true", "args": None}},
    "permissionMode": "bypassPermissions",
    "plugins": [{"type": "local", "path": "/nowhere"}],
    "sandbox": {"enabled": False},
    "settingSources": ["user", "project"],
    "settings": {"model": "x"},
}


def test_the_privileged_options_are_those_of_the_settings() -> None:
    assert set(PRIVILEGED) == set(PRIVILEGED_OPTIONS)


@pytest.mark.parametrize("name", PRIVILEGED)
def test_a_privileged_option_is_forbidden_by_default(strict: Client, root: Path, name: str) -> None:
    for kind in KINDS:
        answer = strict.post(f"/api/runs/{kind}", body_for(kind, root, {"options": {name: PRIVILEGED[name]}}))
        message = refused(answer, f"options.{name}", 403, "OPTION_FORBIDDEN")
        assert "CCM_PRIVILEGED_OPTIONS" in message
        assert name in message


@pytest.mark.parametrize("name", PRIVILEGED)
def test_a_privileged_option_is_accepted_when_the_operator_allows_it(lenient: Client, root: Path, name: str) -> None:
    run = lenient.start(root / "project", "Hello.", options={name: PRIVILEGED[name]})
    assert run["status"] == "completed"
    assert run["options"] == {name: PRIVILEGED[name]}


@pytest.mark.parametrize("name", PRIVILEGED)
def test_allowing_one_privileged_option_allows_no_other(name: str) -> None:
    settings = Settings(privileged_options=(name,), setting_sources=("user",))
    for given, value in PRIVILEGED.items():
        if given == name:
            check_options({given: value}, settings)
        else:
            with pytest.raises(Forbidden):
                check_options({given: value}, settings)


@pytest.mark.parametrize("content", [None, "{", "[1]", "\udcff"], ids=["missing", "no JSON", "no object", "no text"])
def test_a_settings_file_that_cannot_be_read_fails_its_run_and_nothing_else(
    lenient_service: InProcessService, lenient: Client, root: Path, tmp_path: Path, content: str | None
) -> None:
    file = tmp_path / "settings.json"
    if content is not None:
        file.write_text(content, encoding="utf-8", errors="surrogateescape")
    options = {"settings": str(file), "sandbox": {"enabled": False}}
    run = lenient.start(root / "project", "Hello.", options=options)
    assert run["status"] == "error"
    assert str(file) in run["error"]["message"]
    traces = [line for line in lenient_service.log if "Traceback" in line and run["id"] in line]
    assert traces == [], "a bad value from a client is no failure of the service"


HIDDEN = [
    ({"permissionMode": "bypassPermissions"}, "permissionMode"),
    ({"permissionMode": "auto"}, "permissionMode"),
    ({"mcpServers": ["s"]}, "mcpServers"),
    ({"mcpServers": [{"s": {"command": "true"}}]}, "mcpServers"),
    ({"mcpServers": []}, "mcpServers"),
]


@pytest.mark.parametrize(("fields", "name"), HIDDEN)
def test_a_privileged_option_is_forbidden_within_agents_too(
    strict: Client, lenient: Client, root: Path, fields: Mapping[str, Any], name: str
) -> None:
    options = {"agents": {"harmless": AGENT, "poet": AGENT | dict(fields)}}
    for kind in KINDS:
        answer = strict.post(f"/api/runs/{kind}", body_for(kind, root, {"options": options}))
        message = refused(answer, f"options.agents.poet.{name}", 403, "OPTION_FORBIDDEN")
        assert "CCM_PRIVILEGED_OPTIONS" in message
        assert name in message
    assert lenient.start(root / "project", "Hello.", options=options)["options"] == options


@pytest.mark.parametrize("mode", ["bypassPermissions", "auto"])
def test_the_wide_permission_modes_are_forbidden_unless_one_is_the_services_own(
    strict: Client, root: Path, mode: str
) -> None:
    answer = strict.post("/api/runs/start", body_for("start", root, {"options": {"permissionMode": mode}}))
    refused(answer, "options.permissionMode", 403, "OPTION_FORBIDDEN")
    check_options({"permissionMode": mode}, Settings(permission_mode=mode))


@pytest.mark.parametrize("sources", [["project"], ["local"], ["user", "local"], ["user", "project", "local"]])
def test_wider_setting_sources_than_the_services_own_are_forbidden(
    strict: Client, root: Path, sources: list[str]
) -> None:
    answer = strict.post("/api/runs/start", body_for("start", root, {"options": {"settingSources": sources}}))
    message = refused(answer, "options.settingSources", 403, "OPTION_FORBIDDEN")
    assert "CCM_SETTING_SOURCES" in message
    assert "CCM_PRIVILEGED_OPTIONS" in message


@pytest.mark.parametrize("sources", [[], ["user"]])
def test_narrower_setting_sources_are_open_to_everyone(sources: list[str]) -> None:
    check_options({"settingSources": sources}, Settings(setting_sources=("user",)))


@pytest.mark.parametrize("name", Options.model_fields)
def test_a_null_counts_as_an_option_that_is_not_given(name: str) -> None:
    assert Options.model_validate_json(json.dumps({name: None})).given() == {}


@pytest.mark.parametrize("prompt", ["--help", "-p", "--resume=x", "- a list"])
def test_a_prompt_may_begin_with_a_dash(lenient: Client, root: Path, prompt: str) -> None:
    run = lenient.start(root / "project", prompt)
    heard = lenient.messages(run["id"], type="assistant")[0]["message"]["content"][0]["text"]
    assert [run["status"], heard] == ["completed", f"heard: {prompt}"]


# ---- runs and sessions that do not exist


@pytest.mark.parametrize("run", [NOWHERE, "nowhere", "0", "%F0%9F%98%80", "%FF", "--help", "x" * 5000])
def test_a_run_that_does_not_exist_is_not_found(strict: Client, run: str) -> None:
    for method, path in (("GET", ""), ("HEAD", ""), ("DELETE", ""), ("GET", "/messages")):
        answer = strict.request(method, f"/api/runs/{run}{path}")
        assert answer.status == 404
        if method != "HEAD":
            refused(answer, None, 404, "RUN_NOT_FOUND")


@pytest.mark.parametrize("session", [NOWHERE, "nowhere", "0", "%F0%9F%98%80", "%FF", "--help", "x" * 5000])
def test_a_session_that_does_not_exist_is_not_found(strict: Client, session: str) -> None:
    for path in ("", "/messages", "/runs", "/forks"):
        refused(strict.get(f"/api/sessions/{session}{path}"), None, 404, "SESSION_NOT_FOUND")
    refused(strict.patch(f"/api/sessions/{session}", {"title": "x"}), None, 404, "SESSION_NOT_FOUND")
    refused(strict.patch(f"/api/sessions/{session}", {}), None, 404, "SESSION_NOT_FOUND")


def test_a_run_without_a_session_cannot_be_resumed_or_forked(strict: Client) -> None:
    for kind in ("resume", "fork"):
        answer = strict.post(f"/api/runs/{kind}", {"sessionId": NOWHERE, "prompt": "x"})
        refused(answer, None, 404, "SESSION_NOT_FOUND")
    refused(strict.get("/api/runs", sessionId=NOWHERE), None, 404, "SESSION_NOT_FOUND")


def test_a_fork_from_a_point_of_another_session_is_refused(lenient: Client, ended: dict[str, Any], root: Path) -> None:
    other = lenient.start(root / "project", "Hello.")
    message = lenient.messages(other["id"], type="assistant")[0]["uuid"]
    here = {"sessionId": ended["sessionId"], "prompt": "x"}
    before = lenient.get("/api/runs").json

    for run in (NOWHERE, other["id"]):
        refused(lenient.post("/api/runs/fork", here | {"atRunId": run}), None, 404, "RUN_NOT_FOUND")
    for uuid in (NOWHERE, message):
        refused(lenient.post("/api/runs/fork", here | {"atMessage": uuid}), "atMessage")
        refused(lenient.post("/api/runs/fork", here | {"atRunId": ended["id"], "atMessage": uuid}), "atMessage")
    assert lenient.get("/api/runs").json == before


@pytest.mark.parametrize("path", ["/api/runs/%00", "/api/runs/x%00/messages"])
def test_a_runs_id_with_a_nul_is_refused(strict: Client, path: str) -> None:
    assert "NUL" in refused(strict.get(path), "runId")


@pytest.mark.parametrize("path", ["", "/messages", "/runs", "/forks"])
def test_a_sessions_id_with_a_nul_is_refused(strict: Client, path: str) -> None:
    assert "NUL" in refused(strict.get(f"/api/sessions/x%00{path}"), "sessionId")


# ---- bodies that are not a JSON object

DEEP = 100_000
WRITES = [("POST", f"/api/runs/{kind}") for kind in KINDS] + [("PATCH", f"/api/sessions/{NOWHERE}")]
NO_JSON = {
    "empty": b"",
    "blank": b" \n",
    "text": b"cwd=/&prompt=Hello.",
    "a comma too many": b'{"prompt": "x",}',
    "single quotes": b"{'prompt': 'x'}",
    "cut off": b'{"prompt": "x"',
    "two documents": b"{}{}",
    "a comment": b'{"prompt": "x"} // y',
    "100,000 brackets": b"[" * DEEP,
    "100,000 whole arrays": b"[" * DEEP + b"]" * DEEP,
    "100,000 whole objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "100,000 brackets in a field": b'{"metadata": {"a": ' + b"[" * DEEP + b"]" * DEEP + b"}}",
    "an integer of 100,000 digits": b'{"metadata": {"a": ' + b"9" * 100_000 + b"}}",
    "an integer of 5,000 digits": b'{"options": {"maxTurns": ' + b"9" * 5_000 + b"}}",
    "a lone surrogate": rb'{"prompt": "\ud800"}',
    "a lone low surrogate": rb'{"title": "\udc00"}',
    "surrogates the wrong way round": rb'{"prompt": "\udc00\ud800"}',
    "a lone surrogate in a name": rb'{"\ud800": 1}',
    "a surrogate as UTF-8": b'{"prompt": "\xed\xa0\x80"}',
    "invalid UTF-8": b'{"prompt": "\xff"}',
    "cut-off UTF-8": b'{"prompt": "\xf0\x9f\x98"}',
    "overlong UTF-8": b'{"prompt": "\xc0\xaf"}',
    "latin-1": '{"prompt": "\u00e9"}'.encode("latin-1"),
    "UTF-16": '{"prompt": "x"}'.encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf{}",
    "a NUL": b'{"prompt": "x"}\0',
    "a raw line break in a text": b'{"prompt": "a\nb"}',
}
NO_OBJECT = [b"null", b"true", b"5", b"-0.5e3", b'"x"', b"[]", b'[{"prompt": "x"}]', b"NaN", b"-Infinity", b"1e999"]


@pytest.mark.parametrize("body", NO_JSON.values(), ids=list(NO_JSON))
def test_a_body_that_is_no_json_is_refused(strict: Client, body: bytes) -> None:
    for method, path in WRITES:
        assert "JSON" in refused(strict.request(method, path, body))


@pytest.mark.parametrize("body", NO_OBJECT)
def test_a_body_that_is_no_object_is_refused(strict: Client, body: bytes) -> None:
    for method, path in WRITES:
        assert "JSON object" in refused(strict.request(method, path, body))


@pytest.mark.parametrize("value", [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"[[1, -1e999]]"])
def test_a_number_that_json_does_not_have_is_refused(strict: Client, root: Path, value: bytes) -> None:
    start = json.dumps(body_for("start", root, {"metadata": {"x": "HERE"}})).encode()
    assert "NaN or Infinity" in refused(strict.post("/api/runs/start", start.replace(b'"HERE"', value)), "metadata")
    patch = b'{"metadata": {"x": ' + value + b"}}"
    assert "NaN or Infinity" in refused(strict.patch(f"/api/sessions/{NOWHERE}", patch), "metadata")
    budget = json.dumps(body_for("start", root, {"options": {"maxBudgetUsd": "HERE"}})).encode()
    refused(strict.post("/api/runs/start", budget.replace(b'"HERE"', value)), "options.maxBudgetUsd")


# ---- bodies that are too large


def said_413(head: bytes, body: bytes) -> bool:
    assert head.startswith(b"HTTP/1.1 413 ")
    assert b"\r\nContent-Type: application/json\r\n" in head
    assert b"\r\nX-Request-Id: " in head
    error = json.loads(body)["error"]
    assert error["code"] == "BODY_TOO_LARGE"
    assert "CCM_MAX_BODY_BYTES" in error["message"]
    return True


@pytest.mark.parametrize("size", [SMALL * 4, 2**40])
def test_a_body_that_is_announced_as_too_large_is_refused_unread(served: Client, size: int) -> None:
    with connect(served, post_head("/api/runs/start", f"Content-Length: {size}")) as connection:
        first = connection.recv(2**16)
        assert first.startswith(b"HTTP/1.1 413 "), "the client is told to go on and send it"
        assert said_413(*read_all(connection, first))


def test_a_chunked_body_that_grows_too_large_is_refused(served: Client) -> None:
    with connect(served, post_head("/api/runs/start", "Transfer-Encoding: chunked")) as connection:
        connection.sendall(b"%x\r\n" % (SMALL * 4) + b" " * (SMALL * 2))
        assert said_413(*read_all(connection))


def test_a_body_of_one_byte_too_many_is_refused(served: Client) -> None:
    with connect(
        served, post_head("/api/runs/start", f"Content-Length: {SMALL + 1}", "Connection: close")
    ) as connection:
        connection.sendall(b'{"prompt": "x"}'.ljust(SMALL + 1))
        assert said_413(*read_all(connection))


def test_the_app_itself_refuses_a_body_of_one_byte_too_many(lenient: Client) -> None:
    """Under `flask run`, where no waitress stands before it."""
    answer = lenient.post("/api/runs/start", b'{"prompt": "x"}'.ljust(SMALL + 1))
    assert "CCM_MAX_BODY_BYTES" in refused(answer, None, 413, "BODY_TOO_LARGE")
    assert "cwd" in refused(lenient.post("/api/runs/start", b'{"prompt": "x"}'.ljust(SMALL)), "cwd")


def test_a_body_just_below_the_limit_is_read(served: Client) -> None:
    assert "cwd" in refused(served.post("/api/runs/start", b'{"prompt": "x"}'.ljust(SMALL - 1)), "cwd")


def test_a_body_of_exactly_the_limit_is_read(served: Client) -> None:
    with connect(served, post_head("/api/runs/start", f"Content-Length: {SMALL}", "Connection: close")) as connection:
        connection.sendall(b'{"prompt": "x"}'.ljust(SMALL))
        head, body = read_all(connection)
    assert head.split(b" ")[1] == b"400", "a body of CCM_MAX_BODY_BYTES is not larger than that"
    assert json.loads(body)["error"]["field"] == "cwd"


# ---- media types


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": ""},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "multipart/form-data; boundary=x"},
        {"Content-Type": "application/jsonp"},
        {"Content-Type": "application/merge-patch+json"},
        {"Content-Type": "text/json, application/json"},
        {"Content-Type": "application/json; charset=utf-16"},
        {"Content-Type": "application/json; charset=iso-8859-1"},
        {"Content-Encoding": "gzip"},
        {"Content-Encoding": "br"},
        {"Content-Encoding": "identity, gzip"},
    ],
    ids=lambda headers: next(": ".join(item) for item in headers.items()),
)
def test_a_body_of_another_media_type_is_refused(strict: Client, headers: Mapping[str, str]) -> None:
    for method, path in WRITES:
        answer = strict.request(method, path, b"{}", headers)
        assert next(iter(headers)) in refused(answer, None, 415, "UNSUPPORTED_MEDIA_TYPE")


@pytest.mark.parametrize(("method", "path"), WRITES)
def test_a_request_without_a_body_is_refused(strict: Client, method: str, path: str) -> None:
    refused(strict.request(method, path), None, 415, "UNSUPPORTED_MEDIA_TYPE")


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "application/json; charset=utf-8"},
        {"Content-Type": 'APPLICATION/JSON;charset="UTF-8"'},
        {"Content-Encoding": "identity"},
    ],
    ids=str,
)
def test_json_in_utf_8_is_read_with_any_spelling_of_its_media_type(strict: Client, headers: Mapping[str, str]) -> None:
    refused(strict.request("POST", "/api/runs/start", b"{}", headers), "prompt")


# ---- queries

WAITS = ["", "x", "-1", "-0.001", "300.001", "301", "nan", "inf", "-inf", "1e9", "0x10", "1,5", "1%00"]
LIMITS = ["0", "-1", "1001", "x", "", "1.5", "1e2", "%2B1", "%C2%B2", "%EF%BC%91", "9" * 30, "1%00", "%FF"]
CURSORS = ["", "x", "-1", "LS0x", "MS41", "%C3%A9", "%00", "OTk5OTk5OTk5OTk5OTk5OTk5OQ==", "LzEvMg==", "x" * 5000]
INDEXES = ["", "x", "-2", "1.5", "%C2%B2", "9007199254740993", "9" * 30, "0%00"]
PLACES = [
    "",
    "x",
    "5",
    f"{NOWHERE}",
    f"{NOWHERE}:",
    f"{NOWHERE}:x",
    f"{NOWHERE}:-2",
    f"{NOWHERE}:1:2",
    f"{NOWHERE}:0%00",
]
TYPES = ["", ",", "assistant,", "assistant,,user", "%20", "assistant%00", ",".join("x" * 51)]
LISTS = ["/api/runs", "/api/sessions", "/api/sessions/{session}/runs", "/api/sessions/{session}/forks"]
MESSAGES = ["/api/runs/{run}/messages", "/api/sessions/{session}/messages"]
STREAMS = ["/api/runs/{run}/stream", "/api/sessions/{session}/stream"]
QUERIES: list[tuple[str, str, list[str]]] = [
    *((path, "limit", LIMITS) for path in [*LISTS, *MESSAGES]),
    *((path, "cursor", CURSORS) for path in LISTS),
    *((path, "wait", WAITS) for path in ["/api/runs/{run}", *MESSAGES]),
    *((path, "type", TYPES) for path in MESSAGES),
    (MESSAGES[0], "after", INDEXES),
    (MESSAGES[1], "after", [*PLACES, f"{NOWHERE}:0"]),
    (STREAMS[0], "after", [*INDEXES, "end", "End"]),
    (STREAMS[1], "after", [*PLACES, f"{NOWHERE}:0", f"{NOWHERE}:end", "end", f"{NOWHERE}:END"]),
    (MESSAGES[1], "history", ["", "own%00", "FULL", "all"]),
    ("/api/runs", "status", ["", "x", "RUNNING", "running,error", "%00"]),
    ("/api/runs", "mode", ["", "x", "FRESH", "fresh,fork", "%00"]),
    ("/api/runs", "sessionId", ["%00"]),
    ("/api/runs", "cwd", ["/%00"]),
    ("/api/sessions", "cwd", ["/%00"]),
    ("/api/sessions", "q", ["%00", "x" * 1001]),
    *(
        (path, "bogus", ["1"])
        for path in ["/", "/api/runs/{run}", "/api/sessions/{session}", *LISTS, *MESSAGES, *STREAMS]
    ),
    *((path, name, ["1"]) for path in STREAMS for name in ("limit", "type", "wait", "lastEventId")),
    ("/api/runs", "wait", ["1"]),
    ("/api/runs", "sessionid", [NOWHERE]),
    ("/api/sessions", "status", ["idle"]),
    ("/api/sessions/{session}", "wait", ["1"]),
    (MESSAGES[0], "cursor", ["MTIz"]),
    (MESSAGES[0], "history", ["full"]),
]


@pytest.mark.parametrize(("path", "name", "values"), QUERIES, ids=[f"{path}?{name}" for path, name, _ in QUERIES])
def test_a_bad_query_parameter_is_named(
    lenient: Client, ended: dict[str, Any], path: str, name: str, values: list[str]
) -> None:
    where = path.format(run=ended["id"], session=ended["sessionId"])
    for value in values:
        assert name in refused(lenient.get(f"{where}?{name}={value}"), name)


@pytest.mark.parametrize(
    ("path", "name", "values"),
    [
        ("/api/approvals", "status", ["allowed", "denied"]),
        ("/api/runs", "limit", ["1", "3"]),
        ("/api/sessions", "q", ["a", "a"]),
        (MESSAGES[0], "type", ["user", "assistant"]),
        (STREAMS[0], "after", ["0", "1"]),
    ],
)
def test_a_query_parameter_that_is_given_twice_is_refused(
    lenient: Client, ended: dict[str, Any], path: str, name: str, values: list[str]
) -> None:
    where = path.format(run=ended["id"])
    query = "&".join(f"{name}={value}" for value in values)
    assert refused(lenient.get(f"{where}?{query}"), name) == f"{name} is given 2 times; give it once."


@pytest.mark.parametrize("path", [f"/api/runs/{NOWHERE}/input", f"/api/approvals/{NOWHERE}"])
def test_an_idempotency_key_is_refused_where_none_is_kept(strict: Client, path: str) -> None:
    answer = strict.request("POST", path, {}, {"Idempotency-Key": "nightly"})
    assert "only a start, a resume and a fork take one" in refused(answer, "Idempotency-Key")


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_query_of_a_post_is_refused_before_anything_starts(strict: Client, root: Path, kind: str) -> None:
    body = body_for(kind, root, {})
    for value in WAITS:
        refused(strict.post(f"/api/runs/{kind}?wait={value}", body), "wait")
    assert "it takes wait" in refused(strict.post(f"/api/runs/{kind}?wiat=1", body), "wiat")
    refused(strict.request("DELETE", f"/api/runs/{NOWHERE}?wait=1"), "wait")
    refused(strict.patch(f"/api/sessions/{NOWHERE}?wait=1", {}), "wait")


# ---- targets without a path


@pytest.mark.parametrize("target", ["", "?x=1", "http://localhost", "http://localhost?x=1"])
def test_an_address_without_a_path_is_not_redirected(served: Client, target: str) -> None:
    with connect(
        served, f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
    ) as connection:
        head, body = read_all(connection)
    assert head.split()[1] in (b"400", b"404"), "a redirect would name a host that may not be one"
    assert b"\r\nContent-Type: application/json\r\n" in head
    assert set(json.loads(body)) == {"error"}
