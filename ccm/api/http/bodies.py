"""The bodies of requests, their validation, and the messages about invalid ones."""

from __future__ import annotations

import base64
import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from flask import Request
from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import ErrorDetails, from_json

from ccm.api.http.options_body import SERVICE_OWNED, Options, Strict
from ccm.core.runs.request import IfBusy
from ccm.errors import TooLarge, UnsupportedMediaType, ValidationError
from ccm.models import Answer, Decision, IdempotencyKey, Image, Run, fields

MAX_IMAGES = 20
IMAGE_CHARACTERS = 27_000_000
PATH_CHARACTERS = 4_096
KEY_CHARACTERS = 255
# The largest number of values, names and brackets in a body. Each takes hundreds of bytes in Python, so a body of small
# ones would take gigabytes.
BODY_PARTS = 200_000
# A string in JSON (or an unterminated one at the end), or a mark outside of strings.
PART = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|[,\[{]', re.DOTALL)
# Unknown names are truncated to this in messages.
NAME_CHARACTERS = 100
UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", re.ASCII)
SIGNATURES = {
    "image/png": rb"\x89PNG\r\n\x1a\n",
    "image/jpeg": rb"\xff\xd8\xff",
    "image/gif": rb"GIF8[79]a",
    "image/webp": rb"RIFF.{4}WEBP",
}


def _uuid(text: str) -> str:
    if not UUID.fullmatch(text):
        raise ValueError("must be a UUID, such as 160f5bda-edc4-4a77-aa69-dad3a26497bb")
    return text.lower()


def _run_id(text: str) -> str:
    if not fields.RUN_ID.fullmatch(text):
        raise ValueError("must be the id of a run, such as 160f5bda-edc4-4a77-aa69-dad3a26497bb")
    return text


Path = Annotated[str, Field(min_length=1, max_length=PATH_CHARACTERS), AfterValidator(fields.no_nul)]
# A UUID in its usual form. Claude Code would also accept a session's title, and so another session.
Id = Annotated[str, AfterValidator(_uuid), Field(json_schema_extra={"format": "uuid"})]
RunId = Annotated[str, AfterValidator(_run_id), Field(json_schema_extra={"pattern": f"^{fields.RUN_ID.pattern}$"})]


class ImageBody(Strict):
    """An image of a prompt."""

    mediaType: Literal["image/png", "image/jpeg", "image/gif", "image/webp"] = Field(description="The image's format.")
    data: Annotated[str, Field(min_length=1, max_length=IMAGE_CHARACTERS)] = Field(
        description="The image in base64, without line breaks.", json_schema_extra={"contentEncoding": "base64"}
    )

    @model_validator(mode="after")
    def _is_an_image(self) -> ImageBody:
        try:
            data = base64.b64decode(self.data, validate=True)
        except ValueError:
            raise ValueError("data must be base64, without line breaks or a data: prefix") from None
        if not re.match(SIGNATURES[self.mediaType], data, re.DOTALL):
            raise ValueError(f"data is not of the type {self.mediaType}")
        return self


class InputBody(Strict):
    """A user's message."""

    prompt: fields.Prompt
    images: Annotated[list[ImageBody], Field(max_length=MAX_IMAGES)] = Field(
        default_factory=list, description="Images that belong to the prompt."
    )

    def pictures(self) -> tuple[Image, ...]:
        return tuple(Image(image.mediaType, image.data) for image in self.images)


class SessionBody(Strict):
    """A client's description of a session."""

    title: fields.Title = None
    metadata: fields.Metadata | None = None


class RunBody(InputBody):
    """The common fields of the bodies that start a run."""

    options: Options = Field(default_factory=Options, description="The SDK's options, under their TypeScript names.")
    timeoutMs: fields.TimeoutMs = None
    webhookUrl: fields.WebhookUrl = None
    approvals: fields.Approvals = False
    approvalTimeoutMs: fields.ApprovalTimeoutMs = None

    def run_fields(self) -> dict[str, Any]:
        """Return the fields that are stored with the run under the same names."""
        return self.model_dump(include=set(RunBody.model_fields) & set(Run.shape.shown), exclude={"options"})

    def session_fields(self) -> dict[str, Any]:
        """Return the given fields that are stored with a new session under the same names. A resume has none."""
        return self.model_dump(include=set(SessionBody.model_fields), exclude_unset=True)

    @field_validator("approvalTimeoutMs")
    @classmethod
    def _has_approvals(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("approvals") is False:
            raise ValueError("is for runs with approvals; set approvals to true, or leave it out")
        return value


class StartBody(RunBody, SessionBody):
    """A request for a fresh run."""

    cwd: Path = Field(description="The directory that Claude Code works in, an absolute path on the service's host.")


class ResumeBody(RunBody):
    """A request for a run that continues a session."""

    sessionId: Id = Field(description="The session to continue, or the `sdkSessionId` of any of its runs.")
    ifBusy: IfBusy = Field(default=IfBusy.REJECT, description="What to do while a run of the session has not ended.")


class ForkBody(RunBody, SessionBody):
    """A request for a run that branches off a session."""

    sessionId: Id = Field(description="The session to branch off, or the `sdkSessionId` of any of its runs.")
    atRunId: RunId | None = Field(default=None, description="The run of the session to continue; null for the head.")
    atMessage: Id | None = Field(
        default=None, description="The uuid of the assistant message to continue after; null for the end of the run."
    )
    cwd: Path | None = Field(default=None, description="The directory of the fork; null for that of the session.")


class ApprovalBody(Strict):
    """The answer to an approval."""

    decision: Decision = Field(description="Whether Claude Code may use the tool.")
    updatedInput: fields.UpdatedInput = None
    remember: fields.Remember = False
    message: fields.DenialMessage = None
    interrupt: fields.Interrupt = False

    @field_validator("updatedInput", "remember", "message", "interrupt")
    @classmethod
    def _goes_with_the_decision(cls, value: Any, info: ValidationInfo) -> Any:
        other = "allow" if info.field_name in ("updatedInput", "remember") else "deny"
        if value not in (None, False) and info.data.get("decision", other) != other:
            raise ValueError(f"goes with the decision {other} only; leave it out")
        return value

    def answer(self) -> Answer:
        return Answer(
            allow=self.decision == Decision.ALLOW,
            updated_input=self.updatedInput,
            remember=self.remember,
            message=self.message,
            interrupt=self.interrupt,
        )


Body = TypeVar("Body", bound=Strict)


def read_body(request: Request, model: type[Body], limit: int) -> Body:
    """Read and validate the body of a request.

    Args:
        limit: the maximum number of bytes.

    Raises:
        UnsupportedMediaType: the body is not application/json in UTF-8, or it is compressed.
        TooLarge: the body exceeds the limit.
        ValidationError: the body does not match the model. Names the most relevant invalid field.
    """
    charset = request.mimetype_params.get("charset", "utf-8").lower()
    if request.mimetype != "application/json" or charset not in ("utf-8", "utf8"):
        raise UnsupportedMediaType("The body must be JSON in UTF-8; send it with 'Content-Type: application/json'.")
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise UnsupportedMediaType("The body must not be compressed; send it without Content-Encoding.")
    data = request.stream.read(limit + 1)
    if len(data) > limit:
        raise TooLarge(f"The body has more than {limit} bytes, which CCM_MAX_BODY_BYTES sets as the limit.")
    if _has_too_many_parts(data):
        raise ValidationError(f"The body has more than {BODY_PARTS} names and values.")
    try:
        return model.model_validate_json(data)
    except pydantic.ValidationError as error:
        raise _validation_error(error, data, model) from None


def _has_too_many_parts(data: bytes) -> bool:
    """Return whether JSON has more than BODY_PARTS parts, without parsing it."""
    return any(itertools.islice(PART.finditer(data), BODY_PARTS, None))


def idempotency_key(request: Request, body: RunBody) -> IdempotencyKey | None:
    """Return the request's `Idempotency-Key`, with a digest of its path and body. None if it has no key.

    Raises:
        ValidationError: the key is blank or too long.
    """
    text = request.headers.get("Idempotency-Key")
    if text is None:
        return None
    if not text.strip() or len(text) > KEY_CHARACTERS:
        raise ValidationError(
            f"Idempotency-Key: must be a text of 1 to {KEY_CHARACTERS} characters, such as a UUID.",
            field="Idempotency-Key",
        )
    given = json.dumps(body.model_dump(exclude_unset=True), sort_keys=True)
    return IdempotencyKey(text, hashlib.sha256(f"{request.path}\0{given}".encode()).hexdigest())


def refuse_idempotency_key(request: Request) -> None:
    """Refuse a key where it is not supported, because a client that relies on it would repeat the request.

    Raises:
        ValidationError: the request has an `Idempotency-Key`.
    """
    if "Idempotency-Key" in request.headers:
        raise ValidationError(
            "Idempotency-Key: only a start, a resume and a fork take one; send this request without it.",
            field="Idempotency-Key",
        )


# pydantic's error types for values of the wrong type.
WRONG_TYPES = ("string_type", "list_type", "dict_type", "model_type", "model_attributes_type", "literal_error", "enum")


def _validation_error(errors: pydantic.ValidationError, data: bytes, model: type[Strict]) -> ValidationError:
    error = _closest(errors.errors(include_url=False, include_context=False, include_input=False))
    if error["type"] == "json_invalid":
        return ValidationError(f"The body is no valid JSON: {error['msg'].removeprefix('Invalid JSON: ')}.")
    path = _path(error, from_json(data))
    if not path:
        return ValidationError("The body must be a JSON object.")
    field = ".".join(str(part)[:NAME_CHARACTERS] for part in path)
    if error["type"] == "extra_forbidden":
        return ValidationError(_unknown_field_message(field, model), field=field)
    reason = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        reason = "is required"
    if reason[1:2].islower():  # a sentence and not the name of a variable
        reason = reason[0].lower() + reason[1:]
    return ValidationError(f"{field}: {reason}.", field=field)


def _closest(errors: list[ErrorDetails]) -> ErrorDetails:
    """Return the most relevant error. Each type of a union reports one, and the deepest one came closest to a match."""
    first = errors[0]
    rivals = [error for error in errors if error["loc"][: len(first["loc"]) - 1] == first["loc"][:-1]]
    return max(rivals, key=lambda error: (len(error["loc"]), error["type"] not in WRONG_TYPES, error is first))


def _path(error: ErrorDetails, value: Any) -> list[int | str]:
    """Return the path of an error in the body: pydantic's location without the names of the types that it tried."""
    path: list[int | str] = []
    loc = error["loc"]
    for number, part in enumerate(loc):
        if number and str(loc[number - 1]).startswith("tagged-union["):
            continue  # a tag, which may also be the name of a field
        children: Any = value if isinstance(value, dict | list) else ()
        try:
            value = children[part]
        except (LookupError, TypeError):
            if error["type"] != "missing" or number < len(loc) - 1:
                continue
        path.append(part)
    return path


def _unknown_field_message(field: str, model: type[Strict]) -> str:
    parent, _, name = field.rpartition(".")
    if parent == "options" and name in SERVICE_OWNED:
        return f"{field} is not for clients: {SERVICE_OWNED[name]}."
    known: Mapping[str, Any] = Options.model_fields if parent == "options" else model.model_fields
    near = difflib.get_close_matches(name, known, n=1) if parent in ("", "options") else []
    return f"{field} is not a known field" + (f"; did you mean {near[0]}?" if near else ".")
