"""Lists of messages: joined from the stored JSON texts without parsing, streamed in constant memory.

Those of an ended run never change, so clients may keep them. A long list is compressed for clients that accept gzip.
Compression would let an attacker guess secrets in an answer from its length (BREACH) only if a web page could send
requests with the user's rights, which the admission checks prevent.
"""

from __future__ import annotations

import hashlib
import itertools
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from flask import Response, request

from ccm import __version__
from ccm.api.http.extensions import service
from ccm.api.http.pagination import next_link
from ccm.api.http.query import MessagesQuery
from ccm.api.http.request_limiter import hold_open, wait_until
from ccm.core.lineage import Segment
from ccm.core.queries import Queries

# The largest number of chunks (core/queries.py) of a list that is sent whole.
SHORT_CHUNKS = 4
# Bounded, because an operator may delete the run. Private, because a proxy's cache would also answer clients without a
# token.
IMMUTABLE = "private, max-age=3600, immutable"
VARY = {"Vary": "Accept-Encoding"}


@dataclass(frozen=True)
class Extent:
    """The messages that exist at one moment.

    Args:
        complete: whether there will be no more.
        position_after: returns the `after` with which a request continues after a segment.
        version: identifies the messages if they can never change, otherwise None.
    """

    segments: Sequence[Segment]
    complete: bool
    position_after: Callable[[Segment], str]
    version: str | None = None


def message_list(query: MessagesQuery, key: str, measure: Callable[[Queries], Extent]) -> Response:
    """Return the messages once there are any, or when `?wait=` has passed; 304 if the client has them already.

    Args:
        query: the parameters of the request.
        key: the id of the run or the session.
        measure: returns the current extent.

    Raises:
        SlotsTaken: the list is long and no slot is free.
    """
    types, most, seconds = query.type or (), query.limit, query.wait

    def look() -> Extent | None:
        queries = service().queries
        extent = measure(queries)
        return extent if extent.complete or queries.has_any(extent.segments, types) else None

    found = wait_until(key, seconds, look) if seconds else None
    headers: dict[str, str] = {}
    with service().queries.together() as queries:
        extent = found or measure(queries)
        if extent.version is not None and not seconds:
            tag = _entity_tag(extent.version)
            headers = {"ETag": f'"{tag}"', "Cache-Control": IMMUTABLE, **VARY}
            if request.if_none_match.contains_weak(tag):
                return Response(status=304, headers=headers)
        segments = extent.segments
        kept = segments if most is None else queries.cut(segments, types, most)
        if not extent.complete or list(kept) != list(segments):
            headers |= next_link(after=extent.position_after(kept[-1]))
        chunks = queries.chunks(kept, types)
        # A short list is sent whole, with its length. A long one occupies its thread until the client has read it.
        beginning = deque(itertools.islice(chunks, SHORT_CHUNKS + 1))
    if len(beginning) <= SHORT_CHUNKS:
        return Response(b"".join(_array(beginning)), headers=headers, mimetype="application/json")
    body = _array(itertools.chain(_pop_each(beginning), chunks))
    headers |= VARY
    if _prefers_gzip():
        headers["Content-Encoding"] = "gzip"
        body = _gzip(body)
    return hold_open(Response(body, headers=headers, mimetype="application/json"))


def _entity_tag(version: str) -> str:
    """Return the strong tag of one version of the URL's content, which also depends on its encoding and on our JSON."""
    return hashlib.sha256(f"{version} {_prefers_gzip()} {__version__}".encode()).hexdigest()[:32]


def _prefers_gzip() -> bool:
    accepted = request.accept_encodings
    return accepted.quality("gzip") > accepted.quality("identity")


def _gzip(parts: Iterable[bytes]) -> Iterator[bytes]:
    compressor = zlib.compressobj(1, wbits=31)  # the fastest level, in gzip's format
    for part in parts:
        if compressed := compressor.compress(part):
            yield compressed
    yield compressor.flush()


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
