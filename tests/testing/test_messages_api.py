"""How the stand-in for the Messages API answers requests that it cannot follow."""

from __future__ import annotations

from typing import Any

import pytest

from ccm.testing.messages_api import MessagesAPI
from tests.client import Client

SLOW = {"model": "m", "max_tokens": 10, "messages": [{"role": "user", "content": "[[slow x]]"}]}


@pytest.mark.parametrize(
    ("body", "words"),
    [(SLOW, "[[slow N SECONDS]]"), (b"{", "cannot follow this request")],
    ids=["directive", "no JSON"],
)
def test_a_wrong_request_is_a_400_that_says_why(messages_api: MessagesAPI, body: Any, words: str) -> None:
    # No error of the server, because Claude Code would repeat its request for minutes.
    answer = Client(messages_api.url).post("/v1/messages", body)

    assert answer.status == 400
    assert answer.json["error"]["type"] == "invalid_request_error"
    assert words in answer.json["error"]["message"]


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Origin": "https://evil.example"}], ids=str)
def test_a_web_page_cannot_use_it(messages_api: MessagesAPI, headers: dict[str, str]) -> None:
    answer = Client(messages_api.url).request("POST", "/v1/messages", SLOW, headers)

    assert answer.status == 403
