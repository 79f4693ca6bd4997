"""Pages of a list, as GitHub does it: a plain array, and the next page's address in the `Link` header."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar
from urllib.parse import urlencode

from flask import Response, request

from ccm.api.http.context import json_response
from ccm.api.http.query import Paged, cursor_of


class Item(Protocol):
    def to_json(self) -> dict[str, object]: ...


ItemT = TypeVar("ItemT", bound=Item)


def next_link(**changes: str) -> dict[str, str]:
    """The `Link` header to this very address with some parameters changed."""
    query = dict(request.args.items()) | changes
    # A Host that is none makes no address; the path alone is a valid one too.
    address = request.base_url if request.host else request.path
    return {"Link": f'<{address}?{urlencode(query)}>; rel="next"'}


def page(
    query: Paged,
    read: Callable[[int, int | None], Sequence[ItemT]],
    place: Callable[[ItemT], int],
    *,
    grows: bool = False,
) -> Response:
    """One page of a list.

    Args:
        query: says how many items, and beyond which place.
        read: gives so many items beyond a place.
        place: where an item stands in the list.
        grows: whether the client waits for what comes at its end: then there is always a next page.
    """
    size = query.limit
    # One more than asked for tells whether there is a next page.
    items = read(size + 1, query.cursor)
    headers = {}
    if len(items) > size or grows:
        items = items[:size]
        headers = next_link(**({"cursor": cursor_of(place(items[-1]))} if items else {}))
    return json_response([item.to_json() for item in items], headers=headers)
