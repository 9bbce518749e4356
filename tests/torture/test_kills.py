"""A build that is killed at any moment: the next one succeeds and gives the right bytes."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.hashing import Digest

from .workspaces import WIDTHS, Outcome, Place, Undisturbed, finish, members

pytest.importorskip("onnx")
from . import networks

Kill = Callable[[subprocess.Popen[str], random.Random], bool]


def to_main(number: signal.Signals) -> Kill:
    def kill(build: subprocess.Popen[str], chance: random.Random) -> bool:
        if build.poll() is not None:
            return False
        os.kill(build.pid, number)
        return True

    return kill


def workers_of(build: subprocess.Popen[str]) -> Iterator[psutil.Process]:
    for process in members(build.pid):
        with contextlib.suppress(psutil.Error):
            if "pipeline.workers" in process.cmdline():
                yield process


def to_a_worker(build: subprocess.Popen[str], chance: random.Random) -> bool:
    """Kills one of the build's workers, busy or idle; waits for one if need be. False where none ever came."""
    while build.poll() is None:
        if workers := sorted(workers_of(build), key=lambda process: process.pid):
            chance.choice(workers).kill()
            return True
        time.sleep(0.005)
    return False


KINDS: dict[str, Kill] = {
    "SIGKILL to the main process": to_main(signal.SIGKILL),
    "SIGKILL to a worker": to_a_worker,
    "SIGTERM to the main process": to_main(signal.SIGTERM),
    "SIGINT to the main process": to_main(signal.SIGINT),
}


def whole(artifact: Path) -> bool:
    """Whether what can be seen of an artifact is all there. An artifact that is not there is whole as well."""
    if not artifact.exists():
        return True
    files = json.loads((artifact / "manifest.json").read_bytes())["files"]
    return all(Digest.of_file(artifact / name).hash == digest["hash"] for name, digest in files.items())


def require_dead_in_words(kind: str, outcome: Outcome) -> str:
    """Fails where a killed build did not end as it should; returns how it ended."""
    if kind == "SIGKILL to the main process":
        assert outcome.code == -signal.SIGKILL, outcome.output
        return "killed"
    if kind == "SIGKILL to a worker":
        if outcome.code == 0:
            return "built: the worker was idle or what it had started was done"
        assert outcome.code == 1, outcome.output
        told = re.search(r"FAILED (\w+):\S+: (\w+) of (?:target )?\S+ \(key \w+\) failed: (.*)", outcome.output)
        assert told, outcome.output
        assert "killed by SIGKILL" in told[3], outcome.output
        assert re.search(r"0 of 1 artifact, \d+ tasks? failed: ", outcome.output), outcome.output
        return f"{told[2]} failed by name"
    early = -signal.SIGTERM if "SIGTERM" in kind else -signal.SIGINT
    assert outcome.code in (130, early), outcome.output
    if outcome.code == 130:
        assert "interrupted" in outcome.output, outcome.output
        assert "Traceback" not in outcome.output, outcome.output
    return "interrupted in words" if outcome.code == 130 else "ended by the signal before it began to build"


def torture(place: Place, undisturbed: Undisturbed, kills: int, seed: int) -> Counter[tuple[str, str]]:
    """Kills so many builds; each time the next build gives the right bytes. Returns how often each kind ended how."""
    chance = random.Random(seed)
    ended: Counter[tuple[str, str]] = Counter()
    for attempt in range(3 * kills):
        if ended.total() == kills:
            break
        kind = list(KINDS)[ended.total() % len(KINDS)]
        # The store is emptied, or the other version of the model is built: there is always something to do.
        if attempt % 2 == 0:
            place.empty_store()
            place.forget()
        width = WIDTHS[attempt % 4 // 2 if attempt % 2 == 0 else 1 - attempt % 4 // 2]
        networks.convolutional(place.folder / "net.onnx", width)

        build = place.start()
        time.sleep(chance.uniform(0.05, undisturbed.seconds))
        hit = KINDS[kind](build, chance)
        outcome = finish(build)
        place.require_nobody_left()
        assert whole(place.folder / "artifacts" / "native" / "net")
        if hit and (outcome.code != 0 or kind == "SIGKILL to a worker"):
            ended[kind, require_dead_in_words(kind, outcome)] += 1
        else:  # the signal came too late
            assert outcome.code == 0, outcome.output

        place.build()
        assert place.artifacts() == undisturbed.right[width], f"other bytes after {kind}"
        assert place.build().output.endswith("nothing to do\n")
    assert ended.total() == kills
    return ended


def test_a_killed_build_is_taken_up_by_the_next(place: Place, undisturbed: Undisturbed) -> None:
    torture(place, undisturbed, len(KINDS), seed=1)


@pytest.mark.slow
def test_sixty_killed_builds(place: Place, undisturbed: Undisturbed, capsys: pytest.CaptureFixture[str]) -> None:
    ended = torture(place, undisturbed, 60, seed=2)
    with capsys.disabled():
        print(f"\n{ended.total()} kills:")
        for (kind, how), count in sorted(ended.items()):
            print(f"  {count:3}  {kind}: {how}")


def test_a_worker_that_dies_is_reported_with_its_operator_and_the_others_are_compiled(place: Place) -> None:
    networks.convolutional(place.folder / "net.onnx", WIDTHS[0])
    for _ in range(5):
        place.empty_store()
        place.forget()
        build = place.start(TVMAKE_JOBS="1")
        while "compiled" not in build.stdout.readline():
            assert build.poll() is None
        # Its only worker has the next operator in hand now, or will in a moment.
        to_a_worker(build, random.Random(0))
        outcome = finish(build)
        if outcome.code:
            break
    failed = re.search(r"FAILED (apply|codegen):native:(\w+-\w{8}): (\w+) of native:(\S+) \(key", outcome.output)
    assert failed, outcome.output
    assert failed[2] == failed[4]
    assert "was killed by SIGKILL" in outcome.output
    assert len(re.findall("compiled native:", outcome.output)) >= networks.OPERATORS - 2
    assert place.build().summary["compiled"] == 1
