"""The local store: what was ever read, compiled or linked on this machine, found again by what it was made from.

Three parts in one folder, the first two in the terms of Bazel and the Remote Execution API:

    TVMAKE_STORE            says the format; a folder without it is not touched
    cas/ab/<sha256>         blobs, named by the SHA-256 of their bytes
    ac/ab/<key>             action entries: the components of a key, and the digests of what the action made
    sets/ab/<key>/<sha256>  members of sets that only grow, named by the SHA-256 of their bytes; see pipeline.store.sets
    locks/                  one file for each slot of locks, so that two builds do not make the same thing at once
    quarantine/             what did not have the bytes that its name says; nothing reads it
    tmp/                    files being written

A store without sets/ is as good as one with: the folder is made when something comes into it.

This layer never imports TVM and knows nothing of what it stores.
"""

from pipeline.store.actions import ActionEntry
from pipeline.store.files import StoreCounts
from pipeline.store.local import Store, default_root
from pipeline.store.sets import Sets

__all__ = ["ActionEntry", "Sets", "Store", "StoreCounts", "default_root"]
