"""Whatever somebody does to a remote, nothing wrong is built."""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import closures
from pipeline.hashing import Digest
from pipeline.remotes import results
from pipeline.store import ActionEntry
from tests.sharing.machines import Machine, Machines, bundles_in, found


def test_bundles_that_were_tampered_with_give_nothing_wrong(
    folder: dict[str, str], machines: Machines, tmp_path: Path
) -> None:
    one = machines(folder, more=40)
    one.build().good()
    shared = tmp_path / "shared"
    files = {str(path.relative_to(shared)): path for kind in ("ac", "cas") for path in (shared / kind).iterdir()}
    before = bundles_in({name: path.read_bytes() for name, path in files.items()})
    assert len(before) >= 2, "of what was read, and of what was made of it"
    names = list(before)
    ways: dict[str, Callable[[str], bytes]] = {
        "flipped": lambda name: before[name][:-9] + bytes([before[name][-9] ^ 1]) + before[name][-8:],
        "truncated": lambda name: before[name][: len(before[name]) // 2],
        "html": lambda name: b"<html><body>please log in</body></html>",
        "swapped": lambda name: before[names[names.index(name) - 1]],
        "other contents": lambda name: zlib.compress(bytes(len(zlib.decompress(before[name])))),
        "one other byte": lambda name: zlib.compress(b"!" + zlib.decompress(before[name])[1:]),
        "turned around": lambda name: zlib.compress(zlib.decompress(before[name])[::-1]),
        "bomb": lambda name: zlib.compress(bytes(50 << 20)),
    }
    for how, changed in ways.items():
        for name in names:
            files[name].unlink()
            files[name].write_bytes(changed(name))
        other = machines({**folder, "TVMAKE_REMOTE_POLICY": "read-only"}, more=40)
        done = other.build(forbid_tvm=True).good()
        assert not done.ran, how
        assert "WARNING" not in done.err, how
        assert other.artifact() == one.artifact(), how


@pytest.mark.parametrize(
    "how",
    ["flipped", "swapped", *(pytest.param(how, marks=pytest.mark.slow) for how in ("truncated", "html", "removed"))],
)
def test_a_remote_that_was_tampered_with_gives_nothing_wrong(
    folder: dict[str, str], sender: Machine, machines: Machines, tmp_path: Path, how: str
) -> None:
    for kind in ("ac", "cas"):
        files = sorted((tmp_path / "shared" / kind).iterdir())
        contents = [path.read_bytes() for path in files]
        for i, path in enumerate(files):
            path.unlink()
            if how != "removed":
                changed = {
                    "flipped": bytes([contents[i][0] ^ 1]) + contents[i][1:] if contents[i] else b"!",
                    "truncated": contents[i][: len(contents[i]) // 2],
                    "html": b"<html><body>please log in</body></html>",
                    "swapped": contents[i - 1],
                }[how]
                path.write_bytes(changed)
    other = machines(folder)
    other.build().good()
    assert other.artifact() == sender.artifact()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["flipped", "truncated", "html"])
def test_each_file_of_a_remote_tampered_with_in_turn(
    folder: dict[str, str], sender: Machine, machines: Machines, tmp_path: Path, how: str
) -> None:
    other = machines({**folder, "TVMAKE_REMOTE_POLICY": "read-only"})
    for path in sorted(path for kind in ("ac", "cas") for path in (tmp_path / "shared" / kind).iterdir()):
        before = path.read_bytes()
        path.unlink()
        path.write_bytes({"flipped": before[:-1] + b"!", "truncated": before[:-1], "html": b"<html>"}[how])
        shutil.rmtree(other.workspace.cache, ignore_errors=True)
        shutil.rmtree(other.workspace.artifact("net"), ignore_errors=True)
        other.build().good()
        assert other.artifact() == sender.artifact(), path
        path.unlink()
        path.write_bytes(before)


def test_with_signatures_required_nothing_else_is_used(
    folder: dict[str, str], sender: Machine, machines: Machines, tmp_path: Path
) -> None:
    key, foreign = tmp_path / "ci.pem", tmp_path / "foreign.pem"
    public = sender.cache("key", str(key)).good().out.strip()
    sender.cache("key", str(foreign)).good()
    careful = {**folder, "TVMAKE_TRUST": public, "TVMAKE_REMOTE_POLICY": "read-only"}
    unsigned = machines(careful).build().good()
    assert found(unsigned)[0] == 0
    assert unsigned.err.count("not signed by a key that this machine trusts") == 1
    shutil.rmtree(tmp_path / "shared")
    machines({**folder, "TVMAKE_SIGN_WITH": str(foreign)}).build().good()
    assert found(machines(careful).build().good())[0] == 0, "signed by somebody else"
    shutil.rmtree(tmp_path / "shared")
    one = machines({**folder, "TVMAKE_SIGN_WITH": str(key)})
    one.build().good()
    other = machines(careful)
    assert not other.build(forbid_tvm=True).good().ran
    assert other.artifact() == one.artifact()


def _rewritten(shared: Path, change: Callable[[ActionEntry], ActionEntry | None]) -> int:
    """Changes entries of a shared folder, each with a check that holds, and removes closures; returns how many."""
    changed = 0
    for path in sorted((shared / "ac").iterdir()):
        result = results.from_document(path.name, path.read_bytes())
        assert isinstance(result, results.Result)
        other = None if result.entry.stage == "closure" else change(result.entry)
        path.unlink()
        if other is not None:
            path.write_bytes(results.to_document(results.Result(other, other.to_bytes(path.name))))
            changed += 1
    return changed


@pytest.mark.parametrize("how", ["nothing made", "another stage"])
def test_entries_that_no_stage_would_make_are_made_again(
    folder: dict[str, str], sender: Machine, machines: Machines, tmp_path: Path, how: str
) -> None:
    other = machines({**folder, "TVMAKE_REMOTE_POLICY": "read-only"})

    def change(entry: ActionEntry) -> ActionEntry:
        outputs = {} if how == "nothing made" and entry.stage not in ("apply", "pack") else entry.outputs
        stage = "other" if how == "another stage" else entry.stage
        return ActionEntry(stage, entry.components, outputs, entry.seconds)

    assert _rewritten(tmp_path / "shared", change) > 10
    other.build().good()
    assert other.artifact() == sender.artifact()


@pytest.mark.parametrize(
    "stage", ["extract", *(pytest.param(stage, marks=pytest.mark.slow) for stage in ("apply", "codegen"))]
)
def test_blobs_that_make_no_sense_are_told_of_without_a_traceback(
    folder: dict[str, str], sender: Machine, machines: Machines, tmp_path: Path, stage: str
) -> None:
    garbage = b'{"garbage": 1}'
    (tmp_path / "shared" / "cas" / Digest.of(garbage).hash).write_bytes(garbage)

    def change(entry: ActionEntry) -> ActionEntry:
        outputs = dict.fromkeys(entry.outputs, Digest.of(garbage)) if entry.stage == stage else entry.outputs
        return ActionEntry(entry.stage, entry.components, outputs, entry.seconds)

    _rewritten(tmp_path / "shared", change)
    done = machines({**folder, "TVMAKE_REMOTE_POLICY": "read-only"}).build()
    assert done.code == 1
    assert "FAILED" in done.err
    assert "Traceback" not in done.err


def test_a_closure_cannot_write_outside_of_the_store(
    folder: dict[str, str], sender: Machine, machines: Machines, tmp_path: Path
) -> None:
    other = machines({**folder, "TVMAKE_REMOTE_POLICY": "read-only"})
    victim = other.workspace.write("precious.txt", "precious")
    names = (f"../workspace/{name}" for name in ("precious.txt", "new.txt"))
    entry = ActionEntry("codegen", {}, {}, 1.0)
    parts = tuple(closures.Part(name, "x", entry.to_bytes(name).decode()) for name in names)
    data = closures.Closure(parts).to_bytes()
    (tmp_path / "shared" / "cas" / Digest.of(data).hash).write_bytes(data)
    for path in (tmp_path / "shared" / "ac").iterdir():
        result = results.from_document(path.name, path.read_bytes())
        assert isinstance(result, results.Result)
        if result.entry.stage == "closure":
            path.unlink()
            evil = ActionEntry("closure", {}, {"entries": Digest.of(data)}, 0.0)
            path.write_bytes(results.to_document(results.Result(evil, evil.to_bytes(path.name))))
    other.build().good()
    assert victim.read_text() == "precious"
    assert not (other.workspace.folder / "new.txt").exists()
