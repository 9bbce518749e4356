"""The local store: what was ever read, compiled or linked on this machine, found again by what it was made from.

Two halves in one folder, in the terms of Bazel and the Remote Execution API:

    TVMAKE_STORE            says the format; a folder without it is not touched
    cas/ab/<sha256>         blobs, named by the SHA-256 of their bytes
    ac/ab/<key>             action entries: the components of a key, and the digests of what the action made
    locks/                  one file for each slot of locks, so that two builds do not make the same thing at once
    quarantine/             what did not have the bytes that its name says; nothing reads it
    tmp/                    files being written

This layer never imports TVM and knows nothing of what it stores.
"""

from pipeline.store.actions import ActionEntry
from pipeline.store.local import Store, StoreCounts, default_root

__all__ = ["ActionEntry", "Store", "StoreCounts", "default_root"]
