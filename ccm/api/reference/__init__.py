"""The documentation for browsers: the API's reference and the pages in ccm/docs.

A page itself holds no data and needs no token. Its script asks for one if the service requires it, keeps it for the
tab, and fetches /openapi.json and the Markdown of a page with it.

`assets` has the scripts and style sheets, `pages` the Markdown. assets/vendor/ holds two npm packages, unchanged; its
packages.json says where they come from.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ccm.api.reference.assets import Assets
from ccm.api.reference.pages import Pages


@dataclass(frozen=True)
class Reference:
    """What the pages of one app are made of."""

    assets: Assets = field(default_factory=Assets)
    pages: Pages = field(default_factory=Pages)
