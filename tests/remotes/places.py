"""Somewhere that a remote can be, and what tests put there."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from pipeline.hashing import Digest
from pipeline.remotes import Remote, Terms, messages, open_remote
from tests import servers
from tests.servers import Server

SHORT = Terms(connect=1.0, stall=0.5)
KINDS = {"nginx": servers.nginx, "casd": servers.casd, "gateway": servers.gateway}


@dataclass
class Place:
    """`server` is what can be killed there; a folder has none."""

    url: str
    server: Server | None
    folder: Path
    opened: list[Remote]

    def open(self, terms: Terms | None = None) -> Remote:
        """A client: what another machine would have."""
        remote = open_remote(self.url, terms)
        self.opened.append(remote)
        return remote

    def file(self, data: bytes) -> tuple[Digest, Path]:
        """A blob, and a file of this machine that has its bytes."""
        digest = Digest.of(data)
        path = self.folder / digest.hash
        path.write_bytes(data)
        return digest, path


def document(*files: Digest, text: bytes = b"") -> bytes:
    """An entry that names blobs."""
    result = messages.ActionResult(stdout_raw=text)
    for digest in files:
        result.output_files.add(path=digest.hash[:8], digest={"hash": digest.hash, "size_bytes": digest.size})
    made: bytes = result.SerializeToString(deterministic=True)
    return made


def new_key() -> str:
    return hashlib.sha256(os.urandom(16)).hexdigest()
