"""The remote behind a store: what comes from it is whole and right, or it is a miss."""

from __future__ import annotations

import random
import threading
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import pytest

from pipeline import closures
from pipeline.closures import Closure
from pipeline.errors import RemoteError, StoreError, Trouble
from pipeline.hashing import Digest, key_of
from pipeline.remotes import bundles, open_remote, results, trust
from pipeline.remotes.bundles import Bundle
from pipeline.remotes.cache import RemoteCache
from pipeline.remotes.contract import Remote
from pipeline.remotes.settings import Policy
from pipeline.store import ActionEntry, Store

KEY = key_of({"stage": "codegen", "of": "matmul"})


class Faulty:
    """A real remote with faults put in its way: `fault` is asked before each call, by the call's name."""

    def __init__(self, remote: Remote, fault: Callable[[str], None]) -> None:
        self._remote = remote
        self._fault = fault
        self.name = remote.name

    def action(self, key: str) -> bytes | None:
        self._fault("action")
        return self._remote.action(key)

    def put_action(self, key: str, document: bytes) -> None:
        self._fault("put_action")
        self._remote.put_action(key, document)

    def blob(self, digest: Digest) -> Iterator[bytes] | None:
        self._fault("blob")
        return self._remote.blob(digest)

    def put_blob(self, digest: Digest, path: Path) -> None:
        self._fault("put_blob")
        self._remote.put_blob(digest, path)

    def missing(self, digests: Collection[Digest]) -> set[Digest]:
        self._fault("missing")
        return self._remote.missing(digests)

    def close(self) -> None:
        self._remote.close()


class Machine:
    """A store of its own behind one shared folder."""

    def __init__(
        self,
        folder: Path,
        shared: Path,
        policy: Policy = Policy.READ_WRITE,
        fault: Callable[[str], None] | None = None,
        **trusting: object,
    ) -> None:
        self.store = Store(folder)
        self.said: list[str] = []
        remote = open_remote(shared.as_uri())
        faulty = Faulty(remote, fault) if fault else remote
        self.cache = RemoteCache(self.store, faulty, policy, self.said.append, **trusting)  # type: ignore[arg-type]

    def make(self, key: str = KEY, *contents: bytes) -> ActionEntry:
        outputs = {f"o{i}": self.store.put(data) for i, data in enumerate(contents or (b"code", b"x" * 5000))}
        entry = ActionEntry("codegen", {"stage": "codegen"}, outputs, 1.0)
        self.store.commit(key, entry)
        self.cache.publish(key, entry)
        return entry

    def finish(self) -> Machine:
        self.cache.finish()
        return self


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    return tmp_path / "shared"


@pytest.fixture
def one(tmp_path: Path, shared: Path) -> Machine:
    return Machine(tmp_path / "one", shared)


@pytest.fixture
def other(tmp_path: Path, shared: Path) -> Machine:
    return Machine(tmp_path / "other", shared)


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


def test_only_what_is_missing_is_sent(one: Machine, other: Machine) -> None:
    one.make(KEY, b"same", b"first")
    one.finish()
    other.make(key_of({"x": 1}), b"same", b"second")
    other.finish()
    assert other.cache.counts.sent == len(b"second")


def test_what_is_here_is_not_fetched(one: Machine, other: Machine) -> None:
    one.make(KEY, b"same", b"first")
    one.finish()
    other.store.put(b"same")
    assert other.cache.find(KEY) is not None
    assert other.cache.counts.received == len(b"first")


def test_many_entries_come_at_once(one: Machine, other: Machine) -> None:
    made = {key_of({"i": i}): one.make(key_of({"i": i}), b"%d" % i, b"shared") for i in range(100)}
    one.finish()
    said = {key: one.cache.signed(key, entry).said for key, entry in made.items()}
    assert other.cache.fetch(said) == 100
    assert all(other.store.lookup(key) == entry for key, entry in made.items())
    assert other.cache.fetch(said) == 0, "all are here"


def test_what_is_expected_is_not_asked_for(tmp_path: Path, shared: Path, one: Machine) -> None:
    entry = one.make()
    one.finish()
    calls: list[str] = []
    other = Machine(tmp_path / "other", shared, fault=calls.append)
    other.cache.expect({KEY: one.cache.signed(KEY, entry).said})
    assert other.cache.find(KEY) == entry
    assert set(calls) == {"blob"}


@pytest.mark.parametrize("policy", list(Policy))
def test_a_policy_is_kept(tmp_path: Path, shared: Path, one: Machine, policy: Policy) -> None:
    one.make()
    one.finish()
    calls: list[str] = []
    other = Machine(tmp_path / "other", shared, policy, calls.append)
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
    tmp_path: Path, shared: Path, one: Machine, how: str
) -> None:
    one.make(KEY, b"code", b"x" * 5000)
    one.make(key_of({"x": 1}), b"others")
    one.finish()
    files = [path for kind in ("ac", "cas") for path in sorted((shared / kind).iterdir())]
    assert len(files) == 5
    for i, path in enumerate(files):
        before = path.read_bytes()
        tampered(path, how, [other for other in files if other is not path])
        machine = Machine(tmp_path / f"m{i}", shared)
        for key in (KEY, key_of({"x": 1})):
            found = machine.cache.find(key)
            assert found == machine.store.lookup(key)
            if found is not None:
                assert found == one.store.lookup(key)
        assert machine.cache.counts.hits == 1, "the other action is as it was"
        path.unlink(missing_ok=True)
        path.write_bytes(before)


def test_an_entry_without_one_of_its_blobs_is_a_miss(shared: Path, one: Machine, other: Machine) -> None:
    entry = one.make()
    one.finish()
    (shared / "cas" / entry.outputs["o1"].hash).unlink()
    assert other.cache.find(KEY) is None
    assert other.store.lookup(KEY) is None
    assert other.cache.counts.incomplete == 1
    other.make()
    other.finish()
    assert (shared / "cas" / entry.outputs["o1"].hash).exists(), "who makes it again mends the remote"


def test_an_entry_moved_to_another_key_is_refused(shared: Path, one: Machine, other: Machine) -> None:
    one.make()
    one.finish()
    wanted = key_of({"stage": "codegen", "of": "conv2d"})
    (shared / "ac" / wanted).write_bytes((shared / "ac" / KEY).read_bytes())
    assert other.cache.find(wanted) is None
    assert other.cache.counts.garbled == 1


def test_a_blob_larger_than_the_disk_is_not_fetched(shared: Path, one: Machine, other: Machine) -> None:
    entry = one.make()
    one.finish()
    huge = replace(entry, outputs={"o0": Digest(entry.outputs["o0"].hash, 1 << 60)})
    document = results.to_document(results.Result(huge, huge.to_bytes(KEY)))
    (shared / "ac" / KEY).unlink()
    (shared / "ac" / KEY).write_bytes(document)
    assert other.cache.find(KEY) is None
    assert "room" in other.said[0]


def test_with_signatures_required_only_signed_entries_come(tmp_path: Path, shared: Path, one: Machine) -> None:
    signer, stranger = (trust.signer(path) for path in map(made_key, (tmp_path / "a.pem", tmp_path / "b.pem")))
    unsigned, signed, foreign = (key_of({"i": i}) for i in range(3))
    one.make(unsigned)
    one.finish()
    for key, by in ((signed, signer), (foreign, stranger)):
        machine = Machine(tmp_path / key[:8], shared, signer=by)
        machine.make(key)
        machine.finish()
    careful = Machine(tmp_path / "careful", shared, trust=trust.trusting([signer.public], required=True))
    assert careful.cache.find(signed) is not None
    assert careful.cache.find(unsigned) is None
    assert careful.cache.find(foreign) is None
    assert careful.cache.counts.unsigned == 2
    assert len(careful.said) == 1
    (shared / "ac" / foreign).unlink()
    (shared / "ac" / foreign).write_bytes((shared / "ac" / signed).read_bytes())
    assert careful.cache.find(foreign) is None, "signed, but for another key"


def made_key(path: Path) -> Path:
    trust.new_key(path)
    return path


def away(what: str) -> None:
    raise RemoteError("the remote does not answer", trouble=Trouble.AWAY)


def test_a_remote_that_is_away_costs_one_question(tmp_path: Path, shared: Path) -> None:
    calls: list[str] = []

    def fault(what: str) -> None:
        calls.append(what)
        away(what)

    machine = Machine(tmp_path / "m", shared, fault=fault)
    assert all(machine.cache.find(key_of({"i": i})) is None for i in range(50))
    machine.make()
    machine.finish()
    assert len(calls) == 1
    assert machine.cache.counts.errors == 1
    assert machine.cache.counts.dropped == 1
    assert [said.partition(";")[0] for said in machine.said[:1]] == ["the remote does not answer"]
    assert "doit cache push" in machine.said[-1]


def test_credentials_that_may_only_read_still_read(tmp_path: Path, shared: Path, one: Machine) -> None:
    one.make()
    one.finish()

    def fault(what: str) -> None:
        if what.startswith("put"):
            raise RemoteError("the remote wants a password", trouble=Trouble.REFUSED)

    machine = Machine(tmp_path / "m", shared, fault=fault)
    machine.make(key_of({"x": 1}), b"mine")
    machine.finish()
    machine.make(key_of({"x": 2}), b"mine too")
    machine.finish()
    assert machine.cache.find(KEY) is not None
    assert sum("password" in said for said in machine.said) == 1


def test_blobs_are_there_before_the_entry_that_names_them(tmp_path: Path, shared: Path) -> None:
    calls: list[str] = []
    machine = Machine(tmp_path / "m", shared, fault=calls.append)
    machine.make()
    machine.finish()
    assert calls.index("put_action") > max(i for i, call in enumerate(calls) if call == "put_blob")

    def no_blobs(what: str) -> None:
        if what == "put_blob":
            away(what)

    other = Machine(tmp_path / "n", shared, fault=no_blobs)
    other.make(key_of({"x": 1}), b"never sent")
    other.finish()
    assert not (shared / "ac" / key_of({"x": 1})).exists()


def test_threads_that_ask_at_once_all_get_it(one: Machine, other: Machine) -> None:
    made = {key_of({"i": i}): one.make(key_of({"i": i}), b"%d" % i * 100, b"shared") for i in range(20)}
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


def test_closing_drops_what_was_not_sent(tmp_path: Path, shared: Path) -> None:
    stop = threading.Event()
    machine = Machine(tmp_path / "m", shared, fault=lambda what: stop.wait(10) and None)
    machine.make()
    machine.cache.close()
    stop.set()
    machine.cache.close()


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


def test_what_cannot_be_sent_does_not_keep_the_rest_from_being_sent(one: Machine, other: Machine) -> None:
    blob = one.store.put(b"code")
    one.cache.publish(key_of({"x": 1}), ActionEntry("codegen", {}, {"\ud800": blob}, 1.0))
    one.finish()
    assert any("cannot be sent" in said for said in one.said)
    entry = one.make()
    one.finish()
    assert other.cache.find(KEY) == entry


def test_one_that_is_closed_says_nothing_more(tmp_path: Path, shared: Path) -> None:
    asked, stop = threading.Event(), threading.Event()

    def fault(what: str) -> None:
        asked.set()
        stop.wait(10)
        away(what)

    machine = Machine(tmp_path / "m", shared, fault=fault)
    machine.make()
    assert asked.wait(10)
    machine.cache.close()
    stop.set()
    machine.finish()
    assert not machine.said


# what cannot be sent


def _unmade() -> ActionEntry:
    raise ValueError("it cannot be made")


def _unstored() -> ActionEntry:
    raise StoreError("there is no room")


@pytest.mark.parametrize("how", ["made", "stored", "sent"])
def test_one_of_a_batch_that_cannot_be_sent_drops_no_other(tmp_path: Path, shared: Path, how: str) -> None:
    go = threading.Event()
    one = Machine(tmp_path / "one", shared, fault=lambda what: go.wait(10) and None)
    made = {KEY: one.make()}  # whoever sends waits with it until the others stand in line
    for i in range(20):
        if i == 7:
            unsent = ActionEntry("codegen", {}, {"\ud800": one.store.put(b"code")}, 1.0)
            one.cache.publish(key_of({"bad": i}), {"made": _unmade, "stored": _unstored, "sent": unsent}[how])
        key = key_of({"i": i})
        made[key] = one.make(key, b"%d" % i)
    go.set()
    one.finish()
    assert one.cache.counts.dropped == 1
    assert one.cache.counts.published == len(made) == 21
    assert sum("cannot be sent" in said for said in one.said) == (how != "stored"), "the store told of it already"
    other = Machine(tmp_path / "other", shared)
    assert all(other.cache.find(key) == entry for key, entry in made.items())


def test_what_is_yet_to_be_made_is_made_when_it_is_sent(one: Machine, other: Machine) -> None:
    entry = ActionEntry("codegen", {}, {"o": one.store.put(b"code")}, 1.0)
    makers: list[str] = []

    def make() -> ActionEntry:
        makers.append(threading.current_thread().name)
        return entry

    one.cache.publish(KEY, make)
    one.finish()
    assert makers == ["remote-sender"]
    assert other.cache.find(KEY) == entry


# bundles


@dataclass
class Told:
    """What one machine tells others of what it made."""

    entries: Mapping[str, ActionEntry]
    closure: Closure

    @property
    def bundles(self) -> tuple[Bundle, ...]:
        return self.closure.bundles

    @property
    def blobs(self) -> set[Digest]:
        return {digest for entry in self.entries.values() for digest in entry.outputs.values()}


CLOSURE = key_of({"closure": "of all"})


def told(machine: Machine, entries: int = 20, blobs: int = 20) -> Told:
    """Has a remote hold entries, each with so many blobs, and bundles of them."""
    chance = random.Random(1)
    made = {}
    for i in range(entries):
        outputs = {f"o{j}": machine.store.put(chance.randbytes(300)) for j in range(blobs)}
        made[key_of({"i": i})] = ActionEntry("codegen", {"number": i}, outputs, 1.0)
    for key, entry in made.items():
        machine.cache.publish(key, entry)
    found = {key: (f"native:operator-{i}", entry) for i, (key, entry) in enumerate(made.items())}
    closures.publish(machine.cache, machine.store, found, [CLOSURE])
    machine.finish()
    closure = closures.ask(machine.cache, machine.store, CLOSURE)
    assert closure is not None
    assert closure.bundles
    return Told(made, closure)


def brought(machine: Machine, what: Told) -> int:
    """How many entries come to a machine that was told of them; all that do are whole and right."""
    machine.cache.expect(what.closure.said, what.bundles)
    came = machine.cache.fetch(what.closure.said)
    for key in what.entries:
        assert machine.store.lookup(key) in (None, what.entries[key])
    return came


@pytest.fixture
def small_bundles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bundles of eight blobs in the mean, so that there are many."""
    monkeypatch.setattr(bundles, "_ENDS", 32)


def test_many_small_blobs_come_in_few_calls(tmp_path: Path, shared: Path, one: Machine) -> None:
    what = told(one)
    calls: list[str] = []
    other = Machine(tmp_path / "other", shared, fault=calls.append)
    assert brought(other, what) == 20
    assert len(what.blobs) == 400
    assert calls.count("blob") <= len(what.bundles) + 2 <= 20, "what stands alone is no bundle"
    assert "action" not in calls
    assert other.cache.counts.received == 400 * 300
    assert not other.cache.counts.garbled + other.cache.counts.errors + other.cache.counts.incomplete


def test_entries_that_are_asked_for_one_by_one_bring_their_bundles(tmp_path: Path, shared: Path, one: Machine) -> None:
    what = told(one)
    calls: list[str] = []
    other = Machine(tmp_path / "other", shared, fault=calls.append)
    other.cache.expect(what.closure.said, what.bundles)
    assert not calls, "a bundle stays there until somebody wants what lies in it"
    assert all(other.cache.find(key) == entry for key, entry in what.entries.items())
    assert len(calls) <= len(what.bundles) + 2


def damaged(path: Path, how: str, what: Told, bundle: Bundle, store: Store) -> None:
    blobs = [store.get(digest) or b"" for digest in bundle.members]
    path.chmod(0o644)
    others = [each for each in what.bundles if each is not bundle]
    contents = {
        "garbled": b"\0" * bundle.blob.size,
        "html": b"<html><body>please log in</body></html>",
        "truncated": path.read_bytes()[: bundle.blob.size // 2],
        "empty": b"",
        "bomb": zlib.compress(bytes(1 << 20)),
        "huge": bytes(20 << 20),
        "one wrong member": bundles.pack([*blobs[:-1], bytes(len(blobs[-1]))]),
        "first wrong member": bundles.pack([bytes(len(blobs[0])), *blobs[1:]]),
        "in another order": bundles.pack(reversed(blobs)),
        "swapped": bundles.pack(store.get(digest) or b"" for digest in others[0].members),
    }
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(contents[how])


DAMAGES = ["gone", "garbled", "html", "truncated", "empty", "bomb", "huge", "swapped", "in another order"]


@pytest.mark.usefixtures("small_bundles")
@pytest.mark.parametrize("how", [*DAMAGES, "one wrong member", "first wrong member"])
def test_bundles_that_are_wrong_cost_the_questions_that_they_would_have_saved(
    tmp_path: Path, shared: Path, one: Machine, how: str
) -> None:
    what = told(one)
    assert len(what.bundles) > 16, "more than wrong answers in a row after which a remote is left alone"
    for bundle in what.bundles:
        damaged(shared / "cas" / bundle.blob.hash, how, what, bundle, one.store)
    calls: list[str] = []
    other = Machine(tmp_path / "other", shared, fault=calls.append)
    assert brought(other, what) == 20
    assert other.cache.counts.garbled == (0 if how == "gone" else len(what.bundles))
    assert other.cache.counts.received == 400 * 300
    assert calls.count("blob") <= len(what.bundles) + 400, "each bundle is tried once"
    assert not other.said
    assert not list((other.store.root / "quarantine").iterdir())


@pytest.mark.usefixtures("small_bundles")
def test_one_bundle_that_is_wrong_keeps_no_other_from_being_used(tmp_path: Path, shared: Path, one: Machine) -> None:
    what = told(one)
    (shared / "cas" / what.bundles[3].blob.hash).unlink()
    calls: list[str] = []
    other = Machine(tmp_path / "other", shared, fault=calls.append)
    assert brought(other, what) == 20
    alone = 400 - sum(len(bundle.members) for bundle in what.bundles)
    assert calls.count("blob") == len(what.bundles) + alone + len(what.bundles[3].members)


def test_a_bundle_whose_blobs_are_mostly_here_is_not_fetched(tmp_path: Path, shared: Path, one: Machine) -> None:
    what = told(one)
    largest = max(what.bundles, key=lambda bundle: len(bundle.members))
    lacking = largest.members[:: len(largest.members) // 3][:3]
    seen: list[Digest] = []
    other = Machine(tmp_path / "other", shared)
    real = other.cache.remote.blob
    other.cache.remote.blob = lambda digest: seen.append(digest) or real(digest)  # type: ignore[method-assign]
    for digest in what.blobs.difference(lacking):
        other.store.put(one.store.get(digest) or b"")
    assert brought(other, what) == 20
    assert sorted(seen) == sorted(lacking)


def test_threads_that_want_what_lies_in_one_bundle_fetch_it_once(tmp_path: Path, shared: Path, one: Machine) -> None:
    what = told(one)
    bundle = max(what.bundles, key=lambda bundle: len(bundle.members))
    calls: list[str] = []

    def slowly(call: str) -> None:
        calls.append(call)
        time.sleep(0.2)

    other = Machine(tmp_path / "other", shared, fault=slowly)
    other.cache.expect({}, what.bundles)
    wanted = bundle.members[:10]
    begun, came = threading.Barrier(len(wanted)), []

    def ask(digest: Digest, number: int) -> None:
        begun.wait()
        time.sleep(0.01 * number)  # the first is under way when the others ask
        came.append(other.cache.blobs([digest]))

    threads = [threading.Thread(target=ask, args=each) for each in zip(wanted, count())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert came == [True] * 10
    assert calls == ["blob"]


@pytest.mark.parametrize("how", ["a member elsewhere", "a member of no size", "too large", "elsewhere"])
def test_bundles_that_may_not_be_asked_for_are_passed_over(
    tmp_path: Path, shared: Path, one: Machine, how: str
) -> None:
    what = told(one)
    victim = tmp_path / "precious"
    victim.write_text("precious")
    evil = {
        "a member elsewhere": lambda each: Bundle(each.blob, (*each.members, Digest("../../../precious", 8))),
        "a member of no size": lambda each: Bundle(each.blob, (*each.members, Digest(each.blob.hash, -1))),
        "too large": lambda each: Bundle(Digest(each.blob.hash, 1 << 40), each.members),
        "elsewhere": lambda each: Bundle(Digest("../precious", 8), each.members),
    }[how]
    calls: list[str] = []
    other = Machine(tmp_path / "other", shared, fault=calls.append)
    other.cache.expect({}, map(evil, what.bundles))
    assert other.cache.fetch(what.closure.said) == 20
    assert len(calls) == 400, "blob by blob"
    assert victim.read_text() == "precious"


def test_a_bundle_without_an_end_is_not_read_to_it(tmp_path: Path, shared: Path, one: Machine) -> None:
    what = told(one)
    names = {bundle.blob: bundle for bundle in what.bundles}
    read: list[int] = []

    def endless() -> Iterator[bytes]:
        while True:
            read.append(1000)
            assert sum(read) < 10 << 20
            yield bytes(1000)

    other = Machine(tmp_path / "other", shared)
    real = other.cache.remote.blob
    other.cache.remote.blob = lambda each: endless() if each in names else real(each)  # type: ignore[method-assign]
    assert brought(other, what) == 20
    assert sum(read) <= sum(digest.size + 1000 for digest in names)


def test_a_bundle_gives_nothing_that_was_not_asked_for_by_digest(tmp_path: Path, shared: Path, one: Machine) -> None:
    """One of another's making, of blobs of their own beside one that is wanted."""
    entry = one.make(KEY, b"code", b"more code")
    one.finish()
    evil = b"evil code"
    wanted, alien = entry.outputs["o0"], Digest.of(evil)
    packed = bundles.pack([evil, evil[:4]])
    (shared / "cas" / Digest.of(packed).hash).write_bytes(packed)
    other = Machine(tmp_path / "other", shared)
    other.cache.expect({}, [Bundle(Digest.of(packed), (alien, wanted))])
    assert other.cache.find(KEY) == entry
    assert other.store.get(wanted) == b"code"
    assert other.cache.counts.garbled == 1


def test_a_remote_that_goes_away_in_the_middle_of_bundles_is_waited_for_once(
    tmp_path: Path, shared: Path, one: Machine
) -> None:
    what = told(one)
    other = Machine(tmp_path / "other", shared, fault=away)
    assert brought(other, what) == 0
    assert len(other.said) == 1
    assert "going on without it" in other.said[0]


@pytest.mark.usefixtures("small_bundles")
def test_wrong_blobs_among_many_that_are_right_do_not_close_a_remote(
    tmp_path: Path, shared: Path, one: Machine
) -> None:
    """Not eight in a row."""
    what = told(one)
    for bundle in what.bundles:
        (shared / "cas" / bundle.blob.hash).unlink()
    wrong = {entry.outputs["o0"] for entry in list(what.entries.values())[:12]}
    for digest in wrong:
        path = shared / "cas" / digest.hash
        path.unlink()
        path.write_bytes(b"wrong")
    other = Machine(tmp_path / "other", shared)
    assert brought(other, what) == 8
    assert other.cache.counts.garbled == 12
    assert not other.said
