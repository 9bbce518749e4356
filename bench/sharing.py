"""What a second machine saves: a build of what another has built, through each kind of remote; and how fast blobs move.

    python -m bench.sharing [MODEL...] [--remotes folder,nginx,casd,gateway] [--turns 3] [--blobs 300] [--large 100]

The servers are real ones, started on this machine (see tests/servers.py; those that are not installed are left out), so
that the network costs next to nothing, and what is seen is the work. The second machine is another folder, another
store and another home. Each model is built once without a remote, for comparison.

Transfers are compared with obstore alone, in as many threads, and with a copy on the same disk that is synced: what a
local store does as well.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from bench import zoo
from bench.cpu import Usage, table
from bench.workspaces import BenchError, Scratch, scratch
from pipeline.hashing import Digest
from pipeline.remotes import Remote, open_remote
from tests import servers

KINDS = ("folder", "nginx", "casd", "gateway")
_THREADS = 16


@dataclass(frozen=True)
class Place:
    """A remote of some kind that runs: its URL, and what a client has in its environment."""

    url: str
    environment: dict[str, str]


@contextmanager
def running(kind: str, folder: Path) -> Iterator[Place | None]:
    """A remote; None where its server is not installed."""
    if kind == "folder":
        yield Place((folder / "shared").as_uri(), {})
        return
    with ExitStack() as stack:
        try:
            server = stack.enter_context(getattr(servers, kind)(folder / kind))
        except pytest.skip.Exception as missing:
            print(f"{kind} is left out: {missing}", file=sys.stderr)
            yield None
            return
        yield Place(server.url, dict(server.environment))


# builds


def builds(name: str, kinds: Sequence[str], turns: int, kept: ExitStack) -> list[tuple[object, ...]]:
    """A row for each remote: a machine that builds alone, one that builds and sends, and the median of those that find
    everything. All folders last until `kept` ends: for minutes after many files were removed, ext4 is slow to make new
    ones."""
    rows = []
    cold = _built(kept.enter_context(scratch()), name)
    for kind in kinds:
        folder = Path(kept.enter_context(tempfile.TemporaryDirectory(prefix="tvmake-bench-")))
        with running(kind, folder) as place:
            if place is None:
                continue
            environment = {"TVMAKE_REMOTE": place.url, **place.environment}
            one = kept.enter_context(scratch(HOME=str(folder / "home of one"), **environment))
            sending = _built(one, name)
            warm, same = [], True
            for turn in range(turns):
                other = kept.enter_context(scratch(HOME=str(folder / f"home of other {turn}"), **environment))
                warm.append(_built(other, name, must_run=False))
                same = same and _bytes(one) == _bytes(other)
        median = sorted(warm, key=lambda usage: usage.wall)[turns // 2]
        rows.append((name, kind, cold.wall, sending.wall, median.wall, median.cpu, cold.wall / median.wall, same))
    return rows


def _built(place: Scratch, name: str, must_run: bool = True) -> Usage:
    place.hold(zoo.load(name).SerializeToString(deterministic=True))
    run = place.doit("build").require_good()
    if not must_run and run.stages_run:
        raise BenchError(f"{run.stages_run} stages ran where all should have been found:\n{run.err}")
    if not must_run and not re.search(r"; (\d+) of \1 found on the remote", run.err):
        raise BenchError(f"not everything was found:\n{run.err}")
    return run.usage


def _bytes(place: Scratch) -> dict[str, bytes]:
    artifact = place.folder / "artifacts" / "native" / "model"
    return {path.name: path.read_bytes() for path in artifact.iterdir()}


# transfers


def transfers(kinds: Sequence[str], blobs: int, large: int) -> list[tuple[object, ...]]:
    """A row for each remote and load: MB/s of sending and receiving, over obstore's and over the disk's."""
    loads = {
        f"{blobs} of 16 kB": [os.urandom(16_000) for _ in range(blobs)],
        f"1 of {large} MB": [os.urandom(large * 10**6)],
    }
    rows = []
    for title, load in loads.items():
        with tempfile.TemporaryDirectory(prefix="tvmake-bench-") as name:
            folder = Path(name)
            disk = _disk(folder, load)
            for kind in kinds:
                with running(kind, folder / kind) as place:
                    if place is None:
                        continue
                    os.environ.update(place.environment)
                    sent, received = _ours(open_remote(place.url), folder, load)
                    theirs = _obstores(kind, place, folder, load)
                    over = [
                        ours / other if other else None for ours, other in zip((sent, received), theirs, strict=True)
                    ]
                    shown = [f"{each:.2f}" if each else "—" for each in over]
                    rows.append((title, kind, sent, received, *shown, f"{sent / disk:.2f}", f"{received / disk:.2f}"))
    return rows


def _ours(remote: Remote, folder: Path, load: Sequence[bytes]) -> tuple[float, float]:
    files = [(Digest.of(data), _file(folder, data)) for data in load]
    size = sum(map(len, load))

    def receive(digest: Digest) -> None:
        pieces = remote.blob(digest)
        assert pieces is not None
        assert sum(map(len, pieces)) == digest.size

    sent = size / 1e6 / _timed(lambda each: remote.put_blob(*each), files)
    received = size / 1e6 / _timed(receive, [digest for digest, _ in files])
    remote.close()
    return sent, received


def _obstores(kind: str, place: Place, folder: Path, load: Sequence[bytes]) -> tuple[float, float]:
    """obstore's own rates; 0 where it does not speak the protocol."""
    import obstore
    from obstore.store import HTTPStore, LocalStore, S3Store

    if kind == "folder":
        (folder / "local").mkdir()
        store = LocalStore(str(folder / "local"))
    elif kind == "nginx":
        store = HTTPStore(place.url, client_options={"allow_http": True})
    elif kind == "gateway":
        store = S3Store("tvmake", prefix="alone", client_options={"allow_http": True})
    else:
        return 0.0, 0.0
    named = [(f"cas/alone{i}", data) for i, data in enumerate(load)]
    size = sum(map(len, load))
    parts = None if kind != "nginx" else False  # WebDAV has none
    sent = size / 1e6 / _timed(lambda each: obstore.put(store, each[0], each[1], use_multipart=parts), named)
    received = size / 1e6 / _timed(lambda each: len(obstore.get(store, each[0]).bytes()), named)
    return sent, received


def _disk(folder: Path, load: Sequence[bytes]) -> float:
    """MB/s of copying files that are synced."""
    files = [_file(folder, data) for data in load]
    (folder / "copies").mkdir()

    def copy(path: Path) -> None:
        with open(path, "rb") as source, open(folder / "copies" / path.name, "wb") as made:
            shutil.copyfileobj(source, made, 1 << 20)
            made.flush()
            os.fsync(made.fileno())

    return sum(map(len, load)) / 1e6 / _timed(copy, files)


def _file(folder: Path, data: bytes) -> Path:
    path = folder / Digest.of(data).hash
    if not path.exists():
        path.write_bytes(data)
    return path


def _timed(call: Callable, items: Sequence) -> float:
    with ThreadPoolExecutor(_THREADS) as threads:
        begun = time.perf_counter()
        list(threads.map(call, items))
        return time.perf_counter() - begun


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.sharing", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="*", default=["squeezenet", "densenet121"], help=f"of {', '.join(zoo.NAMES)}")
    parser.add_argument("--remotes", default=",".join(KINDS), help=f"of {', '.join(KINDS)} (default all)")
    parser.add_argument("--blobs", type=int, default=300, help="small blobs to move (default 300)")
    parser.add_argument("--large", type=int, default=100, help="MB of the large one (default 100)")
    parser.add_argument("--turns", type=int, default=3, help="second machines for each remote (default 3)")
    options = parser.parse_args()
    kinds = options.remotes.split(",")
    try:
        with ExitStack() as kept:
            rows = [row for name in options.models for row in builds(name, kinds, options.turns, kept)]
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    columns = ("model", "remote", "alone s", "and sends s", "second s", "its cpu s", "alone / second", "same bytes")
    table("builds of a second machine, wall", columns, rows)
    columns = ("blobs", "remote", "sent MB/s", "received MB/s", "sent / obstore", "received / obstore")
    table("transfers, ratios of rates", (*columns, "sent / disk", "received / disk"),
          transfers(kinds, options.blobs, options.large))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(_main())
