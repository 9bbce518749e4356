"""The remote behind a store: what comes from it is whole and right, or it is a miss."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import closures
from pipeline.errors import RemoteError, Trouble
from pipeline.hashing import Digest, key_of
from pipeline.remotes import results, trust
from pipeline.remotes.settings import Policy
from pipeline.store import ActionEntry
from tests.remotes.machines import KEY, Machine, away


def test_what_one_machine_made_another_has(one: Machine, other: Machine) -> None:
    entry = one.make()
    one.finish()
    assert other.cache.find(KEY) == entry
    assert other.store.lookup(KEY) == entry, "it is in the local store, with its blobs"
    assert other.cache.counts.fetched == {"codegen": 1}
    assert other.cache.counts.received == 5004
    assert one.cache.counts.sent == 5004
    assert other.cache.find(key_of({"x": 1})) is None
    assert other.cache.counts.misses == 1
    assert not one.said + other.said


def test_what_is_here_is_not_fetched(one: Machine, other: Machine) -> None:
    one.make(KEY, b"same", b"first")
    one.finish()
    other.store.put(b"same")
    assert other.cache.find(KEY) is not None
    assert other.cache.counts.received == len(b"first")


def test_many_entries_come_at_once(one: Machine, other: Machine) -> None:
    made = {key_of({"i": i}): one.make(key_of({"i": i}), b"%d" % i, b"between") for i in range(100)}
    one.finish()
    said = {key: one.cache.signed(key, entry).said for key, entry in made.items()}
    assert other.cache.fetch(said) == 100
    assert all(other.store.lookup(key) == entry for key, entry in made.items())
    assert other.cache.fetch(said) == 0, "all are here"


def test_what_is_expected_is_not_asked_for(tmp_path: Path, between: Path, one: Machine) -> None:
    entry = one.make()
    one.finish()
    calls: list[str] = []
    other = Machine(tmp_path / "other", between, fault=calls.append)
    other.cache.expect({KEY: one.cache.signed(KEY, entry).said})
    assert other.cache.find(KEY) == entry
    assert set(calls) == {"blob"}


@pytest.mark.parametrize("policy", list(Policy))
def test_a_policy_is_kept(tmp_path: Path, between: Path, one: Machine, policy: Policy) -> None:
    one.make()
    one.finish()
    calls: list[str] = []
    other = Machine(tmp_path / "other", between, policy, calls.append)
    assert (other.cache.find(KEY) is not None) == policy.reads
    other.make(key_of({"x": 1}), b"new")
    other.finish()
    assert bool({"put_blob", "put_action"}.intersection(calls)) == policy.writes
    assert bool({"action", "blob"}.intersection(calls)) == policy.reads


def tampered(path: Path, how: str, others: list[Path]) -> None:
    path.chmod(0o644)
    data = path.read_bytes()
    match how:
        case "flipped":
            path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
        case "truncated":
            path.write_bytes(data[:-1])
        case "longer":
            path.write_bytes(data + b"!")
        case "empty":
            path.write_bytes(b"")
        case "html":
            path.write_bytes(b"<html><body>please log in</body></html>")
        case "swapped":
            path.write_bytes(others[0].read_bytes())
        case "removed":
            path.unlink()


@pytest.mark.parametrize("how", ["flipped", "truncated", "longer", "empty", "html", "swapped", "removed"])
def test_whatever_is_done_to_a_remote_nothing_wrong_comes_from_it(
    tmp_path: Path, between: Path, one: Machine, how: str
) -> None:
    one.make(KEY, b"code", b"x" * 5000)
    one.make(key_of({"x": 1}), b"others")
    one.finish()
    files = [path for kind in ("ac", "cas") for path in sorted((between / kind).iterdir())]
    assert len(files) == 5
    for i, path in enumerate(files):
        before = path.read_bytes()
        tampered(path, how, [other for other in files if other is not path])
        machine = Machine(tmp_path / f"m{i}", between)
        for key in (KEY, key_of({"x": 1})):
            found = machine.cache.find(key)
            assert found == machine.store.lookup(key)
            if found is not None:
                assert found == one.store.lookup(key)
        assert machine.cache.counts.hits == 1, "the other action is as it was"
        path.unlink(missing_ok=True)
        path.write_bytes(before)


def test_an_entry_without_one_of_its_blobs_is_a_miss(between: Path, one: Machine, other: Machine) -> None:
    entry = one.make()
    one.finish()
    (between / "cas" / entry.outputs["o1"].hash).unlink()
    assert other.cache.find(KEY) is None
    assert other.store.lookup(KEY) is None
    assert other.cache.counts.incomplete == 1
    other.make()
    other.finish()
    assert (between / "cas" / entry.outputs["o1"].hash).exists(), "who makes it again mends the remote"


def test_an_entry_moved_to_another_key_is_refused(between: Path, one: Machine, other: Machine) -> None:
    one.make()
    one.finish()
    wanted = key_of({"stage": "codegen", "of": "conv2d"})
    (between / "ac" / wanted).write_bytes((between / "ac" / KEY).read_bytes())
    assert other.cache.find(wanted) is None
    assert other.cache.counts.garbled == 1


def test_a_blob_larger_than_the_disk_is_not_fetched(between: Path, one: Machine, other: Machine) -> None:
    entry = one.make()
    one.finish()
    huge = replace(entry, outputs={"o0": Digest(entry.outputs["o0"].hash, 1 << 60)})
    document = results.to_document(results.Result(huge, huge.to_bytes(KEY)))
    (between / "ac" / KEY).unlink()
    (between / "ac" / KEY).write_bytes(document)
    assert other.cache.find(KEY) is None
    assert "room" in other.said[0]


def test_with_signatures_required_only_signed_entries_come(tmp_path: Path, between: Path, one: Machine) -> None:
    signer, stranger = (trust.signer(path) for path in map(made_key, (tmp_path / "a.pem", tmp_path / "b.pem")))
    unsigned, signed, foreign = (key_of({"i": i}) for i in range(3))
    one.make(unsigned)
    one.finish()
    for key, by in ((signed, signer), (foreign, stranger)):
        machine = Machine(tmp_path / key[:8], between, signer=by)
        machine.make(key)
        machine.finish()
    careful = Machine(tmp_path / "careful", between, trust=trust.trusting([signer.public], required=True))
    assert careful.cache.find(signed) is not None
    assert careful.cache.find(unsigned) is None
    assert careful.cache.find(foreign) is None
    assert careful.cache.counts.unsigned == 2
    assert len(careful.said) == 1
    (between / "ac" / foreign).unlink()
    (between / "ac" / foreign).write_bytes((between / "ac" / signed).read_bytes())
    assert careful.cache.find(foreign) is None, "signed, but for another key"


def made_key(path: Path) -> Path:
    trust.new_key(path)
    return path


def test_a_remote_that_is_away_costs_one_question(tmp_path: Path, between: Path) -> None:
    calls: list[str] = []

    def fault(what: str) -> None:
        calls.append(what)
        away(what)

    machine = Machine(tmp_path / "m", between, fault=fault)
    assert all(machine.cache.find(key_of({"i": i})) is None for i in range(50))
    machine.make()
    machine.finish()
    assert len(calls) == 1
    assert machine.cache.counts.errors == 1
    assert machine.cache.counts.dropped == 1
    assert [said.partition(";")[0] for said in machine.said[:1]] == ["the remote does not answer"]
    assert "doit cache push" in machine.said[-1]


def test_credentials_that_may_only_read_still_read(tmp_path: Path, between: Path, one: Machine) -> None:
    one.make()
    one.finish()

    def fault(what: str) -> None:
        if what.startswith("put"):
            raise RemoteError("the remote wants a password", trouble=Trouble.REFUSED)

    machine = Machine(tmp_path / "m", between, fault=fault)
    machine.make(key_of({"x": 1}), b"mine")
    machine.finish()
    machine.make(key_of({"x": 2}), b"mine too")
    machine.finish()
    assert machine.cache.find(KEY) is not None
    assert sum("password" in said for said in machine.said) == 1


def test_threads_that_ask_at_once_all_get_it(one: Machine, other: Machine) -> None:
    made = {key_of({"i": i}): one.make(key_of({"i": i}), b"%d" % i * 100, b"between") for i in range(20)}
    one.finish()
    found: list[bool] = []

    def ask() -> None:
        found.extend(other.cache.find(key) == entry for key, entry in made.items())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 160


def test_a_closure_cannot_write_outside_of_the_store(tmp_path: Path, one: Machine, other: Machine) -> None:
    victim = tmp_path / "precious"
    victim.write_text("precious")
    key = "../precious"
    entry = ActionEntry("codegen", {}, {"o": one.store.put(b"code")}, 1.0)
    assert other.cache.fetch({key: entry.to_bytes(key), "a\0b": entry.to_bytes("a\0b")}) == 0
    assert victim.read_text() == "precious"


def test_a_closure_that_is_too_large_is_not_even_fetched(
    one: Machine, other: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = one.store.put(closures.Closure(()).to_bytes())
    one.cache.publish(KEY, ActionEntry(closures.STAGE, {}, {"entries": blob}, 0.0))
    one.finish()
    assert closures.ask(other.cache, other.store, KEY) is not None
    monkeypatch.setattr(closures, "_LARGEST", 3)
    assert closures.ask(other.cache, other.store, KEY) is None
