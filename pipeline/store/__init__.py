"""The local store: what was ever read, compiled or linked on this machine, found again by what it was made from.

Three parts in one folder, the first two in the terms of Bazel and the Remote Execution API:

    TVMAKE_STORE            says the format; a folder without it is not touched
    cas/ab/<sha256>         blobs, named by the SHA-256 of their bytes
    ac/ab/<key>             action entries: the components of a key, and the digests of what the action made
    sets/ab/<key>/<sha256>  members of sets that only grow, named by the SHA-256 of their bytes: pipeline.store.sets
    summaries/              what sets come to, for who lists thousands of them: pipeline.tuning.summaries
    pins/<name>.json        keys whose entries and blobs stay whatever the bounds say: pipeline.store.pins
    usage/                  what runs found and made: a file for each run, one for those before: pipeline.store.usage
    locks/                  one file for each slot of locks, so that two builds do not make the same thing at once;
                            for each run that uses the store, and for who removes: pipeline.store.use
    quarantine/             what did not have the bytes that its name says; nothing reads it
    tmp/                    files being written

The time of an entry is when it was last used; that of a blob, when it was last put or asked for. A store without some
of the folders is as good as one with: each is made when something comes into it.

Beside `Store` stand `upkeep` (what may go, is it whole, how large is it) and `carry` (one file to take elsewhere), and
what they rest on: `inventory`, `checkup`, `use`.

This layer never imports TVM and knows nothing of what it stores.
"""

from pipeline.store.actions import ActionEntry
from pipeline.store.files import StoreCounts
from pipeline.store.local import Store, default_root
from pipeline.store.pins import Pins
from pipeline.store.sets import Sets

__all__ = ["ActionEntry", "Pins", "Sets", "Store", "StoreCounts", "default_root"]
