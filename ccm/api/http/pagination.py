"""Pages of a list: a plain array, and the next page's URL in the `Link` header, as in GitHub's API."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar
from urllib.parse import urlencode

from flask import Response, request

from ccm.api.http.query import Paged, cursor_of
from ccm.core.search import Place
from ccm.json_text import to_json_text


class Shown(Protocol):
    """An item of a list."""

    def to_json(self) -> Mapping[str, Any]:
        """Return the JSON object that the API shows."""


Item = TypeVar("Item", bound=Shown)


def next_link(**changes: str) -> dict[str, str]:
    """Return a `Link` header to the URL of this request with changed parameters."""
    query = dict(request.args.items()) | changes
    # Without a valid Host, use the path alone, which is a valid link too.
    url = request.base_url if request.host else request.path
    return {"Link": f'<{url}?{urlencode(query)}>; rel="next"'}


def page(
    query: Paged, read: Callable[..., Sequence[Item]], place_of: Callable[[Item], Place], *, grows: bool = False
) -> Response:
    """Return one page of a list.

    Args:
        query: has the size of the page, and the place after which it begins.
        read: returns up to `limit` items after the place `after`.
        place_of: returns the place of an item.
        grows: whether the client waits for new items at the end. Then there is always a next page.
    """
    size = query.limit
    # One item more than requested shows whether there is a next page.
    items = read(limit=size + 1, after=query.cursor)
    if len(items) > size or grows:
        items = items[:size]
        return page_of(items, more=True, place=place_of(items[-1]) if items else None)
    return page_of(items)


def page_of(items: Sequence[Shown], *, more: bool = False, place: Place | None = None) -> Response:
    """Return a page that has been read.

    Args:
        more: whether there is a next page.
        place: where it begins; None if it begins where this one does.
    """
    headers = next_link(**({} if place is None else {"cursor": cursor_of(place)})) if more else {}
    # Not by `json_response`, which takes twice as long, because it puts spaces between the parts.
    text = to_json_text([item.to_json() for item in items])
    return Response(text + "\n", headers=headers, mimetype="application/json")
