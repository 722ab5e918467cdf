"""Who may call: whoever has a key, or without keys whoever is on this machine."""

from __future__ import annotations

import hashlib
import hmac

from starlette.requests import Request

from blip3o_jax.serve.answers import Refusal

OPEN = ("/", "/health", "/ready", "/openapi.json")  # routes that need no key
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def digests(keys: tuple[str, ...]) -> list[bytes]:
    """Of keys, all of one length."""
    return [hashlib.sha256(key.encode()).digest() for key in keys]


def admit(request: Request, keys: list[bytes]) -> None:
    """Refuses a call without one of the keys, given as their digests; if there are none, a call
    that a page of another site made, which a browser would let reach this machine."""
    if request.url.path in OPEN and request.method in ("GET", "HEAD"):
        return
    if keys:
        (given,) = digests((request.headers.get("authorization", "").removeprefix("Bearer "),))
        # All are compared, so that the time says nothing.
        if not sum(hmac.compare_digest(given, own) for own in keys):
            message = "The API key is missing or wrong: Authorization: Bearer KEY."
            raise Refusal(401, message, code="invalid_api_key")
        return
    # A name that an attacker lets point here is no loopback name; a page says its own origin.
    host = request.headers.get("host", "")
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
    if name.strip("[]").lower() not in LOOPBACK:
        raise Refusal(403, "Without keys this server answers to localhost and 127.0.0.1 alone.")
    if request.headers.get("origin") not in (None, f"http://{host}"):
        raise Refusal(403, "A page of another site may not call this server.")
