"""Checks every answer that a test receives against the stored description of the API.

The clients of the tests call it, so a test need not. tests/api/openapi/test_document.py holds the stored description to
the one that the service gives.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote

from jsonschema_rs import Draft202012Validator, ValidationError

STORED = Path(__file__).parent / "api" / "openapi" / "document.json"
# Headers of every HTTP server, which a description of an API leaves out.
PLAIN_HEADERS = frozenset(
    {"connection", "content-encoding", "content-length", "content-type", "date", "server", "transfer-encoding", "via"}
)
# Other servers that answer in tests: proxies, which have headers of their own, and the stand-in for the Messages API.
OTHER_SERVERS = ("nginx", "Caddy", "Werkzeug")
# The codes of requests that no operation answers, beside those that every request can get.
NO_OPERATION = frozenset({"NOT_FOUND", "METHOD_NOT_ALLOWED"})
# Pages for browsers, which are no part of the API.
DOCUMENTATION = re.compile(r"/docs(/|\Z)")
REFERENCE = re.compile('"#/components/schemas/([^"]+)"')
Json = dict[str, Any]


class Reached(NamedTuple):
    """An error that an operation can answer with."""

    operation: str
    status: int
    code: str


class Sent(NamedTuple):
    """A request."""

    method: str
    target: str
    body: bytes | None = None

    @property
    def path(self) -> str:
        return unquote(self.target.partition("?")[0])

    @property
    def path_behind_prefix(self) -> str:
        """The path without its first part, which may be the prefix of a proxy."""
        return f"/{self.path.lstrip('/').partition('/')[2]}"


class Operation:
    """An operation of the description, with the validators of its answers.

    Args:
        contract: the whole description.
        described: the operation object.
    """

    def __init__(self, contract: Contract, described: Json) -> None:
        self._contract = contract
        self._validators: dict[tuple[str, str], Draft202012Validator] = {}
        self.id: str = described["operationId"]
        self.responses: Json = {status: contract.resolve(each) for status, each in described["responses"].items()}
        self.parameters = {each["name"]: each for each in described.get("parameters", ())}
        self.body: Json | None = described.get("requestBody", {}).get("content", {}).get("application/json")

    def takes(self, name: str) -> bool:
        """Whether it has this query parameter, by its own name or as a property of an object."""
        objects = [each["schema"] for each in self.parameters.values() if each["schema"].get("type") == "object"]
        return name in self.parameters or any(re.search(each["propertyNames"]["pattern"], name) for each in objects)

    def validator(self, status: str, media_type: str) -> Draft202012Validator:
        """Return the validator of the answers with a status."""
        key = status, media_type
        if key not in self._validators:
            self._validators[key] = self._contract.validator(self.responses[status]["content"][media_type]["schema"])
        return self._validators[key]

    @cached_property
    def frames(self) -> dict[str, tuple[Draft202012Validator, bool]]:
        """The validators of the events of a stream, by the name of the event, and whether the event has an id."""
        found = {}
        for frame in self.responses["200"]["content"]["text/event-stream"]["schema"]["items"]["oneOf"]:
            schema = self._contract.resolve(frame)
            named = schema["properties"]["event"]
            for name in named.get("enum", [named.get("const")]):
                found[name] = self._contract.validator(frame), "id" in schema["properties"]
        return found

    @cached_property
    def body_validator(self) -> Draft202012Validator:
        assert self.body is not None, f"{self.id} has no body"
        return self._contract.validator(self.body["schema"])

    def errors(self) -> Iterator[Reached]:
        """Yield the errors that the description names."""
        for status, response in self.responses.items():
            if int(status) >= 400:
                schema = self._contract.resolve(response["content"]["application/json"]["schema"])
                for code in schema["properties"]["error"]["properties"]["code"]["enum"]:
                    yield Reached(self.id, int(status), code)


class Contract:
    """A description of the API that answers are checked against.

    Args:
        document: the OpenAPI document.
    """

    def __init__(self, document: Json) -> None:
        self.document = document
        self._schemas = {name: strict(each) for name, each in document["components"]["schemas"].items()}
        self._paths = [
            (re.compile(re.sub(r"\\?{\w+\\?}", "[^/]+", re.escape(path))), operations)
            for path, operations in sorted(document["paths"].items(), key=lambda item: "{" in item[0])
        ]
        self._operations: dict[int, Operation] = {}
        self._webhook: Draft202012Validator | None = None

    def resolve(self, described: Json) -> Json:
        """Return the object that a reference stands for, and any other object unchanged."""
        while "$ref" in described:
            target: Json = self.document
            for part in described["$ref"].removeprefix("#/").split("/"):
                target = target[part]
            described = target
        return described

    def validator(self, schema: Json) -> Draft202012Validator:
        """Return the validator of a schema, which may refer to the components."""
        needed: set[str] = set()
        found = REFERENCE.findall(json.dumps(schema))
        while found:  # all components would take 30 times as long to compile
            name = found.pop()
            if name not in needed:
                needed.add(name)
                found += REFERENCE.findall(json.dumps(self._schemas[name]))
        components = {"schemas": {name: self._schemas[name] for name in needed}}
        return Draft202012Validator({**strict(schema), "components": components}, validate_formats=True)

    def operations(self) -> Iterator[Operation]:
        for operations in self.document["paths"].values():
            for described in operations.values():
                yield self._operation(described)

    def _operation(self, described: Json) -> Operation:
        return self._operations.setdefault(id(described), Operation(self, described))

    def find(self, method: str, path: str) -> Operation | None:
        """Return the operation that answers a request, if there is one."""
        method = "get" if method == "HEAD" else method.lower()
        for pattern, operations in self._paths:
            if pattern.fullmatch(path):
                return self._operation(operations[method]) if method in operations else None
        return None

    def check(self, sent: Sent, status: int, headers: Mapping[str, str], body: bytes | None) -> None:
        """Check an answer, and the request if it was accepted: then the description must allow it too.

        Args:
            body: the body of the answer; None if it is a stream, whose events `check_event` checks.

        Raises:
            AssertionError: the description does not allow it.
        """
        if headers.get("Server", "").startswith(OTHER_SERVERS):
            return None
        method = sent.method
        documentation = DOCUMENTATION.match(sent.path) or DOCUMENTATION.match(sent.path_behind_prefix)
        if documentation and (status < 400 or headers.get("Content-Type", "").startswith("text/html")):
            return None
        operation = self.find(method, sent.path) or self.find(method, sent.path_behind_prefix)
        names = {name.lower(): value for name, value in headers.items()}
        media_type = names.get("content-type", "").partition(";")[0]
        if operation is None or (status in (404, 405) and self.find(method, sent.path) is None):
            return self._check_no_operation(sent, status, body)
        where = f"{operation.id} answered {status}"
        response = operation.responses.get(str(status))
        assert response is not None, f"{where}, which is not documented: {body!r}"
        documented = {name.lower(): self.resolve(header) for name, header in response.get("headers", {}).items()}
        unknown = set(names) - set(documented) - PLAIN_HEADERS
        assert not unknown, f"{where} with headers that are not documented: {unknown}"
        missing = {name for name, header in documented.items() if header.get("required")} - set(names)
        assert not missing, f"{where} without the headers {missing}"
        content = response.get("content", {})
        if method != "HEAD":
            assert bool(content) == bool(media_type), f"{where} as {media_type!r}"
        if content and method != "HEAD":
            assert media_type in content, f"{where} as {media_type}, which is not documented"
            if media_type == "text/event-stream" and body is not None:
                self._check_stream(sent, body.decode())
            elif body is not None:
                text = zlib.decompress(body, wbits=31) if names.get("content-encoding") == "gzip" else body
                validate(operation.validator(str(status), media_type), json.loads(text), where)
        if status < 400:
            self._check_request(operation, sent)
        return None

    def check_event(self, target: str, event: str, event_id: str, data: str) -> None:
        """Check an event of a stream.

        Raises:
            AssertionError: the description does not allow it.
        """
        sent = Sent("GET", target)
        operation = self.find("GET", sent.path) or self.find("GET", sent.path_behind_prefix)
        assert operation is not None, f"{target} is not documented"
        assert event in operation.frames, f"{operation.id} sent an event {event!r}, which is not documented"
        validator, has_id = operation.frames[event]
        frame = {"event": event, "data": json.loads(data), **({"id": event_id} if has_id else {})}
        validate(validator, frame, f"{operation.id} sent an event {event!r}")

    def _check_stream(self, sent: Sent, text: str) -> None:
        for block in text.split("\n\n"):
            fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
            if "data" in fields:
                self.check_event(sent.target, fields["event"], fields.get("id", ""), fields["data"])

    def check_webhook(self, body: bytes) -> None:
        """Check the body of a webhook.

        Raises:
            AssertionError: the description does not allow it.
        """
        if self._webhook is None:
            content = self.document["webhooks"]["event"]["post"]["requestBody"]["content"]
            self._webhook = self.validator(content["application/json"]["schema"])
        validate(self._webhook, json.loads(body), "a webhook")

    def _check_request(self, operation: Operation, sent: Sent) -> None:
        for name, _ in parse_qsl(sent.target.partition("?")[2], keep_blank_values=True):
            ignored = operation.id == "getHealth"
            assert ignored or operation.takes(name), f"{operation.id} accepted {name}, which is not documented"
        if sent.body is not None and operation.body is not None:
            validate(operation.body_validator, json.loads(sent.body), f"{operation.id} accepted a body")

    def _check_no_operation(self, sent: Sent, status: int, body: bytes | None) -> None:
        if sent.method == "HEAD" or body is None:
            return
        code = json.loads(body)["error"]["code"]
        known = {code for each in self.document["components"]["responses"] for code in self._codes(each)}
        assert code in NO_OPERATION | known, f"{sent.method} {sent.target} answered {status} {code}"

    def _codes(self, response: str) -> list[str]:
        described = self.document["components"]["responses"][response]
        schema = self.resolve(described["content"]["application/json"]["schema"])
        codes: list[str] = schema["properties"]["error"]["properties"]["code"]["enum"]
        return codes


def strict(schema: Any) -> Any:
    """Return a schema that refuses fields without a description, unless it says that there may be others.

    Clients must ignore fields that they do not know, so the description allows them. The service must send none.
    """
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    result = {name: strict(value) for name, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        result.setdefault("additionalProperties", False)
    return result


def validate(validator: Draft202012Validator, value: Any, where: str) -> None:
    """Check a JSON value.

    Raises:
        AssertionError: it is invalid; names the place.
    """
    try:
        validator.validate(value)
    except UnicodeEncodeError:  # the validator refuses lone surrogates, which JSON allows
        validate(validator, json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")), where)
    except ValidationError as error:
        place = "/".join(map(str, error.instance_path))
        raise AssertionError(f"{where} against its description, at {place!r}: {error.message[:1000]}") from None


@cache
def contract() -> Contract:
    """Return the stored description."""
    return Contract(json.loads(STORED.read_text(encoding="utf-8")))
