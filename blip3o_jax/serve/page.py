"""The page at `/`, with the strictest policy that it works with."""

from __future__ import annotations

import base64
import functools
import hashlib
import re

from blip3o_jax.resources import ASSETS

PAGE = ASSETS / "page.html"


@functools.cache
def page() -> tuple[bytes, dict[str, str]]:
    """Its bytes and headers."""
    text = PAGE.read_text("utf-8")
    return text.encode(), {
        "content-security-policy": policy(text),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
    }


def policy(text: str) -> str:
    """A Content-Security-Policy that allows a page its own inline blocks, by their hashes, and
    nothing from elsewhere."""

    def hashes(tag: str) -> str:
        blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digests = [hashlib.sha256(block.encode()).digest() for block in blocks]
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
        "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
