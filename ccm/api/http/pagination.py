"""Pages of a list, as GitHub does it: a plain array, and the next page's address in the `Link` header."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar
from urllib.parse import urlencode

from flask import Response, request

from ccm.api.http.context import json_response
from ccm.errors import ValidationError

DEFAULT_LIMIT = 100
HIGHEST_LIMIT = 1_000
# A run's seq. Imported history comes before what was there, so it may be negative.
PLACE = re.compile(r"-?\d{1,18}", re.ASCII)


class Item(Protocol):
    def to_json(self) -> dict[str, object]: ...


ItemT = TypeVar("ItemT", bound=Item)


def limit(default: int | None = DEFAULT_LIMIT) -> int | None:
    """`?limit=`.

    Raises:
        ValidationError: it is not a number in range.
    """
    text = request.args.get("limit")
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 9 and 1 <= int(text) <= HIGHEST_LIMIT):
        raise ValidationError(f"limit: must be a whole number from 1 to {HIGHEST_LIMIT}.", field="limit")
    return int(text)


def _cursor() -> int | None:
    text = request.args.get("cursor")
    if text is None:
        return None
    try:
        place = base64.urlsafe_b64decode(text.encode("ascii")).decode("ascii")
        if PLACE.fullmatch(place):
            return int(place)
    except (binascii.Error, UnicodeError, ValueError):
        pass
    raise ValidationError("cursor: is not one that this service gave; take it from a Link header.", field="cursor")


def next_link(**changes: str) -> dict[str, str]:
    """The `Link` header to this very address with some parameters changed."""
    query = dict(request.args.items()) | changes
    # A Host that is none makes no address; the path alone is a valid one too.
    address = request.base_url if request.host else request.path
    return {"Link": f'<{address}?{urlencode(query)}>; rel="next"'}


def page(
    read: Callable[[int, int | None], Sequence[ItemT]], place: Callable[[ItemT], int], *, grows: bool = False
) -> Response:
    """One page of a list.

    Args:
        read: gives so many items beyond a place.
        place: where an item stands in the list.
        grows: whether the client waits for what comes at its end: then there is always a next page.
    """
    size = limit() or DEFAULT_LIMIT
    # One more than asked for tells whether there is a next page.
    items = read(size + 1, _cursor())
    headers = {}
    if len(items) > size or grows:
        items = items[:size]
        cursor = base64.urlsafe_b64encode(str(place(items[-1])).encode()).decode() if items else None
        headers = next_link(**({} if cursor is None else {"cursor": cursor}))
    return json_response([item.to_json() for item in items], headers=headers)
