"""Lists of messages: joined from the stored JSON texts without parsing, streamed in constant memory."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from flask import Response

from ccm.api.http.extensions import service
from ccm.api.http.pagination import next_link
from ccm.api.http.query import MessagesQuery
from ccm.api.http.request_limiter import hold_open, wait_until
from ccm.core.lineage import Segment

# The largest number of chunks (core/queries.py) of a list that is sent whole.
SHORT_CHUNKS = 4


@dataclass(frozen=True)
class Extent:
    """The messages that exist at one moment.

    Args:
        complete: whether there will be no more.
        position_after: returns the `after` with which a request continues after a segment.
    """

    segments: Sequence[Segment]
    complete: bool
    position_after: Callable[[Segment], str]


def message_list(query: MessagesQuery, key: str, measure: Callable[[], Extent]) -> Response:
    """Return the messages once there are any, or when `?wait=` has passed.

    Args:
        query: the parameters of the request.
        key: the id of the run or the session.
        measure: returns the current extent.

    Raises:
        SlotsTaken: the list is long and no slot is free.
    """
    queries = service().queries
    types, most, seconds = query.type or (), query.limit, query.wait

    def look() -> Extent | None:
        extent = measure()
        return extent if extent.complete or queries.has_any(extent.segments, types) else None

    extent = (wait_until(key, seconds, look) if seconds else None) or measure()
    segments = extent.segments
    kept = segments if most is None else queries.cut(segments, types, most)
    headers = (
        {} if extent.complete and list(kept) == list(segments) else next_link(after=extent.position_after(kept[-1]))
    )
    chunks = queries.chunks(kept, types)
    # A short list is sent whole, with its length. A long one occupies its thread until the client has read it.
    beginning = deque(itertools.islice(chunks, SHORT_CHUNKS + 1))
    if len(beginning) <= SHORT_CHUNKS:
        return Response(b"".join(_array(beginning)), headers=headers, mimetype="application/json")
    body = _array(itertools.chain(_pop_each(beginning), chunks))
    return hold_open(Response(body, headers=headers, mimetype="application/json"))


def _pop_each(chunks: deque[list[str]]) -> Iterator[list[str]]:
    """Yield the chunks without keeping them, because the client may take hours to read the rest."""
    while chunks:
        yield chunks.popleft()


def _array(chunks: Iterable[list[str]]) -> Iterator[bytes]:
    before = "["
    for texts in chunks:
        texts[0] = before + texts[0]  # not before the joined text, which would copy all of it
        yield ",\n".join(texts).encode("ascii")
        before = ",\n"
    yield b"]\n" if before != "[" else b"[]\n"
