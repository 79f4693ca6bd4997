"""The description of the API: valid, complete, the same as the stored one, and served as the API is."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from app import create_app
from ccm.api.http.extensions import DOCUMENT
from ccm.api.http.options_body import Options
from ccm.api.openapi.document import EXAMPLES
from ccm.settings.settings import PRIVILEGED_OPTIONS, Settings, variable_of
from tests.api.conftest import refused
from tests.api.in_process import InProcessService
from tests.client import Client
from tests.contract import NO_OPERATION, STORED, Contract, Json
from tests.flask_commands import FLASK, call
from tests.test_readme import classes

TOKEN = "a-token-for-the-tests"
NAMES = "error", "event", "type", "status"


@pytest.fixture(scope="module")
def document() -> Json:
    content: Json = create_app(Settings()).extensions[DOCUMENT].content
    return content


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with InProcessService(tmp_path_factory.mktemp("service")) as service:
        yield service.client


def operations(document: Json) -> Iterator[tuple[str, str, Json]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def test_it_is_valid(document: Json) -> None:
    OpenAPIV31SpecValidator(document).validate()


def test_the_stored_description_is_the_present_one(document: Json) -> None:
    stored = json.loads(STORED.read_text(encoding="utf-8"))

    assert stored == document, "run python -m tests.api.openapi"


def test_it_describes_the_operations_that_the_app_has(document: Json) -> None:
    app = create_app(Settings())
    routes = {
        (method, re.sub(r"<(\w+)>", "{}", rule.rule))
        for rule in app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }

    assert {(method, re.sub(r"{\w+}", "{}", path)) for method, path, _ in operations(document)} == routes


def test_operations_have_unique_ids_and_summaries(document: Json) -> None:
    ids = [operation["operationId"] for _, _, operation in operations(document)]

    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-z]+([A-Z][a-z]+)*", each) for each in ids)
    assert {"startRun", "forkRun", "cancelRun", "listSessions", "answerApproval"} <= set(ids)
    assert all(operation["summary"] and "\n" not in operation["summary"] for _, _, operation in operations(document))


def test_everything_in_it_is_described(document: Json) -> None:
    for method, path, operation in operations(document):
        for parameter in operation.get("parameters", ()):
            assert parameter["description"], f"{method} {path} {parameter['name']}"
    for name, schema in document["components"]["schemas"].items():
        for field, described in schema.get("properties", {}).items():
            said = "description" in json.dumps(described) or "$ref" in described or "const" in described
            assert said or field in NAMES, f"{name}.{field} has no description"


def test_everything_in_it_is_used(document: Json) -> None:
    text = json.dumps(document)
    for kind in ("schemas", "responses", "headers"):
        unused = [name for name in document["components"][kind] if f'"#/components/{kind}/{name}"' not in text]
        assert unused == [], kind


def test_every_error_code_is_documented(document: Json) -> None:
    documented = {error.code for operation in Contract(document).operations() for error in operation.errors()}

    assert documented == {error.code for error in classes()}
    assert all(f"`{code}`" in document["info"]["description"] for code in NO_OPERATION)


def test_options_tell_the_settings_that_decide_on_them(document: Json) -> None:
    schemas = document["components"]["schemas"]
    options = schemas["Options"]["properties"]
    known = {variable_of(field.name) for field in dataclasses.fields(Settings)}

    assert set(options) == {field.alias or name for name, field in Options.model_fields.items()}
    assert {name for name, option in options.items() if "x-privileged" in option} == set(PRIVILEGED_OPTIONS)
    assert options["maxTurns"]["x-ceiling-setting"] == "CCM_MAX_TURNS"
    assert schemas["Agent"]["properties"]["maxTurns"]["x-ceiling-setting"] == "CCM_MAX_TURNS"
    assert schemas["ForkBody"]["properties"]["timeoutMs"]["x-ceiling-setting"] == "CCM_RUN_TIMEOUT"
    assert options["permissionMode"]["x-default-setting"] == "CCM_PERMISSION_MODE"
    assert schemas["StartBody"]["properties"]["cwd"]["x-allowed-by-setting"] == "CCM_ALLOWED_ROOTS"
    for schema in schemas.values():
        for field in schema.get("properties", {}).values():
            for extension in ("x-ceiling-setting", "x-default-setting", "x-allowed-by-setting"):
                if extension in field:
                    assert field[extension] in known
                    assert field[extension] in field["description"]
            if "x-privileged" in field:
                assert "CCM_PRIVILEGED_OPTIONS" in field["description"]


def test_examples_are_valid(document: Json) -> None:
    contract = Contract(document)
    checked = set()
    for operation in contract.operations():
        if operation.body is not None:
            operation.body_validator.validate(operation.body["example"])
        for status, response in operation.responses.items():
            for media_type, content in response.get("content", {}).items():
                if "example" in content:
                    operation.validator(status, media_type).validate(content["example"])
                    checked.add(json.dumps(content["example"]))

    recorded = {json.dumps(each[name]) for each in examples().values() for name in each if name != "request"}
    assert checked == recorded


def examples() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(EXAMPLES.read_text(encoding="utf-8"))
    return found


# ---- how it is served


def test_it_is_served_with_a_strong_tag(client: Client, document: Json) -> None:
    answer = client.get("/openapi.json")
    tag = answer.headers["ETag"]
    again = client.request("GET", "/openapi.json", headers={"If-None-Match": tag})

    assert answer.json == document
    assert answer.headers["Content-Type"] == "application/json"
    assert tag.startswith('"')
    assert (again.status, again.body, again.headers["ETag"]) == (304, b"", tag)


def test_the_overview_names_it(client: Client) -> None:
    assert "/openapi.json" in [endpoint["path"] for endpoint in client.get("/").json["endpoints"]]


def test_its_server_is_relative_to_a_prefix(tmp_path: Path) -> None:
    with InProcessService(tmp_path, CCM_URL_PREFIX="/agents") as service:
        answer = service.client.get("/agents/openapi.json")

    assert [server["url"] for server in answer.json["servers"]] == ["/agents"]


def test_its_server_is_relative_to_the_prefix_of_a_proxy(tmp_path: Path) -> None:
    with InProcessService(tmp_path, CCM_TRUSTED_PROXY="127.0.0.1") as service:
        tags = set()
        for prefix, url in (("/a", "/a"), ("/b", "/b"), ("", "/")):
            answer = service.client.request("GET", "/openapi.json", headers={"X-Forwarded-Prefix": prefix})
            tags.add(answer.headers["ETag"])
            assert answer.json["servers"][0]["url"] == url

    assert len(tags) == 3


def test_it_needs_a_token_where_the_api_does(tmp_path: Path) -> None:
    with InProcessService(tmp_path, CCM_API_TOKEN=TOKEN) as service:
        refused(service.client.get("/openapi.json"), status=401, code="UNAUTHORIZED")
        answer = service.client.request("GET", "/openapi.json", headers={"Authorization": f"Bearer {TOKEN}"})

    assert answer.status == 200


def test_a_command_prints_the_same(client: Client, environ: dict[str, str]) -> None:
    printed = call([*FLASK, "openapi"], environ)

    assert printed.stdout == client.get("/openapi.json").body.decode()
