"""Lists of messages: built from the stored JSON texts without parsing them, streamed at constant memory."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from flask import Response

from ccm.api.http.context import held, service, wait_until
from ccm.api.http.pagination import next_link
from ccm.api.http.query import MessagesQuery
from ccm.core.lineage import Segment

# A list of so many chunks (core/queries.py) at the most is short.
SHORT_CHUNKS = 4


@dataclass(frozen=True)
class Extent:
    """What there is to read at this moment.

    Args:
        complete: nothing more will come.
        place: where a next request goes on after a segment, as its `after`.
    """

    segments: Sequence[Segment]
    complete: bool
    place: Callable[[Segment], str]


def message_list(query: MessagesQuery, key: str, measure: Callable[[], Extent]) -> Response:
    """The messages that there are, once there are any or `?wait=` has passed.

    Args:
        query: says which and how many.
        key: the run or the session.
        measure: tells anew what there is to read.
    """
    queries = service().queries
    types, most, seconds = query.type or (), query.limit, query.wait

    def look() -> Extent | None:
        extent = measure()
        return extent if extent.complete or queries.has_any(extent.segments, types) else None

    extent = (wait_until(key, seconds, look) if seconds else None) or measure()
    segments = extent.segments
    kept = segments if most is None else queries.cut(segments, types, most)
    headers = {} if extent.complete and list(kept) == list(segments) else next_link(after=extent.place(kept[-1]))
    chunks = queries.chunks(kept, types)
    # A short list is sent whole, with its length. A long one keeps its thread for as long as the client reads.
    beginning = deque(itertools.islice(chunks, SHORT_CHUNKS + 1))
    if len(beginning) <= SHORT_CHUNKS:
        return Response(b"".join(_array(beginning)), headers=headers, mimetype="application/json")
    body = _array(itertools.chain(_drained(beginning), chunks))
    return held(Response(body, headers=headers, mimetype="application/json"))


def _drained(chunks: deque[list[str]]) -> Iterator[list[str]]:
    """The chunks, none of which is kept once it is used: the client may take hours to read on."""
    while chunks:
        yield chunks.popleft()


def _array(chunks: Iterable[list[str]]) -> Iterator[bytes]:
    before = "["
    for texts in chunks:
        yield (before + ",\n".join(texts)).encode("ascii")
        before = ",\n"
    yield b"]\n" if before != "[" else b"[]\n"
