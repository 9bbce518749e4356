"""manifest.json of an artifact, read without what it takes to run one."""

from __future__ import annotations

from pathlib import Path

import msgspec

from pipeline.errors import ArtifactError
from pipeline.types import MANIFEST, MANIFEST_FORMAT, Manifest

REBUILD = "build it again"


class _Format(msgspec.Struct):
    format: int


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an artifact, or an ArtifactError in words."""
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ArtifactError(f"{folder} is not an artifact: it has no {MANIFEST}", hint=REBUILD) from error
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from error
    try:
        found = msgspec.json.decode(text, type=_Format).format
        if found != MANIFEST_FORMAT:
            raise ArtifactError(
                f"{path} has format {found}, this version of tvmake reads format {MANIFEST_FORMAT}",
                hint="build it again with this version, or load it with the version that built it",
            )
        return msgspec.json.decode(text, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} is broken: {error}", hint=REBUILD) from error
