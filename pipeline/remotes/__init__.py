"""Remotes: stores that machines share, behind the local one. A wrong, stale, hostile or absent one costs time, never a
wrong build.

    contract      what a remote is
    folder        file://                 a shared folder
    http          http:// https://        any server of Bazel's HTTP cache protocol
    objects       s3:// gs:// az://       buckets
    reapi         grpc:// grpcs://        servers of the Remote Execution API

What these share: `address` (a URL), `blobs` (names and files), `waiting` (no longer than agreed), `questions` (about
many blobs at once), `statuses` (of HTTP), `messages` (of the Remote Execution API); `connections` is http's, `link` and
`packing` are reapi's. Above them: `cache` (behind a store), `lanes` (tuning records), `availability`, `hands`,
`results` (what an entry is there), `trust` and `signatures`, `settings`.

To add one: a file with a class, and a line in `_OPENERS`; tests/remotes runs the contract's tests over it.
"""

from __future__ import annotations

import importlib

from pipeline.errors import ConfigError
from pipeline.remotes.contract import CHUNK, Remote, Terms

__all__ = ["CHUNK", "SCHEMES", "Remote", "Terms", "open_remote"]

# By scheme: the module that serves it, imported only when it is used. Each has `open_url(url, terms) -> Remote`.
_OPENERS = {
    "file": "folder",
    "http": "http",
    "https": "http",
    "s3": "objects",
    "gs": "objects",
    "az": "objects",
    "grpc": "reapi",
    "grpcs": "reapi",
}
SCHEMES = tuple(_OPENERS)


def open_remote(url: str, terms: Terms | None = None) -> Remote:
    """The remote at a URL. Nothing is sent yet.

    Raises ConfigError for a URL that cannot be meant, SetupError where a package that its scheme needs is missing.
    """
    scheme, separator, _ = url.partition("://")
    scheme = scheme.lower()
    if scheme not in _OPENERS or not separator:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        # Without a scheme what comes first may be a password.
        shown = f"{scheme}://" if separator and scheme.isalnum() else "that"
        raise ConfigError(f"a remote's URL cannot begin with {shown}", hint=f"what is known: {known}")
    module = importlib.import_module(f"pipeline.remotes.{_OPENERS[scheme]}")
    remote: Remote = module.open_url(url, terms or Terms())
    return remote
