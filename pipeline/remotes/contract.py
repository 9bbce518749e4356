"""What a remote is: one place that several machines share, with blobs by digest and small documents by key.

The two spaces are those of Bazel's remote caches, `cas` and `ac`, and what lies in them is in their formats: a blob's
name is the SHA-256 of its bytes, a document is a serialized ActionResult of the Remote Execution API. So a server that
Bazel uses serves this project as well.

    https://github.com/bazelbuild/remote-apis/blob/main/build/bazel/remote/execution/v2/remote_execution.proto
    https://bazel.build/remote/caching#http-caching

A remote moves bytes and believes nothing: who calls it verifies every blob by its digest and every document by its own
check. It decides nothing either: when to ask, how often to try, and what to do while it is away is its caller's
(pipeline.remotes.cache). Nothing here imports TVM.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from pipeline.hashing import Digest

CHUNK = 1 << 20  # bytes of a blob that are handed on at once, at most
LARGEST_DOCUMENT = 64 << 20  # bytes of a document that are taken, so that a remote cannot fill the memory


@dataclass(frozen=True)
class Terms:
    """How long a remote may be waited for, in seconds, and what proves who asks.

    connect   until it has accepted a connection
    stall     without a byte, in either direction, once it has
    secrets   what is not in the URL, by name: "token" is sent as a bearer token; never shown, logged or stored
    """

    connect: float = 2.0
    stall: float = 10.0
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)


class Remote(Protocol):
    """One shared place.

    Every method may be called from any thread, by any number of machines at once. What is written is seen whole or not
    at all, and the last writer of a key wins; blobs have one content only, so that it does not matter who wins.

    Every method raises RemoteError where the remote does not do its part, with the `trouble` that tells why, and none
    waits longer than the terms say. A miss is no error: it is None.

    What is this side's fault is no RemoteError: ValueError for what is no key, or no digest where it is to be put (to
    ask for one is a miss: entries from elsewhere name anything), StoreError where a file to be sent is not there or has
    another size, ConfigError where the URL turns out to lead to no remote, such as to a folder with other things in it.
    """

    name: str  # what a person is told: the URL without user, password and query

    def action(self, key: str) -> bytes | None:
        """The document under a key (64 hexadecimal digits)."""

    def put_action(self, key: str, document: bytes) -> None:
        """Puts a document under a key. The blobs that it names must be there before."""

    def blob(self, digest: Digest) -> Iterator[bytes] | None:
        """The bytes of a blob, in pieces, none of them empty; not verified. The pieces raise RemoteError as well."""

    def put_blob(self, digest: Digest, path: Path) -> None:
        """Puts a blob, whose bytes are those of a file."""

    def missing(self, digests: Collection[Digest]) -> set[Digest]:
        """Which of these blobs are not there. It may be asked about many at once."""

    def close(self) -> None:
        """Ends connections. What was put is there."""
