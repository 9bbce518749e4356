"""What an HTTP status that is no success says of a server."""

from __future__ import annotations

from pipeline.errors import Trouble

_TROUBLES = {
    **dict.fromkeys((401, 403, 405, 407, 501), Trouble.REFUSED),
    **dict.fromkeys((413, 507), Trouble.FULL),
    **dict.fromkeys((408, 409, 429), Trouble.AWAY),  # 409: others write the same; the time for it is another
}
_READS_ONLY = "if this machine is only to read, say so: policy read-only"
_HINTS = {
    401: "give credentials, or other ones: TVMAKE_REMOTE_TOKEN, or user and password in the URL",
    403: f"the credentials do not allow it; {_READS_ONLY}",
    405: f"the server only lets read, or the URL leads elsewhere; {_READS_ONLY}",
    407: "the proxy wants a user and a password: put them into HTTP_PROXY or HTTPS_PROXY",
    413: "raise the server's limit on the size of a request (nginx: client_max_body_size 0)",
    501: f"the server only lets read, or the URL leads elsewhere; {_READS_ONLY}",
    507: "free some space on the server",
}


def trouble_of(status: int) -> Trouble:
    """401 → REFUSED, 413 → FULL, 503 → AWAY, 418 → GARBLED"""
    return _TROUBLES.get(status, Trouble.AWAY if status >= 500 else Trouble.GARBLED)


def hint_for(status: int) -> str:
    """What to do about a status; empty where nothing helps but to wait."""
    return _HINTS.get(status, "does the URL lead to a cache?" if trouble_of(status) is Trouble.GARBLED else "")
