"""`/docs`: the reference of the API and the pages of the documentation, for a browser."""

from __future__ import annotations

from functools import partial
from io import BytesIO
from typing import IO

from flask import Blueprint, Response, abort, render_template, request, url_for
from werkzeug.exceptions import NotFound
from werkzeug.wsgi import wrap_file

from ccm import __version__
from ccm.api.http.extensions import reference, service
from ccm.api.http.responses import json_response
from ccm.api.http.suggestions import did_you_mean, suggestion
from ccm.api.reference.assets import MEDIA_TYPES
from ccm.api.reference.pages import Page

blueprint = Blueprint("docs", __name__, template_folder="reference/templates")

# Everything is loaded from this service. Frames are forbidden, because a page around this one could catch clicks.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src {styles}; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
STYLES = "'self'"
# Scalar inserts style elements and attributes without a nonce. They can load nothing from elsewhere, as the rest of the
# policy still holds.
SCALAR_STYLES = "'self' 'unsafe-inline'"
NO_SNIFFING = {"X-Content-Type-Options": "nosniff"}
# The longest unknown name for which a similar one is looked for.
NAME_CHARACTERS = 100
# Seconds; a year. The URL changes with the content.
ASSET_LIFETIME = 31_536_000


@blueprint.get("/docs")
def show_reference() -> Response:
    """Show the reference of the API in a browser."""
    return _shell("reference.html", SCALAR_STYLES)


@blueprint.get("/docs/<name>")
def show_page(name: str) -> Response:
    """Show a page of the documentation in a browser."""
    return _shell("page.html", STYLES, page=_page(name))


@blueprint.get("/docs/<name>.md")
def get_page(name: str) -> Response:
    """Return a page of the documentation as Markdown."""
    response = Response(_page(name).text, headers=NO_SNIFFING, content_type="text/markdown; charset=utf-8")
    response.add_etag()
    response.make_conditional(request)
    return response


@blueprint.get("/docs/assets/<digest>/<name>")
def get_asset(digest: str, name: str) -> Response:
    """Return a script, style sheet or icon of these pages."""
    assets = reference().assets
    path = assets.files.get(name)
    if path is None or digest != assets.digest:
        raise NotFound
    headers = {
        **NO_SNIFFING,
        "Cache-Control": f"public, max-age={ASSET_LIFETIME}, immutable",
        "Vary": "Accept-Encoding",
    }
    file: IO[bytes]
    if request.accept_encodings["gzip"]:
        compressed = assets.compressed(name)
        file, size, headers["Content-Encoding"] = BytesIO(compressed), len(compressed), "gzip"
    else:
        file, size = path.open("rb"), path.stat().st_size
    # As a file, which the server sends from where it is: a client that does not read would hold a copy of bytes.
    response = Response(wrap_file(request.environ, file), headers=headers, content_type=MEDIA_TYPES[path.suffix])
    response.content_length, response.direct_passthrough = size, True
    return response


def _page(name: str) -> Page:
    page = reference().pages.by_name.get(name)
    if page is None:
        abort(_no_such_page(name))
    return page


def _no_such_page(name: str) -> Response:
    """Return the answer to a request for an unknown page: HTML for a browser, else JSON as for every other path."""
    pages = reference().pages.by_name
    similar = suggestion(name[:NAME_CHARACTERS], pages)
    if request.accept_mimetypes.best_match(("application/json", "text/html")) == "text/html":
        response = _shell("missing.html", STYLES, similar=pages[similar] if similar else None)
        response.status_code = 404
        return response
    suffix = ".md" if request.path.endswith(".md") else ""
    hint = did_you_mean(f"/docs/{similar}{suffix}" if similar else None)
    message = f"There is nothing at {request.path}{hint} GET / lists the endpoints, and /docs shows the pages."
    return json_response({"error": {"code": "NOT_FOUND", "message": message}}, 404)


def _shell(template: str, styles: str, page: Page | None = None, similar: Page | None = None) -> Response:
    """Return a page without content, which its script fetches.

    Args:
        page: the page, if it is not the reference.
        similar: what an unknown page was probably meant to be.
    """
    body = render_template(
        template,
        version=__version__,
        groups=reference().pages.groups,
        page=page,
        similar=similar,
        asset=partial(url_for, "docs.get_asset", digest=reference().assets.digest),
        # A proxy may add the token to the browser's requests.
        asks_for_token=service().settings.has_tokens and "Authorization" not in request.headers,
    )
    headers = {
        **NO_SNIFFING,
        "Content-Security-Policy": CONTENT_SECURITY_POLICY.format(styles=styles),
        "Cache-Control": "no-store",
        "Referrer-Policy": "no-referrer",
    }
    return Response(body, headers=headers, content_type="text/html; charset=utf-8")
